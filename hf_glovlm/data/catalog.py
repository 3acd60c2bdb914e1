"""Catalogue of public data sets, their classes and prompts: one YAML file per set, in `catalog/`.

A file added to that folder is a set added to the catalogue; nothing else needs to change. From
Python: `catalog_entry("glo_vlms_cornell")`, and `load_classes(labels)` for the names and prompts
of any data set, known or not.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..errors import GloVLMError, nearest
from ..settings import from_mapping, read_yaml
from .terminology import Term, find_stain, find_term, match_key, prompts_for
from .visibility import visible_prompts

logger = logging.getLogger("hf_glovlm")
_FOLDER = Path(__file__).with_name("catalog")
# Cohorts whose name stands in their ids: a word of its own, before a digit or a separator.
_NAMED = re.compile(r"(?<![^\W_])(tcga|cptac|gtex|paip|kpmp|hubmap)(?![^\W\d_])", re.I)
_TEMPLATE = "A pathology image of {}"


@dataclass(frozen=True)
class ClassInfo:
    """Class name, display name and prompts.

    Attributes:
        name: The label as the data have it (the folder name).
        display_name: For tables and cards.
        prompts: One or more texts for the class; their embeddings are averaged.
        grade: Where the classes are grades, such as Gleason patterns, which one this is; of these
            numbers only the order counts. `None` where no order is stated.
    """

    name: str
    display_name: str
    prompts: tuple[str, ...]
    grade: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as results hold them; the grade where there is one."""
        values = {"name": self.name, "display_name": self.display_name, "prompts": self.prompts}
        return values if self.grade is None else values | {"grade": self.grade}


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """Catalogue entry of a data set.

    Attributes:
        name: The catalogue name, which is also the file's.
        title: One line for a table.
        kind: `glomeruli` (one crop, one glomerulus), `region` (tissue tiles), `slide` (one label a
            whole slide, in a `slides.csv`: see `read_slide_table`) or `synthetic`.
        classes: In the file's order; the names are those of the class folders.
        stain: Canonical stain names; empty where the source names none.
        cohorts: Whose slides these are, in lower case (`tcga`), to be compared with what a backbone
            saw in pretraining; not all where `notes` name further ones, empty where unknown.
        licence: Of the images, as far as known.
        citation: What to cite.
        source: Where to get it.
        layout: How the folder must look.
        split_rule: What may never stand on two sides.
        metric: The headline, or why there is none.
        notes: Traps.
        public: Whether the images can be had at all.
    """

    name: str
    title: str
    kind: Literal["glomeruli", "region", "slide", "synthetic"]
    classes: tuple[ClassInfo, ...]
    stain: tuple[str, ...]
    licence: str
    citation: str
    source: str
    layout: str
    split_rule: str
    metric: str
    notes: tuple[str, ...]
    cohorts: tuple[str, ...] = ()
    public: bool = True

    @property
    def how_to_get(self) -> str:
        """Instructions for getting the set, for a user who gave its name as `--data`."""
        if self.kind == "synthetic":
            return f"'{self.name}' is made on demand: {self.source}(folder)."
        if not self.public:
            return (
                f"The images of '{self.name}' are not public; "
                "its classes and prompts fit data of your own."
            )
        return (
            f"Get '{self.name}' from {self.source} (licence: {self.licence}) and lay it out so: "
            f"{self.layout}. Then pass that {'table' if self.kind == 'slide' else 'folder'}."
        )


def catalog_entries() -> list[CatalogEntry]:
    """All sets of the catalogue, sorted by name."""
    return list(_entries())


def catalog_entry(name: str) -> CatalogEntry:
    """Look up a set of the catalogue.

    Raises:
        GloVLMError: No such set; names the nearest and lists all.
    """
    known = {entry.name: entry for entry in _entries()}
    if name not in known:
        raise GloVLMError(
            f"The catalogue has no set '{name}'.{nearest(name, known)} Sets: {', '.join(known)}."
        )
    return known[name]


def find_cohorts(name: str, texts: Iterable[str] = ()) -> set[str]:
    """Cohorts that data come from, by the catalogue and by their own words.

    Args:
        name: Of the data: a catalogue name in any spelling, perhaps with more around it.
        texts: Ids, institutions and file names, in which cohorts are named (`TCGA-A1-A0SB`).

    Returns:
        In lower case; empty where nothing is known.
    """
    words = f" {match_key(name)} "
    cohorts = {
        cohort
        for entry in _entries()
        for cohort in entry.cohorts
        if f" {match_key(entry.name)} " in words
    }
    for text in {name, *texts}:
        cohorts |= {match.lower() for match in _NAMED.findall(text)}
    return cohorts


def describe_source(name: str) -> str:
    """Description of a set for a user, in several lines: source, licence, layout.

    Nothing is downloaded: most sets need a form, an account or a licence first.

    Raises:
        GloVLMError: See `catalog_entry`.
    """
    entry = catalog_entry(name)
    lines = {
        "classes": ", ".join(info.name for info in entry.classes),
        "source": entry.source if entry.public else f"{entry.source}; the images are not public",
        "licence": entry.licence,
        "cite": entry.citation,
        "layout": entry.layout,
        "split": entry.split_rule,
        "metric": entry.metric,
    }
    facts = [f"{key}: {text}" for key, text in lines.items()]
    return "\n".join([f"{entry.name}: {entry.title}", *facts, *(f"- {n}" for n in entry.notes)])


def read_entry(path: Path) -> CatalogEntry:
    """Read one file of the catalogue, strictly.

    A class gives its `prompts`, or, in a file with `templates`, the `names` that go into each.

    Raises:
        GloVLMError: Names the file and the key that is unknown, missing or wrong.
    """
    raw = read_yaml(path)
    given = raw.pop("classes", None)
    if not isinstance(given, dict) or len(given) < 2:
        raise GloVLMError(f"{path.name}: 'classes' must hold at least two classes.")
    templates = raw.pop("templates", None)
    if templates is not None:
        given = _fill_templates(templates, given, path.name)
    texts = {
        label: _class_text(value, f"{path.name}: class '{label}'") for label, value in given.items()
    }
    for label, text in texts.items():
        for key in ("display_name", "prompts"):
            if not getattr(text, key):
                raise GloVLMError(f"{path.name}: class '{label}': the key '{key}' is missing.")
    classes = tuple(
        ClassInfo(x, t.display_name, _distinct(t.prompts), t.grade) for x, t in texts.items()
    )
    entry = from_mapping(CatalogEntry, {**raw, "classes": classes}, path.name)
    if entry.name != path.stem:
        raise GloVLMError(
            f"{path.name}: 'name' is '{entry.name}', but the file is called '{path.stem}'."
        )
    for stain in entry.stain:
        if find_stain(stain) != stain:
            raise GloVLMError(f"{path.name}: write the stain '{stain}' as '{find_stain(stain)}'.")
    if len({match_key(info.name) for info in classes}) < len(classes):
        raise GloVLMError(f"{path.name}: two classes differ in spelling only.")
    _check_prompts(classes, f"{path.name}: ")
    _check_grades(classes, f"{path.name}: ")
    return entry


def load_classes(
    label_names: Sequence[str],
    *,
    source: str | Path | None = None,
    prompts: str | Path = "auto",
    stain: str | None = None,
    outline: str = "ignore",
    outline_of: str | None = None,
) -> list[ClassInfo]:
    """Class names and prompts of a data set.

    Class by class, the first of these that has the class gives its prompts; likewise its display
    name:

    1. the `classes.yaml` that `prompts` points to, else the one beside the data (`source`);
    2. with `prompts="terminology"`, the glomerular terminology;
    3. the catalogue: the set that `prompts` or `source` names, else the smallest set whose classes
       include all the labels (at least two; spelling such as `viable_glomeruli` aside);
    4. "A pathology image of {display name}".

    `classes.yaml` may name only some classes, and a prompt list, a display name or both for each;
    classes that are grades state which, all of them:

        classes:
          sclerosed: {display_name: Sclerosed, prompts: [A pathology image of ...], grade: 2}

    Args:
        label_names: The labels, in the order of the data's ids; at least one, all different.
        source: The data folder (or a file in it), a catalogue name or a Hub id.
        prompts: `auto`; `catalog` (an error if no set fits); `terminology`; the name of a
            catalogue set; or the path of a `classes.yaml`.
        stain: Used with `terminology`: named in the prompts if every class takes its prompts from
            the terminology and shows in that stain, else in none of them, so that the stain's
            words favour no class.
        outline: What the model does with outlines; where these hide something, prompts that name
            it are left out (see `visible_prompts`), except those of a `classes.yaml`.
        outline_of: What outlines go around: `capsule`, `tuft`, or not known.

    Returns:
        One ClassInfo for each label, in the order given; every one has a prompt, no prompt twice.

    Raises:
        GloVLMError: An unknown label, key, set or stain; a bad file; a term that no crop can show;
            two classes with the same prompt.
    """
    labels = list(label_names)
    if not labels or len(set(labels)) < len(labels):
        raise GloVLMError(f"Expected different class labels, found {labels or 'none'}.")
    own = _own_texts(labels, source, prompts)
    open_labels = [label for label in labels if label not in own or not own[label].prompts]
    from_terms = _term_prompts(open_labels, labels, stain) if prompts == "terminology" else {}
    from_catalog = _catalog_classes(labels, open_labels, source, prompts)

    classes = []
    for label in labels:
        text, known = own.get(label, _ClassText()), from_catalog.get(label)
        display = text.display_name or (known or _undescribed(label)).display_name
        ours = from_terms.get(label) or (known.prompts if known else (_TEMPLATE.format(display),))
        chosen = text.prompts or visible_prompts(ours, outline, outline_of)
        grade = text.grade if text.grade is not None or known is None else known.grade
        classes.append(ClassInfo(label, display, _distinct(chosen), grade))
    if any(text.grade is not None for text in own.values()):
        _check_grades(classes, "classes.yaml: ")
    _check_prompts(classes, "")
    return classes


def find_grades(labels: Sequence[str]) -> list[int] | None:
    """Grades of classes by the catalogue; `None` where no set of it has them as grades."""
    entry = _matching_entry(list(labels))
    known = {match_key(info.name): info for info in entry.classes} if entry else {}
    return list_grades([known.get(match_key(label)) for label in labels])


def list_grades(classes: Iterable[ClassInfo | None]) -> list[int] | None:
    """Grade of each class, as `compute_metrics` takes them; `None` where no order is stated."""
    grades = [None if info is None else info.grade for info in classes]
    known = [grade for grade in grades if grade is not None]
    return known if len(known) == len(grades) else None


# ------------------------------------------------------------------------------- the sources


@dataclass(frozen=True, kw_only=True)
class _ClassText:
    """Display name and prompts of a class in a YAML file."""

    display_name: str = ""
    prompts: tuple[str, ...] = ()
    grade: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Templates:
    templates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _NamedClass:
    display_name: str
    names: tuple[str, ...]
    grade: int | None = None


def _class_text(raw: object, where: str) -> _ClassText:
    if isinstance(raw, dict) and raw.get("prompts") == []:
        raise GloVLMError(f"{where}: 'prompts' is empty; write at least one, or leave the key out.")
    return from_mapping(_ClassText, raw, where)


def _fill_templates(templates: object, given: dict[str, Any], file: str) -> dict[str, Any]:
    """Classes with `prompts` made of their `names`, one for each name and template."""
    top = from_mapping(_Templates, {"templates": templates}, file)
    for template in top.templates:
        if template.count("{}") != 1:
            raise GloVLMError(f"{file}: the template '{template}' must hold {{}} once.")
    filled: dict[str, dict[str, Any]] = {}
    for label, value in given.items():
        named = from_mapping(_NamedClass, value, f"{file}: class '{label}'")
        prompts = [t.format(name) for name in named.names for t in top.templates]
        filled[label] = {"display_name": named.display_name, "prompts": prompts}
        filled[label] |= {} if named.grade is None else {"grade": named.grade}
    return filled


def _undescribed(label: str) -> ClassInfo:
    """A class without a description."""
    return ClassInfo(label, label.replace("_", " ").strip() or label, ())


def _distinct(prompts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(prompts))


def _own_texts(
    labels: Sequence[str], source: str | Path | None, prompts: str | Path
) -> dict[str, _ClassText]:
    """Texts of the user's `classes.yaml`: the one given, else the one beside the data."""
    if _is_path(prompts):
        path = Path(prompts)
    else:
        place = Path(source) if source is not None else None
        if place is None or not place.exists():
            return {}
        path = (place if place.is_dir() else place.parent) / "classes.yaml"
        if not path.exists():
            return {}
    raw = read_yaml(path)
    if set(raw) != {"classes"} or not isinstance(raw["classes"], dict):
        raise GloVLMError(
            f"{path}: expected the one key 'classes' with the labels below it, "
            f"found {', '.join(map(repr, raw)) or 'nothing'}."
        )
    for label in raw["classes"]:
        if label not in labels:
            raise GloVLMError(
                f"{path}: the data have no class '{label}'.{nearest(label, labels)} "
                f"Classes: {', '.join(labels)}."
            )
    return {
        label: _class_text(value, f"{path}: class '{label}'")
        for label, value in raw["classes"].items()
    }


def _is_path(prompts: str | Path) -> bool:
    if isinstance(prompts, Path):
        return True
    return prompts.endswith((".yaml", ".yml")) or ("/" in prompts or "\\" in prompts)


def _catalog_classes(
    labels: Sequence[str],
    open_labels: Sequence[str],
    source: str | Path | None,
    prompts: str | Path,
) -> dict[str, ClassInfo]:
    """Classes of the catalogue's set, under the labels as the data spell them.

    The set must have every one of `open_labels`, those without prompts in `classes.yaml`.
    """
    known = [entry.name for entry in _entries()]
    named: str | None = None
    if isinstance(prompts, str) and not _is_path(prompts):
        if prompts not in ("auto", "catalog", "terminology"):
            if prompts not in known:
                choices = ["auto", "catalog", "terminology", *known]
                raise GloVLMError(
                    f"Unknown prompts '{prompts}'.{nearest(prompts, choices)} Expected one of "
                    f"{', '.join(choices)}, or the path of a classes.yaml."
                )
            named = prompts
        elif str(source) in known and not Path(str(source)).exists():
            named = str(source)
    entry = catalog_entry(named) if named else _matching_entry(labels)
    if entry is None:
        if prompts == "catalog" and open_labels:
            raise GloVLMError(
                f"No set of the catalogue has the classes {', '.join(labels)}; use prompts "
                f"'auto', a classes.yaml, or the name of a set: {', '.join(known)}."
            )
        return {}
    by_key = {match_key(info.name): info for info in entry.classes}
    for label in open_labels:
        if match_key(label) not in by_key:
            names = [info.name for info in entry.classes]
            raise GloVLMError(
                f"The catalogue's set '{entry.name}' has no class '{label}'."
                f"{nearest(label, names)} Its classes: {', '.join(names)}."
            )
    return {label: by_key[match_key(label)] for label in labels if match_key(label) in by_key}


def _matching_entry(labels: Sequence[str]) -> CatalogEntry | None:
    """The smallest set that has all these labels; None for one label or a tie that matters."""
    keys = {match_key(label) for label in labels}
    if len(keys) < 2:
        return None
    fits = [e for e in _entries() if keys <= {match_key(info.name) for info in e.classes}]
    if not fits:
        return None
    fewest = min(len(entry.classes) for entry in fits)
    best = [entry for entry in fits if len(entry.classes) == fewest]
    names = ", ".join(f"'{entry.name}'" for entry in best)
    meant = [{match_key(c.name): c.prompts for c in e.classes} for e in best]
    if any(other[key] != meant[0][key] for other in meant for key in keys):
        logger.warning("The classes fit several sets of the catalogue (%s): none is used.", names)
        return None
    logger.info("The classes are those of the catalogue's set %s (%s).", names, best[0].title)
    return best[0]


def _term_prompts(
    open_labels: Sequence[str], labels: Sequence[str], stain: str | None
) -> dict[str, tuple[str, ...]]:
    """Prompts from the terminology for the open labels in it; a warning for the others."""
    terms: dict[str, Term] = {}
    for label in open_labels:
        try:
            terms[label] = find_term(label)
        except GloVLMError as error:
            logger.warning("%s", error)
    if open_labels and not terms:
        raise GloVLMError(
            f"The terminology has none of the classes {', '.join(open_labels)}; it holds "
            "glomerular lesions only: use prompts 'auto' or a classes.yaml."
        )
    if stain is not None:
        canonical = find_stain(stain)
        blind = [x for x in labels if x not in terms or canonical not in terms[x].stains]
        if blind:
            logger.warning(
                "No prompt names the stain %s: it is not known to show %s, and words that only "
                "some classes carry would favour those.",
                canonical,
                ", ".join(f"'{label}'" for label in blind),
            )
            stain = None
    return {label: tuple(prompts_for(term, stain)) for label, term in terms.items()}


def _check_prompts(classes: Iterable[ClassInfo], where: str) -> None:
    owner: dict[str, str] = {}
    for info in classes:
        for prompt in info.prompts:
            other = owner.setdefault(prompt.casefold(), info.name)
            if other != info.name:
                raise GloVLMError(
                    f"{where}The classes '{other}' and '{info.name}' share the prompt '{prompt}', "
                    "so no text distinguishes them; give each its own (your data: classes.yaml)."
                )


def _check_grades(classes: Sequence[ClassInfo], where: str) -> None:
    """Refuse grades of some classes only, and one grade for two classes."""
    grades = [info.grade for info in classes]
    if not any(grade is not None for grade in grades):
        return
    for info in classes:
        if info.grade is None or grades.count(info.grade) > 1:
            least = "none" if info.grade is None else f"{info.grade} like another"
            raise GloVLMError(
                f"{where}class '{info.name}' has the grade {least}; give every class its own "
                "'grade' (whole numbers, from the least to the most severe), or none."
            )


@lru_cache(maxsize=1)
def _entries() -> tuple[CatalogEntry, ...]:
    return tuple(read_entry(path) for path in sorted(_FOLDER.glob("*.yaml")))
