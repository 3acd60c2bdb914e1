"""The data audit as a page: all planted faults, the numbers of its file, and no name."""

import csv
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Glovlm
from pages import check_page
from PIL import Image

from hf_glovlm.data import check_dataset, load_dataset
from hf_glovlm.reports.audit import render_audit
from hf_glovlm.runs.audit import audit_dataset

EVIL = "<img src=x onerror=alert(1)> & {{ 7*7 }}"
RNG = np.random.default_rng(0)


def blotch(k: int) -> Image.Image:
    """A picture that is a near duplicate of no other."""
    small = np.random.default_rng(k).integers(30, 225, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC)


class Planted:
    """A folder of two classes of six patients, and rows to plant faults in."""

    def __init__(self, folder: Path, classes: tuple[str, str] = ("viable", EVIL)) -> None:
        self.folder, self.rows, self.n = folder, list[dict[str, str]](), 0
        folder.mkdir()
        for patient in range(6):
            for label in classes * 2:
                self.add(blotch(self.n), label, f"patient-{patient}")

    def add(self, image: Image.Image | None, label: str, patient: str, name: str = "") -> None:
        name, self.n = name or f"secret_{self.n}.png", self.n + 1
        if image is None:
            (self.folder / name).write_bytes(b"")
        else:
            image.save(self.folder / name)
        stain, place = ("PAS", "north") if patient == "patient-0" else ("H&E", "south")
        row = {"file_name": name, "label": label, "patient_id": patient, "split": "train"}
        self.rows.append(row | {"stain": stain, "institution": place})

    def write(self) -> Path:
        with (self.folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)
        return self.folder


def with_every_fault(folder: Path) -> Path:
    planted = Planted(folder)
    planted.add(blotch(0), EVIL, "patient-3", "secret_conflict.png")
    planted.add(blotch(4), "viable", "patient-4", "secret_copy.png")
    near = blotch(8).resize((44, 44))
    planted.add(near, "viable", "patient-5", "secret_near<b>x.jpg")
    planted.add(blotch(90), "viable", "PATIENT-5")
    planted.add(blotch(91), "rare", "patient-2")
    for row in planted.rows:
        alone = row["label"] == "rare"
        row["split"] = "test" if row["patient_id"] == "patient-1" or alone else "train"
    return planted.write()


SEEN = {
    "label_conflict": "images have different labels in copies with the same pixels",
    "across_groups": "images are in several groups, as copies with the same pixels",
    "spelling": "values of patient_id differ in spelling only",
    "split": "group stands on two sides of the given split",
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The page without pictures and the one with, by the command."""
    from hf_glovlm.cli import app

    root = tmp_path_factory.mktemp("audit")
    data = with_every_fault(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOVLM_CACHE", str(root / "cache"))
        patch.chdir(root)
        codes = [app.main(["data", "check", str(data), "--html", "--allow-fewer"])]
        more = ["--allow-fewer", "--output", "shown.html", "--with-images"]
        codes += [app.main(["data", "check", str(data), *more])]
    assert codes == [1, 1]
    files = {"bare": root / "audit.html", "shown": root / "shown.html"}
    read = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    facts = {n: json.loads(p.with_suffix(".json").read_text()) for n, p in files.items()}
    return {"files": files, "text": read, "facts": facts}


def words(page: str) -> str:
    """What a person reads, without the charts."""
    body = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page.partition("<body>")[2], flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


@pytest.mark.parametrize("kind", SEEN)
def test_every_planted_fault_is_on_the_page(kind: str, pages: dict[str, Any]) -> None:
    facts = pages["facts"]["bare"]
    assert kind in {problem["kind"] for problem in facts["problems"]}
    assert SEEN[kind] in words(pages["text"]["bare"]).replace("Values of", "values of")


def test_copies_and_counts_are_on_the_page(pages: dict[str, Any]) -> None:
    facts, text = pages["facts"]["bare"], words(pages["text"]["bare"])
    assert facts["copies"] == {"label_conflict": 1, "across_groups": 2, "within_groups": 0}
    assert "1 with different labels and 2 in several patients" in text
    assert "Class rare lies in 1 patient: it cannot be both learned and tested." in text
    assert "Stain PAS comes from one institution, which has no other stain" in text
    assert "class rare has 1 test images and none to train on" in text.lower()
    by_name = {row["name"]: row for row in facts["classes"]}
    assert (by_name["viable"]["images"], by_name["viable"]["groups"]) == (15, 7)
    assert facts["origins"]["stain"]["names"] == ["H&E", "PAS"]


def test_unreadable_images_are_counted_and_the_others_audited(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "data")
    planted.add(None, "viable", "patient-1", "secret_broken.png")
    data = load_dataset(planted.write())
    facts = audit_dataset(data, check_dataset(data), n_resamples=50).facts
    assert (facts["images"], facts["unreadable"]) == (25, 1)
    assert facts["problems"][0]["sentence"].startswith("1 image cannot be read")
    assert sum(row["images"] for row in facts["classes"]) == 24
    assert facts["probe"]["n"] == 24


def test_a_page_of_nothing_readable_says_so(tmp_path: Path) -> None:
    for k, label in enumerate(("a", "b")):
        (tmp_path / label).mkdir()
        (tmp_path / label / f"{k}.png").write_bytes(b"")
    data = load_dataset(tmp_path)
    page = render_audit(audit_dataset(data, check_dataset(data)).facts)
    assert "No image can be read" in words(page)
    assert "2 images cannot be read" in words(page)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
        yield len(value)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", value.replace(",", "")))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_every_number_on_the_page_stands_in_its_json(pages: dict[str, Any]) -> None:
    page, facts = pages["text"]["bare"], pages["facts"]["bare"]
    text = words(re.sub(r'<details class="how">.*?</details>', " ", page, flags=re.S))
    text = text.replace("95% interval", "interval")
    known = {*numbers(facts)} | {100 * x for x in numbers(facts)}
    shown = re.findall(r"(?<![\w.,-])-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?![\w])", text)
    assert len(shown) > 200
    for written in shown:
        plain = written.replace(",", "")
        digits = len(plain.partition("e")[0].partition(".")[2])
        exact = {plain, plain.lstrip("-")}
        same = any(f"{x:.{digits}f}" in exact or f"{x:.3g}" in exact for x in known)
        assert same or plain in STATED, f"{written} stands in no fact"


# In the names of statistics and of the package: "Detail at 1 to 2 px", ".50 is chance".
STATED = {"1", "2", "4", "8", "16", "50", "0", "7"}


def test_nothing_on_the_bare_page_names_a_file_or_a_patient(pages: dict[str, Any]) -> None:
    bare, shown = pages["text"]["bare"], pages["text"]["shown"]
    for name in ("secret_", "patient-1", "PATIENT-5"):
        assert name not in bare
        assert name not in json.dumps(pages["facts"]["bare"])
        assert name in shown or name != "secret_"
    assert "data:image" not in bare
    assert shown.count("data:image/jpeg") > 12
    assert "secret_conflict.png" in words(shown)
    assert len(shown) < 1_000_000


def test_hostile_names_are_text(pages: dict[str, Any]) -> None:
    for page in pages["text"].values():
        assert "<img src=x" not in page
        assert "onerror=alert(1)&gt; &amp; {{ 7*7 }}" in page
    assert "secret_near&lt;b&gt;x.jpg" in pages["text"]["shown"]


@pytest.mark.browser
def test_the_page_is_read_on_a_desktop_and_a_phone(pages: dict[str, Any]) -> None:
    check_page(pages["files"]["shown"], what="audit")


def test_what_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, glovlm: Glovlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = tmp_path / "data", tmp_path / "other.html"
    (data / "deeper").mkdir(parents=True)
    other.write_text("<p>mine</p>")
    cases = {
        "give --html": ("--with-images",),
        "read or written|not a page|is not": ("--html", "--output", other),
        "does not exist": ("--html", "--output", tmp_path / "no/audit.html"),
        "expected a name such as audit.html": ("--output", tmp_path / "audit.txt"),
    }
    for sentence, options in cases.items():
        done = glovlm("data", "check", data, *options)
        assert done.code == 2
        assert re.search(sentence, done.err), done.err
    assert other.read_text() == "<p>mine</p>"
    monkeypatch.chdir(data / "deeper")
    done = glovlm("data", "check", data, "--html")
    assert done.code == 2
    assert "among the images" in done.err
