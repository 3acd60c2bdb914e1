"""The licence gate, case by case."""

from types import SimpleNamespace
from typing import Any

import pytest

from hf_glovlm.errors import GloVLMError
from hf_glovlm.publish.licences import check_publishing, describe_licence, read_licence

CLIP = "openai/clip-vit-base-patch32"
REASON = "The authors agreed in writing that heads may be shared."
ALL = ("full", "export", "adapter", "head")
GATE = [
    # name, licence, restrictions: what needs nothing, what needs a reason; the rest is refused
    (CLIP, "mit", [], ALL, ()),
    ("mini", "apache-2.0", [], ALL, ()),
    ("MahmoodLab/conch", "cc-by-nc-nd-4.0", ["non-commercial"], (), ("adapter", "head")),
    ("MahmoodLab/UNI+microsoft/x", "cc-by-nc-nd-4.0 + mit", [], (), ("adapter", "head")),
    ("uni", None, None, (), ("adapter", "head")),  # a folder of that name
    ("Virchow2", None, None, (), ("adapter", "head")),
    ("jamessyx/PathGen-CLIP", "not verified", [], (), ("adapter", "head")),
    ("google/medsiglip-448", "health-ai-developer-foundations", [], (), ("adapter", "head")),
    ("owkin/phikon-v2+x/y", "owkin non-commercial + mit", ["non-commercial"], ALL, ()),
    ("somebody/model", "CC-BY-ND-4.0", None, (), ("adapter", "head")),
    ("vinid/plip", "not verified", [], (), ALL),
    ("facebook/dinov2-base+own-text", "apache-2.0", [], (), ALL),  # half of it is unknown
    ("own-weights", None, None, (), ALL),
    (None, None, None, (), ALL),
]


@pytest.mark.parametrize("what", ALL)
@pytest.mark.parametrize(("name", "licence", "restrictions", "free", "argued"), GATE)
def test_the_licence_gate(
    name: str, licence: str, restrictions: list[str], free: Any, argued: Any, what: Any
) -> None:
    config = SimpleNamespace(
        backbone_name=name, backbone_license=licence, backbone_restrictions=restrictions
    )
    for reason in (None, "  ", "because", REASON):
        if what in free or (what in argued and reason == REASON):
            check_publishing(config, what, reason)
            terms = " ".join(describe_licence(config, what, reason))
            assert (reason == REASON) == (REASON in terms)
            assert ("commercial" in terms) == read_licence(config).non_commercial
        else:
            expected = "--reason" if what in argued else "no option overrides"
            with pytest.raises(GloVLMError, match=expected):
                check_publishing(config, what, reason)
