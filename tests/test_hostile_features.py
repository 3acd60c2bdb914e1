"""`adapt_features` on hostile arrays: the right answer or a sentence, for every method."""

from typing import Any

import numpy as np
import pytest
from hostile_features import (
    LABELS,
    LACKING,
    MATRICES,
    NUMBERS,
    ON_FEATURES,
    QUERIES,
    REFUSED,
    SLOW,
    attempt,
    check,
    good,
)

from hf_glovlm.errors import GloVLMError
from hf_glovlm.training import adapt_features

QUICK = [name for name in ON_FEATURES if name not in SLOW]
CASES = 200


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Logits of the quick methods on arrays as they should be."""
    return {name: attempt(name) for name in QUICK}


def same(ended: Any, expected: Any) -> bool:
    return isinstance(ended, np.ndarray) and np.array_equal(ended, expected)


@pytest.mark.parametrize("method", QUICK)
def test_what_an_array_comes_as_does_not_matter(method: str, plain: dict[str, Any]) -> None:
    changes: dict[str, dict[str, Any]] = {}
    for text, convert in MATRICES.items():
        for name in ("support_features", "text_features", "query_features"):
            changes[f"{name}: {text}"] = {name: convert(good()[name])}
        changes[f"predicted: {text}"] = {"queries": convert(good()["query_features"])}
    for text, convert in LABELS.items():
        changes[f"labels: {text}"] = {"support_labels": convert(good()["support_labels"])}
    changes |= {text: change() for text, change in NUMBERS.items()}
    ended = {text: attempt(method, **change) for text, change in changes.items()}
    wrong = {text: e for text, e in ended.items() if not same(e, plain[method])}
    assert not wrong


@pytest.mark.parametrize("method", SLOW)
def test_a_trained_head_takes_all_of_it_at_once(method: str) -> None:
    base = good()
    ended = attempt(
        method,
        support_features=MATRICES["big-endian"](base["support_features"])[::-1],
        support_labels=LABELS["series"](base["support_labels"][::-1]),
        text_features=MATRICES["bfloat16 tensor"](base["text_features"]),
        queries=MATRICES["read-only"](base["query_features"]),
        **NUMBERS["scale as a tensor"](),
        **NUMBERS["seed of numpy"](),
    )
    turned = attempt(
        method,
        support_features=base["support_features"][::-1].copy(),
        support_labels=base["support_labels"][::-1].copy(),
    )
    assert same(ended, turned), ended


@pytest.mark.parametrize("method", ON_FEATURES)
def test_what_has_no_right_reading_ends_in_a_sentence(method: str) -> None:
    changes = REFUSED | ({} if method == "zero_shot" else LACKING)
    ended = {text: attempt(method, **change()) for text, change in changes.items()}
    wrong = {
        text: e
        for text, e in ended.items()
        if not isinstance(e, GloVLMError) or "\n" in str(e) or not str(e).endswith((".", "?"))
    }
    assert not wrong


@pytest.mark.parametrize("method", QUICK)
def test_queries_without_a_right_reading_are_refused(method: str) -> None:
    ended = {
        text: attempt(method, queries=change()["query_features"])
        for text, change in QUERIES.items()
    }
    assert not {text: e for text, e in ended.items() if not isinstance(e, GloVLMError)}


def test_zero_shot_learns_from_no_label(plain: dict[str, Any]) -> None:
    ended = {text: attempt("zero_shot", **change()) for text, change in LACKING.items()}
    assert not {text: e for text, e in ended.items() if not same(e, plain["zero_shot"])}


def test_truth_values_are_the_classes_0_and_1() -> None:
    base = good()
    two = {"support_features": base["support_features"], "text_features": base["text_features"][:2]}
    truth = base["support_labels"] > 0
    ended = attempt("gda", **two, support_labels=truth)
    assert same(ended, attempt("gda", **two, support_labels=truth.astype(int))), ended


def test_images_of_a_class_that_cancel_out_give_no_mean() -> None:
    features = np.array([[1.0, 2.0], [-1.0, -2.0], [2.0, 1.0]])
    ended = attempt("tip_adapter", support_features=features, support_labels=[0, 0, 1],
                    text_features=None, query_features=None, queries=features)  # fmt: skip
    assert isinstance(ended, GloVLMError), ended
    assert "class 0" in str(ended)


@pytest.mark.parametrize("method", [None, 3, ["gda"], "", "gdaa"])
def test_a_method_that_is_none_is_refused(method: Any) -> None:
    ended = attempt(method)
    assert isinstance(ended, GloVLMError), ended


def test_names_of_classes_are_refused_with_the_way_to_number_them() -> None:
    with pytest.raises(GloVLMError, match="return_inverse"):
        adapt_features("gda", **(good() | {"support_labels": np.array(list("abcabcc"))}))


def test_random_arrays_end_in_logits_or_a_sentence() -> None:
    failures = [failure for number in range(CASES) if (failure := check(number))]
    assert not failures, f"{len(failures)} of {CASES}:\n" + "\n".join(failures[:10])
