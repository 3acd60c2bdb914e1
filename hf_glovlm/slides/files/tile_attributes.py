"""Tile attributes: scale, size, overlap and encoder of a bag's tiles, whoever wrote them.

Each tool states them by names of its own. `glovlm slide`: `tile_mpp`, `tile_size` in pixels,
`overlap_fraction`, `fingerprint`. TRIDENT: `target_magnification`, `patch_size` and `overlap` in
pixels of that magnification, `patch_size_level0`, `encoder`. STAMP: `tile_size_um` (or `tile_size`
with the `unit` um), `tile_size_px`, `extractor`, and coordinates in micrometres. CLAM: `patch_size`
in pixels of a level, its `downsample`, and no micrometres. A name counts on the file or on any of
its datasets, and a value whether it is a number, text with a unit, bytes or an array of one.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...tables import spelling

TOLERANCE = 0.05  # of a scale or size: what two scanners, or rounding, make of the same
# A magnification names a range: 40x is .2 to .3 micrometres per pixel, 20x twice that.
NOMINAL_TOLERANCE = 0.25
OVERLAP_TOLERANCE = 0.02  # in fractions of a tile's side
MPP_RANGE = (0.01, 100.0)  # micrometres per pixel that a tile can have; else it is not stated
MPP_OF_1X = 10.0  # micrometres per pixel, by the convention that 20x is .5
DEFAULT_ENGINE = {"precision": "fp32", "runtime": "torch"}  # of a bag that states none

_SEVERAL = "several"  # precisions of training slides whose mixture was accepted
_TILE_MPP = ("tile_mpp", "patch_mpp", "target_mpp")
_LEVEL0_MPP = ("slide_mpp", "level0_mpp", "mpp")
_MAGNIFICATION = ("target_magnification", "target_mag", "magnification")
_SIDE_PX = ("tile_size_px", "patch_size_px")
_SIDE_UM = ("tile_size_um", "patch_size_um")
_SIDE = ("tile_size", "patch_size")  # in pixels, unless a unit says otherwise
_ENCODER = ("encoder", "extractor", "patch_encoder", "enc_name", "feature_extractor", "model_name")
_NUMBER = re.compile(r"\s*([-+]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:e[-+]?\d+)?)\s*([^\d\s/]*)", re.I)
_MICROMETRES = {
    "um": 1.0, "\N{GREEK SMALL LETTER MU}m": 1.0, "micron": 1.0, "microns": 1.0,
    "micrometre": 1.0, "micrometres": 1.0, "micrometer": 1.0, "micrometers": 1.0,
    "nm": 1e-3, "mm": 1e3,
}  # fmt: skip


@dataclass(frozen=True)
class TileAttributes:
    """Tile attributes of one bag; `None` is not stated.

    Attributes:
        mpp: Micrometres per pixel of the tiles.
        magnification: Nominal, where no micrometres are stated.
        downsample: Of level 0, where nothing else is said of the scale.
        side: Of a tile in pixels.
        side_um: Of a tile in micrometres.
        overlap: The part of its side that a tile shares with the next.
        fingerprint: Of the encoder, in bags of ours.
        encoder: Its name.
        engine: What computed it, `runtime precision`, in bags of ours.
        in_micrometres: Whether coordinates are micrometres rather than pixels of level 0.
    """

    mpp: float | None = None
    magnification: float | None = None
    downsample: float | None = None
    side: float | None = None
    side_um: float | None = None
    overlap: float | None = None
    fingerprint: str | None = None
    encoder: str | None = None
    engine: str | None = None
    in_micrometres: bool = False

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> "TileAttributes":
        """Read the attributes of a bag, or what `to_dict` gave."""
        given = {str(name).casefold(): value for name, value in attributes.items()}
        unit = _text(given.get("unit"))
        in_um = unit is not None and _unit(unit) in _MICROMETRES
        side = _first(given, _SIDE_PX, _plain_number)
        side_um = _first(given, _SIDE_UM, _micrometres)
        for name in _SIDE:
            number, stated = _number(given.get(name)) or (None, "")
            if number is None:
                continue
            if in_um or stated in _MICROMETRES:
                side_um = side_um or number * _MICROMETRES.get(stated, 1.0)
            else:
                side = side or number
        shrunk = _shrunk(given)
        mpp = _sane(_first(given, _TILE_MPP, _micrometres))
        if mpp is None and side and side_um:
            mpp = _sane(side_um / side)
        if mpp is None:
            level0 = _first(given, _LEVEL0_MPP, _micrometres)
            mpp = level0 and _sane(level0 * (shrunk or 1.0))
        magnification = _first(given, _MAGNIFICATION, _plain_number)
        if magnification is None and shrunk:
            level0 = _first(given, ("level0_magnification",), _plain_number)
            magnification = level0 and level0 / shrunk
        magnification = magnification and _sane(MPP_OF_1X / magnification) and magnification
        if mpp is not None:
            side_um = side_um or (side and side * mpp)
        known = mpp is not None or magnification is not None
        return cls(
            mpp=mpp,
            magnification=None if mpp is not None else magnification,
            downsample=None if known else _first(given, ("downsample",), _plain_number),
            side=side,
            side_um=side_um,
            overlap=_overlap(given),
            fingerprint=_text(given.get("fingerprint")),
            engine=_engine(given),
            encoder=next(filter(None, (_text(given.get(name)) for name in _ENCODER)), None),
            in_micrometres=in_um or any(name in given for name in _SIDE_UM),
        )

    def to_dict(self) -> dict[str, Any]:
        """What is known, by the names of our bags."""
        values = {
            "fingerprint": self.fingerprint,
            "encoder": self.encoder,
            **_stated_engine(self),
            "tile_mpp": self.mpp,
            "target_magnification": self.magnification,
            "downsample": self.downsample,
            "tile_size": self.side,
            "tile_size_um": None if self.side and _scale(self) else self.side_um,
            "overlap_fraction": self.overlap,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Quantity:
    """One thing that tiles of one kind share.

    `read` gives `(kind, value)`, or `None` where it is not stated; `same` compares two of them.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[TileAttributes], tuple[str, float] | None]
    same: Callable[[tuple[str, float], tuple[str, float]], bool]
    describe: Callable[[tuple[str, float]], str]


def _scale(tiles: TileAttributes) -> tuple[str, float] | None:
    if tiles.mpp is not None:
        return "measured", tiles.mpp
    if tiles.magnification is not None:
        return "nominal", MPP_OF_1X / tiles.magnification
    return None if tiles.downsample is None else ("relative", tiles.downsample)


def _same_scale(one: tuple[str, float], other: tuple[str, float]) -> bool:
    kinds = {one[0], other[0]}
    if "relative" in kinds and len(kinds) > 1:
        return True  # nothing that could be compared
    tolerance = TOLERANCE if len(kinds) == 1 else NOMINAL_TOLERANCE
    return math.isclose(one[1], other[1], rel_tol=tolerance)


def _describe_scale(value: tuple[str, float]) -> str:
    if value[0] == "measured":
        return f"{value[1]:.4g} micrometres per pixel"
    if value[0] == "nominal":
        return f"{MPP_OF_1X / value[1]:.4g}x"
    return f"level 0 shrunk {value[1]:.4g} times"


def _length(
    name: str, unit: str, attribute: str, same: Callable[[float, float], bool], times: float = 1
) -> _Quantity:
    def read(tiles: TileAttributes) -> tuple[str, float] | None:
        value = getattr(tiles, attribute)
        return None if value is None else (unit, value)

    return _Quantity(
        name,
        (attribute,),
        read,
        lambda one, other: same(one[1], other[1]),
        lambda value: f"{value[1] * times:.4g}{unit}",
    )


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE)


QUANTITIES = (
    _Quantity(
        "scale", ("mpp", "magnification", "downsample"), _scale, _same_scale, _describe_scale
    ),
    _length("tile size", " pixels", "side", _close),
    _length("tile size", " micrometres", "side_um", _close),
    _length("overlap", "%", "overlap", lambda a, b: abs(a - b) <= OVERLAP_TOLERANCE, 100),
)


def find_differences(names: Sequence[str], tiles: Sequence[TileAttributes]) -> list[str]:
    """In what the tiles of several bags differ, with two bags and their values: empty is nothing.

    Also in what computed their features, as numbers of bf16 or int8 are a little off those of fp32.

    Args:
        names: Of the bags.
        tiles: Their attributes.
    """
    differences: list[str] = []
    for quantity in QUANTITIES:
        pair = _differing(quantity, tiles)
        follows = quantity.fields == ("side_um",) and differences  # from what was named already
        if pair is not None and not follows:
            one, other = (f"{names[i]} has {quantity.describe(value)}" for i, value in pair)
            differences.append(f"{quantity.name}: {one}, {other}")
    engines = {one.engine: i for i, one in reversed(list(enumerate(tiles))) if one.engine}
    if len(engines) > 1:
        one, other = (f"{names[i]} has {tiles[i].engine}" for i in sorted(engines.values())[:2])
        differences.append(f"runtime and precision: {one}, {other}")
    return differences


def other_encoder(tiles: Sequence[TileAttributes]) -> tuple[int, int] | None:
    """Two bags that different models encoded, as far as they say; `None` where there are none.

    Models are known by their fingerprints, else by their names in any spelling.
    """
    for keys in (
        [one.fingerprint for one in tiles],
        [one.encoder and spelling(one.encoder) for one in tiles],
    ):
        known = {key: i for i, key in reversed(list(enumerate(keys))) if key}
        if len(known) > 1:
            first, second = sorted(known.values())[:2]
            both = tiles[first].fingerprint, tiles[second].fingerprint
            if None in both or both[0] != both[1]:
                return first, second
    return None


def shared_attributes(tiles: Sequence[TileAttributes]) -> TileAttributes:
    """What all bags agree on, as far as they state it."""
    values: dict[str, Any] = {}
    for quantity in QUANTITIES:
        if _differing(quantity, tiles) is not None:
            continue
        best = next((one for one in tiles if one.mpp), None) if quantity.name == "scale" else None
        for one in filter(None, (best, *tiles)):
            if quantity.read(one) is not None:
                values |= {name: getattr(one, name) for name in quantity.fields}
                break
    if values.get("mpp") and values.get("side"):
        values["side_um"] = values["mpp"] * values["side"]
    engines = {one.engine for one in tiles if one.engine}
    values["engine"] = engines.pop() if len(engines) == 1 else None
    for name in ("fingerprint", "encoder"):
        values[name] = next(filter(None, (getattr(one, name) for one in tiles)), None)
    return TileAttributes(**values)


def unknown_note(tiles: Sequence[TileAttributes]) -> str | None:
    """Sentence on how many bags do not state what was to be compared; `None` where all do."""
    n = len(tiles)
    missing = {
        "scale": sum(_scale(one) is None for one in tiles),
        "tile size": sum(one.side is None and one.side_um is None for one in tiles),
        "overlap": sum(one.overlap is None for one in tiles),
        "encoder": sum(one.fingerprint is None and one.encoder is None for one in tiles),
    }
    if missing["overlap"] == n:
        missing["overlap"] = 0  # many tools never state it
    parts = [f"the {name} of {count}" for name, count in missing.items() if count]
    if not parts:
        return None
    return f"Not stated, and so not compared: {', '.join(parts)} of {n} slides."


def _differing(
    quantity: _Quantity, tiles: Sequence[TileAttributes]
) -> list[tuple[int, tuple[str, float]]] | None:
    """Two bags, by number, whose values are not the same; the least and greatest decide."""
    known = [(i, value) for i, one in enumerate(tiles) if (value := quantity.read(one))]
    ends: list[tuple[int, tuple[str, float]]] = []
    for kind in dict.fromkeys(value[0] for _, value in known):
        of = [pair for pair in known if pair[1][0] == kind]
        ends += [min(of, key=lambda pair: pair[1][1]), max(of, key=lambda pair: pair[1][1])]
    for a, one in enumerate(ends):
        for other in ends[a + 1 :]:
            if not quantity.same(one[1], other[1]):
                return sorted((one, other))
    return None


# ------------------------------------------------------------------------------ odd values


def _engine(given: Mapping[str, Any]) -> str | None:
    """Runtime and precision of a bag of ours, which states only what is not the default."""
    about = {name: _text(given.get(name)) or usual for name, usual in DEFAULT_ENGINE.items()}
    if _text(given.get("fingerprint")) is None or about["precision"] == _SEVERAL:
        return None
    return f"{about['runtime']} {about['precision']}"


def _stated_engine(tiles: TileAttributes) -> dict[str, str]:
    """Runtime and precision by the names of our bags, where they are not the default."""
    if tiles.engine is None:
        return {} if tiles.fingerprint is None else {"precision": _SEVERAL}
    runtime, precision = tiles.engine.split(" ", 1)
    about = {"precision": precision, "runtime": runtime}
    return {} if about == DEFAULT_ENGINE else about


def _number(value: Any, least: float = 0.0) -> tuple[float, str] | None:
    """A finite number above `least`, and its unit in one spelling; `None` where there is none."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):  # of an axis each
        parts = [_number(part, least) for part in value]
        first = parts[0] if parts else None
        same = first and all(part and _close(part[0], first[0]) for part in parts)
        return first if same else None
    if isinstance(value, str):
        match = _NUMBER.match(value)
        if match is None:
            return None
        number, unit = float(match[1].replace(",", ".")), _unit(match[2])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number, unit = float(value), ""
        except OverflowError:
            return None
    else:
        return None
    return (number, unit) if math.isfinite(number) and number > least else None


def _plain_number(value: Any) -> float | None:
    number = _number(value)
    return number and number[0]


def _micrometres(value: Any) -> float | None:
    number = _number(value)
    return number and number[0] * _MICROMETRES.get(number[1], 1.0)


def _sane(mpp: float | None) -> float | None:
    """A scale that tiles can have."""
    return mpp if mpp is not None and MPP_RANGE[0] <= mpp <= MPP_RANGE[1] else None


def _unit(text: str) -> str:
    """A unit in one spelling: the micro sign and the Greek letter are one."""
    return unicodedata.normalize("NFKC", text).strip().casefold().split("/")[0]


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, list | tuple) and len(value) == 1:
        return _text(value[0])
    text = value.strip() if isinstance(value, str) else ""
    return None if text.casefold() in ("", "none", "unknown", "null") else text


def _first(
    given: Mapping[str, Any], names: Sequence[str], read: Callable[[Any], float | None]
) -> float | None:
    return next(filter(None, (read(given[name]) for name in names if name in given)), None)


def _shrunk(given: Mapping[str, Any]) -> float | None:
    """Pixels of level 0 per pixel of a tile, where it is stated."""
    whole = _first(given, ("patch_size_level0",), _plain_number)
    side = _first(given, ("patch_size",), _plain_number)
    if whole and side:
        return whole / side
    return _first(given, ("downsample",), _plain_number)


def _overlap(given: Mapping[str, Any]) -> float | None:
    """Overlap as a fraction; 0 is a value."""
    stated = _number(given.get("overlap_fraction"), -1e-9)
    if stated is not None:
        return stated[0] / 100 if stated[1] == "%" else stated[0]
    pixels, side = _number(given.get("overlap"), -1e-9), _number(given.get("patch_size"))
    step = _number(given.get("step_size"))
    if pixels is not None and pixels[1] == "%":
        return pixels[0] / 100
    if side is None:
        return None
    if pixels is not None:
        return pixels[0] / side[0]
    return None if step is None else max(1 - step[0] / side[0], 0.0)
