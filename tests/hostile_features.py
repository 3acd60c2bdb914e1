"""Arrays that `adapt_features` may be given: those with a right reading, and those without one."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch

from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import METHODS, FeatureMethod, HeadMethod
from hf_glovlm.training import adapt_features

ON_FEATURES = [n for n, m in METHODS.items() if isinstance(m, FeatureMethod | HeadMethod)]
# These train, some for hundreds of epochs.
SLOW = ("lp_plus_plus", "zs_lp", "clap", "taskres", "clip_adapter", "tip_adapter_f", "prolip")
SLOW += ("classifier",)
K, DIM = 3, 8


def good(seed: int = 0) -> dict[str, Any]:
    """A support of three classes, their texts and queries: sixteenths, exact in every format."""
    rng = np.random.default_rng(seed)
    texts = np.eye(K, DIM) * 2 + rng.integers(-4, 5, size=(K, DIM)) / 16
    labels = np.array([0, 1, 2, 0, 1, 2, 2])
    noise = rng.integers(-6, 7, size=(len(labels), DIM)) / 16
    queries = texts + rng.integers(-4, 5, size=(K, DIM)) / 16
    return {
        "support_features": texts[labels] + noise,
        "support_labels": labels,
        "text_features": texts,
        "query_features": queries,
    }


def attempt(method: Any, *, queries: Any = None, **arguments: Any) -> Any:
    """Logits of the queries, or whatever was raised; a warning counts as raised."""
    queries = good()["query_features"] if queries is None else queries
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return adapt_features(method, **(good() | arguments)).predict_logits(queries)
        except Exception as error:
            return error


def read_only(array: Any) -> Any:
    copy = np.array(array)
    copy.setflags(write=False)
    return copy


def series(values: Any) -> Any:
    import pandas as pd

    return pd.Series(list(values), index=range(5, 5 + len(values)))


def frame(values: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(values)


# What a matrix may come as without another meaning.
MATRICES: dict[str, Callable[[Any], Any]] = {
    "big-endian": lambda x: x.astype(">f8"),
    "negative strides": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "column-major": np.asfortranarray,
    "read-only": read_only,
    "float16": lambda x: x.astype(np.float16),
    "long double": lambda x: x.astype(np.longdouble),
    "objects": lambda x: x.astype(object),
    "lists": lambda x: x.tolist(),
    "a data frame": frame,
    "bfloat16 tensor": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "tensor with a gradient": lambda x: torch.tensor(x, requires_grad=True),
    "transposed tensor": lambda x: torch.tensor(x.T.copy()).T,
    "unmasked array": np.ma.asarray,
}
LABELS: dict[str, Callable[[Any], Any]] = {
    "big-endian": lambda y: y.astype(">i4"),
    "negative strides": lambda y: np.ascontiguousarray(y[::-1])[::-1],
    "unsigned": lambda y: y.astype(np.uint64),
    "int8 tensor": lambda y: torch.tensor(y, dtype=torch.int8),
    "list": lambda y: y.tolist(),
    "series": series,
    "objects": lambda y: y.astype(object),
    "read-only": read_only,
}
NUMBERS: dict[str, Callable[[], dict[str, Any]]] = {
    "scale as a tensor": lambda: {"logit_scale": torch.tensor(100.0)},
    "scale as a parameter": lambda: {"logit_scale": torch.nn.Parameter(torch.tensor([100.0]))},
    "scale of numpy": lambda: {"logit_scale": np.float32(100)},
    "seed of numpy": lambda: {"seed": np.int64(0)},
    "seed as a tensor": lambda: {"seed": torch.tensor(0)},
}


def _put(name: str, value: float) -> Callable[[], dict[str, Any]]:
    def change() -> dict[str, Any]:
        array = good()[name].copy()
        array[-1, 0 if np.isnan(value) or np.isinf(value) else slice(None)] = value
        return {name: array}

    return change


def _set(**change: Any) -> Callable[[], dict[str, Any]]:
    return lambda: change


# What has no right reading: by name, the change that it is, made anew each time.
REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    f"{name} with {text}": _put(name, value)
    for name in ("support_features", "text_features", "query_features")
    for text, value in {
        "NaN": np.nan, "infinity": np.inf, "a row of zeros": 0.0, "1e20": 1e20, "1e300": 1e300,
        "1e-30": 1e-30,
    }.items()
}  # fmt: skip
for _name in ("support_features", "text_features", "query_features"):
    _x = good()[_name]
    REFUSED |= {
        f"{_name} complex": _set(**{_name: _x.astype(complex)}),
        f"{_name} complex tensor": _set(**{_name: torch.tensor(_x.astype(complex))}),
        f"{_name} 3-d": _set(**{_name: _x[None]}),
        f"{_name} 1-d": _set(**{_name: _x[0]}),
        f"{_name} sparse": _set(**{_name: scipy.sparse.csr_matrix(_x)}),
        f"{_name} sparse tensor": _set(**{_name: torch.tensor(_x).to_sparse()}),
        f"{_name} strings": _set(**{_name: _x.astype(str)}),
        f"{_name} object strings": _set(**{_name: _x.astype(str).astype(object)}),
        f"{_name} dates": _set(**{_name: _x.astype("datetime64[s]")}),
        f"{_name} ragged": _set(**{_name: [[1.0], [1.0, 2.0]]}),
        f"{_name} masked": _set(**{_name: np.ma.masked_less(_x, 0.1)}),
        f"{_name} without columns": _set(**{_name: _x[:, :0]}),
        f"{_name} of another width": _set(**{_name: _x[:, :-1]}),
        f"{_name} a number": _set(**{_name: 3.0}),
        f"{_name} too large a whole number": _set(**{_name: [[10**400] * DIM] * len(_x)}),
    }
_y = good()["support_labels"]
REFUSED |= {
    f"labels {text}": _set(support_labels=value)
    for text, value in {
        "strings": np.array(list("abcabcc")),
        "object strings": np.array(list("abcabcc"), dtype=object),
        "a series of strings": series("abcabcc"),
        "digits as strings": _y.astype(str),
        "fractions": _y + 0.0,
        "NaN": np.full(7, np.nan),
        "None": None,
        "of objects and None": [0, 1, 2, 0, 1, 2, None],
        "short": _y[:-1],
        "a column": _y[:, None],
        "below zero": _y - 1,
        "beyond the texts": _y + 1,
        "huge": np.where(_y == 2, 2**63 - 1, _y),
        "huge unsigned": np.where(_y == 2, 2**64 - 1, _y.astype(np.uint64)),
        "masked": np.ma.masked_equal(_y, 2),
        "a sparse tensor": torch.tensor(_y).to_sparse(),
        "complex": _y.astype(complex),
        "a mapping": {"a": 1},
        "ragged": [[0], [1, 2]],
    }.items()
}
REFUSED |= {
    "one class": lambda: {
        "support_features": good()["support_features"][:2],
        "support_labels": [0, 0],
        "text_features": good()["text_features"][:1],
    },
    "one class without texts": lambda: {
        "support_labels": np.zeros(7, int), "text_features": None,
    },
    "two texts of one vector": lambda: {"text_features": good()["text_features"][[0, 1, 1]]},
    "too few texts": lambda: {"text_features": good()["text_features"][:2]},
    "no texts": lambda: {"text_features": good()["text_features"][:0]},
    "scale NaN": _set(logit_scale=np.nan),
    "scale 0": _set(logit_scale=0),
    "scale negative": _set(logit_scale=-100.0),
    "scale infinite": _set(logit_scale=torch.tensor(torch.inf)),
    "scale a string": _set(logit_scale="100"),
    "scale None": _set(logit_scale=None),
    "scale true": _set(logit_scale=True),
    "scale of two": _set(logit_scale=np.array([100.0, 100.0])),
    "scale complex": _set(logit_scale=100j),
    "seed negative": _set(seed=-1),
    "seed huge": _set(seed=2**70),
    "seed true": _set(seed=True),
    "seed a fraction": _set(seed=0.5),
    "seed a string": _set(seed="1"),
    "seed None": _set(seed=None),
    "unknown setting": _set(method_config={"colour": 1}),
    "settings as a list": _set(method_config=["C"]),
    "settings with a number for a name": _set(method_config={1: 2}),
}  # fmt: skip
# zero_shot learns from no label, so that one class, or none, may lack images.
LACKING: dict[str, Callable[[], dict[str, Any]]] = {
    "an empty support": _set(support_features=np.zeros((0, DIM)), support_labels=[]),
    "a single image": lambda: {
        "support_features": good()["support_features"][:1], "support_labels": [0],
    },
    "a class without an image": lambda: {"support_labels": np.minimum(_y, 1)},
}  # fmt: skip
# And for `predict_logits`, of any width but the support's.
QUERIES = {
    name.removeprefix("query_features "): change
    for name, change in REFUSED.items()
    if name.startswith("query_features ")
}


def draw(number: int) -> tuple[str, dict[str, Any], bool]:
    """A random case: a method, arguments, and whether there is a right reading."""
    rng = np.random.default_rng([17, number])
    method = ON_FEATURES[number % len(ON_FEATURES)]

    def one_of(options: dict[str, Any]) -> Any:
        return options[list(options)[rng.integers(len(options))]]

    base = good(number % 5)
    arguments: dict[str, Any] = {
        name: one_of(MATRICES)(base[name])
        for name in ("support_features", "text_features", "query_features")
    }
    arguments["support_labels"] = one_of(LABELS)(base["support_labels"])
    if rng.random() < 0.3:
        arguments |= one_of(NUMBERS)()
    fine = rng.random() < (0.1 if method in SLOW else 0.4)
    if not fine:
        for _ in range(rng.integers(1, 3)):
            arguments |= one_of(REFUSED)()
    return method, arguments, fine


def check(number: int) -> str:
    """Empty where a random case ended as it should, else how it did."""
    method, arguments, fine = draw(number)
    ended = attempt(method, **arguments)
    if not fine:
        right = isinstance(ended, GloVLMError) and "\n" not in str(ended)
    else:
        right = isinstance(ended, np.ndarray) and ended.shape == (K, K) and ended.any()
        right = right and bool(np.isfinite(ended).all())
    return "" if right else f"{number}: {method} {sorted(arguments)}: {ended!r}"
