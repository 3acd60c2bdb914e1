"""Bags of one kind: scale, size, overlap and encoder, by whatever attribute they are stated."""

import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from slide_model import train

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.encoding import encoder_fingerprint, load_encoder
from hf_glovlm.slides.files.bags import read_bag
from hf_glovlm.slides.files.tile_attributes import TileAttributes, find_differences
from hf_glovlm.slides.mil import MilConfig
from hf_glovlm.slides.mil.cohort import Cohort, read_cohort, split_cohort

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# What the tools write, by where it stands: on the file, the features or the coordinates.
TRIDENT: dict[str, dict[str, Any]] = {
    "features": {"name": "s", "savetodir": "/data", "encoder": "conch_v15"},
    "coords": {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "level0_width": 90_000,
        "level0_height": 70_000,
    },
}
STAMP: dict[str, dict[str, Any]] = {
    "file": {
        "stamp_version": "2.1.0",
        "extractor": "ctranspath",
        "unit": "um",
        "tile_size_um": 256.0,
        "tile_size_px": 224,
    }
}
STAMP_2_0: dict[str, dict[str, Any]] = {
    "file": {"extractor": "ctranspath", "unit": "um", "tile_size": 256.0}
}
CLAM: dict[str, dict[str, Any]] = {
    "coords": {
        "patch_size": 256,
        "patch_level": 1,
        "downsample": (4.0, 4.0),
        "level_dim": (900, 700),
        "name": "s",
    }
}
OURS: dict[str, dict[str, Any]] = {
    "file": {
        "fingerprint": "a" * 32,
        "tile_mpp": 0.5,
        "tile_size": 224,
        "overlap_fraction": 0.0,
    }
}
TOOLS = {"TRIDENT": TRIDENT, "STAMP": STAMP, "STAMP 2.0": STAMP_2_0, "CLAM": CLAM, "ours": OURS}
N = 6  # slides, every second of the other class, one a patient


def changed(base: Mapping[str, Mapping[str, Any]], **values: Any) -> dict[str, dict[str, Any]]:
    """Attributes with some replaced where they stand, or removed where the value is `None`."""
    result = {place: dict(given) for place, given in base.items()}
    for name, value in values.items():
        place = next((p for p in result if name in result[p]), next(iter(result)))
        result[place].pop(name, None)
        if value is not None:
            result[place][name] = value
    return result


def write_bags(folder: Path, attributes: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Bags `s0.h5` ... as the tools write them; STAMP's have `feats` and micrometres."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, given in enumerate(attributes):
        stamp = "unit" in given.get("file", {})
        name = "feats" if stamp else "features"
        with h5py.File(folder / f"s{i}.h5", "w") as file:
            file[name] = rng.normal(size=(5, 4)).astype(np.float16 if stamp else np.float32)
            file["coords"] = np.arange(10).reshape(5, 2) * (255.7 if stamp else 512)
            places = {"file": file, "features": file[name], "coords": file["coords"]}
            for place, values in given.items():
                for key, value in values.items():
                    places[place].attrs[key] = value


def configure(folder: Path, attributes: Sequence[Any], **options: Any) -> MilConfig:
    write_bags(folder / "bags", attributes)
    header = ["slide", "label", "patient_id", *(["split"] if "split" in options else [])]
    splits = options.pop("split", None)
    with (folder / "slides.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for i in range(len(attributes)):
            row = [f"s{i}", "ab"[i % 2], f"P{i}"]
            writer.writerow([*row, splits[i]] if splits else row)
    places = {"features": folder / "bags", "labels": folder / "slides.csv"}
    return MilConfig(
        **{name: str(path) for name, path in places.items()},
        output_dir=str(folder / "run"),
        device="cpu",
        **options,
    )


def cohort_of(folder: Path, attributes: Sequence[Any], **options: Any) -> Cohort:
    return read_cohort(configure(folder, attributes, **options))


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (TRIDENT, {"target_magnification": 20, "tile_size": 256, "overlap_fraction": 0}),
        (TRIDENT, {"encoder": "conch_v15"}),
        (STAMP, {"tile_mpp": 256 / 224, "tile_size": 224, "encoder": "ctranspath"}),
        (STAMP_2_0, {"tile_size_um": 256}),
        (CLAM, {"downsample": 4, "tile_size": 256}),
        (OURS, {"tile_mpp": 0.5, "tile_size": 224, "fingerprint": "a" * 32}),
        (changed(TRIDENT, overlap=64), {"overlap_fraction": 0.25}),
        (changed(TRIDENT, target_magnification=None), {"target_magnification": 20}),
        (changed(TRIDENT, mpp=0.2527), {"tile_mpp": 0.5054}),
        (changed(CLAM, mpp=0.25), {"tile_mpp": 1.0}),
        (changed(CLAM, step_size=128), {"overlap_fraction": 0.5}),
    ],
    ids=lambda value: "" if "coords" in value or "file" in value else ",".join(value),
)
def test_each_tool_states_scale_and_size_by_names_of_its_own(
    tmp_path: Path, attributes: Any, expected: dict[str, Any]
) -> None:
    encoder = cohort_of(tmp_path, [attributes] * N).encoder
    for name, value in expected.items():
        assert encoder.get(name) == (value if isinstance(value, str) else pytest.approx(value))


@pytest.mark.parametrize(
    "value",
    [
        "0.5",
        b"0.5",
        "0.5 um",
        "0.5 \N{MICRO SIGN}m/px",
        "0,5 \N{GREEK SMALL LETTER MU}m",
        "500 nm",
        "0.0005 mm",
        np.float16(0.5),
        np.array([0.5]),
        np.array([[0.5, 0.5]]),
        np.bytes_("0.5"),
        ["0.5 um", "0.5 um"],
    ],
    ids=repr,
)
def test_a_value_counts_in_whatever_type_it_is_stated(tmp_path: Path, value: Any) -> None:
    encoder = cohort_of(tmp_path, [changed(OURS, tile_mpp=value)] * N).encoder
    assert encoder.get("tile_mpp") == pytest.approx(0.5)


DIFFERENCES = [
    (TRIDENT, {"target_magnification": 10}, "scale: s0 has 20x, s5 has 10x"),
    (TRIDENT, {"target_magnification": "40x"}, "scale: s0 has 20x, s5 has 40x"),
    (TRIDENT, {"patch_size": 512, "target_magnification": 20}, "tile size: s0 has 256 pixels, s5"),
    (TRIDENT, {"overlap": 128}, "overlap: s0 has 0%, s5 has 50%"),
    (STAMP, {"tile_size_um": 128.0}, "scale: s0 has 1.143 micrometres per pixel, s5 has 0.5714"),
    (STAMP_2_0, {"tile_size": 512.0}, "tile size: s0 has 256 micrometres, s5 has 512"),
    (STAMP, {"tile_size_px": "448"}, "scale: .*tile size: s0 has 224 pixels, s5 has 448"),
    (CLAM, {"downsample": (1.0, 1.0)}, "s0 has level 0 shrunk 4 times, s5 has level 0 shrunk 1"),
    (CLAM, {"patch_size": b"512"}, "tile size: s0 has 256 pixels, s5 has 512 pixels"),
    (OURS, {"tile_mpp": 1.0}, "scale: s0 has 0.5 micrometres per pixel, s5 has 1 "),
    (OURS, {"tile_size": "448"}, "tile size: s0 has 224 pixels, s5 has 448 pixels"),
    (OURS, {"overlap_fraction": 0.5}, "overlap: s0 has 0%, s5 has 50%"),
    (OURS, {"precision": "bf16"}, "runtime and precision: s0 has torch fp32, s5 has torch bf16"),
]


@pytest.mark.parametrize(
    ("base", "change", "words"), DIFFERENCES, ids=[words.split(",")[0] for *_, words in DIFFERENCES]
)
def test_slides_cut_in_different_ways_are_refused_unless_allowed(
    tmp_path: Path, base: Any, change: dict[str, Any], words: str
) -> None:
    attributes = [changed(base, **change) if i == 5 else base for i in range(N)]
    config = configure(tmp_path, attributes)
    with pytest.raises(GloVLMError, match=f"{words}.*--allow-scale"):
        read_cohort(config)
    allowed = cohort_of(tmp_path, attributes, allow_scale=True)
    assert any("tiles differ in" in note for note in allowed.notes)
    mixed = TileAttributes.of(allowed.encoder)  # of a classifier that learned from both
    for given in (base, attributes[5]):
        own = TileAttributes.of({k: v for part in given.values() for k, v in part.items()})
        assert not find_differences(["the training", "it"], [mixed, own])


def test_slides_of_two_tools_are_compared_as_far_as_both_state_it(tmp_path: Path) -> None:
    near = changed(OURS, fingerprint=None, tile_mpp=0.4624, tile_size=256, encoder="CONCH-v15")
    mixed = [TRIDENT if i < 3 else near for i in range(N)]  # 20x of a scanner of .2312
    encoder = cohort_of(tmp_path / "same", mixed).encoder
    assert encoder["tile_mpp"] == pytest.approx(0.4624)
    mixed[5] = changed(near, tile_mpp=0.2312)
    with pytest.raises(GloVLMError, match=r"scale: s0 has 20x, s5 has 0.2312 micro"):
        cohort_of(tmp_path / "other", mixed)


@pytest.mark.parametrize(("tool", "name"), [("TRIDENT", "encoder"), ("STAMP", "extractor")])
def test_slides_of_two_encoders_are_refused_whatever_is_allowed(
    tmp_path: Path, tool: str, name: str
) -> None:
    base = TOOLS[tool]
    other = [changed(base, **{name: "uni_v2"}) if i == 3 else base for i in range(N)]
    with pytest.raises(GloVLMError, match=r"s3 was encoded by another model than s0 \(.*, uni_v2"):
        cohort_of(tmp_path / "other", other, allow_scale=True)
    again = {"conch_v15": "CONCH v15", "ctranspath": "CTransPath"}
    given = next(part[name] for part in base.values() if name in part)
    cohort_of(tmp_path / "same", [changed(base, **{name: again[given]}), *[base] * (N - 1)])


@pytest.mark.parametrize(
    ("attributes", "note"),
    [
        ([{}] * N, "the scale of 6, the tile size of 6, the encoder of 6 of 6 slides"),
        ([CLAM] * N, "Not stated, and so not compared: the encoder of 6 of 6 slides."),
        ([STAMP] * 4 + [STAMP_2_0] * 2, "Not stated, and so not compared: the scale of 2 of 6"),
        ([OURS] * 5 + [changed(OURS, tile_size=None)], "the tile size of 1 of 6 slides"),
        ([changed(TRIDENT, target_magnification=-1, level0_magnification=-1)] * N, "scale of 6"),
    ],
    ids=["nothing", "CLAM", "two STAMPs", "one of ours", "minus one"],
)
def test_what_is_not_stated_is_said_once_with_how_many(
    tmp_path: Path, attributes: list[Any], note: str
) -> None:
    notes = cohort_of(tmp_path, attributes).notes
    assert sum(note in one for one in notes) == 1
    assert sum("not compared" in one for one in notes) == 1


def test_coordinates_of_stamp_are_micrometres_and_the_notes_say_so(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, [STAMP] * N)
    assert any("coordinates of 6 slides are micrometres" in note for note in cohort.notes)
    bag = read_bag(tmp_path / "bags" / "s0.h5")
    assert bag.coords.tolist() == np.rint(np.arange(10).reshape(5, 2) * 255.7).tolist()


ODD: list[Any] = [
    0, -1, np.nan, np.inf, True, "", "x", "20x", "1e999", "256 um", b"\xff", 2**62, 10.0**300,
    np.zeros(0), np.zeros((2, 2)), np.array([1.0, 2.0]), ["a", "b"], h5py.Empty("f"),
    np.array([b"0.5"]), "None", ",", "-5 nm", np.uint8(7), 1e-320,
]  # fmt: skip


def test_odd_attributes_on_file_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    sentences = []
    for case, base in enumerate((OURS, TRIDENT, STAMP)):
        names = [name for given in base.values() for name in given]
        attributes = [
            changed(base, **dict.fromkeys([names[(i + case) % len(names)], "name"], value))
            for i, value in enumerate(ODD)
        ]
        try:
            encoder = cohort_of(tmp_path / str(case), attributes).encoder
        except GloVLMError as error:  # where they differ
            sentences.append(str(error))
        else:
            assert json.loads(json.dumps(encoder, allow_nan=False)) == encoder
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)


def test_odd_attributes_never_end_in_a_traceback() -> None:
    from hf_glovlm.slides.files import tile_attributes as tiles

    rng, more = random.Random(7), [*ODD, [[["0.5"]]], 10**400, None, {}]
    names = {n for base in TOOLS.values() for given in base.values() for n in given}
    names = sorted(names | {"precision", "runtime"})
    for _ in range(400):
        bags = []
        for _ in range(4):
            base = {
                k: v
                for given in rng.choice(list(TOOLS.values())).values()
                for k, v in given.items()
            }
            odd = {rng.choice(names): rng.choice(more) for _ in range(rng.randrange(6))}
            bags.append(tiles.TileAttributes.of(base | odd))
        shared = tiles.shared_attributes(bags)
        json.dumps(shared.to_dict(), allow_nan=False)
        kept = tiles.TileAttributes.of(shared.to_dict())  # by a trained aggregator
        assert not tiles.find_differences(["kept", "now"], [kept, shared])
        for sentence in tiles.find_differences(list("abcd"), bags):
            assert " has " in sentence
        tiles.other_encoder(bags)
        tiles.unknown_note(bags)


# --------------------------------------------------------------- an encoder that was trained here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose results say that it learned from P1, P2 and P5, and its fingerprint."""
    from hf_glovlm.runs.provenance import Provenance, hash_groups
    from hf_glovlm.tables import spelling

    folder = train(tmp_path_factory.mktemp("run"))
    ids = {key: frozenset([None]) for key in hash_groups(map(spelling, ("P1", "P2", "P5")))}
    learned = Provenance({"patient_id": ids}, frozenset(["an image"]), labels=9)
    results = {
        "kind": "adaptation",
        "method": {"name": "linear_probe"},
        "data": {"name": "d", "learned_from": learned.to_dict()},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder, encoder_fingerprint(*load_encoder(str(folder)))


def by_run(run: tuple[Path, str]) -> list[Any]:
    return [changed(OURS, fingerprint=run[1], classes=["lesion", "tissue"])] * N


def test_an_encoder_of_a_run_may_have_learned_from_the_slides_and_the_notes_say_so(
    tmp_path: Path, run: tuple[Path, str]
) -> None:
    notes = cohort_of(tmp_path, by_run(run)).notes
    assert any("may have learned from these very patients" in note for note in notes)
    plain = cohort_of(tmp_path / "plain", [OURS] * N).notes
    assert not any("learned from" in note for note in plain)


@pytest.mark.parametrize("options", [{"test_fraction": 0.4}, {"folds": 3}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_patients_that_the_encoder_learned_from_are_not_tested(
    tmp_path: Path, run: tuple[Path, str], options: dict[str, Any], seed: int
) -> None:
    config = configure(tmp_path, by_run(run), encoder=str(run[0]), seed=seed, **options)
    cohort = read_cohort(config)
    tested = {cohort.groups[i] for sides in split_cohort(cohort, config) for i in sides.test}
    assert tested <= {"P0", "P3", "P4"}
    assert len(tested) == 3 if "folds" in options else tested
    assert any("learned from 3 of these patients, which are not" in n for n in cohort.notes)


def test_a_declared_test_side_of_learned_patients_is_refused(
    tmp_path: Path, run: tuple[Path, str]
) -> None:
    split = ["test" if i in (4, 5) else "train" for i in range(N)]
    config = configure(tmp_path, by_run(run), encoder=str(run[0]), split=split)
    with pytest.raises(GloVLMError, match="learned from 1 of the 2 groups on the test side"):
        split_cohort(read_cohort(config), config)


def test_a_run_that_did_not_encode_the_slides_is_refused(
    tmp_path: Path, run: tuple[Path, str]
) -> None:
    with pytest.raises(GloVLMError, match=r"encoded by another model \(aaaaaaaaaaaa\) than that"):
        cohort_of(tmp_path, [OURS] * N, encoder=str(run[0]))
    with pytest.raises(GloVLMError, match="found none with results: correct --encoder"):
        cohort_of(tmp_path, [OURS] * N, encoder="mini")
