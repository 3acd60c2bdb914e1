"""Patients, labels and leaks: who is one patient, what is one image, what was learned from."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import Glovlm
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import tiny_clip, tiny_images

from hf_glovlm import (
    GloVLMConfig,
    GloVLMError,
    check_dataset,
    evaluate,
    leave_patients_out,
    load_backbone,
    load_dataset,
)
from hf_glovlm.data import all_rows, draw_episode, group_rows
from hf_glovlm.runs import TrainConfig, run
from hf_glovlm.runs.workflow import _pretraining_notes
from hf_glovlm.slides.files.slide_table import read_slide_table

Rows = list[dict[str, str]]


def read(folder: Path) -> Rows:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write(folder: Path, rows: Rows) -> Path:
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def changed(source: Path, folder: Path, change: Callable[[Rows], Rows | None]) -> Path:
    """A copy whose table is another."""
    shutil.copytree(source, folder)
    rows = read(folder)
    return write(folder, change(rows) or rows)


def save_as(source: Path, target: Path) -> None:
    """The same pixels in another format that loses none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if target.suffix == ".webp" else {}
    Image.open(source).save(target, **lossless)


def copied(source: Path, folder: Path, rows: Rows, suffix: str, **columns: str) -> Path:
    """Images under other names, in another format, of other patients."""
    table = []
    for i, row in enumerate(rows):
        name = f"{row['label']}/copy {i}{suffix}"
        save_as(source / row["file_name"], folder / name)
        other = {"patient_id": f"somebody {i // 3}"} | columns
        table.append({"file_name": name, "label": row["label"], **other})
    return write(folder, table)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("patients") / "images", per_class=12, groups=6)


def train(data: Any, folder: Path, **settings: Any) -> Any:
    given = {"backbone": str(tiny_clip()), "shots": 2, "n_resamples": 5, "device": "cpu"}
    return run(TrainConfig(data=data, output_dir=str(folder), **{**given, **settings}))


@pytest.fixture(scope="module")
def run_folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(str(images), folder)
    return folder


def held_out(folder: Path) -> set[str]:
    draws = json.loads((folder / "episodes.json").read_text(encoding="utf-8"))["draws"]
    return set(draws[0]["test_groups"])


def learned_from(images: Path, folder: Path) -> Rows:
    """Rows of the patients that are not tested: of whom the model learned."""
    others = held_out(folder)
    return [row for row in read(images) if row["patient_id"] not in others]


# -------------------------------------------------------------------------------------- spelling

IDS = {
    "case": ("P001", "p001"),
    "leading zeros": ("1", "01"),
    "separators": ("P 1", "P-01"),
    "invisible": ("P1", "P1\u200b"),
    "accents": ("Ren\u00e9", "Rene\u0301"),
    "width": ("P1", "\uff30\uff11"),
    "floats": ("1", "1.0"),
}


def renamed(one: str, other: str, column: str = "patient_id") -> Callable[[Rows], None]:
    """Two of the patients bear these ids."""

    def change(rows: Rows) -> None:
        ids = {"patient_0": one, "patient_1": other}
        for row in rows:
            row[column] = ids.get(row["patient_id"], row["patient_id"])
            if column != "patient_id":
                del row["patient_id"]

    return change


@pytest.mark.parametrize("kind", IDS)
def test_ids_that_differ_in_spelling_are_a_problem(
    kind: str, images: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    one, other = IDS[kind]
    data = changed(images, tmp_path / "data", renamed(one, other))
    (problem,) = check_dataset(load_dataset(data)).problems or [""]
    shown = (one, other) if kind not in ("invisible", "accents") else (ascii(one), ascii(other))
    assert all(text in problem for text in shown)
    assert "patient_id differ in spelling only" in problem
    if kind == "case":
        done = glovlm("train", "--data", data, "--output-dir", tmp_path / "run", "--shots", 1)
        assert done.code == 2
        assert "differ in spelling only" in done.err


@pytest.mark.parametrize("column", ["slide_id", "case_id", "group_id", "glomerulus_id"])
def test_every_column_of_ids_is_compared(column: str, images: Path, tmp_path: Path) -> None:
    def change(rows: Rows) -> None:
        if column == "glomerulus_id":
            for i, row in enumerate(rows):
                row[column] = {0: "G1", 1: "g1"}.get(i, "")
        else:
            renamed("S1", "s1", column)(rows)

    data = changed(images, tmp_path / "data", change)
    problems = check_dataset(load_dataset(data)).problems
    assert [f"of {column} differ in spelling only" in problem for problem in problems] == [True]


def test_ids_of_a_given_split_are_compared_across_its_sides(images: Path, tmp_path: Path) -> None:
    def change(rows: Rows) -> None:
        renamed("P1", "p1")(rows)
        for row in rows:
            row["split"] = "test" if row["patient_id"] in ("p1", "patient_2") else "train"

    data = changed(images, tmp_path / "data", change)
    assert "'P1' and 'p1'" in " ".join(check_dataset(load_dataset(data)).problems)


def test_ids_that_only_resemble_each_other_are_none(images: Path, tmp_path: Path) -> None:
    def nested(rows: Rows) -> None:  # slides that are numbered anew in each patient
        for i, row in enumerate(rows):
            row["slide_id"] = ["1", "01", "2"][i % 3]

    different = changed(images, tmp_path / "different", renamed("1-1", "11"))
    assert check_dataset(load_dataset(different)).problems == []
    slides = changed(images, tmp_path / "slides", nested)
    assert check_dataset(load_dataset(slides)).problems == []


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8))


def in_folders(names: Sequence[str], folder: Path) -> Any:
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            picture(2 * k + i).save(folder / name / f"{i}.png")
    return folder


def in_a_table(names: Sequence[str], folder: Path) -> Any:
    folder.mkdir()
    rows = []
    for i, name in enumerate([*names, *names]):
        picture(i).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "label": name})
    return write(folder, rows)


def in_memory(names: Sequence[str], folder: Path) -> Any:
    labels = [*range(len(names))] * 2
    columns = {"image": [picture(i) for i in range(len(labels))], "label": labels}
    types = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict(columns, types)


def in_parquet(names: Sequence[str], folder: Path) -> Any:
    in_memory(names, folder).to_parquet(str(folder) + ".parquet")
    return str(folder) + ".parquet"


@pytest.mark.parametrize("pair", [("viable", "Viable"), ("a b", "a_b"), ("sclér", "scle\u0301r")])
@pytest.mark.parametrize("source", [in_folders, in_a_table, in_memory, in_parquet])
def test_classes_that_differ_in_spelling_are_a_problem(
    source: Callable[..., Any], pair: tuple[str, str], tmp_path: Path
) -> None:
    data = source([*pair, "other"], tmp_path / "data")
    problems = check_dataset(load_dataset(data)).problems
    assert ["differ in spelling only" in problem for problem in problems] == [True]
    assert pair[0] in problems[0] or ascii(pair[0]) in problems[0]


@pytest.mark.parametrize("rows", ["a,x,P1\nb,y,p01\n", "a,viable,P1\nb,Viable,P2\n"])
def test_a_table_of_slides_spells_each_patient_and_class_in_one_way(
    rows: str, tmp_path: Path
) -> None:
    (tmp_path / "slides.csv").write_text(f"slide,label,patient_id\n{rows}")
    with pytest.raises(GloVLMError, match="differ in spelling only"):
        read_slide_table(tmp_path / "slides.csv")


def test_a_label_that_is_a_class_in_another_spelling_is_named_with_it(
    images: Path, run_folder: Path, tmp_path: Path
) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            row["label"] = row["label"].replace("viable", "Viable")

    data = changed(images, tmp_path / "data", change)
    with pytest.raises(GloVLMError, match=r"'Viable' and 'viable' differ in spelling only"):
        evaluate(run_folder, data, n_resamples=5)


# ----------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("label", ["viable", "sclerosed"])
def test_the_same_pixels_in_two_files_are_one_image(
    label: str, suffix: str, images: Path, tmp_path: Path
) -> None:
    def change(rows: Rows) -> None:
        name = f"copy{suffix}"
        save_as(images / "viable/image_00.png", tmp_path / "data" / name)
        rows.append({"file_name": name, "label": label, "patient_id": "patient_1"})

    problems = check_dataset(load_dataset(changed(images, tmp_path / "data", change))).problems
    expected = "in several groups" if label == "viable" else "have different labels"
    assert [expected in problem for problem in problems] == [True]
    assert "viable/image_00.png" in problems[0]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_learned_images_are_known_under_any_name_and_patient(
    suffix: str, images: Path, run_folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    rows = learned_from(images, run_folder)
    data = copied(images, tmp_path / "copies", rows, suffix)
    with pytest.raises(GloVLMError, match=r"learned from \d of the \d groups in these data"):
        evaluate(run_folder, data, n_resamples=5)
    allowed = evaluate(run_folder, data, allow_seen=True, n_resamples=5)
    assert allowed.data["images_seen_in_training"] == len(rows)


def masked(data: Path, folder: Path) -> Path:
    down, across = np.mgrid[:40, :40]
    disc = Image.fromarray(np.uint8(255 * (np.hypot(down - 20, across - 20) < 12)))
    for row in read(data):
        target = (folder / row["file_name"]).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        disc.save(target)
    return folder


def test_heat_maps_of_learned_images_are_left_out_whatever_the_column(
    images: Path, run_folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    def by_slide(rows: Rows) -> None:
        for row in rows:
            row["slide_id"] = "slide of " + row.pop("patient_id")

    data = changed(images, tmp_path / "data", by_slide)
    more = ("--masks", masked(data, tmp_path / "masks"), "--method", "gradient", "--json")
    done = glovlm("explain-check", run_folder, "--data", data, *more)
    assert done.code == 0, done.err
    (measured,) = json.loads(done.out)["methods"].values()
    assert measured["groups"] == len(held_out(run_folder))
    left = len(learned_from(images, run_folder))
    assert f"{left} images of groups that the model learned from are left out" in done.err
    assert "by the images alone" in done.err


def test_a_patient_is_not_left_out_for_an_image_of_another_one(images: Path) -> None:
    model, processor = load_backbone(str(tiny_clip()))
    rows = all_rows(load_dataset(images)).select(range(12))
    one = rows.select([0, 0, 1, 2, 3]).remove_columns("label")
    labels = [0, 0, 1, 1, 0]
    rows = one.add_column("label", labels).cast_column("label", ClassLabel(names=["a", "b"]))
    arguments = (model, processor, "linear_probe", rows)
    same = leave_patients_out(*arguments, ["p", "q", "p", "q", "r"])
    assert same.results is None
    assert "the same pixels" in same.sentence
    spelled = leave_patients_out(*arguments, ["P1", "P1", "p1", "q", "q"])
    assert spelled.results is None
    assert "'P1' and 'p1'" in spelled.sentence


# ----------------------------------------------------------------------------------- institutions


def of(institution: str, other: str | None = None) -> Callable[[Rows], None]:
    """A hospital; the later half of each class is of the other one."""

    def change(rows: Rows) -> None:
        for i, row in enumerate(rows):
            row["institution"] = other if other is not None and i % 12 >= 6 else institution

    return change


def other_pixels(folder: Path) -> Path:
    """Images as they are, but for one grey level."""
    for path in folder.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2 + 100).save(path)
    return folder


def test_ids_are_those_of_an_institution(images: Path, tmp_path: Path) -> None:
    data = changed(images, tmp_path / "data", of("north", "south"))
    groups = group_rows(all_rows(load_dataset(data)))
    assert len(set(groups.ids)) == 12
    assert {"patient_0 (north)", "patient_0 (south)"} <= set(groups.ids)
    assert "institution" in groups.note
    assert check_dataset(load_dataset(data)).problems == []
    one = changed(images, tmp_path / "one", of("North", " north"))
    assert set(group_rows(all_rows(load_dataset(one))).ids) == {f"patient_{i}" for i in range(6)}


def test_the_same_ids_at_another_hospital_may_be_measured(images: Path, tmp_path: Path) -> None:
    train(str(changed(images, tmp_path / "north", of("North"))), tmp_path / "run")
    south = other_pixels(changed(images, tmp_path / "south", of("South")))
    measured = evaluate(tmp_path / "run", south, n_resamples=5)
    assert measured.data["groups_seen_in_training"] == 0
    for name, change in {"same": of("NORTH"), "unknown": lambda rows: None}.items():
        data = other_pixels(changed(images, tmp_path / name, change))
        with pytest.raises(GloVLMError, match=r"learned from \d of the 6 groups") as caught:
            evaluate(tmp_path / "run", data, n_resamples=5)
        assert ("known on one side only" in str(caught.value)) == (name == "unknown")


def test_the_same_ids_in_another_spelling_are_known(
    images: Path, run_folder: Path, tmp_path: Path
) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            row["patient_id"] = row["patient_id"].replace("patient_", "Patient 0")

    data = other_pixels(changed(images, tmp_path / "data", change))
    with pytest.raises(GloVLMError, match=r"learned from \d of the 6 groups"):
        evaluate(run_folder, data, n_resamples=5)


def test_numbers_of_patients_are_one_whatever_their_type(tmp_path: Path) -> None:
    data = changed(
        tiny_images(tmp_path / "images", per_class=8),
        tmp_path / "text",
        lambda rows: [row | {"patient_id": row["patient_id"][-1] + ".0"} for row in rows],
    )
    train(str(data), tmp_path / "run")
    rows = all_rows(load_dataset(other_pixels(tmp_path / "images")))
    numbers = [float(value[-1]) for value in rows["patient_id"]]
    typed = rows.remove_columns("patient_id").add_column("patient_id", numbers)
    typed.cast_column("patient_id", Value("float64")).to_parquet(str(tmp_path / "data.parquet"))
    with pytest.raises(GloVLMError, match=r"learned from \d of the 4 groups"):
        evaluate(tmp_path / "run", tmp_path / "data.parquet", n_resamples=5)


# -------------------------------------------------------------------------- check and train agree


def one_patient_class(rows: Rows) -> None:
    for row in rows:
        if row["label"] == "viable":
            row["patient_id"] = "patient_0"


def one_patient(rows: Rows) -> None:
    for row in rows:
        row["patient_id"] = "patient_0"


def few_of_a_class(rows: Rows) -> Rows:
    return [row for row in rows if row["label"] != "viable" or row["file_name"] < "viable/image_03"]


def no_class_to_train(rows: Rows) -> None:
    for row in rows:
        late = row["patient_id"] > "patient_2" or row["label"] == "viable"
        row["split"] = "validation" if late and row["label"] == "viable" else "train"
        if row["patient_id"] > "patient_3" and row["label"] != "viable":
            row["split"] = "test"


def one_class(rows: Rows) -> Rows:
    return [row for row in rows if row["label"] == "viable"]


DATA: dict[str, Callable[[Rows], Rows | None]] = {
    "good": lambda rows: None,
    "a class in one patient": one_patient_class,
    "one patient": one_patient,
    "few images of a class": few_of_a_class,
    "no image of a class to train on": no_class_to_train,
    "one class": one_class,
    "two spellings": renamed("P1", "p1"),
}
SHOTS = {"good": [2, 8], "few images of a class": [1, 2]}


@pytest.mark.parametrize("name", DATA)
def test_the_check_of_the_data_says_what_train_says(
    name: str, images: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    data = changed(images, tmp_path / "data", DATA[name])
    for shots in SHOTS.get(name, [8]):
        drawn = ("--data", data, "--backbone", tiny_clip(), "--shots", shots, "--n-resamples", 5)
        trained = glovlm("train", *drawn, "--output-dir", tmp_path / f"run {shots}")
        # No word of the shots: 8 is the default of both.
        checked = glovlm("data", "check", data, *(("--shots", shots) if shots != 8 else ()))
        assert (checked.code, trained.code) in {(0, 0), (1, 2)}
        if trained.code:
            reason = trained.errors[0].removeprefix("error: ").partition(" (")[0]
            assert reason in checked.err


def test_prompts_that_train_refuses_are_a_problem(
    images: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    data = changed(images, tmp_path / "data", lambda rows: None)
    (data / "classes.yaml").write_text("classes: {viabel: {prompts: [a glomerulus]}}\n")
    done = glovlm("data", "check", data)
    assert done.code == 1
    assert "the data have no class 'viabel'" in done.err


# ------------------------------------------------------------------- a run on a former run


@pytest.fixture(scope="module")
def chain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs, each on the model of the one before, with other seeds."""
    place = tmp_path_factory.mktemp("chain")
    settings: list[dict[str, Any]] = [
        {"method": "lora", "epochs": 1, "calibration_groups": 1},
        {"backbone": str(place / "0")},
        {"backbone": str(place / "1" / "model")},
    ]
    for i, given in enumerate(settings):
        train(str(images), place / str(i), seed=3 * i, shots=1, **given)
    return [place / str(i) for i in range(3)]


def test_a_chain_of_runs_is_stated_and_its_labels_count(chain: list[Path]) -> None:
    first, second, third = (json.loads((one / "results.json").read_text()) for one in chain)
    base = first["backbone"]["name"]
    assert second["backbone"]["name"] == f"{base}, adapted by lora on images"
    assert third["backbone"]["name"].endswith("by lora on images, then by linear_probe on images")
    budgets = [one["data"]["support"]["label_budget"] for one in (first, second, third)]
    assert budgets == [budgets[0], budgets[0] + 3, budgets[0] + 6]
    assert any("adapted by lora on images" in note for note in second["notes"])
    card = (chain[2] / "README.md").read_text(encoding="utf-8")
    assert f"`{base}`, adapted by lora on images, then by linear_probe on images, then" in card
    assert f"Label budget: {budgets[2]} with the {budgets[1]} of the runs before" in card


def test_what_a_former_run_learned_from_is_never_measured(chain: list[Path], images: Path) -> None:
    learned = [{row["patient_id"] for row in learned_from(images, one)} for one in chain]
    support = json.loads((chain[0] / "episodes.json").read_text())["draws"][0]
    former = {
        row["patient_id"]
        for row in read(images)
        if row["file_name"] in {*support["support"], *support["calibration"]}
    }
    assert former
    assert former <= learned[1]
    assert former <= learned[2]
    rows = all_rows(load_dataset(images))
    seen = rows.select([i for i, one in enumerate(rows["patient_id"]) if one in former])
    for model in chain:
        with pytest.raises(GloVLMError, match=f"learned from {len(former)} of the"):
            evaluate(model, seen, n_resamples=5)


def test_a_given_split_that_tests_what_a_former_run_learned_from_is_refused(
    chain: list[Path], images: Path, tmp_path: Path
) -> None:
    apart = {row["patient_id"] for row in learned_from(images, chain[0])}

    def change(rows: Rows) -> None:
        for row in rows:
            row["split"] = "test" if row["patient_id"] in apart else "train"

    data = changed(images, tmp_path / "data", change)
    with pytest.raises(
        GloVLMError, match=r"The backbone learned from \d of the \d groups on the test"
    ):
        train(str(data), tmp_path / "run", backbone=str(chain[0]), shots=1)


def test_a_split_that_tests_nothing_learned_from_is_as_it_was(images: Path) -> None:
    rows = all_rows(load_dataset(images))
    for seed in range(6):
        plain = draw_episode(rows, shots=1, seed=seed)
        groups = group_rows(rows).ids
        held = {groups[i] for i in range(len(groups))} - {groups[i] for i in plain.test}
        assert draw_episode(rows, shots=1, seed=seed, pooled=held) == plain
        one = groups[plain.test[0]]
        other = draw_episode(rows, shots=1, seed=seed, pooled={one})
        assert one not in {groups[i] for i in other.test}


def test_an_adapted_model_without_its_results_is_unknown(
    chain: list[Path], images: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(chain[0] / "model", tmp_path / "alone"))
    results = train(str(images), tmp_path / "run", backbone=str(alone))
    text = " ".join([results["backbone"]["name"], *results["notes"]])
    assert "adapted by a run that is not known" in text
    assert "cannot be known" in text
    rows = all_rows(load_dataset(images))
    unseen = rows.select(
        [i for i, p in enumerate(rows["patient_id"]) if p in held_out(tmp_path / "run")]
    )
    measured = evaluate(tmp_path / "run", unseen, n_resamples=5)
    assert "cannot be known" in " ".join(measured["notes"])


def test_a_run_of_an_earlier_version_is_compared_by_its_groups(
    run_folder: Path, images: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    results = json.loads((folder / "results.json").read_text())
    del results["data"]["learned_from"]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(GloVLMError, match="earlier version"):
        evaluate(folder, images, n_resamples=5)
    rows = all_rows(load_dataset(images))
    unseen = rows.select([i for i, p in enumerate(rows["patient_id"]) if p in held_out(folder)])
    measured = evaluate(folder, DatasetDict({"all": unseen}), n_resamples=5)
    assert measured.data["groups_seen_in_training"] == 0
    assert "earlier version" in " ".join(measured["notes"])


def test_what_results_keep_of_images_names_nobody(run_folder: Path, images: Path) -> None:
    text = (run_folder / "results.json").read_text()
    assert not any(row["patient_id"] in text or row["file_name"] in text for row in read(images))
    kept = json.loads(text)["data"]["learned_from"]
    assert len(kept["images"]) == 2 * len(learned_from(images, run_folder))


# --------------------------------------------------------------------------------- contamination


@pytest.mark.parametrize(
    ("backbone", "data", "patient", "expected"),
    [
        ("owkin/phikon-v2", "esca_tolkach", "1", "phikon-v2 saw TCGA in pretraining"),
        ("owkin/phikon-v2", "WSSS4LUAD", "1", "phikon-v2 saw TCGA in pretraining"),
        ("owkin/phikon-v2", "tcga-ut 2022", "1", "phikon-v2 saw TCGA in pretraining"),
        ("owkin/phikon-v2", "ours", "TCGA-A1-A0SB", "phikon-v2 saw TCGA in pretraining"),
        ("owkin/phikon-v2", "wsss4luad", "1", "Whether phikon-v2 saw GDPH"),
        ("owkin/phikon-v2", "ours", "1", "Whether phikon-v2 saw images of these data"),
        ("MahmoodLab/conch", "esca_tolkach", "1", None),
        ("vinid/plip", "esca_tolkach", "1", "Whether plip saw TCGA"),
        ("somebody/else", "ours", "1", "What 'somebody/else' was pretrained on is not known"),
        ("mini", "esca_tolkach", "1", None),
    ],
)
def test_cohorts_of_data_and_of_pretraining_are_compared(
    backbone: str, data: str, patient: str, expected: str | None
) -> None:
    adapted: Any = SimpleNamespace(
        model=SimpleNamespace(config=GloVLMConfig(backbone_name=backbone))
    )
    rows = Dataset.from_dict({"patient_id": [patient, "2"]})
    config = TrainConfig(data=f"/data/{data}", output_dir="o")
    notes = _pretraining_notes(adapted, config, rows)
    if expected is None:
        assert not any("in pretraining" in note or "not known" in note for note in notes)
    else:
        assert any(note.startswith(expected) for note in notes)
