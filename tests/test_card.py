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
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from tiny import tiny_clip, tiny_images

import hf_glovlm
from hf_glovlm.backbones import BACKBONES, MINI
from hf_glovlm.calibration import measure_abstention, measure_sets
from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.phantoms import render_glomerulus
from hf_glovlm.metrics import compute_metrics, compute_subgroups
from hf_glovlm.publish.card import Publication, render_backbone_card, render_card, write_card
from hf_glovlm.rendering import group_unit
from hf_glovlm.runs import run
from hf_glovlm.runs.config import TrainConfig

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
    *, synthetic: bool = False, absent: bool = False, full: bool = False, **changes: Any
) -> dict[str, Any]:
    """What `run` returns, with real numbers, and with secrets wherever it may hold them.

    Args:
        synthetic: Whether the images are synthetic.
        absent: Whether one class has no test image.
        full: Whether everything that a run may be asked for was; otherwise the results are those
            of a plain run before any of it existed.
        changes: Replaces parts.
    """
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
    if full:
        groups = [PATIENTS[i % 12] for i in range(60)]
        results |= {
            "calibration": {
                "n": 31,
                "groups": 7,
                "per_class": dict(zip(CLASSES, (11, 13, 7), strict=True)),
                "nll": {"before": 1.2345678, "after": 0.9876543},
                "temperature": 1.7182818,
                "coverage_range": [0.81, 0.97],
            },
            "sets": measure_sets(probabilities > 0.3, labels, CLASSES, groups, n_resamples=50),
            "abstention": measure_abstention(probabilities, labels, 0.7),
            "prior_correction": {
                "how": "em",
                "prevalence": dict(zip(CLASSES, rng.dirichlet((1, 1, 1)).tolist(), strict=True)),
            },
            "transductive": {
                "query_images": 60,
                "saved_model_alone": {"balanced_accuracy": 0.76543},
            },
            "subgroups": compute_subgroups(
                labels,
                probabilities,
                {"stain": ["PAS", "H&E"] * 30, "institution": ["Seven", "Nine", None] * 20},
                groups=groups,
                class_names=CLASSES,
                n_resamples=50,
            ),
        }
        config |= {"conformal": "aps", "alpha": 0.15, "max_risk": 0.05, "calibration_groups": 7}
        data = results["data"]
        data |= {"mpp": 0.4938, "stain": ["PAS", "H&E"]}
        data["counts"] |= {"calibration": results["calibration"]["per_class"]}
        data["support"] |= {"calibration_labels": 31, "label_budget": 50}
        results["backbone"]["restrictions"] = []
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
    assert data.base_model_relation == "finetune"
    assert data.library_name == "hf-glovlm"
    assert data.pipeline_tag == "image-classification"
    assert data.language == "en"
    assert data.datasets is None  # a folder is no data set of the Hub
    assert "lora" in data.tags
    assert ("synthetic" in data.tags) is synthetic
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert len(values) == len(results["metrics"])
    assert values["Macro-AUC" + " (synthetic images)" * synthetic] == pytest.approx(
        results["metrics"]["macro_auc"]["value"], abs=5e-5
    )
    assert {result.dataset_split for result in data.eval_results} == {"test"}
    index = front_matter(render_card(results))["model-index"]
    assert model_index_to_eval_results(index)[1] == data.eval_results


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
    values = front_matter(render_card(results))
    assert (values["license"], values.get("license_name")) == (license_id, name)


@pytest.mark.parametrize(
    ("backbone", "present", "absent"),
    [
        ({"name": "mini", "license": "apache-2.0", "restrictions": []}, "inherits", "commercial"),
        ({"name": "mini", "license": None, "restrictions": None}, "is not known here", "**Not"),
        ({"name": "x/plip", "license": "not verified"}, "is not known here", "inherits"),
        ({"name": "x/y", "license": "mit"}, "was not recorded", "**No"),
        (
            {"name": "x/y", "license": "own", "restrictions": ["non-commercial"]},
            "**Not for commercial use.**",
            "**No derivatives",
        ),
        # Results from before restrictions were kept: the table knows.
        (
            {"name": "MahmoodLab/conch", "license": "cc-by-nc-nd-4.0"},
            "**No derivatives may be shared.**",
            "recorded",
        ),
    ],
)
def test_what_the_base_forbids_is_said_plainly(
    backbone: dict[str, Any], present: str, absent: str
) -> None:
    card = render_card(make_results(backbone={"revision": None, **backbone}))
    section = card.split("## Licence of the backbone")[1].split("## Metrics")[0]
    assert present in section
    assert absent not in section


def test_a_licence_of_its_own_is_linked() -> None:
    base = {"name": "owkin/phikon-v2", "revision": None, "license": "owkin non-commercial"}
    values = front_matter(render_card(make_results(backbone=base)))
    assert values["license_link"] == "https://huggingface.co/owkin/phikon-v2"


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
    about = front_matter(render_card(results))
    values = about.get("base_model", [])
    assert len(values) == expected
    assert all(name in backbone and "/" in name for name in values)
    assert ("base_model_relation" in about) == bool(expected)


def test_a_base_in_a_folder_is_called_that() -> None:
    results = make_results()
    results["backbone"]["name"] = SECRETS["backbone"]
    card = render_card(results)
    assert "a local folder+a local folder adapted by lora" in card
    assert "secret" not in card
    assert "base_model" not in front_matter(card)


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
# What is no result: the papers of the protocol and of the backbones.
CITED = {"2508.15960", "2511.11984"} | set(
    NUMBER.findall(" ".join(row.citation for row in BACKBONES.values()))
)


@pytest.mark.parametrize("changes", [{}, {"synthetic": True}, {"absent": True}, {"full": True}])
def test_every_number_comes_from_the_results(changes: dict[str, Any]) -> None:
    """As it stands there, with three decimals, or rounded to four in the front matter."""
    results = make_results(**changes)
    card = render_card(results)
    values = set(NUMBER.findall(card))
    assert values <= numbers_in(results) | CITED
    for entry in results["metrics"].values():
        if entry["value"] is not None:
            assert {f"{x:.3f}" for x in (entry["value"], *(entry["ci95"] or ()))} <= values


def test_the_test_of_numbers_can_fail() -> None:
    """The template holds no number but a paper's, and a made-up one would be noticed."""
    templates = Path(hf_glovlm.__file__).parent / "templates"
    assert set(NUMBER.findall((templates / "model_card.md.j2").read_text())) <= CITED
    assert not {"0.999", "17.5", "61"} & (numbers_in(make_results(full=True)) | CITED)


def test_a_number_that_changes_changes_the_card() -> None:
    results = make_results()
    other = copy.deepcopy(results)
    other["per_class"]["viable"]["recall"]["value"] = 0.123
    assert "0.123" not in render_card(results)
    assert "0.123" in render_card(other)


@pytest.mark.parametrize("synthetic", [False, True])
def test_nothing_leads_to_a_patient_or_a_disk(synthetic: bool) -> None:
    results = make_results(synthetic=synthetic, full=True)
    results["notes"] += [
        "The image /data/ward/12.png was left out.",
        r"Prompts came from C:\\ward\\classes.yaml.",
        "biopsy_of_jones.svs has no mpp.",
        "Found at ~/hospital/x.",
    ]
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


def test_synthetic_images_stand_in_the_title_and_above_every_number() -> None:
    card = render_card(make_results(synthetic=True, full=True))
    assert "synthetic images" in front_matter(card)["model-index"][0]["name"]
    sections = re.split(r"^(#+ .*)$", body(card), flags=re.MULTILINE)
    assert "synthetic images" in sections[1]
    measured = ("Metrics", "Per class", "Confusion", "Where it fails", "Calibration", "By stain")
    headings = [h for h in sections[1::2] if any(word in h for word in measured)]
    assert len(headings) == len(measured)
    assert all("synthetic images" in heading for heading in headings)
    plain = render_card(make_results())
    assert "synthetic images" not in plain
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
    results["data"]["classes"][0] |= {"display_name": "a | b\n{{ n }}", "prompts": ["{x} | $y"]}
    line = next(x for x in render_card(results).splitlines() if x.startswith("| ischemic | a"))
    assert line == r"| ischemic | a \| b {{ n }} | {x} \| $y |"


def renamed(results: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The results with other class names."""
    text = json.dumps(results)
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    return json.loads(text)


@pytest.mark.parametrize("what", [None, "full", "adapter"])
def test_a_class_may_have_any_name(what: Any) -> None:
    """It stands in the card as it is: no word of the card, no template, no end of a table."""
    publication = Publication("lab/model", what, "x/y", "0123abc", ["Own terms."]) if what else None
    results = renamed(make_results(full=True), {name: f"{name}_0" for name in CLASSES})
    odd = {"ischemic_0": "RUN", "sclerosed_0": "{{ n }}{% for %}", "viable_0": "a|b\n# c"}
    expected = render_card(results, publication)
    for name, new in odd.items():
        assert expected.count(name) > 6
        expected = expected.replace(name, new.replace("\n", " "))
    card = render_card(renamed(results, odd), publication)
    assert card.replace("\\|", "|") == expected
    assert r"| a\|b # c |" in card
    assert ('"RUN/model"' in card) is (what is None)


ODD = [
    "RUN", "{{ x }}", "---", "***", "`x`", "<script>alert(1)</script>", "[x](http://x.y)", "_a_",
    "*a*", "![](x.png)", "a: b", "- a", "# a", "&amp;", "~~a~~", "null", "%a", "@a", "'a\"", "\\*",
    "a|b", "1. a",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_name_is_read_neither_as_markdown_nor_as_yaml(name: str) -> None:
    """Rendered as the Hub does, its cells show it as it was given, and no other place changes."""
    publication = Publication("lab/model", "full", "x/y", "0123abc", ["Own terms."])
    results = renamed(make_results(full=True), {"ischemic": name})
    results["data"]["name"] = name
    card = render_card(results, publication)
    assert 'model="lab/model"' in card
    about = ModelCard(card).data
    named = {row.dataset_name for row in about.eval_results or ()}
    assert {text.removesuffix(" (synthetic images)") for text in named} == {name}
    markdown = pytest.importorskip("markdown_it").MarkdownIt
    tokens = markdown("commonmark", {"html": True}).enable("table").parse(ModelCard(card).text)
    shown = [token for token in tokens if token.type == "inline"]
    texts = ["".join(c.content for c in token.children or ()) for token in shown]
    assert texts.count(name) >= 4
    kinds = {child.type for token in shown for child in token.children or ()}
    assert kinds <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}
    assert {token.type for token in tokens} & {"html_block", "hr"} == set()


def test_a_note_stays_on_its_line() -> None:
    results = make_results(notes=["first\n\n# A heading {{ n }}"])
    assert "\n- first # A heading {{ n }}\n" in render_card(results)


def oral_results() -> dict[str, Any]:
    """Those of a model of oral mucosa."""
    results = make_results()
    results["data"]["name"] = "oral_mucosa"
    for row in results["data"]["classes"]:
        row["prompts"] = [f"A pathology image of {row['name']} oral mucosa"]
    return results


@pytest.mark.parametrize("what", [None, "full", "head"])
def test_tags_and_example_come_from_the_data(what: Any) -> None:
    publication = Publication("lab/model", what, "x/y", "0123abc", []) if what else None
    for results, tags, example in (
        (oral_results(), {"histopathology"}, "image.png"),
        (make_results(), {"glomerulus", "nephropathology"}, "glomerulus.png"),
    ):
        card = render_card(results, publication)
        shared = {"few-shot", "vision-language", "not-for-diagnosis", "lora"}
        assert set(ModelCard(card).data.tags) == tags | shared
        assert f'Image.open("{example}")' in card
    assert "glomerul" not in render_card(oral_results(), publication).lower()


def test_a_published_card_names_its_place_and_terms() -> None:
    terms = ["The licence passes on.", "Why it was published: it may be."]
    card = render_card(make_results(), Publication("lab/model", "head", "x/y+z", "0123abc", terms))
    about = ModelCard(card).data
    assert about.base_model == ["x/y", "z"]
    assert about.base_model_relation == "adapter"
    assert 'load_published("lab/model")' in card
    assert "at commit `0123abc`" in card
    assert card.endswith("\n## Licence and publication\n\n" + "".join(f"- {x}\n" for x in terms))
    assert "Licence and publication" not in render_card(make_results())


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


def test_a_card_is_written_from_results_alone(tmp_path: Path) -> None:
    results = make_results()
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("---\nlibrary_name: hf-glovlm\n---\nan old card")
    card = write_card(tmp_path)
    assert card == tmp_path / "README.md"
    assert card.read_text() == render_card(results)
    assert card.read_text().endswith("\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "results.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "found no results.json"),
        ("{", "is damaged"),
        ("[]", "expected keys and values, found list"),
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


# ------------------------------------------------------------------------------- the sections


@pytest.fixture(scope="module")
def full_card() -> str:
    return render_card(make_results(full=True))


def section(card: str, heading: str) -> str:
    return re.split(r"^#+ ", card.split(f"# {heading}", 1)[1], flags=re.MULTILINE)[0]


def test_labels_are_told_by_class_and_by_use(full_card: str) -> None:
    text = section(full_card, "Labels that it learned from")
    header = "| class | labels | contributing patients | further labels, for calibration |"
    assert header in text
    assert "| ischemic | 8 | 5 | 11 |" in text
    assert "Label budget: 50, of which 31 served for calibration." in text
    assert "Patients on each side: support 5, validation 0, test 12." in text


@pytest.mark.parametrize(
    ("data", "config", "lines"),
    [
        ({}, {}, ["Stain: not stated", "Scale: unknown"]),
        ({"mpp": "unknown"}, {"stain": "PAS"}, ["Stain: PAS", "Scale: unknown"]),
        ({"mpp": 0.5, "stain": ["PAS", "H&E"]}, {}, ["Stain: PAS, H&E", "Scale: 0.5 micrometres"]),
    ],
)
def test_stain_scale_and_split(
    data: dict[str, Any], config: dict[str, Any], lines: list[str]
) -> None:
    results = make_results()
    results["data"] |= data
    results["config"] |= config
    text = section(render_card(results), "Data and split")
    for line in (*lines, f"Split hash: `{'b' * 32}`"):
        assert f"- {line}" in text


def test_failures_are_the_worst_classes_and_pairs() -> None:
    results = make_results()
    classes = results["per_class"]
    for name, recall in zip(CLASSES, (0.9, 0.25, 1.0), strict=True):
        classes[name]["recall"] |= {"value": recall, "ci95": [0.1, 0.95]}
    results["confusion_matrix"] = [[18, 2, 0], [9, 5, 6], [0, 0, 20]]
    lines = [line for line in section(render_card(results), "Where it fails").splitlines() if line]
    assert lines == [
        "- Recall of `sclerosed`: 0.250 [0.100, 0.950], on 20 images of 4 patients.",
        "- Recall of `ischemic`: 0.900 [0.100, 0.950], on 20 images of 4 patients.",
        "- 9 of 20 images of `sclerosed` were called `ischemic`.",
        "- 6 of 20 images of `sclerosed` were called `viable`.",
        "- 2 of 20 images of `ischemic` were called `sclerosed`.",
    ]


def test_no_failure_is_no_praise() -> None:
    results = make_results()
    for row in results["per_class"].values():
        row["recall"]["value"] = 1.0
    results["confusion_matrix"] = np.diag([20, 20, 20]).tolist()
    assert "so few images do not show" in section(render_card(results), "Where it fails")


def test_calibration_is_told_as_far_as_it_went(full_card: str) -> None:
    text = section(full_card, "Calibration")
    sets = make_results(full=True)["sets"]
    for words in (
        "Calibrated on 31 images of 7 patients",
        "ischemic 11, sclerosed 13, viable 7",
        "from 1.235 to 0.988",
        "Temperature: 1.718",
        "(`aps`, alpha 0.15)",
        f"class of {sets['coverage']:.3f} [{sets['coverage_ci95'][0]:.3f}",
        "asked for was at most 0.05",
        "estimated from the unlabelled test images",
        "The 60 unlabelled test images were judged together",
    ):
        assert words in text
    assert "not calibrated" not in text
    plain = section(render_card(make_results()), "Calibration")
    assert "as trained, not calibrated" in plain
    assert "Prediction sets" not in plain


def test_subgroups_are_those_that_name_nobody(full_card: str) -> None:
    measured = make_results(full=True)["subgroups"]
    assert sorted(measured) == ["institution", "stain"]
    text = section(full_card, "By stain")
    pas = measured["stain"]["PAS"]
    value = pas["metrics"]["balanced_accuracy"]["value"]
    assert f"| PAS | 30 | {pas['n_groups']} | {value:.3f} [" in text
    assert "Seven" not in full_card
    assert "### By" not in render_card(make_results())


def test_a_subgroup_is_measured_alone() -> None:
    rng = np.random.default_rng(3)
    labels, p = np.arange(40) % 2, rng.dirichlet((1, 1), 40)
    groups = [f"g{i % 5}" for i in range(40)]
    stain = ["PAS" if i < 22 else "H&E" if i < 35 else None for i in range(40)]
    options: dict[str, Any] = {"class_names": ["a", "b"], "n_resamples": 30, "seed": 2}
    columns = {"stain": stain, "scanner": ["one"] * 40, "level": [None] * 40}
    values = compute_subgroups(labels, p, columns, groups=groups, **options)
    assert list(values) == ["stain"]
    assert list(values["stain"]) == ["H&E", "PAS"]
    for name, rows in (("PAS", slice(0, 22)), ("H&E", slice(22, 35))):
        alone = compute_metrics(labels[rows], p[rows], groups=groups[rows], **options)
        assert values["stain"][name] == {k: alone[k] for k in ("n", "n_groups", "metrics")}
    with pytest.raises(GloVLMError, match="Expected 40 values of 'stain', found 3"):
        compute_subgroups(labels, p, {"stain": ["PAS"] * 3})


@pytest.mark.parametrize(
    "lacking",
    [
        ("calibration", "sets", "abstention", "subgroups", "transductive", "prior_correction"),
        ("calibration",),
        ("sets",),
    ],
)
def test_results_of_earlier_versions_render(lacking: tuple[str, ...]) -> None:
    results = make_results(full=True)
    for key in lacking:
        del results[key]
    for key in ("mpp", "stain", "counts", "groups"):
        del results["data"][key]
    for key in ("calibration_groups", "clip_norm", "accumulate"):
        del results["config"][key]
    del results["backbone"]["restrictions"], results["data"]["support"]["calibration_labels"]
    card = render_card(results)
    assert ModelCard(card).data.eval_results
    assert set(NUMBER.findall(card)) <= numbers_in(results) | CITED


# ------------------------------------------------------------------------------------- its lines


def _execute(card: str, changes: dict[str, str]) -> None:
    """Run the first block of Python in a card, after telling it where things are."""
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert code
    text = code[1]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    exec(compile(text, "card", "exec"), {})


def test_the_lines_of_the_card_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_images(tmp_path / "images", per_class=4, groups=4)
    config = TrainConfig(
        data=str(data),
        output_dir=str(tmp_path / "run"),
        backbone=str(tiny_clip()),
        shots=2,
        n_resamples=20,
        cache=False,
    )
    results = run(config)
    card = (tmp_path / "run" / "README.md").read_text()
    assert card == render_card(results)
    assert set(NUMBER.findall(card)) <= numbers_in(results.to_dict()) | CITED
    assert str(tmp_path) not in card
    image = tmp_path / "one.png"
    Image.new("RGB", (40, 40), "white").save(image)
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert code
    assert len([line for line in code[1].splitlines() if line]) == 5
    capsys.readouterr()
    _execute(card, {"RUN/model": str(tmp_path / "run" / "model"), "image.png": str(image)})
    printed = capsys.readouterr().out
    assert all(f"'{name}'" in printed for name in ("mesangial", "sclerosed", "viable"))


# ------------------------------------------------------------------------------------------ mini


@pytest.fixture(scope="module")
def mini() -> tuple[dict[str, Any], str]:
    facts = json.loads((MINI / "pretraining.json").read_text())
    return facts, render_backbone_card(facts)


def test_the_card_of_mini(mini: tuple[dict[str, Any], str]) -> None:
    facts, card = mini
    about = ModelCard(card).data
    assert about.license == "apache-2.0"
    assert "synthetic" in about.tags
    assert about.base_model is None
    (result,) = about.eval_results
    assert result.metric_value == pytest.approx(facts["accuracy"], abs=1e-3)
    assert "synthetic images" in result.metric_name
    assert "Not for diagnosis" in card
    assert "never seen a photograph" in card
    versions = {"2.0"}  # of the licence
    assert set(NUMBER.findall(card)) <= numbers_in(facts) | versions
    assert not {"{{", "{%"} & set(re.findall(r"\{.", card))
    assert card == (MINI / "README.md").read_text()


def test_the_lines_of_minis_card_run(
    mini: tuple[dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "one.png"
    render_glomerulus("viable", seed=1).image.save(image)
    _execute(mini[1], {"image.png": str(image)})
    assert "tensor([[" in capsys.readouterr().out


def test_the_card_of_mini_is_written_where_asked(
    mini: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    card = write_card("mini", tmp_path / "cards" / "mini.md")
    assert card.read_text() == mini[1]
    assert [path.name for path in card.parent.iterdir()] == ["mini.md"]
    with pytest.raises(GloVLMError, match="give --output"):
        write_card("mini")
    (tmp_path / "file").write_text("")
    with pytest.raises(GloVLMError, match="cannot be written"):
        write_card("mini", tmp_path / "file" / "mini.md")
    facts = {name: 1 for name in mini[0] if name != "accuracy"}
    with pytest.raises(GloVLMError, match=r"pretraining\.json.*'accuracy'"):
        render_backbone_card(facts | {"log": [], "accuracy_by_template": {}})


def test_the_cards_of_the_project_are_as_they_are_rendered(
    mini: tuple[dict[str, Any], str],
) -> None:
    folder = Path(__file__).resolve().parent.parent / "model_cards"
    assert (folder / "mini.md").read_text() == mini[1]
    for card in folder.glob("*.md"):
        assert "Not for diagnosis" in card.read_text()


def test_a_card_can_go_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(make_results()))
    card = write_card(tmp_path / "run", tmp_path / "cards" / "one.md")
    assert card.read_text() == render_card(make_results())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]
