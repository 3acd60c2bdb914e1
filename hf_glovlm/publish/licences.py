"""Licence check: what of an adapted model may be published, by the licence of its base."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from ..backbones import BACKBONES, NOT_VERIFIED, Backbone
from ..errors import GloVLMError

__all__ = ["Licence", "Part", "check_publishing", "describe_licence", "read_licence"]

Part = Literal["full", "adapter", "head", "export"]

WORDS: dict[Part, str] = {
    "full": "full weights",
    "adapter": "the adapter alone",
    "head": "the head alone",
    "export": "an export",
}
_WEIGHTS: tuple[Part, ...] = ("full", "export")  # what holds the base's own weights
_MIN_REASON = 20  # characters: a sentence, not "because"


@dataclass(frozen=True)
class Licence:
    """Licence of a model's base, as far as it is known.

    Args:
        base: The base, as the model's config names it.
        names: The licences that are stated, of one tower or two.
        gated: Whether access to a tower has to be asked for.
        non_commercial: Whether one forbids commercial use.
        no_derivatives: Whether one forbids sharing what is made from the weights.
        unknown: Whether that of a tower is not known.
    """

    base: str
    names: tuple[str, ...]
    gated: bool = False
    non_commercial: bool = False
    no_derivatives: bool = False
    unknown: bool = False

    @property
    def locked(self) -> bool:
        """Whether the base's weights may not be passed on, in whatever form."""
        return self.gated or self.no_derivatives

    @property
    def stated(self) -> str:
        """The licences in words."""
        return " and ".join(self.names) or "not stated"


def read_licence(config: Any) -> Licence:
    """Read a base's licence off a model's config and the table of backbones.

    The stricter of the two counts. A base that lay in a folder is recognised by the folder's name,
    so that a gated checkpoint stays gated after it was downloaded.

    Args:
        config: A `GloVLMConfig`: `backbone_name`, `backbone_license`, `backbone_restrictions`.
    """
    name = str(config.backbone_name or "")
    parts = [part for part in name.split("+") if part]
    rows = [row for part in parts for row in _rows(part)]
    names = [part.strip() for part in str(config.backbone_license or "").split(" + ")]
    stated = [part for part in names if part and part.lower() != NOT_VERIFIED]
    forbids = {*(config.backbone_restrictions or []), *_forbidden(" ".join(stated))}
    forbids |= {word for row in rows for word in row.restrictions}
    return Licence(
        base=name or "unnamed",
        names=tuple(dict.fromkeys(stated)),
        gated=any(row.gated for row in rows),
        non_commercial="non-commercial" in forbids,
        no_derivatives="no-derivatives" in forbids,
        unknown=len(stated) < max(len(parts), 1),
    )


def check_publishing(config: Any, what: Part, reason: str | None = None) -> None:
    """Check that the licence of the base allows a publication: the one rule of every door.

    The models' own `push_to_hub` has the short form of it that stands without this package, for
    `full` and no reason.

    Nothing opens a gated base or one that forbids derivatives: its weights stay here, merged,
    converted or not. What was learned beside them (an adapter, a head) may leave for a written
    reason. A base of unknown licence needs one for everything, a non-commercial one for nothing.

    Args:
        config: The model's `GloVLMConfig`.
        what: `full` (any weights of the base), `export` (the same in another format), `adapter` or
            `head` (what was learned beside them, alone).
        reason: Why it may be published; it is printed on the model card.

    Raises:
        GloVLMError: It may not, or not without a reason.
    """
    licence = read_licence(config)
    given = len((reason or "").strip()) >= _MIN_REASON
    if licence.locked and what in _WEIGHTS:
        reasons = ["gated"] if licence.gated else []
        if licence.no_derivatives:
            reasons.append(f"licensed {licence.stated}, without derivatives")
        raise GloVLMError(
            f"{WORDS[what].capitalize()} of '{licence.base}' cannot be published: it is "
            f"{' and '.join(reasons)}, which no option overrides. Publish what was learned beside "
            "it (--adapter-only with --reason), if its terms allow that."
        )
    if licence.locked and not given:
        raise GloVLMError(
            f"'{licence.base}' is {'gated' if licence.gated else 'licensed without derivatives'} "
            f"({licence.stated}), and its terms may count {WORDS[what]} as a derivative: say in a "
            "sentence why it may be published (--reason TEXT); the model card prints it."
        )
    if licence.unknown and not given:
        raise GloVLMError(
            f"The licence of '{licence.base}' is not known, so {WORDS[what]} cannot be published: "
            "read its terms, and state the licence and why they allow it (--reason TEXT, a "
            "sentence); the model card prints it."
        )


def describe_licence(config: Any, what: Part, reason: str | None = None) -> list[str]:
    """Licence terms that a published model inherits from its base, in sentences for its card.

    Args:
        config: The model's `GloVLMConfig`.
        what: What is published.
        reason: What was given to `check_publishing`.
    """
    licence = read_licence(config)
    terms = [f"The licence of the base, `{licence.base}`, is not stated."]
    if licence.names:
        terms = [f"The licence of the base, `{licence.base}`, passes on: {licence.stated}."]
        if licence.unknown:
            terms.append("That of one of its towers is not known.")
    if licence.non_commercial:
        terms.append("Not for commercial use: the base forbids it, so this model does, too.")
    if licence.locked:
        terms.append(
            "The weights of the base are not here; access to them is asked for at its own page. "
            "What is here is under the same terms as the base."
        )
    if reason and reason.strip():
        terms.append(f"Why it was published, in the words of who did: {' '.join(reason.split())}")
    return terms


def _rows(part: str) -> list[Backbone]:
    """Rows that a tower's name may mean, whatever its case: ids, short names, names of folders."""
    low = part.lower()
    return [row for row in BACKBONES.values() if low in _names(row)]


def _names(row: Backbone) -> set[str]:
    hub_id = (row.hub_id or "").lower()
    return {row.name, hub_id, hub_id.rpartition("/")[2]}


def _forbidden(names: str) -> set[str]:
    """Restrictions in a licence's own name, such as `cc-by-nc-nd-4.0`."""
    marks = {
        "non-commercial": r"\bnc\b|non-?commercial",
        "no-derivatives": r"\bnd\b|no-?derivatives",
    }
    return {word for word, pattern in marks.items() if re.search(pattern, names.lower())}
