"""Columns of a table of images: which hold the image, the class and the patient."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import GloVLMError, nearest
from ..settings import Settings, setting
from ..tables import column_name

MANIFEST = (
    "patient_id",
    "case_id",
    "slide_id",
    "glomerulus_id",
    "group_id",
    "block",
    "level",
    "stain",
    "mpp",
    "section_um",
    "scanner",
    "institution",
    "reader",
    "kidney",
    "outline",
)
FLOAT_COLUMNS = frozenset({"mpp", "section_um"})
MASK = "mask"  # names the picture of an image's outline, nonzero inside
OUTLINE = "outline"  # what it goes around: capsule or tuft; in an image file its alpha channel's
LOOK = "_look"  # what was seen of the files of a row, see `looks.py`
CAPTION = "caption"  # a text about the image, not about its origin as the MANIFEST columns
GROUP_IDS = ("patient_id", "case_id", "slide_id", "group_id")  # the first that is known groups
# What people call them, in one spelling; taken where just one of a line is there.
SYNONYMS = {
    "file_name": (
        "filename", "file", "image", "image_name", "image_file", "image_path", "image_id", "img",
        "img_name", "img_path", "imagename", "path", "filepath", "file_path",
    ),
    "label": (
        "class", "labels", "class_name", "classname", "class_label", "diagnosis", "category",
        "target", "lesion",
    ),
    "split": ("set", "subset", "partition", "phase"),
    "patient_id": (
        "patient", "patientid", "patient_no", "patient_nr", "patient_number", "patient_name",
        "pat_id", "pid", "subject", "subject_id", "subjectid", "donor", "donor_id",
    ),
    "case_id": ("case", "caseid", "case_no", "biopsy_id", "accession", "accession_number"),
    "slide_id": ("slide", "slideid", "slide_name", "wsi", "wsi_id"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Columns(Settings):
    """Columns that images, classes and patients are read from, where the usual names do not say."""

    image_column: str | None = setting(
        None,
        help="Column of a table that names the images.",
        group="Data",
        unset="file_name, or what people call it",
    )
    label_column: str | None = setting(
        None,
        help="Column that holds their classes.",
        group="Data",
        unset="label, or what people call it",
    )
    group_column: str | None = setting(
        None,
        help="Column of the patients, or of what else must not stand on two sides of a split.",
        group="Data",
        unset="patient_id, case_id, slide_id or group_id",
    )
    group_from: str | None = setting(
        None,
        help="Patients from file names: `parent`, the folder below the class's, or a regular "
        "expression with one group around what names the patient.",
        group="Data",
        unset="not read from names",
    )

    def check(self) -> None:
        """Rules over several settings."""
        if self.group_column is not None and self.group_from is not None:
            raise GloVLMError(
                "Patients come from a column or from file names, not both: give --group-column or "
                "--group-from."
            )
        super().check()

    def choose(
        self, header: Sequence[str], origin: str, known: Mapping[str, str] | None = None
    ) -> tuple[dict[str, str], list[str]]:
        """Which column of a table holds what.

        Args:
            header: Column names as written.
            origin: The table, for the sentence.
            known: Columns whose type already shows what they hold.

        Returns:
            The column as written by what it holds (`file_name`, `label`, `split`, `caption` and
            the MANIFEST), and a sentence where that is not its own name.

        Raises:
            GloVLMError: A column that was asked for is not there, or serves twice; several may
                hold the patients.
        """
        spelled = {column_name(name): name for name in header}
        chosen = {name: spelled[name] for name in _READ if name in spelled} | dict(known or {})
        given = {"file_name": self.image_column, "label": self.label_column}
        asked_for = (self.image_column, self.label_column, self.group_column)
        used = {*chosen.values(), *(spelled.get(column_name(name)) for name in asked_for if name)}
        notes = []
        for role, names in SYNONYMS.items():
            alike = [spelled[n] for n in names if n in spelled and spelled[n] not in used]
            if role in chosen or given.get(role) is not None or not alike:
                continue
            if len(alike) == 1:
                chosen[role] = alike[0]
                used.add(alike[0])
                notes.append(f"{role} is read from the column '{alike[0]}'")
            elif role == GROUP_IDS[0] and self.group_column is None and self.group_from is None:
                raise GloVLMError(
                    f"{origin}: patients may stand in the columns {', '.join(alike)}; rename one "
                    f"to {role} or give --group-column {alike[0]}."
                )
        for role, asked in given.items():
            if asked is not None:
                chosen[role] = self._pick(asked, spelled, origin)
        if self.group_column is not None:
            picked = self._pick(self.group_column, spelled, origin)
            role = column_name(picked) if column_name(picked) in GROUP_IDS else GROUP_IDS[0]
            for other in GROUP_IDS[: GROUP_IDS.index(role)]:
                chosen.pop(other, None)  # would group in its place
            chosen = {r: name for r, name in chosen.items() if name != picked or r in given}
            chosen[role] = picked
            notes.append(f"groups are read from the column '{picked}', as {role}")
        if chosen.get("file_name") == chosen.get("label") is not None:
            raise GloVLMError(
                f"{origin}: the column '{chosen['label']}' cannot hold both the images and their "
                "classes; give another --image-column or --label-column."
            )
        return chosen, notes

    def _pick(self, asked: str, spelled: dict[str, str], origin: str) -> str:
        name = spelled.get(column_name(asked))
        if name is None:
            header = ", ".join(spelled.values())[:1000] or "none"
            raise GloVLMError(
                f"{origin} has no column '{asked}'; found {header}.{nearest(asked, spelled)}"
            )
        return name


_READ = ("file_name", "label", "split", CAPTION, MASK, *MANIFEST)
_FLAGS = {"file_name": "--image-column", "label": "--label-column"}


def has_column(role: str, header: Sequence[str]) -> bool:
    """Whether a table has a column for it, under this name, another, or nearly."""
    names = [column_name(name) for name in header]
    return bool({role, *SYNONYMS[role]} & {*names} or nearest(role, names))


def missing_column(role: str, header: Sequence[str]) -> str:
    """What to do where no column is, or several may be, the images' or the classes'."""
    names = [column_name(name) for name in header]
    alike = [one for one, name in zip(header, names, strict=True) if name in SYNONYMS[role]]
    close = nearest(role, names)
    if len(alike) > 1:
        return f"rename one of {', '.join(alike)} to {role} or give {_FLAGS[role]} {alike[0]}."
    meant = re.search(r"'(.*)'", close)
    one = meant[1] if meant else "the column you mean"
    return f"rename {one} to {role} or give {_FLAGS[role]} {meant[1] if meant else 'NAME'}.{close}"
