"""Recall of a finder by class, as `finder.json` states it of glomeruli that were left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import GloVLMError
from ..files import check_fields, read_json
from .finder.folder import CONFIG, KIND, WEIGHTS, fingerprint_finder
from .lesions import lesion_of


@dataclass(frozen=True)
class FinderRecall:
    """Recall of a finder by class.

    Attributes:
        by_class: Glomeruli of each class that it outlined, and how many there were, by the key of
            the class's lesion.
        groups: On how many patients, slides or regions that was measured, in words.
        fingerprint: Of the finder's files, which the objects that it outlines bear in short; empty
            where its weights are not there.
    """

    by_class: Mapping[str, tuple[int, int]]
    groups: str
    fingerprint: str

    def of_classes(
        self, names: Sequence[str]
    ) -> tuple[tuple[list[int], list[int]] | None, list[str]]:
        """Recall of some classes as counts, and the classes whose recall was not measured.

        Args:
            names: The classes.
        """
        known = [self.by_class.get(lesion_of(name).key) for name in names]
        missing = [n for n, one in zip(names, known, strict=True) if one is None or not one[1]]
        if missing:
            return None, missing
        return ([one[0] for one in known if one], [one[1] for one in known if one]), []


def read_recall(folder: Path) -> FinderRecall:
    """Read the recall of a finder by class.

    Args:
        folder: Of `glovlm find train`.

    Raises:
        GloVLMError: It holds no finder, or one whose recall was not measured.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise GloVLMError(
            f"Expected a finder, found no {CONFIG} in '{folder}': give the --output-dir of `glovlm "
            "find train`."
        )
    content = read_json(path)
    check_fields(path, content, {"kind": (str,), "left_out": (dict,)})
    left_out = content["left_out"]
    by_class = left_out.get("by_class")
    if content["kind"] != KIND or not isinstance(by_class, dict):
        raise GloVLMError(
            f"'{path}' states no recall by class: it takes outlines with classes, of several "
            "patients, slides or regions, to measure one."
        )
    counts: dict[str, tuple[int, int]] = {}
    for name, one in by_class.items():
        values = (one.get("found"), one.get("of")) if isinstance(one, dict) else (None, None)
        hits, of = values
        if type(hits) is not int or type(of) is not int or not 0 <= hits <= of:
            raise GloVLMError(f"'{path}' is damaged: the recall of {name} is no two counts.")
        before = counts.get(lesion_of(str(name)).key, (0, 0))
        counts[lesion_of(str(name)).key] = (before[0] + hits, before[1] + of)
    groups = f"{left_out.get('groups', 'some')} {left_out.get('group', 'group')}s"
    whole = (folder / WEIGHTS).is_file()
    return FinderRecall(counts, groups, fingerprint_finder(folder) if whole else "")
