"""What may stand in a published text, and how long the Hub asks to wait."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_glovlm.errors import GloVLMError
from hf_glovlm.publish.hub_errors import seconds_asked
from hf_glovlm.publish.identifiers import Identifiers
from hf_glovlm.publish.staging import clean
from hf_glovlm.publish.upload import push


@given(
    st.recursive(
        st.sampled_from(
            [
                "well",
                3,
                None,
                "Rossi Maria",
                "of Rossi Maria.",
                "case-0815",
                "in /scans/x/y",
                "~/a/b",
            ]
        ),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["a", "case-0815"]), inner),
    )
)
def test_whatever_names_somebody_is_left_out(value: Any) -> None:
    known = Identifiers(frozenset(["case-0815"]), frozenset([sha256(b"Rossi Maria").hexdigest()]))
    dropped: list[str] = []
    cleaned = json.dumps(clean([value], known, dropped))
    assert not [word for word in ("Rossi", "0815", "scans", "~") if word in cleaned]
    assert json.dumps(value).count("well") == cleaned.count("well") or "case-0815" in dropped


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, 0),
        ("7", 7),
        ("soon", 0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40),
    ],
)
def test_how_long_the_hub_asks_to_wait(
    stated: str | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 60.0)
    assert seconds_asked(stated) == expected


def test_a_wrong_id_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match="owner/name"):
        push(tmp_path / "nothing", "no id")
    with pytest.raises(GloVLMError, match="--output-dir of a finished"):
        push(tmp_path / "nothing", "lab/model")
