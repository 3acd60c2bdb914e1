"""The card says what was measured, in the Hub's own format, and nothing that leads to a patient."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_glovlm.card import group_unit, metric_rows, render_card, write_card
from hf_glovlm.errors import GloVLMError
from hf_glovlm.metrics import compute_metrics

CLASSES = ("ischemic", "sclerosed", "viable")
SECRETS = {
    "data": "/srv/hospital_seven/ward|nine/renal_set",
    "output_dir": "/home/dr_jones/runs/1",
    "episodes": "/home/dr_jones/frozen.json",
    "prompts": "/home/dr_jones/classes.yaml",
    "backbone": "/opt/secret_weights/vision+/opt/secret_weights/text",
}
PATIENTS = [f"MRN-{i:05d}" for i in range(12)]


def make_results(
    *, synthetic: bool = False, absent: bool = False, **changes: Any
) -> dict[str, Any]:
    """What `run` returns, with real numbers, and with secrets wherever it may hold them."""
    rng = np.random.default_rng(1)
    labels = np.arange(60) % (2 if absent else 3)
    probabilities = rng.dirichlet((1, 1, 1), 60) / 2 + np.eye(3)[labels] / 2
    measured = compute_metrics(
        labels,
        probabilities,
        groups=[PATIENTS[i % 12] for i in range(60)],
        class_names=CLASSES,
        n_resamples=200,
    )
    counts = dict(zip(CLASSES, (8, 8, 3), strict=True))
    config = {
        **SECRETS,
        "method": "lora",
        "shots": 8,
        "seed": 3,
        "draw": 4,
        "test_fraction": 0.5,
        "validation_shots": 0,
        "augment": False,
        "accumulate": 1,
        "mixed_precision": "no",
        "clip_norm": None,
        "loss": "prototypes",
        "method_config": {},
    }
    results = {
        "config": config,
        "data": {
            "name": "renal_set",
            "fingerprint": "a" * 32,
            "classes": [
                {
                    "name": c,
                    "display_name": c.title(),
                    "prompts": [f"a {c} glomerulus", f"{c} tuft"],
                }
                for c in CLASSES
            ],
            "counts": {"support": counts},
            "groups": {"support": 5, "validation": 0, "test": 12},
            "group_column": "patient_id",
            "split_hash": "b" * 32,
            "shots": 8,
            "sampler": "spread",
            "support": {
                "labels_per_class": counts,
                "groups_per_class": dict(zip(CLASSES, (5, 4, 2), strict=True)),
                "validation_labels": 0,
                "label_budget": 19,
            },
            "support_groups_sha256": ["c" * 64],
            "notes": [f"scan_{PATIENTS[0]}.png and {PATIENTS[1]} look the same."],
        },
        **measured,
        "method": {"name": "lora", "settings": {"rank": 4, "alpha": 16}, "citation": "Hu et al."},
        "backbone": {"name": "openai/clip-vit-base-patch32", "revision": None, "license": "mit"},
        "training": {
            "trainable_parameters": 49152,
            "recipe": {"lr": 2e-5, "epochs": 20},
            "epochs_run": 20,
            "final_loss": 0.1234,
            "loss": "prototypes",
        },
        "notes": ["The towers had no joint space."],
        "synthetic": synthetic,
        "timing": {"total": 12.345},
        "environment": {"hf_glovlm": "0.1.0", "python": "3.11.7", "gpu": None, "threads": 2},
    }
    return results | changes


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def body(card: str) -> str:
    return card.split("---\n", 2)[2]


@pytest.mark.parametrize("synthetic", [False, True])
def test_the_hub_reads_the_front_matter(synthetic: bool) -> None:
    results = make_results(synthetic=synthetic)
    data = ModelCard(render_card(results)).data  # raises on a malformed model-index
    assert data.license == "mit"
    assert data.base_model == ["openai/clip-vit-base-patch32"]
    assert data.library_name == "hf-glovlm"
    assert data.pipeline_tag == "image-classification"
    assert data.language == "en"
    assert data.datasets is None  # a folder is no data set of the Hub
    assert "lora" in data.tags
    assert ("drawings" in data.tags) is synthetic
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert len(found) == len(results["metrics"])
    assert found["Macro-AUC" + " (drawings)" * synthetic] == pytest.approx(
        results["metrics"]["macro_auc"]["value"], abs=5e-5
    )
    assert {result.dataset_split for result in data.eval_results} == {"test"}


def test_a_hub_data_set_is_linked() -> None:
    results = make_results()
    results["data"]["hub_id"] = "owner/glomeruli"
    data = ModelCard(render_card(results)).data
    assert data.datasets == ["owner/glomeruli"]
    assert data.eval_results[0].dataset_type == "owner/glomeruli"


@pytest.mark.parametrize(
    ("stated", "license_id", "name"),
    [
        ("apache-2.0", "apache-2.0", None),
        ("MIT", "mit", None),
        ("apache-2.0 + apache-2.0", "apache-2.0", None),
        ("apache-2.0 + mit", "other", "apache-2.0-and-mit"),
        ("owkin non-commercial", "other", "owkin-non-commercial"),
        (None, "other", "not-stated"),
    ],
)
def test_the_licence_of_the_base_passes_on(
    stated: str | None, license_id: str, name: str | None
) -> None:
    results = make_results(backbone={"name": "mini", "revision": None, "license": stated})
    found = front_matter(render_card(results))
    assert (found["license"], found.get("license_name")) == (license_id, name)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("facebook/dinov2-small+sentence-transformers/all-MiniLM-L6-v2", 2),
        ("dinov2-small-10l+sentence-transformers/all-MiniLM-L6-v2", 1),
        ("dinov2-small-10l+all-MiniLM-L6-v2", 0),
        ("mini", 0),
    ],
)
def test_base_models_are_hub_ids_only(backbone: str, expected: int) -> None:
    results = make_results(backbone={"name": backbone, "revision": None, "license": None})
    found = front_matter(render_card(results)).get("base_model", [])
    assert len(found) == expected
    assert all(name in backbone and "/" in name for name in found)


def numbers_in(value: Any) -> set[str]:
    """Every number of the results, in every form that a card may give it."""
    if isinstance(value, dict):
        return set().union(*(numbers_in(v) for pair in value.items() for v in pair))
    if isinstance(value, list | tuple):
        return set().union(*map(numbers_in, value))
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, int | float):
        return {str(value), f"{value:.3f}", str(round(value, 4))}
    return set(NUMBER.findall(str(value)))


NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)*(?:e-?\d+)?(?!\w)")
# The two arXiv numbers of the protocol, the interval's 95%, the version of CLIP's paper.
CONSTANT = {"2508.15960", "2511.11984", "95", "2021", "2103.00020", "3"}


@pytest.mark.parametrize("changes", [{}, {"synthetic": True}, {"absent": True}])
def test_every_number_comes_from_the_results(changes: dict[str, bool]) -> None:
    results = make_results(**changes)
    card = render_card(results)
    found = set(NUMBER.findall(card))
    assert found <= numbers_in(results) | CONSTANT
    for entry in results["metrics"].values():
        if entry["value"] is not None:
            assert {f"{x:.3f}" for x in (entry["value"], *entry["ci95"])} <= found


def test_a_number_that_changes_changes_the_card() -> None:
    results = make_results()
    other = copy.deepcopy(results)
    other["per_class"]["viable"]["recall"]["value"] = 0.123
    assert "0.123" not in render_card(results)
    assert "0.123" in render_card(other)


@pytest.mark.parametrize("synthetic", [False, True])
def test_nothing_leads_to_a_patient_or_a_disk(synthetic: bool) -> None:
    results = make_results(synthetic=synthetic)
    results["environment"]["hostname"] = "/dev/kidney-01"
    results["method"]["settings"]["file"] = "C:\\secret\\prompts.txt"
    card = render_card(results)
    assert not [patient for patient in PATIENTS if patient in card]
    for secret in (
        "hospital",
        "ward",
        "jones",
        "secret",
        "frozen.json",
        "/dev",
        ".png and",
        "c" * 64,
    ):
        assert secret not in card
    assert not re.findall(r"(?<![\w.:/])/\w+", body(card)), "an absolute path"


def test_drawings_stand_in_the_title_and_above_every_number() -> None:
    card = render_card(make_results(synthetic=True))
    assert "drawings" in front_matter(card)["model-index"][0]["name"]
    sections = re.split(r"^(#+ .*)$", body(card), flags=re.MULTILINE)
    assert "drawings" in sections[1]
    measured = ("Metrics", "Per class", "Confusion", "Calibration")
    headings = [h for h in sections[1::2] if any(word in h for word in measured)]
    assert len(headings) == len(measured)
    assert all("drawings" in heading for heading in headings)
    plain = render_card(make_results())
    assert "drawings" not in plain
    assert "Not for diagnosis" in plain


def test_what_is_undefined_is_said_and_not_published_as_a_number() -> None:
    results = make_results(absent=True)
    card = render_card(results)
    undefined = [m for m, entry in results["metrics"].items() if entry["value"] is None]
    published = front_matter(card)["model-index"][0]["results"][0]["metrics"]
    assert len(published) == len(results["metrics"]) - len(undefined)
    assert "Not measured at all, for lack of test images: viable" in card
    assert "undefined" in card


@pytest.mark.parametrize(
    ("counts", "words"),
    [((8, 8, 8), "8 labels per class"), ((8, 8, 3), "3 to 8 labels"), ((0, 0, 0), "no labels")],
)
def test_labels_are_counted_not_asked_for(counts: tuple[int, ...], words: str) -> None:
    results = make_results()
    results["data"]["support"]["labels_per_class"] = dict(zip(CLASSES, counts, strict=True))
    assert words in render_card(results)


def test_the_title_stays_a_title() -> None:
    results = make_results()
    title = re.search(r"^# (.*)$", render_card(results), flags=re.MULTILINE)
    assert title
    assert title[1] == "openai/clip-vit-base-patch32 adapted by lora, 3 to 8 labels per class"


def test_odd_names_do_not_break_a_table() -> None:
    results = make_results()
    results["data"]["classes"][0] |= {"display_name": "a | b\n$title", "prompts": ["{x} | $y"]}
    line = next(x for x in render_card(results).splitlines() if x.startswith("| ischemic | a"))
    assert line == r"| ischemic | a \| b $title | {x} \| $y |"


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        ("patient_id", "patients"),
        ("slide_id", "slides"),
        ("group_id", "groups"),
        ("near_duplicate", "near-duplicate clusters"),
    ],
)
def test_groups_are_named_for_people(column: str, unit: str) -> None:
    assert group_unit(column) == unit
    results = make_results()
    results["data"]["group_column"] = column
    assert f"bootstrap over {unit}" in render_card(results)


def test_metric_rows_show_interval_and_note() -> None:
    entry = {"value": 0.5, "ci95": [0.25, 0.75], "note": "too few groups", "undefined_resamples": 7}
    nothing = {"value": None, "ci95": None, "note": "undefined on these labels"}
    rows = metric_rows({"macro_auc": entry, "ece": nothing | {"undefined_resamples": 0}})
    assert rows == [
        ["Macro-AUC", "0.500", "[0.250, 0.750]", "too few groups; undefined in 7 resamples"],
        ["ECE", "undefined", "", "undefined on these labels"],
    ]


def test_a_card_is_written_from_results_alone(tmp_path: Path) -> None:
    results = make_results()
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("an old card")
    card = write_card(tmp_path)
    assert card == tmp_path / "README.md"
    assert card.read_text() == render_card(results)
    assert card.read_text().endswith("\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "results.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "found no results.json"),
        ("{", "cannot be read"),
        ("[]", "a card cannot be made from"),
        ('{"config": {}}', "a card cannot be made from"),
    ],
)
def test_no_card_without_a_run(tmp_path: Path, content: str | None, words: str) -> None:
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        (folder / "results.json").write_text(content)
    with pytest.raises(GloVLMError, match=words):
        write_card(folder)
    assert not (folder / "README.md").exists()
