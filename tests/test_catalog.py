"""The catalogue of public sets, and where the names and prompts of a class come from."""

import dataclasses
import logging
import os
import re
from pathlib import Path

import pytest
import yaml
from fresh_process import inherited, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_glovlm.data import catalog
from hf_glovlm.data.catalog import (
    ClassInfo,
    catalog_entries,
    catalog_entry,
    describe_source,
    find_grades,
    list_grades,
    load_classes,
    read_entry,
)
from hf_glovlm.data.folder import load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.runs.evaluation import grades_of_run
from hf_glovlm.slides.files.slide_table import read_slide_table

FOLDER = Path(catalog.__file__).with_name("catalog")
FILES = sorted(FOLDER.glob("*.yaml"))
SHARED = Path(os.environ.get("GLOVLM_SHARED", "../shared")) / "data"

# Published wording, word for word: folder name -> the one prompt of the class.
GLO_VLMS = {
    "glo_vlms_cornell": {
        "Atubular Glomeruli": "A pathology image of atubular glomerulus",
        "Global Glomerulosclerosis": "A pathology image of globally sclerotic glomerulus",
        "Ischemic Glomeruli": "A pathology image of ischemic glomerulus",
        "Segmental Glomerulosclerosis": "A pathology image of segmentally sclerotic glomerulus",
        "Viable Glomeruli": "A pathology image of viable glomerulus",
    },
    "glo_vlms_vanderbilt": {
        "Normal glomeruli": "A pathology image of a normal glomeruli",
        "Obsolescent glomeruli": "A pathology image of an obsolescent glomeruli",
        "Solidified glomeruli": "A pathology image of a solidified glomeruli",
        "Disappearing glomeruli": "A pathology image of a disappearing glomeruli",
        "Non-glomerular": "A pathology image of non-glomerular tissue",
    },
    "synthetic_glomeruli": {
        "viable": "A pathology image of viable glomerulus",
        "ischemic": "A pathology image of ischemic glomerulus",
        "segmental_sclerosis": "A pathology image of segmentally sclerotic glomerulus",
        "global_sclerosis": "A pathology image of globally sclerotic glomerulus",
        "atubular": "A pathology image of atubular glomerulus",
    },
}


def write_classes(path: Path, classes: object) -> Path:
    path.write_text(yaml.safe_dump({"classes": classes}), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------- the files


def test_every_file_is_an_entry():
    assert [entry.name for entry in catalog_entries()] == [path.stem for path in FILES]
    assert {*GLO_VLMS, "glomeruli_sclerosis", "lc25000_lung"} <= {p.stem for p in FILES}
    assert [p for p in FOLDER.iterdir() if p.suffix != ".yaml"] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_entry_is_complete_and_finds_itself(path):
    entry = read_entry(path)
    assert entry == catalog_entry(path.stem)
    assert entry.notes
    assert re.search(r"patient|slide|group|tile", entry.split_rule)
    assert ("Synthetic" in entry.title) is (entry.kind == "synthetic")
    assert entry.name in entry.how_to_get
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\.\./|/work/|/home/|/tmp/|[A-Z]:\\", text)  # no path of one machine
    names = [info.name for info in entry.classes]
    assert load_classes(names) == list(entry.classes)  # also where two sets share their classes
    assert load_classes(names[::-1], prompts="catalog") == list(entry.classes)[::-1]
    assert load_classes(names[:1], source=entry.name) == list(entry.classes)[:1]
    assert load_classes(names, prompts=entry.name) == list(entry.classes)


@pytest.mark.parametrize("name", GLO_VLMS)
def test_the_published_prompts_are_exact(name):
    actual = {info.name: info.prompts for info in catalog_entry(name).classes}
    assert actual == {label: (prompt,) for label, prompt in GLO_VLMS[name].items()}


@pytest.mark.parametrize("name", ["glo_vlms_cornell", "glo_vlms_vanderbilt"])
def test_private_images_are_marked(name):
    entry = catalog_entry(name)
    assert not entry.public
    assert "not public" in entry.title
    assert "not public" in entry.how_to_get


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("glomeruli_sclerosis", "glomeruli_sclerosis"),
        ("lc25000_dedup", "lc25000"),
        ("crc_val_he_7k_mini", "crc_val_he_7k"),
        ("osteosarcoma_ut_mini", "osteosarcoma"),
        ("prostate_gleason_mini", "prostate_gleason"),
        ("breakhis_400x_mini", "breakhis"),
    ],
)
def test_class_names_are_the_folders_of_the_real_sets(folder, name):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"{folder} is not here")
    with_images = {p.parent.name for p in (SHARED / folder).glob("*/*") if p.suffix != ".json"}
    assert {info.name for info in catalog_entry(name).classes} == with_images
    classes = load_classes(sorted(with_images), source=SHARED / folder)
    assert set(classes) == set(catalog_entry(name).classes)


# What published work on context-guided tokens reports on, and the count of classes of each set.
TASKS = {
    "slide": {
        "bracs_3": 3, "bracs_7": 7, "camelyon16": 2, "ebrains_12": 12, "ebrains_30": 30,
        "panda": 6, "rcc_dhmc": 5, "tcga_brca": 2, "tcga_nsclc": 2, "tcga_rcc": 3,
    },
    "region": {
        "bach": 4, "bracs_roi": 7, "camelyon17_wilds": 2, "databiox": 3, "digestpath": 2,
        "esca_tolkach": 11, "huncrc": 9, "mhist": 2, "nct_crc_he_100k": 9, "patch_camelyon": 2,
        "sicap_v2": 4, "skin_cancer": 16, "tcga_ut": 32, "unitopatho": 6, "wsss4luad": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
def test_the_tasks_are_there(kind):
    actual = {e.name: len(e.classes) for e in catalog_entries() if e.kind == kind}
    assert TASKS[kind].items() <= actual.items()
    assert kind == "region" or TASKS[kind] == actual
    for name in TASKS[kind]:
        for info in catalog_entry(name).classes:
            assert len(info.prompts) >= 3
            assert any("H&E" in prompt for prompt in info.prompts)


def _image_folder(root, entry, split):
    """One image a class; under train/ and test/ where the layout says so."""
    parts = ("train", "test") if split else (None,)
    rows = ["file_name,label,patient_id" + (",split" if split else "")]
    for part in parts:
        for i, info in enumerate(entry.classes):
            (root / info.name).mkdir(parents=True, exist_ok=True)
            name = f"{info.name}/{part or 0}.png"
            Image.new("RGB", (8, 8), (i, 7, 7)).save(root / name)
            rows.append(f"{name},{info.name},{part}_{i}" + (f",{part}" if split else ""))
    (root / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "entry",
    [e for e in catalog_entries() if e.kind != "slide"],
    ids=lambda e: getattr(e, "name", None),
)
@pytest.mark.parametrize("split", [False, True])
def test_a_folder_in_a_set_s_layout_loads_with_its_prompts(tmp_path, entry, split):
    _image_folder(tmp_path, entry, split)
    loaded = load_dataset(tmp_path)
    assert list(loaded) == (["train", "test"] if split else ["all"])
    names = next(iter(loaded.values())).features["label"].names
    assert sorted(names) == sorted(info.name for info in entry.classes)
    assert set(load_classes(names, source=tmp_path)) == set(entry.classes)
    assert set(load_classes(names, source=tmp_path, prompts=entry.name)) == set(entry.classes)
    if not split:  # class folders alone
        (tmp_path / "metadata.csv").unlink()
        again = load_dataset(tmp_path)["all"].features["label"].names
        assert again == names


@pytest.mark.parametrize(
    "entry",
    [e for e in catalog_entries() if e.kind == "slide"],
    ids=lambda e: getattr(e, "name", None),
)
def test_a_table_in_a_set_s_layout_loads_with_its_prompts(tmp_path, entry):
    assert entry.layout.startswith("slides.csv (slide, label, patient_id)")
    classes = [info.name for info in entry.classes]
    rows = [f"slide_{i}.svs,{name},p{i}" for i, name in enumerate(classes)]
    path = tmp_path / "slides.csv"
    path.write_text("\n".join(["slide,label,patient_id", *rows]), encoding="utf-8")
    table = read_slide_table(path, classes=classes)
    assert table.labels == list(range(len(classes)))
    assert load_classes(table.classes, prompts="catalog") == list(entry.classes)
    files = [tmp_path / f"slide_{i}.h5" for i in range(len(classes))]
    assert list(table.match(files).values()) == files
    path.write_text(path.read_text() + f"\nlast.svs,{classes[0]}x,p\n")
    with pytest.raises(GloVLMError, match="unknown label"):
        read_slide_table(path, classes=classes)


@pytest.mark.parametrize("entry", catalog_entries(), ids=lambda e: e.name)
def test_description_of_a_source(entry):
    text = describe_source(entry.name)
    for fact in (entry.title, entry.source, entry.licence, entry.layout, entry.split_rule):
        assert fact in text
    assert all(fact in text for fact in (*entry.notes, *(info.name for info in entry.classes)))
    assert ("the images are not public" in text) is not entry.public
    words = ("unverified", "CC", "none", "GDC", "Apache", "any use")
    assert any(word in entry.licence for word in words)


def test_a_miss_names_the_nearest_set():
    with pytest.raises(GloVLMError, match=r"no set 'breakhiss'.*Did you mean 'breakhis'"):
        catalog_entry("breakhiss")


def test_importing_is_light_and_the_module_wins_over_its_folder(tmp_path):
    code = (
        "import sys, hf_glovlm.data.catalog as c; c.catalog_entries();"
        "assert c.__file__.endswith('catalog.py'), c.__file__;"
        "own = {'hf_glovlm.data.catalog', 'hf_glovlm.data.terminology'};"
        "assert own <= set(sys.modules); print('{}')"
    )
    run_script(code, home=tmp_path, **inherited())
    source = Path(catalog.__file__).read_text() + (
        Path(catalog.__file__).with_name("terminology.py").read_text()
    )
    heavy = r"import (torch|datasets|transformers|numpy|sklearn)|from (torch|datasets|numpy)"
    assert not re.search(heavy, source)


# -------------------------------------------------------------------------------- bad entries


def good() -> dict:
    text = dict.fromkeys(
        ["title", "licence", "citation", "source", "layout", "split_rule", "metric"], "text"
    )
    classes = {x: {"display_name": x, "prompts": [f"An image of {x}"]} for x in ("one", "two")}
    return (
        {"name": "new", "kind": "region", "stain": ["PAS"], "notes": ["trap"]}
        | text
        | {"classes": classes}
    )


def test_a_sound_file_is_read(tmp_path):
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(good()))
    entry = read_entry(tmp_path / "new.yaml")
    assert entry.classes == (
        ClassInfo("one", "one", ("An image of one",)),
        ClassInfo("two", "two", ("An image of two",)),
    )


def test_templates_are_filled_with_every_name(tmp_path):
    content = good() | {"templates": ["A {}", "An H&E image of {}"]}
    content["classes"] = {
        "one": {"display_name": "One", "names": ["x", "y", "x"]},
        "two": {"display_name": "Two", "names": ["z"]},
    }
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(content))
    assert [info.prompts for info in read_entry(path).classes] == [
        ("A x", "An H&E image of x", "A y", "An H&E image of y"),
        ("A z", "An H&E image of z"),
    ]
    for change, sentence in [
        ({"templates": ["A"]}, "the template 'A' must hold {} once"),
        ({"templates": "A {}"}, "'templates': expected a list of texts"),
        ({"templates": []}, "class 'one': 'prompts' is empty"),
        ({"classes": good()["classes"]}, "class 'one': unknown key 'prompts'"),
    ]:
        path.write_text(yaml.safe_dump(content | change))
        with pytest.raises(GloVLMError, match=re.escape(sentence)):
            read_entry(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *(
            (lambda f, key=key: f.pop(key), f"the key '{key}' is missing")
            for key in sorted(set(good()) - {"classes"})
        ),
        (lambda f: f.pop("classes"), "'classes' must hold at least two"),
        (lambda f: f["classes"].pop("one"), "'classes' must hold at least two"),
        (lambda f: f.update(license="MIT"), "unknown key 'license'. Did you mean 'licence'?"),
        (lambda f: f.update(title=""), "'title': expected text"),
        (lambda f: f.update(title=7), "'title': expected text"),
        (
            lambda f: f.update(kind="slides"),
            "'kind': expected one of glomeruli, region, slide, synthetic",
        ),
        (lambda f: f.update(stain="PAS"), "'stain': expected a list of texts, found 'PAS'"),
        (lambda f: f.update(stain=["HE"]), "write the stain 'HE' as 'H&E'"),
        (lambda f: f.update(stain=["blue"]), "Unknown stain 'blue'"),
        (lambda f: f.update(notes=[1]), "'notes', item 1: expected text"),
        (lambda f: f.update(name="old"), "'name' is 'old', but the file is called 'new'"),
        (lambda f: f["classes"]["one"].pop("prompts"), "class 'one': the key 'prompts' is missing"),
        (lambda f: f["classes"]["one"].update(prompts=[]), "class 'one': 'prompts' is empty"),
        (lambda f: f["classes"]["one"].update(prompt=[]), "class 'one': unknown key 'prompt'"),
        (lambda f: f["classes"]["one"].pop("display_name"), "the key 'display_name' is missing"),
        (lambda f: f["classes"].update(One=f["classes"]["one"]), "differ in spelling only"),
        (
            lambda f: f["classes"]["two"].update(prompts=["an image of ONE"]),
            "'one' and 'two' share the prompt",
        ),
    ],
)
def test_a_bad_entry_names_the_file_and_the_key(tmp_path, change, sentence):
    content = good()
    change(content)
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(GloVLMError, match=re.escape(sentence)) as caught:
        read_entry(path)
    assert "new.yaml" in str(caught.value) or "stain" in sentence
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"classes: [", "not valid YAML"),
        (b"a: 1\na: 2\n", "line 2: not valid YAML: the key 'a' stands there twice"),
        (b"- a\n", "expected keys and values at the top, found a list"),
        (b"", "expected keys and values at the top, found nothing"),
        (b"[a]: 1\n", "a key must be plain text"),
        (b"a: !!python/object:os.system {}\n", "not valid YAML"),
        ("title: é".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_broken_yaml_file_gives_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "classes.yaml"
    path.write_bytes(text)
    with pytest.raises(GloVLMError, match=re.escape(sentence)) as caught:
        load_classes(["a", "b"], prompts=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- precedence

OWN = {"sclerosed": {"display_name": "Scarred", "prompts": ["my words"]}}
LABELS = ["non_sclerosed", "sclerosed"]


@pytest.mark.parametrize(
    ("labels", "beside", "prompts", "display_names", "first_prompts"),
    [
        (
            ["apple_pie", "pear"],
            None,
            "auto",
            ["apple pie", "pear"],
            ["A pathology image of apple pie", "A pathology image of pear"],
        ),
        (
            LABELS,
            None,
            "auto",
            ["Non-sclerosed", "Sclerosed"],
            [
                "A pathology image of non-sclerotic glomerulus",
                "A pathology image of globally sclerotic glomerulus",
            ],
        ),
        (
            LABELS,
            None,
            "terminology",
            ["Non-sclerosed", "Sclerosed"],
            [
                "A pathology image of a non-sclerotic glomerulus",
                "A pathology image of a sclerotic glomerulus",
            ],
        ),
        *(
            (LABELS, OWN, prompts, ["Non-sclerosed", "Scarred"], [first, "my words"])
            for prompts, first in [
                ("auto", "A pathology image of non-sclerotic glomerulus"),
                ("catalog", "A pathology image of non-sclerotic glomerulus"),
                ("terminology", "A pathology image of a non-sclerotic glomerulus"),
            ]
        ),
        (  # only the display name: the prompts come from the next source
            LABELS,
            {"sclerosed": {"display_name": "Scarred"}},
            "auto",
            ["Non-sclerosed", "Scarred"],
            [
                "A pathology image of non-sclerotic glomerulus",
                "A pathology image of globally sclerotic glomerulus",
            ],
        ),
        (  # only a display name, and nobody else knows the class
            ["apple", "pear"],
            {"pear": {"display_name": "Green pear"}},
            "auto",
            ["apple", "Green pear"],
            ["A pathology image of apple", "A pathology image of Green pear"],
        ),
        (  # everything is given: the catalogue is not needed
            ["1", "no"],
            {"1": {"prompts": ["first"]}, "no": {"prompts": ["second"]}},
            "catalog",
            ["1", "no"],
            ["first", "second"],
        ),
    ],
)
def test_precedence(tmp_path, labels, beside, prompts, display_names, first_prompts):
    if beside is not None:
        write_classes(tmp_path / "classes.yaml", beside)
    classes = load_classes(labels, source=tmp_path, prompts=prompts)
    assert [info.name for info in classes] == labels
    assert [info.display_name for info in classes] == display_names
    assert [info.prompts[0] for info in classes] == first_prompts


def test_the_file_that_is_named_takes_the_place_of_the_one_beside_the_data(tmp_path):
    write_classes(tmp_path / "classes.yaml", {label: {"prompts": [label]} for label in LABELS})
    named = write_classes(tmp_path / "other.yaml", OWN)
    for prompts in (named, str(named)):
        first, second = load_classes(LABELS, source=tmp_path, prompts=prompts)
        assert first.prompts == ("A pathology image of non-sclerotic glomerulus",)
        assert second.prompts == ("my words",)


def test_classes_yaml_beside_a_table(tmp_path):
    write_classes(tmp_path / "classes.yaml", {"a": {"prompts": ["x", "y", "x"]}})
    (tmp_path / "images.parquet").touch()
    first, second = load_classes(["a", "b"], source=str(tmp_path / "images.parquet"))
    assert first.prompts == ("x", "y")
    assert second.prompts == ("A pathology image of b",)


def test_keys_of_classes_yaml_are_read_as_written(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("classes:\n  no: {prompts: [none]}\n  01: {prompts: [first]}\n")
    assert [c.prompts for c in load_classes(["01", "no"], prompts=path)] == [("first",), ("none",)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"classes": {"sclerosd": {}}}, "no class 'sclerosd'. Did you mean 'sclerosed'?"),
        ({"classes": {"sclerosed": {"prompt": ["x"]}}}, "class 'sclerosed': unknown key 'prompt'"),
        ({"classes": {"sclerosed": {"prompts": "x"}}}, "expected a list of texts, found 'x'"),
        ({"classes": {"sclerosed": {"prompts": []}}}, "'prompts' is empty"),
        ({"classes": {"sclerosed": {"prompts": [" "]}}}, "item 1: expected text"),
        ({"classes": {"sclerosed": None}}, "expected keys and values, found nothing"),
        ({"sclerosed": {"prompts": ["x"]}}, "expected the one key 'classes'"),
        ({"classes": ["sclerosed"]}, "expected the one key 'classes'"),
        (
            {"classes": {label: {"prompts": ["Same"]} for label in LABELS}},
            "share the prompt 'Same'",
        ),
    ],
)
def test_a_bad_classes_yaml_gives_one_sentence(tmp_path, content, sentence):
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(GloVLMError, match=re.escape(sentence)):
        load_classes(LABELS, source=tmp_path)


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        ([], {}, "Expected different class labels, found none"),
        (["a", "a"], {}, "Expected different class labels"),
        (["a", "b"], {"prompts": "catalog"}, "No set of the catalogue has the classes a, b"),
        (["a", "b"], {"prompts": "terminology"}, "The terminology has none of the classes a, b"),
        (["a", "b"], {"prompts": "catalogue"}, "Did you mean 'catalog'?"),
        (["a", "b"], {"prompts": "no/such.yaml"}, "Expected a YAML file at no/such.yaml"),
        (["a", "b"], {"prompts": Path()}, "found: a folder"),
        (
            ["viabel", "atubular"],
            {"source": "synthetic_glomeruli"},
            "no class 'viabel'. Did you mean 'viable'",
        ),
        (["benign", "spindle"], {"prompts": "breakhis"}, "'breakhis' has no class 'spindle'"),
        (["Oxford M0", "viable"], {"prompts": "terminology"}, "a whole biopsy (Oxford MEST-C)"),
        (["cg1a", "viable"], {"prompts": "terminology"}, "only electron microscopy shows it"),
        (
            ["normal", "viable"],
            {"prompts": "terminology"},
            "'normal' and 'viable' share the prompt",
        ),
        (["viable", "atubular"], {"prompts": "terminology", "stain": "blu"}, "Unknown stain 'blu'"),
    ],
)
def test_impossible_requests_are_refused(labels, options, sentence):
    with pytest.raises(GloVLMError, match=re.escape(sentence)):
        load_classes(labels, **options)


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (["viable_glomeruli", "ISCHEMIC GLOMERULI"], "glo_vlms_cornell"),
        (["lung_n", "lung_aca"], "lc25000_lung"),  # the smallest set that has them
        (["lung_n", "colon_n"], "lc25000"),
        (["segmental-sclerosis", "viable"], "synthetic_glomeruli"),
        (["viable"], None),  # one label identifies nothing
        (["viable", "apple"], None),
    ],
)
def test_a_set_is_known_by_its_classes(labels, name, caplog):
    with caplog.at_level(logging.INFO, "hf_glovlm"):
        classes = load_classes(labels)
    assert (f"set '{name}'" in caplog.text) is (name is not None)
    assert [info.name for info in classes] == labels
    published = {p for e in catalog_entries() for info in e.classes for p in info.prompts}
    if name is None:
        assert not published & {p for info in classes for p in info.prompts}
    else:
        own = {p for info in catalog_entry(name).classes for p in info.prompts}
        assert {p for info in classes for p in info.prompts} <= own


def test_a_tie_between_sets_uses_neither_with_a_warning(monkeypatch, caplog):
    lung = catalog_entry("lc25000_lung")
    words = tuple(dataclasses.replace(c, prompts=(f"other {c.name}",)) for c in lung.classes)
    twins = (
        dataclasses.replace(lung, name="lung_1"),
        dataclasses.replace(lung, name="lung_2", classes=words),
    )
    monkeypatch.setattr(catalog, "_entries", lambda: twins)
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        classes = load_classes(["lung_aca", "lung_n"])
    assert classes[0].prompts == ("A pathology image of lung aca",)
    assert "'lung_1', 'lung_2'" in caplog.text


def test_sets_with_equal_prompts_are_no_tie(monkeypatch, caplog):
    lung = catalog_entry("lc25000_lung")
    twins = tuple(dataclasses.replace(lung, name=name) for name in ("lung_1", "lung_2"))
    monkeypatch.setattr(catalog, "_entries", lambda: twins)
    assert load_classes(["lung_aca", "lung_n"]) == [lung.classes[0], lung.classes[1]]
    assert "none is used" not in caplog.text


CORNELL = list(GLO_VLMS["glo_vlms_cornell"])


@pytest.mark.parametrize(
    ("labels", "stain", "named"),
    [
        (CORNELL, None, False),
        (CORNELL, "PAS", True),
        (list(GLO_VLMS["glo_vlms_vanderbilt"]), "pas", True),
        (CORNELL, "H&E", False),  # not shown for every class, so named for none
        (["viable", "global sclerosis"], "HE", True),
        (["viable", "apple"], "PAS", False),  # the template of 'apple' carries no stain
    ],
)
def test_the_stain_is_named_for_all_classes_or_for_none(labels, stain, named, caplog):
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        classes = load_classes(labels, prompts="terminology", stain=stain)
    assert {("stain" in p) for info in classes for p in info.prompts} == {named}
    assert ("No prompt names the stain" in caplog.text) is (stain is not None and not named)


LABEL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(st.lists(LABEL.filter(str.strip), min_size=1, max_size=6, unique_by=lambda x: x.casefold()))
def test_every_label_gets_its_own_prompt_in_order(labels):
    shown = {" ".join(["A pathology image of", x.replace("_", " ").strip() or x]) for x in labels}
    if len({text.casefold() for text in shown}) < len(labels):  # 'a b' and 'a_b' read the same
        with pytest.raises(GloVLMError, match="share the prompt"):
            load_classes(labels)
        return
    classes = load_classes(labels)
    assert [info.name for info in classes] == labels
    assert all(info.prompts and info.display_name for info in classes)
    prompts = [p.casefold() for info in classes for p in info.prompts]
    assert len(set(prompts)) == len(prompts)


# Grades ----------------------------------------------------------------------------------------


def test_sets_of_grades_state_their_order():
    graded = {e.name: list_grades(e.classes) for e in catalog_entries()}
    assert {name: grades for name, grades in graded.items() if grades} == {
        "databiox": [1, 2, 3],
        "panda": [0, 1, 2, 3, 4, 5],
        "prostate_gleason": [0, 3, 4, 5],
        "sicap_v2": [0, 3, 4, 5],
    }
    for entry in catalog_entries():  # who says that the classes are ordered gives the grades
        assert bool(graded[entry.name]) == any("classes are ordered" in n for n in entry.notes)
    assert find_grades(["G5", "G3", "NC"]) == [5, 3, 0]
    assert find_grades(["viable", "sclerosed"]) is None


def test_own_grades_are_read_and_kept_beside_those_of_the_catalogue(tmp_path):
    write_classes(tmp_path / "classes.yaml", {"mild": {"grade": 1}, "none": {"grade": 0}})
    classes = load_classes(["mild", "none"], source=tmp_path)
    assert list_grades(classes) == [1, 0]
    assert classes[0].to_dict()["grade"] == 1
    write_classes(tmp_path / "classes.yaml", {"G3": {"display_name": "Pattern 3"}})
    assert list_grades(load_classes(["NC", "G3"], source=tmp_path)) == [0, 3]
    assert "grade" not in load_classes(["mild", "none"])[0].to_dict()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"mild": {"grade": 1}}, "class 'none' has the grade none; give every class its own"),
        ({"mild": {"grade": 1}, "none": {"grade": 1}}, "has the grade 1 like another"),
        ({"mild": {"grade": "low"}}, "'grade': expected a whole number, found 'low'"),
        ({"mild": {"grade": True}}, "'grade': expected a whole number"),
    ],
)
def test_half_an_order_is_refused(tmp_path, classes, message):
    write_classes(tmp_path / "classes.yaml", classes)
    with pytest.raises(GloVLMError, match=message):
        load_classes(["mild", "none"], source=tmp_path)


def test_a_model_is_measured_by_the_grades_that_its_run_states_or_the_catalogue():
    run = {"data": {"classes": [{"name": "mild", "grade": 2}, {"name": "none", "grade": 1}]}}
    assert grades_of_run(run, ["none", "mild"]) == [1, 2]
    assert grades_of_run({"data": {"classes": ["none", "mild"]}}, ["none", "mild"]) is None
    assert grades_of_run(None, ["G4", "G3"]) == [4, 3]
