"""The terminology: strict reading, marks of doubt, prompts limited to what a crop shows."""

import logging
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_glovlm.data import terminology
from hf_glovlm.data.terminology import (
    described_prompts,
    find_stain,
    find_term,
    match_key,
    prompts_for,
    terms,
    terms_of,
)
from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files import case_table

TERMS = terms()
STAINS = ("H&E", "PAS", "silver", "trichrome")
PROMPTABLE = [t for t in TERMS if t.promptable]
NOT_PROMPTABLE = [t for t in TERMS if not t.promptable]
FILE = Path(terminology.__file__).with_name("terminology.yaml")


def term_id(term):
    return term.name


def test_the_file_lies_beside_the_module_and_every_system_is_there():
    assert FILE.is_file()
    assert {t.system for t in TERMS} == {
        "general",
        "RPS consensus",
        "Oxford MEST-C",
        "ISN/RPS 2003",
        "ISN/RPS 2018",
        "RPS diabetic",
        "Columbia FSGS",
        "Banff",
    }


@pytest.mark.parametrize("term", TERMS, ids=term_id)
def test_a_term_is_one_line_with_a_source_and_known_stains(term):
    assert "\n" not in term.definition
    assert len(term.definition) < 150
    assert term.definition.endswith(".")
    assert set(term.stains) <= set(STAINS)
    assert ("unverified" in term.source) is (not term.verified)
    assert ("UNVERIFIED" in term.describe()) is (not term.verified)
    assert term.describe().casefold().count("unverified") == (not term.verified)  # once, not twice
    assert find_term(term.name) is term
    assert find_term(term.name.upper().replace(" ", "_")) is term


# What the reference marks as domain knowledge, with two entries that sources do support.
@pytest.mark.parametrize(
    ("name", "verified"),
    [
        ("viable", False),
        ("ischemic", False),
        ("wire loop", False),
        ("Banff mm2", False),
        ("cg1b", False),
        ("cg1a", False),
        ("glomerulitis", False),
        ("mesangiolysis", False),
        ("global sclerosis", True),
        ("obsolescent", True),
        ("Oxford M1", True),
    ],
)
def test_doubt_is_marked(name, verified):
    assert find_term(name).verified is verified


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Viable Glomeruli", "viable glomerulus"),
        ("Normal glomeruli", "viable glomerulus"),
        ("Global Glomerulosclerosis", "global sclerosis"),
        ("segmental_sclerosis", "segmental sclerosis"),
        ("Non-glomerular", "non-glomerular tissue"),
        ("Ischaemic", "ischemic glomerulus"),
        ("non_sclerosed", "non-sclerotic glomerulus"),
        ("sclerosed", "sclerotic glomerulus"),
        ("mesangial hypercellularity", "mesangial hypercellularity"),
        ("Mesangial hypercellularity Oxford", "mesangial hypercellularity (Oxford)"),
    ],
)
def test_terms_by_the_words_of_data_sets(name, expected):
    assert find_term(name).name == expected


def test_the_same_word_in_several_systems_stays_several_entries():
    cut_offs = {
        t.system: t.definition
        for t in TERMS
        if t.name.split(" (")[0] == "mesangial hypercellularity"
    }
    assert set(cut_offs) == {"RPS consensus", "Oxford MEST-C", "ISN/RPS 2003", "ISN/RPS 2018"}
    assert len(set(cut_offs.values())) == 4
    assert find_term("segmental sclerosis (Oxford)") is not find_term("segmental sclerosis")


def test_a_miss_names_the_nearest_term():
    with pytest.raises(GloVLMError, match=r"no term 'globul sclerosis'.*Did you mean 'global scl"):
        find_term("globul sclerosis")


@pytest.mark.parametrize("term", NOT_PROMPTABLE, ids=term_id)
@pytest.mark.parametrize("stain", [None, "PAS"])
def test_nothing_that_a_crop_cannot_show_becomes_a_prompt(term, stain):
    with pytest.raises(GloVLMError, match=r"electron microscopy|a whole biopsy"):
        prompts_for(term.name, stain)


@pytest.mark.parametrize(
    "name", ["Oxford M0", "Oxford M1", "cellular variant", "cg1a", "diabetic class I", "class IV"]
)
def test_biopsy_labels_and_electron_microscopy_are_among_them(name):
    if name == "class IV":
        name = "lupus nephritis class IV"
    assert not find_term(name).promptable


@pytest.mark.parametrize("term", PROMPTABLE, ids=term_id)
@pytest.mark.parametrize("stain", [None, *STAINS])
def test_a_prompt_names_the_lesion_and_only_a_stain_that_shows_it(term, stain):
    prompts = prompts_for(term, stain)
    assert prompts
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert ("stain" in prompt) is (stain is not None and stain in term.stains)
        assert any(word in prompt for word in term.phrases)
        assert not re.search(r"[(){}]|  ", prompt)
        assert len(prompt.split()) < 20


def test_electron_microscopy_alone_suffices_to_refuse_a_prompt():
    term = terminology.Term(
        name="foot process effacement",
        definition="Feet are gone.",
        system="general",
        stains=(),
        verified=True,
        source="a book",
        em_only=True,
    )
    assert term.level == "crop"
    with pytest.raises(GloVLMError, match="only electron microscopy shows it"):
        prompts_for(term)


def test_prompts_are_templates_times_synonyms_with_the_stain():
    assert prompts_for("atubular", "Periodic acid-Schiff") == [
        "A pathology image of an atubular glomerulus, PAS stain",
        "A histopathology image of an atubular glomerulus, PAS stain",
        "A microscopy image of an atubular glomerulus, PAS stain",
        "A kidney section showing an atubular glomerulus, PAS stain",
    ]
    assert len(prompts_for("global sclerosis")) == 4 * 3
    assert "A pathology image of a glomerulus with karyorrhexis" in prompts_for("karyorrhexis")


@pytest.mark.parametrize("term", PROMPTABLE, ids=term_id)
def test_described_prompts_add_what_the_lesion_looks_like(term):
    plain, actual = prompts_for(term), described_prompts(term)
    assert actual[: len(plain)] == plain
    assert len(set(actual)) == len(actual) == 2 * len(plain)
    for short, long in zip(plain, actual[len(plain) :], strict=True):
        look = long.removeprefix(f"{short}: ")
        assert term.definition.lower().startswith(look.lower())
        assert not re.search(r"stated|stain|electron|biops|[;{}]|\.$", look)
        assert look[0].islower()


def test_a_description_ends_at_the_first_semicolon():
    assert described_prompts("crescent")[-1] == (
        "A kidney section showing a glomerulus with extracapillary proliferation: growth outside "
        "the capillaries, more than two cell layers deep"
    )
    with pytest.raises(GloVLMError, match="no term 'crescnt'"):
        described_prompts("crescnt")
    with pytest.raises(GloVLMError, match="label of a whole biopsy"):
        described_prompts("lupus nephritis class IV")


def test_terms_of_classes_distinguish_them():
    viable, globally = find_term("viable glomerulus"), find_term("global sclerosis")
    assert terms_of([("Viable_Glomeruli",), ("x", "global sclerosis")]) == [viable, globally]
    # The first known name counts, and an unknown class leaves the others theirs.
    assert terms_of([("viable", "global sclerosis"), ("a dog", "a cat")]) == [viable, None]
    assert terms_of([("viable",), ("normal glomerulus",), ("crescent",)]) == [
        None,
        None,
        find_term("crescent"),
    ]
    assert terms_of([("lupus nephritis class IV",), ("foot process effacement",)])[0] is None


def test_a_stain_that_does_not_show_the_lesion_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        assert prompts_for("basement membrane spikes", "H&E") == prompts_for("spikes")
    assert "H&E is not known to show 'basement membrane spikes'" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("HE", "H&E"), ("h&e", "H&E"), ("pas", "PAS"), ("Jones", "silver"), ("Masson", "trichrome")],
)
def test_stains_have_one_name(name, expected):
    assert find_stain(name) == expected


def test_an_unknown_stain_is_refused():
    with pytest.raises(GloVLMError, match=r"Unknown stain 'trichrom'.*Did you mean 'trichrome'"):
        prompts_for("viable", "trichrom")


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_match_key_is_idempotent_and_blind_to_case(name):
    assert match_key(match_key(name)) == match_key(name)
    assert match_key(name.replace("_", " ")) == match_key(name)


# --------------------------------------------------------------------------------- bad files


def good() -> dict:
    return {
        "stains": {"PAS": {"phrase": "PAS stain"}},
        "templates": ["An image of {}"],
        "systems": {"general": "words"},
        "declared": [
            {
                "name": "mest",
                "title": "A classification",
                "terms": ["general"],
                "adequacy": [
                    {"verdict": "adequate", "glomeruli": 10, "arteries": 2},
                    {"verdict": "minimal", "glomeruli": 7, "arteries": 1},
                ],
                "source": "a book",
                "verified": True,
                "parts": {"S": ["tuft glomerulus"]},
            }
        ],
        "terms": [
            {
                "name": "tuft glomerulus",
                "definition": "A tuft.",
                "system": "general",
                "stains": ["PAS"],
                "seen_in": "tuft",
                "verified": True,
                "source": "a book",
            }
        ],
    }


def test_the_sound_file_is_read(tmp_path):
    path = tmp_path / "terminology.yaml"
    path.write_text(yaml.safe_dump(good()))
    read = terminology.read_terminology(path)
    assert read.terms[0].phrases == ("a tuft glomerulus",)
    words = ["at least 10 glomeruli and 2 arteries", "at least 7 glomeruli and 1 artery"]
    assert [rule.words for rule in read.declared["mest"].adequacy] == words


def test_the_declared_systems_are_those_of_a_table_of_cases():
    for name in case_table.SYSTEMS[1:]:
        system = terminology.declared_system(name)
        assert system.verified == (name != "isn_rps"), "the ten of ISN/RPS are recalled"
    with pytest.raises(GloVLMError, match="Did you mean 'banff'"):
        terminology.declared_system("banf")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.pop("templates"), "the key 'templates' is missing"),
        (lambda f: f.update(terms=[]), "'terms': expected a list"),
        (lambda f: f.update(extra=1), "unknown key 'extra'"),
        (lambda f: f["templates"].append("no place"), "'no place' must hold {} once"),
        (
            lambda f: f["declared"][0]["adequacy"][0].update(glomeruli="8"),
            "expected a whole number",
        ),
        (
            lambda f: f["declared"][0]["adequacy"][0].update(verdict="good"),
            "one of adequate, minim",
        ),
        (
            lambda f: f["declared"][0]["adequacy"].reverse(),
            "begin with the rule that asks for most",
        ),
        (lambda f: f["declared"][0].update(terms=["genral"]), "'genral'. Did you mean 'general'"),
        (lambda f: f["declared"][0]["parts"].update(E=["tuff"]), "'E': unknown 'tuff'"),
        (
            lambda f: f["declared"][0].update(source="recalled, unverified"),
            "must contain unverifie",
        ),
        (lambda f: f.update(declared=["oxford"]), "declared 'oxford'"),
        (lambda f: f["terms"][0].pop("verified"), "'tuft glomerulus': the key 'verified' is miss"),
        (lambda f: f["terms"][0].update(verified="yes"), "'verified': expected true or false"),
        (lambda f: f["terms"][0].update(synonym=["x"]), "'synonym'. Did you mean 'synonyms'"),
        (lambda f: f["terms"][0].update(stains=["PAX"]), "unknown 'PAX'. Did you mean 'PAS'"),
        (lambda f: f["terms"][0].update(stains="PAS"), "'stains': expected a list of texts"),
        (lambda f: f["terms"][0].update(level="slide"), "'level': expected one of crop, biopsy"),
        (lambda f: f["terms"][0].pop("seen_in"), "'seen_in' (tuft, capsule, around or anywhere) m"),
        (lambda f: f["terms"][0].update(level="biopsy"), "must be there if, and only if, 'level'"),
        (lambda f: f["terms"][0].update(seen_in="hilum"), "'seen_in': expected one of tuft, caps"),
        (lambda f: f["terms"][0].update(system="Bonff"), "'system': unknown 'Bonff'"),
        (lambda f: f["terms"][0].update(em_only=True), "'em_only' and 'stains' exclude"),
        (lambda f: f["terms"][0].update(verified=False), "must contain unverified"),
        (lambda f: f["terms"][0].update(source="a book, unverified"), "must contain unverified"),
        (lambda f: f["terms"][0].update(aliases=["Tuft-Glomeruli"]), "stands for two entries"),
    ],
)
def test_a_bad_terminology_names_the_file_and_the_key(tmp_path, change, sentence):
    content = good()
    change(content)
    path = tmp_path / "terminology.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(GloVLMError, match=re.escape(sentence)) as caught:
        terminology.read_terminology(path)
    assert str(caught.value).startswith("terminology.yaml")
    assert "\n" not in str(caught.value)
