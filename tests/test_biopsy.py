"""Facts of a biopsy's sheet: each rule against counts that are written by hand."""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from biopsies_made import (
    Made,
    correct,
    describe,
    lesion_of_sheet,
    sheet_of,
    write_cases,
    write_slides,
)

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.biopsy import describe_biopsies
from hf_glovlm.slides.lesions import ClassSet, State, at_one_level, lesion_of, over_levels

N, G, S, CR = "normal", "global_sclerosis", "segmental_sclerosis", "crescent"
FOUR = (N, G, S, CR)
P: State = "present"
A: State = "absent"
NA: State = "not_assessable"
NR: State = "not_read"


def counts_of(sheet: Mapping[str, Any], name: str) -> tuple[int, ...]:
    counts = lesion_of_sheet(sheet, name)["counts"]
    return tuple(counts[state] for state in (P, A, NA, NR))


def made(*labels: str, **options: Any) -> list[Made]:
    return [Made(label, **options) for label in labels]


# ---------------------------------------------------------------------------- classes and lesions


@pytest.mark.parametrize(
    ("classes", "called", "expected"),
    [
        # one class says nothing of another lesion
        ((N, S, CR), CR, {"crescent": P}),
        # normal is without every lesion of the set
        ((N, S, CR), N, {"segmental sclerosis": A, "crescent": A, "global sclerosis": A}),
        # of exclusive classes one of which is global sclerosis every other one is not
        (FOUR, CR, {"crescent": P, "global sclerosis": A}),
        (("other_lesions", "GS"), "other_lesions", {"other lesions": P, "global sclerosis": A}),
        # sclerosed does not say of how much of the tuft, and its opposite denies that alone
        (("sclerosed", "non_sclerosed"), "sclerosed", {"sclerotic glomerulus": P}),
        (("sclerosed", "non_sclerosed"), "non_sclerosed", {"sclerotic glomerulus": A}),
        (("globally sclerosed tuft", N), "globally sclerosed tuft", {"global sclerosis": P}),
        (("non-sclerotic", G), "non-sclerotic", {"global sclerosis": A}),
        # two classes: the second one denies the first one alone
        ((CR, "no_crescent"), "no_crescent", {"crescent": A}),
        ((CR, "other"), "other", {"crescent": A}),
        (("GGS", "NoGGS", "segmental_sclerosis"), "NoGGS", {"global sclerosis": A}),
        # kinds: of global sclerosis, of crescents
        (
            ("obsolescent", "solidified", "disappearing", N),
            "solidified",
            {"global sclerosis": P, "solidified glomerulus": P, "obsolescent glomerulus": A,
             "disappearing glomerulus": A},
        ),
        (("obsolescent", CR), CR, {"crescent": P}),  # it may still be solidified
        (
            ("cellular_crescent", "fibrous crescent", N),
            "cellular_crescent",
            {"crescent": P, "cellular crescent": P},
        ),
        (
            ("crescent: cellular", N),
            N,
            {"crescent": A, "cellular crescent": A, "global sclerosis": A},
        ),
        (("spikes: fine", N), "spikes: fine",
         {"basement membrane spikes": P, "basement membrane spikes: fine": P}),
        # no class of a glomerulus
        (("S1", N, G), "S1", {}),
        (("ptc", N), "ptc", {}),
        (("non-glomerular", N), "non-glomerular", {}),
        (FOUR, None, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_class_says_of_lesions_what_its_words_and_its_set_say(
    classes: Sequence[str], called: str | None, expected: dict[str, str]
) -> None:
    assert ClassSet(classes).states(called) == expected


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("S1", "label of a whole biopsy"),
        ("Banff cg1a", "electron microscopy"),
        ("T", "of the tubules"),
        ("i", "of the interstitium"),
        ("ptc", "of the peritubular capillaries"),
    ],
)
def test_what_no_glomerulus_shows_is_no_class_of_one(name: str, why: str, tmp_path: Path) -> None:
    sheet = sheet_of(describe(tmp_path, {"s": made(name, N)}, (name, N)))
    (row,) = sheet["not_shown"]
    assert row["class"] == name
    assert why in row["why"]
    assert name not in [lesion["class"] for lesion in sheet["lesions"]]
    assert sheet["counts"]["n"] == 2


def test_what_no_glomerulus_shows_is_not_shown_where_it_is_ticked(tmp_path: Path) -> None:
    sheet = sheet_of(describe(tmp_path, {"s": [Made(N, lesions="ptc; Oxford C1")]}, (N, G)))
    assert [row["class"] for row in sheet["not_shown"]] == ["Oxford C1", "ptc"]
    assert [*sheet["glomeruli"][0]["states"]] == [G]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([{"crescent": P}, {"crescent": A}], (NR, P)),
        ([{"crescent": A}, {}], (NR, A)),
        ([{"crescent": NA}, {"crescent": A}], (NR, A)),
        ([{"global sclerosis": P}, {"global sclerosis": P}], (P, NA)),
        ([{"global sclerosis": P}, {"global sclerosis": A, "crescent": A}], (A, A)),
        ([{"global sclerosis": P}, {"global sclerosis": NA}], (NA, NA)),
        ([{"global sclerosis": P}, {}], (P, NA)),
        ([{"global sclerosis": P}, {"crescent": P}], (NR, P)),
    ],
    ids=str,
)
def test_a_focal_lesion_is_of_any_level_and_global_sclerosis_of_every(
    levels: list[dict[str, Any]], expected: tuple[str, str]
) -> None:
    keys = ["global sclerosis", "crescent"]
    ruled = [at_one_level(dict.fromkeys(keys, NR) | level) for level in levels]
    merged = over_levels(ruled, keys)
    assert tuple(merged[key] for key in keys) == expected


def test_a_further_level_never_takes_a_focal_lesion_away() -> None:
    keys = ["global sclerosis", "crescent"]
    values = [
        dict(zip(keys, pair, strict=True)) for pair in itertools.product((P, A, NA, NR), repeat=2)
    ]
    ruled = [at_one_level(value, spoiled=cut) for value in values for cut in (False, True)]
    for levels in itertools.product(ruled, repeat=2):
        alone, both = over_levels(levels[:1], keys), over_levels(levels, keys)
        assert both["crescent"] == P or alone["crescent"] != P, levels
        assert both["global sclerosis"] != P or alone["global sclerosis"] != A, levels
        assert both == over_levels(levels[::-1], keys)
        assert both["global sclerosis"] != P or both["crescent"] == NA


# -------------------------------------------------------------------------------------- one section


@pytest.mark.parametrize(
    ("shown", "classes", "expected"),
    [
        # lesion: present, absent, not assessable, not read
        (made(N, N, G, S), (N, G, S), {G: (1, 3, 0, 0), S: (1, 2, 1, 0)}),
        (made(N, CR, S, G), FOUR, {G: (1, 3, 0, 0), CR: (1, 1, 1, 1), S: (1, 1, 1, 1)}),
        # cut, folded, blurred, a wrong stain: present counts, absent does not
        (
            [Made(G, quality="folded"), Made(N, quality="Blurred; wrong stain"), *made(N, S),
             Made(S, score=0.9, cut=True), Made(N, x=0.0)],
            (N, G, S),
            {G: (1, 2, 3, 0), S: (2, 1, 3, 0)},
        ),
        # ticked: present; not ticked is missing unless its class says that it is absent
        (
            [Made(S, lesions="crescent: cellular; microaneurysm"), *made(S, N, G)],
            (N, G, S),
            {S: (2, 1, 1, 0), CR: (1, 0, 1, 2), "crescent: cellular": (1, 0, 1, 2)},
        ),
        # in a globally sclerotic one a ticked lesion does not count
        ([Made(G, lesions=CR), Made(N)], (N, G), {G: (1, 1, 0, 0), CR: (0, 0, 1, 1)}),
        # tissue without a glomerulus is none
        (made(N, "non-glomerular", G), (N, G, "non-glomerular"), {G: (1, 1, 0, 0)}),
        (made("sclerosed", "non_sclerosed"), ("sclerosed", "non_sclerosed"),
         {"sclerosed": (1, 1, 0, 0), "global sclerosis": (0, 0, 0, 2)}),
    ],
    ids=str,
)  # fmt: skip
def test_states_on_one_section(
    shown: list[Made], classes: Sequence[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    sheet = sheet_of(describe(tmp_path, {"s": shown}, classes))
    for name, counts in expected.items():
        assert counts_of(sheet, name) == counts, name
    assert sheet["lesions"][0]["words"] == "global sclerosis"
    for lesion in sheet["lesions"]:
        assert sum(lesion["counts"].values()) == sheet["counts"]["n"]
        for share in lesion["shares"]:
            if share["percent"] is not None:
                assert share["percent"] == 100 * share["count"] / share["denominator"]


def test_shares_print_their_denominators(tmp_path: Path) -> None:
    classes = (N, G, CR)
    sheet = sheet_of(describe(tmp_path, {"s": made(*[N] * 6, G, G, CR, CR)}, classes))
    of_all, of_crescents = (lesion_of_sheet(sheet, name)["shares"] for name in (G, CR))
    assert [(s["of"], s["count"], s["denominator"], s["percent"]) for s in of_all] == [
        ("all glomeruli", 2, 10, 20.0)
    ]
    assert of_all[0]["ci95"] == pytest.approx([5.668, 50.984], abs=0.01)  # Wilson's, by a table
    assert [(s["of"], s["count"], s["denominator"], s["percent"]) for s in of_crescents] == [
        ("assessable glomeruli that are not globally sclerotic", 2, 8, 25.0),
        ("all glomeruli, globally sclerotic ones too", 2, 10, 20.0),
    ]
    assert "The kind (cellular, fibrocellular, fibrous) is not stated." in lesion_of_sheet(
        sheet, CR
    )["notes"]  # fmt: skip


def test_a_lesion_that_some_were_not_read_for_has_no_percentage_but_a_least(tmp_path: Path) -> None:
    sheet = sheet_of(describe(tmp_path, {"s": made(N, N, CR, S, S, G)}, FOUR))
    lesion = lesion_of_sheet(sheet, CR)
    assert [share["percent"] for share in lesion["shares"]] == [None, None, 20.0]
    least = lesion["shares"][-1]
    assert (least["count"], least["denominator"], least["ci95"]) == (1, 5, None)
    assert [share["least"] for share in lesion["shares"]] == [False, False, True]
    assert any("between 1 and 3 of 5" in note for note in lesion["notes"])
    assert lesion["why_not_corrected"] == "some glomeruli were not read for it"


def test_cut_ones_that_show_nothing_say_what_leaving_them_out_does(tmp_path: Path) -> None:
    shown = [*made(N, N, G, G), *made(N, N, N, N, quality="cut by the border")]
    sheet = sheet_of(describe(tmp_path, {"s": shown}, (N, G)))
    lesion = lesion_of_sheet(sheet, G)
    assert lesion["shares"][0]["percent"] == 50.0
    assert any("leans upwards: 25%" in note for note in lesion["notes"])
    assert (sheet["counts"]["cut"], sheet["counts"]["not_assessable"]) == (4, 4)


def test_definitions_are_those_of_the_terminology_and_a_class_without_one_says_so(
    tmp_path: Path,
) -> None:
    classes = (N, "wire loops", "odd lesion")
    sheet = sheet_of(describe(tmp_path, {"s": made(*classes)}, classes))
    wire, odd = (lesion_of_sheet(sheet, name) for name in classes[1:])
    assert (wire["words"], wire["system"], wire["verified"]) == (
        "wire loop lesion", "ISN/RPS 2003", False,
    )  # fmt: skip
    assert "unverified" in wire["source"]
    assert (odd["definition"], odd["source"], odd["verified"]) == (None, None, False)
    assert any("terminology lacks this class" in note for note in odd["notes"])


def test_permuted_sections_and_objects_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(3)
    sections = {
        name: [
            Made(rng.choice(FOUR), f"k{i}", id=f"{name}-{i}", x=200.0 * i + 50) for i in range(6)
        ]
        for name in ("s1", "s2", "s3")
    }
    first: Any = None
    for i in range(3):
        names = rng.sample([*sections], 3)
        slides = {name: rng.sample(sections[name], 6) for name in names}
        folder = tmp_path / str(i)
        folder.mkdir()
        sheet = sheet_of(describe(folder, slides, FOUR))
        first = first or sheet
        assert sheet == first


# ----------------------------------------------------------------------------------------- joining


def rows_of(*slides: str, **values: Any) -> list[dict[str, Any]]:
    return [{"slide_id": slide, "case_id": "B1", **values} for slide in slides]


def test_levels_join_by_glomerulus_id_and_never_average(tmp_path: Path) -> None:
    slides = {
        "l1": [Made(CR, "a"), Made(G, "b"), Made(G, "c"), Made(N, "d")],
        "l2": [Made(N, "a"), Made(G, "b"), Made(N, "c"), Made(S, "d")],
        "l3": [Made(N, "a"), Made(N, "d"), Made(N, "e")],
    }
    sheet = sheet_of(describe(tmp_path, slides, FOUR))
    assert sheet["join"]["by"] == "glomerulus id"
    assert sheet["counts"]["n"] == 5
    assert counts_of(sheet, G) == (1, 4, 0, 0)  # b; c is not on the second level
    assert counts_of(sheet, CR) == (1, 3, 1, 0)
    assert counts_of(sheet, S) == (1, 3, 1, 0)
    assert len(sheet["glomeruli"]) == 11  # one an outline
    assert sheet["lesions"][0]["why_not_corrected"].startswith("sections were joined")


@pytest.mark.parametrize("ids", [(None, None), ("a", None)])
def test_without_ids_in_all_sections_the_largest_is_reported(
    ids: tuple[Any, Any], tmp_path: Path
) -> None:
    slides = {"l1": [Made(G, ids[0])], "l2": made(N, N, G), "l3": [Made(G, ids[1])] * 2}
    biopsies = describe(tmp_path, slides, (N, G), rows_of("l1", "l2", "l3", patient_id="p"))
    sheet = sheet_of(biopsies)
    assert (sheet["join"]["by"], sheet["counts"]["n"]) == ("one section", 3)
    assert [(s["slide"], s["used"]) for s in sheet["sections"]] == [
        ("l1", False), ("l2", True), ("l3", False),
    ]  # fmt: skip
    assert "not summed" in sheet["sections"][0]["why_not"]
    assert [*biopsies.objects] == ["l2"]


def test_two_models_tell_of_the_same_glomeruli(tmp_path: Path) -> None:
    first = write_slides(tmp_path / "A", {"s": made(N, G, "other")}, (N, G, "other"))
    second = write_slides(tmp_path / "B", {"s": made("no crescent", CR, CR)}, (CR, "no crescent"))
    cases = write_cases(tmp_path / "cases.csv", rows_of("s"))
    sheet = sheet_of(describe_biopsies(cases, [first, second]))
    assert counts_of(sheet, G) == (1, 2, 0, 0)
    assert counts_of(sheet, CR) == (1, 1, 1, 0)  # the globally sclerotic one is not assessable
    third = write_slides(tmp_path / "C", {"s": made(CR, CR)}, (CR, "no crescent"))
    failed = describe_biopsies(cases, [first, third]).failed
    assert "outlines of s differ" in failed["B1"]


# -------------------------------------------------------------------------------- adequacy, systems


@pytest.mark.parametrize(
    ("system", "arteries", "confirmed", "provisional", "verdict", "why"),
    [
        ("", "", 12, 0, None, "No class system is declared"),
        ("none", 2, 12, 0, None, "No class system is declared"),
        ("oxford", "", 8, 0, "adequate", "8 confirmed glomeruli."),
        ("oxford", "", 7, 0, "unsatisfactory", "not at least 8"),
        ("oxford", "", 7, 1, None, "no reader confirmed"),
        ("oxford", "", 8, 5, "adequate", "8 confirmed"),
        ("isn_rps", "", 10, 0, "adequate", "10 confirmed glomeruli."),
        ("isn_rps", "", 9, 0, "unsatisfactory", "not at least 10"),
        ("banff", "", 12, 0, None, "arteries is not stated"),
        ("banff", 2, 10, 0, "adequate", "10 confirmed glomeruli and 2 arteries"),
        ("banff", 1, 12, 0, "minimal", "12 confirmed glomeruli and 1 arter"),
        ("banff", 2, 7, 0, "minimal", "7 confirmed glomeruli and 2 arteries"),
        ("banff", 0, 20, 0, "unsatisfactory", "20 confirmed glomeruli and 0 arteries"),
        ("banff", 2, 6, 0, "unsatisfactory", "not at least 7"),
        ("banff", 2, 7, 3, None, "may be adequate"),
        ("banff", 1, 7, 3, "minimal", "7 confirmed glomeruli and 1 arter"),
        ("oxford", "", 0, 9, None, "0 confirmed"),
    ],
)
def test_adequacy_is_by_the_declared_system_on_confirmed_glomeruli(
    system: str,
    arteries: Any,
    confirmed: int,
    provisional: int,
    verdict: str | None,
    why: str,
    tmp_path: Path,
) -> None:
    shown = [*made(*[N] * confirmed), *made(*[N] * provisional, score=0.8)]
    rows = rows_of("s", system=system, arteries=arteries, reader="AB")
    sheet = sheet_of(describe(tmp_path, {"s": shown}, (N, G), rows))
    adequacy = sheet["adequacy"]
    assert (adequacy["verdict"], adequacy["n"]) == (verdict, confirmed)
    assert why in adequacy["why"]
    assert sheet["counts"]["provisional"] == provisional
    if system == "isn_rps":
        assert not adequacy["verified"]
        assert "unverified" in adequacy["source"]
        assert any("recalled and was not checked" in limit for limit in sheet["limits"])


@pytest.mark.parametrize(("n", "percent"), [(8, 43), (10, 35), (20, 12)])
def test_the_chance_to_miss_a_lesion_of_a_tenth(n: int, percent: int, tmp_path: Path) -> None:
    chance = sheet_of(describe(tmp_path, {"s": made(*[N] * n)}, (N, G)))["chance_to_miss"]
    assert round(100 * chance["chance"]) == percent
    assert f"{percent}%" in chance["sentence"]


@pytest.mark.parametrize("other", [made(*[N] * 5), "failed"], ids=["without ids", "failed"])
def test_sections_that_may_show_more_give_no_verdict_that_more_would_change(
    other: Any, tmp_path: Path
) -> None:
    slides = {"l1": made(*[N] * 7), "l2": other}
    rows = rows_of("l1", "l2", system="oxford", reader="AB")
    adequacy = sheet_of(describe(tmp_path, slides, (N, G), rows))["adequacy"]
    assert adequacy["verdict"] is None
    assert "not counted may show others" in adequacy["why"]


def test_a_finder_may_have_missed_what_would_make_a_biopsy_adequate(tmp_path: Path) -> None:
    results = write_slides(tmp_path / "O", {"s": made(N, N, score=0.9)}, (N, G))
    cases = write_cases(tmp_path / "cases.csv", rows_of("s", system="oxford"))
    said = []
    for all_read in (False, True):
        output = correct(
            results, tmp_path / f"C{all_read}", "AB",
            {"s": {"g0": {"label": G}, "g1": {"label": G}}}, all_read=all_read,
        )  # fmt: skip
        sheet = sheet_of(describe_biopsies(cases, [results], corrections=output, signed_by="AB"))
        said.append((sheet["adequacy"]["verdict"], sheet["adequacy"]["n"]))
    assert said == [(None, 2), ("unsatisfactory", 2)]


M = "mesangial hypercellularity (Oxford)"


@pytest.mark.parametrize(
    ("stain", "section_um", "shown"),
    [("PAS", 3, True), ("PAS", "", False), ("HE", 3, False), ("", 3, False)],
)
def test_m_is_counted_on_pas_of_stated_thickness_alone(
    stain: str, section_um: Any, shown: bool, tmp_path: Path
) -> None:
    rows = rows_of("s", system="oxford", stain=stain, section_um=section_um)
    sheet = sheet_of(describe(tmp_path, {"s": made(N, M)}, (N, M), rows))
    listed = {lesion["class"]: lesion for lesion in sheet["lesions"]}
    assert (M in listed) == shown
    if shown:
        assert listed[M]["heading"] == "candidate for Oxford M, to be confirmed"
    else:
        assert "PAS" in next(r["why"] for r in sheet["not_shown"] if r["class"] == M)
        assert all(M not in one["states"] for one in sheet["glomeruli"])


@pytest.mark.parametrize(
    ("system", "name", "role", "heading"),
    [
        ("oxford", "endocapillary hypercellularity", "candidate", "Oxford E, to be confirmed"),
        ("oxford", S, "candidate", "Oxford S, to be confirmed"),
        ("oxford", "cellular crescent", "candidate", "Oxford C, to be confirmed"),
        ("oxford", "fibrous crescent", "lesion", None),
        ("isn_rps", "wire loops", "component", "never summed"),
        ("banff", "glomerulitis", "component", "no cg"),
        ("banff", CR, "lesion", None),
        ("", CR, "lesion", None),
        ("oxford", G, "global sclerosis", None),
    ],
)
def test_lesions_stand_as_the_declared_system_uses_them(
    system: str, name: str, role: str, heading: str | None, tmp_path: Path
) -> None:
    sheet = sheet_of(
        describe(tmp_path, {"s": made(N, name)}, (N, name), rows_of("s", system=system))
    )
    lesion = lesion_of_sheet(sheet, name)
    assert lesion["role"] == role
    assert heading is None if lesion["heading"] is None else str(heading) in lesion["heading"]
    never = {"oxford": ["T"], "banff": ["i", "t", "ptc", "cg"]}.get(system, [])
    shown = [row["class"].split()[-1] for row in sheet["not_shown"]]
    assert set(never) <= set(shown)
    text = json.dumps([sheet["lesions"], sheet["not_shown"]])
    assert not any(score in text for score in ("E1", "S1", "C1", "M1"))
    if system == "oxford":
        (limit,) = [limit for limit in sheet["limits"] if "never E1, S1 or C1" in limit]
        assert "33%" in limit  # 1 - .98 ** 20 = .332


def test_a_class_of_another_system_is_noted_and_keeps_its_definition(tmp_path: Path) -> None:
    name = "segmental sclerosis (Oxford)"
    sheet = sheet_of(
        describe(tmp_path, {"s": made(N, name)}, (N, name), rows_of("s", system="banff"))
    )
    lesion = lesion_of_sheet(sheet, name)
    assert lesion["system"] == "Oxford MEST-C"
    assert "adhesion" in lesion["definition"]
    assert any("the declared system is banff" in note for note in lesion["notes"])


def test_a_stain_that_is_not_known_to_show_a_lesion_is_a_note(tmp_path: Path) -> None:
    rows = rows_of("s", stain="PAS")
    sheet = sheet_of(describe(tmp_path, {"s": made(N, "spikes")}, (N, "spikes"), rows))
    assert counts_of(sheet, "spikes") == (1, 1, 0, 0)
    assert any(
        "PAS is not known to show it" in n for n in lesion_of_sheet(sheet, "spikes")["notes"]
    )
    assert any("H&E section" in limit for limit in sheet["limits"])


# --------------------------------------------------------------------------------------- intervals

CONFUSION = [[90, 10], [10, 90]]


def finder_folder(folder: Path, by_class: Mapping[str, tuple[int, int]]) -> Path:
    folder.mkdir()
    shares = {name: {"found": found, "of": of} for name, (found, of) in by_class.items()}
    content = {"kind": "finder", "left_out": {"by_class": shares, "groups": 6, "group": "patient"}}
    (folder / "finder.json").write_text(json.dumps(content))
    return folder


def test_a_corrected_interval_holds_the_classifier_and_the_finder(tmp_path: Path) -> None:
    shown = made(*[N] * 14, *[G] * 6, score=0.9)
    finder = finder_folder(tmp_path / "F", {N: (95, 100), "GS": (30, 60)})
    plain = sheet_of(describe(tmp_path, {"s": shown}, (N, G), confusion=CONFUSION))
    cases = tmp_path / "cases.csv"
    known = sheet_of(describe_biopsies(cases, [tmp_path / "O"], finder=finder))
    alone, both = (lesion_of_sheet(sheet, G)["corrected"] for sheet in (plain, known))
    assert alone["holds"][:2] == ["counting", "the classifier's errors"]
    assert alone["holds"][2].startswith("not: the finder's recall")
    assert both["holds"] == ["counting", "the classifier's errors", "the finder's recall by class"]
    assert both["percent"] > alone["percent"] + 5  # half of the sclerotic ones are missed
    assert both["ci95"][1] > alone["ci95"][1]
    share = lesion_of_sheet(known, G)["shares"][0]
    assert (share["percent"], share["holds"]) == (30.0, ["counting"])


@pytest.mark.parametrize(
    ("confusion", "by_class", "shown", "why"),
    [
        (None, None, {}, "no confusion matrix"),
        ([[90, 10], [0, 0]], None, {}, "on no object of global_sclerosis"),
        ([[60, 40], [55, 45]], None, {}, "say too little"),
        (CONFUSION, {N: (9, 10)}, {"score": 0.9}, "recall of global_sclerosis was not measured"),
        (CONFUSION, {N: (9, 10), G: (4, 9)}, {"score": 0.9}, "detected 4 of 9 global_sclerosis"),
        (CONFUSION, None, {"quality": "folded"}, "every glomerulus is cut"),
    ],
    ids=str,
)
def test_why_a_percentage_is_not_corrected(
    confusion: Any, by_class: Any, shown: Mapping[str, Any], why: str, tmp_path: Path
) -> None:
    finder = finder_folder(tmp_path / "F", by_class) if by_class else None
    glomeruli = made(*[N] * 6, *[G] * 4, **shown)
    biopsies = describe(tmp_path, {"s": glomeruli}, (N, G), confusion=confusion, finder=finder)
    lesion = lesion_of_sheet(sheet_of(biopsies), G)
    assert lesion["corrected"] is None
    assert why in lesion["why_not_corrected"]


def test_the_recall_of_another_finder_is_refused(tmp_path: Path) -> None:
    finder = finder_folder(tmp_path / "F", {N: (9, 10), G: (9, 10)})
    (finder / "head.safetensors").write_bytes(b"weights")
    shown = made(N, G, score=0.9, metadata={"finder": "0123456789ab"})
    failed = describe(tmp_path, {"s": shown}, (N, G), finder=finder).failed
    assert "The finder 0123456789ab outlined glomeruli of s" in failed["B1"]


# ----------------------------------------------------------------------------------------- readers


def read(tmp_path: Path, *readers: dict[str, Any], signed_by: str | None = None, **row: Any) -> Any:
    """A sheet of ten glomeruli, corrected by some readers."""
    results = write_slides(
        tmp_path / "O", {"s": made(*[N] * 7, G, G, S)}, (N, G, S), confusion=None
    )
    output = tmp_path / "C"
    for options in readers:
        correct(results, output, **options)
    cases = write_cases(tmp_path / "cases.csv", rows_of("s", **row))
    return describe_biopsies(cases, [results], corrections=output, signed_by=signed_by)


def changes(**of: Any) -> dict[str, Any]:
    return {"s": of}


def test_a_sheet_is_no_draft_where_the_reader_who_signs_read_all_of_it(tmp_path: Path) -> None:
    one = {"reader": "AB", "changes": changes(g0={"label": S}, g1=None, new=Made(G))}
    sheet = sheet_of(read(tmp_path, one, signed_by="AB", system="oxford"))
    assert sheet["status"] == {
        "draft": False, "signed_by": "AB", "words": "Read by AB, 2026-11-30", "reasons": [],
    }  # fmt: skip
    assert counts_of(sheet, G) == (3, 7, 0, 0)
    assert counts_of(sheet, S) == (2, 5, 3, 0)
    assert (sheet["counts"]["confirmed"], sheet["adequacy"]["verdict"]) == (10, "adequate")
    lesion = lesion_of_sheet(sheet, G)
    assert lesion["shares"][0]["holds"] == ["counting"]
    assert "no reader's error" in lesion["why_not_corrected"]


def test_a_sheet_that_was_read_in_part_says_how_much(tmp_path: Path) -> None:
    one = {"reader": "AB", "changes": changes(g0={"label": S}, g1={"label": G}), "all_read": False}
    sheet = sheet_of(read(tmp_path, one, signed_by="AB"))
    assert sheet["status"]["words"] == "DRAFT, read in part by AB: 2 of 10 glomeruli"
    assert (sheet["status"]["draft"], sheet["counts"]["confirmed"]) == (True, 2)
    assert "others the model's" in lesion_of_sheet(sheet, G)["why_not_corrected"]


def test_without_a_name_that_signs_a_sheet_is_unreviewed(tmp_path: Path) -> None:
    sheet = sheet_of(read(tmp_path, {"reader": "AB", "changes": changes(g0={"label": G})}))
    assert sheet["status"]["words"] == "DRAFT, unreviewed"
    assert counts_of(sheet, G) == (3, 7, 0, 0)  # what was corrected counts all the same


def test_readers_that_contradict_each_other_take_a_name(tmp_path: Path) -> None:
    one = {"reader": "AB", "changes": changes(g0={"label": S}), "all_read": False}
    other = {
        "reader": "CD",
        "changes": changes(g0={"label": G}, g1={"label": S}),
        "all_read": False,
    }
    biopsies = read(tmp_path, one, other)
    assert "contradict each other on s" in biopsies.failed["B1"]
    assert "the object g0" in biopsies.failed["B1"]
    signed = describe_biopsies(
        tmp_path / "cases.csv", [tmp_path / "O"], corrections=tmp_path / "C", signed_by="AB"
    )
    sheet = sheet_of(signed)
    assert counts_of(sheet, S) == (2, 6, 2, 0)
    assert any("CD left the object g0 as global_sclerosis" in note for note in sheet["notes"])
    assert any("contradict each other (1 in the notes)" in limit for limit in sheet["limits"])


def test_readers_of_different_objects_go_together(tmp_path: Path) -> None:
    one = {"reader": "AB", "changes": changes(g0={"label": S}, new=Made(G)), "all_read": False}
    other = {"reader": "CD", "changes": changes(g1={"label": G}, g2=None), "all_read": False}
    sheet = sheet_of(read(tmp_path, one, other))
    assert sheet["counts"]["n"] == 10
    assert counts_of(sheet, G) == (4, 6, 0, 0)
    assert {one["by"] for one in sheet["glomeruli"]} == {"model", "AB", "CD"}


def test_a_tick_of_a_reader_counts_and_what_is_declared_read_is_absent_without_one(
    tmp_path: Path,
) -> None:
    one = {
        "reader": "AB",
        "changes": changes(g0={"lesions": "crescent: cellular"}, g9={"quality": "blurred"}),
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    missing = sheet_of(read(tmp_path / "a", one, signed_by="AB"))
    assert counts_of(missing, CR) == (1, 6, 2, 1)  # the one of segmental sclerosis is not read
    declared = sheet_of(read(tmp_path / "b", one, signed_by="AB", reader="AB", read=CR))
    assert counts_of(declared, CR) == (1, 6, 3, 0)  # it is blurred, so that it cannot be absent
    kinds = lesion_of_sheet(declared, "crescent: cellular")
    assert kinds["words"] == "cellular crescent"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, 1, 0, 0)),  # nothing was marked on it
        ({"lesions": CR}, (1, 0, 0, 0)),
        ({"given": CR}, (1, 0, 0, 0)),  # the class that its outline came with
        ({"score": 0.9}, (0, 0, 0, 1)),  # a finder outlined it, and nobody marked anything
    ],
)
def test_a_lesion_that_the_table_declares_read_is_absent_where_it_is_not_marked(
    given: Mapping[str, str], expected: tuple[int, ...], tmp_path: Path
) -> None:
    rows = rows_of("s", reader="AB", read=CR)
    sheet = sheet_of(describe(tmp_path, {"s": [Made(S, **given)]}, (S, G, CR), rows))
    assert counts_of(sheet, CR) == expected


# --------------------------------------------------------------------------------------- bad input


def test_zero_glomeruli_are_a_sheet_without_percentages(tmp_path: Path) -> None:
    sheet = sheet_of(
        describe(tmp_path, {"s": []}, (N, G), rows_of("s", system="oxford", reader="A"))
    )
    assert sheet["counts"]["n"] == 0
    assert sheet["chance_to_miss"]["chance"] is None
    assert all(s["percent"] is None for one in sheet["lesions"] for s in one["shares"])
    assert sheet["adequacy"]["verdict"] == "unsatisfactory"
    assert any("No glomerulus was counted" in limit for limit in sheet["limits"])


@pytest.mark.parametrize(
    ("slides", "rows", "told"),
    [
        ({"s": made(N), "t": made(N)}, rows_of("s"), {"slide t": "has no row for it"}),
        ({"s": made(N), "t": made(N)}, [*rows_of("s"), {"slide_id": "t", "stain": "PAS"}],
         {"slide t": "names no case"}),
        ({"s": made(N), "t": made(N)},
         [{"slide_id": x, "case_id": "B1", "patient_id": "p", "biopsy": x} for x in "st"],
         {"B1": "holds the biopsies s, t"}),
        ({"s": made(N), "t": made(N)}, rows_of("s", "t", block="1", level="2", stain="PAS"),
         {"B1": "s and t of the case B1 are both block 1, level 2, PAS"}),
        ({"s": [Made(N, "a"), Made(N, "a")]}, rows_of("s"), {"B1": "glomerulus a 2 times"}),
        ({"s": "tiles"}, rows_of("s"), {"B1": "tiles are no glomeruli"}),
        ({"s": "failed"}, rows_of("s"), {"B1": "it failed: no tissue"}),
        ({"s": [Made(N, lesions="normal")]}, rows_of("s"), {"B1": "'normal' is no lesion"}),
        ({"s": [Made(N, quality="blured")]}, rows_of("s"), {"B1": "Did you mean 'blurred'"}),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_fails_alone_and_says_why(
    slides: Any, rows: Any, told: dict[str, str], tmp_path: Path
) -> None:
    failed = describe(tmp_path, slides, (N, G), rows).failed
    assert [*failed] == [*told]
    for name, text in told.items():
        assert text in failed[name]


def test_cases_of_which_nothing_was_classified_are_a_note(tmp_path: Path) -> None:
    rows = [*rows_of("s"), {"slide_id": "t", "case_id": "B2"}, {"slide_id": "u", "stain": "PAS"}]
    done = describe(tmp_path, {"s": made(N)}, (N, G), rows)
    assert ([*done.sheets], done.failed) == (["B1"], {})
    assert "1 case has no results here, and no sheet: B2." in done.notes


def test_a_failed_section_beside_others_is_named(tmp_path: Path) -> None:
    sheet = sheet_of(describe(tmp_path, {"s": made(N, G), "t": "failed", "u": "tiles"}, (N, G)))
    assert [section["used"] for section in sheet["sections"]] == [True, False, False]
    assert sheet["sections"][1]["why_not"] == "it failed: no tissue"


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"system": "oxford"}, {"system": "banff"}, "system of the case B1 is banff"),
        ({"kidney": "native"}, {"kidney": "transplant"}, "kidney of the case B1 is transplant"),
        ({}, {"system": "banff"}, ""),
        ({"system": "oxford"}, {"case_id": "B2"}, "is of the case B2"),
        ({"stain": "H&E"}, {"stain": "PAS"}, "stain of s is PAS"),
    ],
    ids=str,
)
def test_a_table_that_differs_from_that_of_the_results_is_refused(
    before: dict[str, str], now: dict[str, str], told: str, tmp_path: Path
) -> None:
    stains = {"s": before["stain"]} if "stain" in before else None
    rows = [{"slide_id": "s", "case_id": "B1"} | now]
    biopsies = describe(
        tmp_path, {"s": made(N)}, (N, G), rows, stated=before, case="B1", stains=stains
    )
    assert told in " ".join(biopsies.failed.values())
    assert bool(biopsies.failed) == bool(told)


def test_numbered_results_ask_for_a_table_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "O").mkdir()
    (tmp_path / "O" / "numbers.json").write_text("{}")
    slides, rows = {"slide_001": made(N, G)}, [{"slide_id": "S-18-1", "case_id": "B1"}]
    failed = describe(tmp_path, slides, (N, G), rows, case="case_001").failed
    assert "numbers in place of names" in failed["slide slide_001"]
    rows = [{"slide_id": "slide_001", "case_id": "B1"}]
    write_cases(tmp_path / "cases.csv", rows)
    assert counts_of(sheet_of(describe_biopsies(tmp_path / "cases.csv", [tmp_path / "O"])), G) == (
        1, 1, 0, 0,
    )  # fmt: skip


def test_a_name_that_may_be_a_person_s_is_noted(tmp_path: Path) -> None:
    sheet = sheet_of(describe(tmp_path, {"Smith_John": made(N)}, (N, G)))
    assert any("make sure that it identifies no patient" in note for note in sheet["notes"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"signed_by": "AB"}, "needs --corrections"),
        ({"corrections": "C", "signed_by": "Ab"}, "Did you mean 'AB'"),
        ({"corrections": "O"}, "no corrections.json"),
        ({"finder": "O"}, "no finder.json"),
        ({"slides": 2}, "given twice"),
        ({"cases": "system: mayo"}, "Expected|expected none, oxford"),
    ],
    ids=str,
)
def test_what_is_wrong_with_all_is_refused(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    results = write_slides(tmp_path / "O", {"s": made(N)}, (N, G))
    correct(results, tmp_path / "C", "AB", changes())
    cases = write_cases(
        tmp_path / "cases.csv", rows_of("s", system="mayo" if "cases" in options else "")
    )
    given = {k: tmp_path / v for k, v in options.items() if k in ("corrections", "finder")}
    given |= {"signed_by": options["signed_by"]} if "signed_by" in options else {}
    with pytest.raises(GloVLMError, match=told):
        describe_biopsies(cases, [results] * options.get("slides", 1), **given)


def test_corrections_of_other_results_are_refused(tmp_path: Path) -> None:
    read(tmp_path, {"reader": "AB", "changes": changes()})
    write_slides(tmp_path / "O", {"s": made(N, N)}, (N, G, S))
    again = describe_biopsies(
        tmp_path / "cases.csv", [tmp_path / "O"], corrections=tmp_path / "C", signed_by="AB"
    )
    assert "made from other results" in again.failed["B1"]


def test_lesions_are_the_same_in_every_spelling() -> None:
    for name in ("GS", "Global-Sclerosis", "globally sclerotic glomeruli", "sclerosis, global"):
        assert lesion_of(name).key == "global sclerosis", name
    assert lesion_of("sclerosis").key == "sclerotic glomerulus"
    assert lesion_of("segmental sclerosis, not global").key != "global sclerosis"
