"""Features, labels and numbers from outside, checked once for every method on features.

Arrays of any library come in: what torch cannot take as it is (another byte order, negative
strides, memory that is not writable) is copied, and what has no right reading is refused.
"""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import GloVLMError

__all__ = [
    "check_directions",
    "check_mapping",
    "count_classes",
    "read_features",
    "read_labels",
    "read_logit_scale",
    "read_seed",
]

# Of a row: beyond, its square is no number of fp32, or normalising divides by its own epsilon.
SHORTEST, LONGEST = 1e-10, 1e15
MAX_SCALE = 1e6
MAX_SEED = 2**32 - 1


def read_features(values: Any, name: str, *, width: int | None = None) -> Tensor:
    """Feature matrix of fp32: finite numbers, no row without a direction.

    Args:
        values: `[n, dim]`: a tensor, an array, or what numpy makes one of; real numbers.
        name: What it is, for the message.
        width: The dim that is expected.

    Returns:
        `[n, dim]`, on the CPU, without a gradient; a copy.

    Raises:
        GloVLMError: It is no matrix of finite real numbers, has another width, or a row is zero, or
            so short or long that its length is no number of fp32.
    """
    wide = _numbers(values, f"{name} to be a matrix of numbers [n, dim]")
    if wide.dim() != 2 or wide.shape[1] < 1:
        raise GloVLMError(
            f"Expected {name} to be a matrix [n, dim] of at least one column, found shape "
            f"{tuple(wide.shape)}: give a row per image."
        )
    if not torch.isfinite(wide).all():
        row = int((~torch.isfinite(wide)).any(1).nonzero()[0])
        raise GloVLMError(
            f"Expected {name} to be a matrix of finite numbers, found shape {tuple(wide.shape)} "
            f"with NaN or infinity in row {row}: encode that image again, in float32."
        )
    if width is not None and wide.shape[1] != width:
        raise GloVLMError(
            f"Expected {name} of width {width}, found {wide.shape[1]}: features of one encoder "
            "have one width."
        )
    length = wide.abs().amax(1)
    bad = ~((length >= SHORTEST) & (length <= LONGEST))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise GloVLMError(
            f"Expected rows of {name} with a largest number of {SHORTEST:g} to {LONGEST:g}, found "
            f"{float(length[row]):g} in row {row}: a row of zeros has no direction, and one beyond "
            "has no length in fp32. Encode that image again, or scale the features."
        )
    return wide.float().clone(memory_format=torch.contiguous_format)


def read_labels(values: Any, n: int, name: str = "support_labels") -> Tensor:
    """Class numbers `[n]` of any integer type; truth values are 0 and 1.

    Raises:
        GloVLMError: They are names or fractions, or of another shape.
    """
    array = _as_array(values, f"{n} whole class numbers as {name}")
    if array.size == 0 and n == 0 and array.ndim == 1:
        return torch.zeros(0, dtype=torch.long)
    if array.dtype.kind == "O" and all(isinstance(v, Integral | np.bool_) for v in array.flat):
        whole = array.astype(object)
    elif array.dtype.kind in "biu":
        whole = array
    else:
        names = array.dtype.kind in "USTO"
        raise GloVLMError(
            f"Expected {n} whole class numbers as {name}, found {tuple(array.shape)} of "
            f"{array.dtype}: {'map class names to numbers first' if names else 'make them whole'}"
            f"{', numpy.unique(names, return_inverse=True)' if names else ''}."
        )
    if whole.shape != (n,):
        raise GloVLMError(
            f"Expected {n} whole class numbers as {name}, found {tuple(whole.shape)} of "
            f"{array.dtype}: give one per row of features."
        )
    if n and max(abs(int(whole.min())), int(whole.max())) > 2**62:
        raise GloVLMError(f"Expected {n} whole class numbers as {name}, found {int(whole.max())}.")
    return torch.from_numpy(whole.astype(np.int64))


def count_classes(labels: Tensor, texts: Tensor | None) -> int:
    """Number of classes, at least 2: rows of the texts if there are any, else by the labels.

    Args:
        labels: Class numbers `[n]`.
        texts: `[K, dim]`, or `None`.

    Raises:
        GloVLMError: There is one class alone, a label beyond the texts, or numbers with gaps.
    """
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    num_classes = highest + 1 if texts is None else len(texts)
    if lowest < 0 or highest >= num_classes:
        raise GloVLMError(
            f"Class numbers go from 0 to {num_classes - 1} (one row of text_features a class); "
            f"found {lowest} to {highest}."
        )
    if texts is None and num_classes > max(len(labels), 1):
        raise GloVLMError(
            f"Expected class numbers 0 ... K - 1 without gaps, each at least once, found "
            f"{highest} among {len(labels)} labels: numpy.unique(labels, return_inverse=True) "
            "numbers them."
        )
    if num_classes < 2:
        raise GloVLMError(
            f"Expected at least two classes, found {num_classes}: with one there is nothing to "
            "tell apart. Give labelled images of another class, or a row of text_features a class."
        )
    return num_classes


def read_logit_scale(value: Any) -> float:
    """Factor between cosines and logits: one finite number above 0, at most 1e6.

    Raises:
        GloVLMError: It is another.
    """
    number = _scalar(value)
    if isinstance(number, bool | np.bool_) or not isinstance(number, Real):
        raise GloVLMError(
            f"Expected logit_scale as one number, found {_shown(value)}: CLIP's is 100."
        )
    if not 0 < float(number) <= MAX_SCALE:
        raise GloVLMError(
            f"Expected logit_scale above 0 and at most {MAX_SCALE:g}, found {float(number):g}: "
            "CLIP's is 100."
        )
    return float(number)


def read_seed(value: Any) -> int:
    """Seed: a whole number from 0 to 2**32 - 1, of Python, numpy or torch.

    Raises:
        GloVLMError: It is another.
    """
    number = _scalar(value)
    whole = isinstance(number, Integral) and not isinstance(number, bool | np.bool_)
    if not whole or not 0 <= int(number) <= MAX_SEED:
        raise GloVLMError(
            f"Expected seed as a whole number from 0 to {MAX_SEED}, found {_shown(value)}."
        )
    return int(number)


def check_mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Settings by name; `None` is none.

    Raises:
        GloVLMError: It is no mapping of strings.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise GloVLMError(f"Expected {name} as a mapping of settings, found {_shown(value)}.")
    return value


def check_directions(prototypes: Tensor) -> None:
    """Refuse class texts or means `[K, dim]`, unit by now, that name no direction of their own.

    Raises:
        GloVLMError: One is zero, where a class's images cancel out, or two are one vector.
    """
    empty = (prototypes.norm(dim=-1) < 0.5).nonzero().flatten().tolist()
    if empty:
        raise GloVLMError(
            f"Expected a direction of every class, found none of class {empty[0]}: its features "
            "cancel out. Give text_features, or other images."
        )
    _, place, count = prototypes.unique(dim=0, return_inverse=True, return_counts=True)
    if (count > 1).any():
        same = (place == count.argmax()).nonzero().flatten().tolist()
        raise GloVLMError(
            f"Expected a direction of its own for every class, found one vector for classes "
            f"{same[0]} and {same[1]}: nothing tells them apart. Encode their texts again, or give "
            "other images."
        )


def _numbers(values: Any, what: str) -> Tensor:
    """A dense tensor of fp64 from any array of real numbers."""
    if isinstance(values, Tensor):
        _check_dense(values, what)
        if values.is_complex():
            raise GloVLMError(f"Expected {what}, found {values.dtype}: complex numbers have none.")
        return values.detach().cpu().double()
    array = _as_array(values, what)
    extended = array.dtype.kind == "V" and array.dtype.names is None  # bfloat16 of ml_dtypes
    objects = array.dtype.kind == "O" and all(isinstance(v, Real) for v in array.flat)
    if not (array.dtype.kind in "biuf" or extended or objects):
        raise GloVLMError(f"Expected {what}, found {array.dtype}: convert it to float32.")
    try:
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.array(array, dtype=np.float64, order="C"))
    except (TypeError, ValueError, OverflowError):
        raise GloVLMError(f"Expected {what}, found {array.dtype}: convert it to float32.") from None


def _as_array(values: Any, what: str) -> NDArray[Any]:
    if isinstance(values, Tensor):
        _check_dense(values, what)
        values = values.detach().cpu()
    if hasattr(values, "toarray") and hasattr(values, "nnz"):
        raise GloVLMError(f"Expected {what}, found a sparse matrix: give its .toarray().")
    if np.ma.isMaskedArray(values) and np.ma.getmaskarray(values).any():
        raise GloVLMError(f"Expected {what}, found a masked array: fill it, or leave rows out.")
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise GloVLMError(f"Expected {what}, found {_shown(values)}.") from None


def _check_dense(values: Tensor, what: str) -> None:
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        kind = "without values" if values.is_meta else f"of layout {values.layout}"
        raise GloVLMError(f"Expected {what}, found a tensor {kind}: give its .to_dense().")


def _scalar(value: Any) -> Any:
    """The one number in a tensor or an array of one element; anything else as it is."""
    if isinstance(value, Tensor | np.ndarray) and not getattr(value, "is_meta", False):
        size = value.numel() if isinstance(value, Tensor) else value.size
        return value.item() if size == 1 else None
    return value


def _shown(value: Any) -> str:
    text = f"{type(value).__name__}"
    return f"'{value}'" if isinstance(value, str | int | float) and len(str(value)) < 40 else text
