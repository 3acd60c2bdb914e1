"""Masks: objects as blobs of one colour, or of one number, in an image of the slide's shape."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps
from scipy import ndimage
from scipy.spatial import ConvexHull

from ...data.folder import open_image
from ...errors import GloVLMError

_COLOURS = {"red": "#f00", "green": "#0f0", "blue": "#00f", "yellow": "#ff0", "cyan": "#0ff"}
_BACKGROUND = ("black", "white")  # unless they are named
_VALUES = (0, 255)  # the same in a mask of numbers
_SOLID = 0.9  # area over convex hull below which a blob of a mask looks like two that touch
_STRANGE = 0.001  # share of pixels whose colour is neither a class nor background
_FEW_VALUES = 16  # numbers below it look black: a mask of them is read by value


@dataclass(frozen=True)
class Blob:
    """Connected component of a mask.

    Attributes:
        label: Its class.
        bounds: `(x0, y0, x1, y1)` in pixels of level 0.
        flags: `partial` (touches the edge), `merged` (looks like two that touch).
        pixels: Bool: its pixels, and no others', in the box around it.
        corner: Column and row of that box in the mask.
        scale: Pixels of level 0 per pixel of the mask.
    """

    label: str
    bounds: tuple[float, float, float, float]
    flags: tuple[str, ...]
    pixels: NDArray[np.bool_] = field(repr=False, compare=False)
    corner: tuple[int, int]
    scale: float

    def fill(self, x0: float, y0: float, scale: float, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Pixels `[height, width]` whose middle lies in the blob, as `shapes.fill` gives them."""
        there, places = [], []
        for start, first, length, n in zip(
            (x0, y0), self.corner, self.pixels.shape[::-1], size, strict=True
        ):
            middles = start + (np.arange(n) + 0.5) / scale
            place = np.floor(middles / self.scale).astype(np.int64) - first
            there.append((place >= 0) & (place < length))
            places.append(place[there[-1]])
        inside = np.zeros((size[1], size[0]), bool)
        inside[np.ix_(there[1], there[0])] = self.pixels[np.ix_(places[1], places[0])]
        return inside


@dataclass(frozen=True)
class Mask:
    """Objects of a mask.

    Attributes:
        blobs: From top to bottom.
        specks: Number of blobs that were too small to be an object.
        colours: Pixels of each colour or number that the mask holds, the most frequent first; of
            many the first ten.
        hint: What to do where there are no blobs; empty where nothing is known.
    """

    blobs: list[Blob]
    specks: int = 0
    colours: dict[str, int] = field(default_factory=dict)
    hint: str = ""

    def describe_colours(self) -> str:
        """`#000000 (59,000 pixels), #00ff00 (12 pixels)`."""
        return ", ".join(f"{name} ({n:,} pixels)" for name, n in self.colours.items())


def parse_colours(text: str) -> dict[str, str]:
    """`green=non_sclerosed,red=sclerosed` -> the class by colour, as a command line has it.

    Raises:
        GloVLMError: Not of that form, a colour that does not exist or stands there twice, or
            colours beside numbers.
    """
    colours: dict[str, str] = {}
    for part in text.split(","):
        colour, equals, label = (piece.strip() for piece in part.partition("="))
        if not (colour and equals and label) or colour in colours:
            raise GloVLMError(
                "Expected colours as 'green=CLASS,red=CLASS', or numbers as '1=CLASS,2=CLASS', "
                f"each once, found '{text}'."
            )
        colours[colour] = label
    if not _are_values(colours):
        alike: dict[tuple[int, int, int], str] = {}
        for colour in colours:
            other = alike.setdefault(_rgb(colour), colour)
            if other != colour:
                raise GloVLMError(f"'{other}' and '{colour}' are one colour: name it once.")
    return colours


def read_mask(
    path: Path, size: tuple[int, int], colours: Mapping[str, str], *, min_extent: int
) -> Mask:
    """Read the objects of a mask: connected components of one class; touching pixels share a side.

    Args:
        path: An image of the slide's shape, at any scale.
        size: Width and height of level 0.
        colours: The class by colour (`red`, `#00ff00`), or by number (`1`) where the mask holds
            numbers (grey values, or places in a palette). A colour that is named is a class;
            black and white, 0 and 255, are background where they are not named.
        min_extent: Blobs whose longer side has fewer of its pixels are specks.

    Raises:
        GloVLMError: An image that cannot be read or has another shape, or a colour or number that
            is neither named nor background in more than one of a thousand pixels.
    """
    picture = open_image(path)
    width, height = picture.size
    scale = size[0] / width
    if abs(scale * height - size[1]) > max(scale, 1):
        raise GloVLMError(
            f"{path} has {width} x {height} pixels and the slide {size[0]} x {size[1]}; expected "
            "the same shape."
        )
    labels = list(dict.fromkeys(colours.values()))
    by_value = _are_values(colours)
    classify = _classify_values if by_value else _classify_colours
    classes, seen = classify(path, np.asarray(picture), colours, labels)
    blobs: list[Blob] = []
    specks = 0
    for label, rows, columns, blob in _components(classes, labels):
        if max(blob.shape) < min_extent:
            specks += 1
            continue
        y, x = (rows.start, rows.stop), (columns.start, columns.stop)
        flags = ["partial"] if min(x[0], y[0]) == 0 or x[1] == width or y[1] == height else []
        flags += ["merged"] if _solidity(blob) < _SOLID else []
        bounds = (x[0] * scale, y[0] * scale, x[1] * scale, y[1] * scale)
        blobs.append(Blob(label, bounds, tuple(flags), blob, (x[0], y[0]), scale))
    blobs.sort(key=lambda blob: (blob.bounds[1], blob.bounds[0]))
    hint = ""
    if specks and not blobs:
        hint = f"{specks} blobs are smaller than --min-extent {min_extent}"
    elif not by_value and not blobs and _holds_numbers(path):
        hint = "it holds small numbers: give --colours 1=CLASS,2=CLASS"
    return Mask(blobs, specks, seen, hint)


def _are_values(colours: Mapping[str, str]) -> bool:
    """Whether classes are given by number; refuses numbers beside colours."""
    numbers = [colour for colour in colours if colour.isdecimal()]
    if numbers and len(numbers) < len(colours):
        raise GloVLMError(
            f"Expected colours or numbers, found both ({', '.join(colours)}): a mask holds one."
        )
    return bool(numbers)


def _components(
    classes: NDArray[np.uint8], labels: list[str]
) -> Iterator[tuple[str, slice, slice, NDArray[np.bool_]]]:
    """Class, place and pixels of every connected component."""
    for k, label in enumerate(labels, start=1):
        blobs, _ = ndimage.label(classes == k)
        for i, (rows, columns) in enumerate(ndimage.find_objects(blobs), start=1):
            yield label, rows, columns, blobs[rows, columns] == i


def _classify_colours(
    path: Path, pixels: NDArray[np.uint8], colours: Mapping[str, str], labels: list[str]
) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Class mask `[height, width]` by the nearest colour, 0 is background; and the colours."""
    named = {_rgb(name): labels.index(label) + 1 for name, label in colours.items()}
    anchors = {_rgb(name): 0 for name in _BACKGROUND} | named
    packed = (pixels.astype(np.uint32) << np.array([16, 8, 0], dtype=np.uint32)).sum(
        axis=-1, dtype=np.uint32
    )
    counts = np.bincount(packed.ravel(), minlength=1 << 24)
    seen = np.flatnonzero(counts)
    rgb = np.stack([seen >> 16 & 255, seen >> 8 & 255, seen & 255], axis=1).astype(np.float32)
    distance = np.stack(
        [np.linalg.norm(rgb - np.array(anchor, dtype=np.float32), axis=1) for anchor in anchors]
    )
    strange = distance.min(axis=0) > 128  # further than half-way from black to a full colour
    _refuse_strange(path, counts[seen], strange, colours, lambda i: f"#{seen[i]:06x}")
    ids = np.array([*anchors.values()], dtype=np.uint8)
    table = np.zeros(1 << 24, dtype=np.uint8)
    table[seen] = np.where(strange, 0, ids[distance.argmin(axis=0)])
    classes: NDArray[np.uint8] = table[packed]
    return classes, _most_frequent({f"#{value:06x}": int(counts[value]) for value in seen})


def _classify_values(
    path: Path, pixels: NDArray[np.uint8], colours: Mapping[str, str], labels: list[str]
) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Class mask `[height, width]` by number, 0 is background; and the numbers."""
    values = _read_values(path)
    seen, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    named = {int(name): labels.index(label) + 1 for name, label in colours.items()}
    ids = np.array([named.get(int(value), 0) for value in seen], dtype=np.uint8)
    strange = np.array([int(value) not in {*named, *_VALUES} for value in seen])
    _refuse_strange(path, counts, strange, colours, lambda i: str(int(seen[i])))
    by_value = {str(int(v)): int(n) for v, n in zip(seen, counts, strict=True)}
    return ids[inverse].reshape(values.shape), _most_frequent(by_value)


def _read_values(path: Path) -> NDArray[np.generic]:
    """Numbers `[height, width]` of a mask: its grey values, or places in its palette."""
    with Image.open(path) as image:  # `open_image` has read it before
        values = np.asarray(ImageOps.exif_transpose(image))
    if values.ndim == 3:
        colours = values[..., : 3 if values.shape[2] > 2 else 1]  # the rest is an alpha channel
        values = values[..., 0] if (colours == values[..., :1]).all() else values
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise GloVLMError(
            f"{path} holds colours and no numbers: give --colours by name, such as green=CLASS."
        )
    return values


def _holds_numbers(path: Path) -> bool:
    """Whether a mask holds a few small numbers, which all look black."""
    try:
        most = int(_read_values(path).max())
    except GloVLMError:
        return False
    return 0 < most < _FEW_VALUES


def _refuse_strange(
    path: Path,
    counts: NDArray[np.int64],
    strange: NDArray[np.bool_],
    colours: Mapping[str, str],
    name: Callable[[int], str],
) -> None:
    share = counts[strange].sum() / counts.sum()
    if share > _STRANGE:
        common = int(np.flatnonzero(strange)[counts[strange].argmax()])
        raise GloVLMError(
            f"{path}: {share:.1%} of the pixels have a colour that no class was given for, most "
            f"often {name(common)}; colours given: {', '.join(colours)}. Name it too, and leave "
            "its class out with --exclude where it is none."
        )


def _most_frequent(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:10])


def _rgb(name: str) -> tuple[int, int, int]:
    try:
        rgb = ImageColor.getrgb(_COLOURS.get(name.lower(), name))
    except ValueError:
        raise GloVLMError(
            f"Unknown colour '{name}'; expected {', '.join(_COLOURS)}, black, white, grey, a code "
            "such as #00ff00, or a number."
        ) from None
    return rgb[0], rgb[1], rgb[2]


def _solidity(blob: NDArray[np.bool_]) -> float:
    """Solidity: area over that of the convex hull, 0 to 1; a bay between two discs lowers it."""
    rows = np.flatnonzero(blob.any(axis=1))
    first, last = blob[rows].argmax(axis=1), blob.shape[1] - blob[rows, ::-1].argmax(axis=1)
    corners = np.concatenate(
        [np.stack([x, y], axis=1) for x in (first, last) for y in (rows, rows + 1)]
    )
    return float(np.count_nonzero(blob) / ConvexHull(corners).volume)
