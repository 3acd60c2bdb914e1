"""Saved models: the fields of their configuration, checked before anything is built of them.

transformers builds whatever a config.json says, so that a field of another kind ends in an error
from anywhere, and a huge number of layers in none for hours.
"""

import math
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from ..errors import GloVLMError
from ..files import check_fields, is_plain_name, read_json
from ..model.outlines import OUTLINES, draw_centre

_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {  # of fields that any config.json may have
    **dict.fromkeys(
        ("text_config", "vision_config", "id2label", "label2id", "auto_map"), (dict, _NONE)
    ),
    "architectures": (list, _NONE),
    "model_type": (str,),
    **dict.fromkeys(("dtype", "torch_dtype"), (str, _NONE)),
    "projection_dim": (int, _NONE),
}
_OURS: dict[str, tuple[type, ...]] = {  # of those that a `GloVLMConfig` has
    **dict.fromkeys(("backbone_config", "head", "inserts", "context", "guard"), (dict, _NONE)),
    "stain_centres": (dict, _NONE),
    **dict.fromkeys(("prompts", "prior_shift", "backbone_restrictions", "stains"), (list, _NONE)),
    **dict.fromkeys(("backbone_name", "backbone_revision", "backbone_license"), (str, _NONE)),
    **dict.fromkeys(("vision_pooling", "text_pooling"), (str,)),
    **dict.fromkeys(("joint_space", "synthetic", "normalize_pooled", "projection_bias"), (bool,)),
    "draft": (bool,),
    "outline": (str,),
    "outline_of": (str, _NONE),
    "calibration": (dict, _NONE),
    "temperature": (float,),
    "mpp": (float, _NONE),
}
_CALIBRATION: dict[str, tuple[type, ...]] = {
    "calibration.conformal": (dict, _NONE),
    "calibration.abstention": (dict, _NONE),
    "calibration.notes": (list, _NONE),
}
_ABSTENTION: dict[str, tuple[type, ...]] = {"calibration.abstention.threshold": (float, _NONE)}
_MOST = {  # of whole numbers, by how their names end: far above any model, far below any harm
    "layers": 1_000, "image_size": 2**14, "patch_size": 2**14, "num_patches": 2**20,
    "position_embeddings": 2**20, "vocab_size": 2**24, "hidden_size": 2**17,
    "intermediate_size": 2**20, "_dim": 2**20, "_heads": 2**10, "channels": 2**10,
    "_edge": 2**14, "height": 2**14, "width": 2**14,
}  # fmt: skip
_HUGE = 2**40


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Hub id and revision of `owner/name@revision`; what lies on this disk keeps its name.

    Args:
        name: A Hub id, with or without a revision, or a path.
        revision: Commit, tag or branch that was given beside it.

    Raises:
        GloVLMError: The revision is empty, another one than was given beside it, or of a path.
    """
    if Path(name).expanduser().exists():
        if revision is not None:
            raise GloVLMError(
                f"Only what is on the Hub has revisions, and {name} lies on this disk: leave out "
                f"revision '{revision}'."
            )
        return name, None
    hub_id, sign, stated = name.partition("@")
    if not sign:
        return name, revision
    if not stated.strip() or revision not in (None, stated):
        raise GloVLMError(
            f"Expected one revision, as in owner/name@main, found '{name}'"
            f"{'' if revision is None else f' and revision {revision!r}'}."
        )
    return hub_id, stated


def read_config(file: Path, what: str) -> dict[str, Any]:
    """Read and check a model's config.json.

    Args:
        file: The file.
        what: What it belongs to, for the sentence: "The model run".

    Raises:
        GloVLMError: It is damaged, see `check_config`; or a file beside it is a pipe or a device,
            or an index of weights that lie elsewhere.
    """
    try:
        content: dict[str, Any] = read_json(file)
        check_config(content, file)
        check_folder(file.parent)
    except GloVLMError as error:
        raise GloVLMError(f"{what} cannot be loaded: {error}") from error
    return content


def check_folder(folder: Path) -> None:
    """Check a model's folder before anything in it is read.

    Args:
        folder: The folder.

    Raises:
        GloVLMError: A file in it is a pipe or a device, which would never end, or an index names
            weights that lie elsewhere.
    """
    for path in folder.iterdir():
        with suppress(OSError):  # a link to nothing: whoever needs it reports it
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise GloVLMError(f"'{path}' is a device or pipe, and a model is of files.")
        if path.name.endswith(".index.json") and path.is_file():
            index = read_json(path)
            check_fields(path, index, {"weight_map": (dict,)})
            for name in index["weight_map"].values():
                _refuse_unless(
                    isinstance(name, str) and is_plain_name(name),
                    path, "weight_map", "to name files beside it", name,
                )  # fmt: skip


def check_config(content: Any, path: Path | str) -> None:
    """Check the fields of a model's config.json: kinds of values, sizes, labels, calibration.

    Args:
        content: What it holds.
        path: Where it lies, for the sentence.

    Raises:
        GloVLMError: Names the file and the first field that is wrong.
    """
    place = Path(path)
    check_fields(place, {"config": content}, {"config": (dict,)})
    check_fields(place, content, {k: kinds for k, kinds in _KINDS.items() if k in content})
    _check_numbers(place, "", content)
    if content.get("model_type") == "glovlm":
        check_fields(place, content, {k: kinds for k, kinds in _OURS.items() if k in content})
        _check_values(place, content)


def _check_values(place: Path, content: Mapping[str, Any]) -> None:
    """Check what stands in the fields of a `GloVLMConfig`, which are of the right kinds."""
    for name, known in (("outline", OUTLINES), ("outline_of", (None, "capsule", "tuft"))):
        value = content.get(name, known[0])
        _refuse_unless(
            value in known, place, name, f"to be one of {', '.join(map(str, known))}", value
        )
    labels = content.get("id2label") or {}
    _refuse_unless(
        all(isinstance(name, str) for name in labels.values())
        and {str(key) for key in labels} == {str(k) for k in range(len(labels))},
        place, "id2label", "to name the classes 0, 1, 2, ...", labels,
    )  # fmt: skip
    for name in ("temperature", "mpp"):
        value = content.get(name)
        _refuse_unless(
            value is None or 0 < value < _HUGE, place, name, "to be a number above 0", value
        )
    shift, prompts = content.get("prior_shift"), content.get("prompts")
    _refuse_unless(
        shift is None or (all(map(_is_finite, shift)) and len(shift) == (len(labels) or 2)),
        place, "prior_shift", "to be a number for each class", shift,
    )  # fmt: skip
    _refuse_unless(
        all(isinstance(p, list) and all(isinstance(t, str) for t in p) for p in prompts or ()),
        place, "prompts", "to be a list of texts for each class", prompts,
    )  # fmt: skip
    restrictions = content.get("backbone_restrictions") or ()
    _refuse_unless(
        all(isinstance(word, str) for word in restrictions),
        place, "backbone_restrictions", "to be texts", restrictions,
    )  # fmt: skip
    if content.get("calibration"):
        check_fields(place, content, _CALIBRATION)
        notes = content["calibration"].get("notes") or ()
        _refuse_unless(
            all(isinstance(sentence, str) for sentence in notes),
            place, "calibration.notes", "to be sentences", notes,
        )  # fmt: skip
        if content["calibration"].get("abstention"):
            check_fields(place, content, _ABSTENTION)


def check_processor(processor: Any, config: Any, place: str) -> None:
    """Check that an image transform can be used, and makes what the vision tower takes.

    Args:
        processor: A `GloVLMProcessor`.
        config: Of the model.
        place: Where both lie, for the sentence.

    Raises:
        GloVLMError: It cannot.
    """
    from PIL import Image

    _check_numbers(Path(place), "", processor.image_processor.to_dict())
    if processor.outline != config.outline:
        raise GloVLMError(
            f"The image transform in '{place}' was saved for outline '{processor.outline}', and "
            f"the model learned with outline '{config.outline}': restore a copy of "
            "processor_config.json, and of config.json."
        )
    if processor.draft is not config.draft:
        raise GloVLMError(
            f"The image transform in '{place}' was saved with draft {processor.draft}, and the "
            f"model learned with draft {config.draft}: restore a copy of processor_config.json, "
            "and of config.json."
        )
    picture = draw_centre(Image.new("RGB", (64, 48)))  # one with an outline
    try:
        made = processor(images=picture, return_tensors="pt")["pixel_values"]
        finite = bool(made.isfinite().all())
    except Exception as error:  # of whatever library reads it
        raise GloVLMError(
            f"The image transform in '{place}' is damaged ({first_line_of(error)}): restore a copy "
            "of processor_config.json or preprocessor_config.json."
        ) from error
    tower = config.backbone_config.vision_config
    size = getattr(tower, "image_size", None)
    fixed = tower.model_type in ("clip_vision_model", "siglip_vision_model")
    if not finite or (fixed and tuple(made.shape[-2:]) != (size, size)):
        height, width = made.shape[-2:]
        raise GloVLMError(
            f"The image transform in '{place}' does not fit the model: it makes images of {width} "
            f"x {height} pixels{'' if finite else ' that are no numbers'}, and the vision tower "
            f"takes {size} x {size}: restore a copy of processor_config.json or "
            "preprocessor_config.json."
        )


def loading_reason(error: Exception, folder: Path | None) -> str:
    """Reason why a model cannot be loaded, in one line: the damaged file, where there is one.

    Args:
        error: What was raised.
        folder: The model's folder, where it is local.
    """
    if folder is not None and folder.is_dir():
        for file in sorted(folder.iterdir()):
            try:
                if file.suffix == ".json":
                    content = read_json(file)
                    if file.name == "tokenizer.json":
                        check_fields(file, content, {"model": (dict,), "added_tokens": (list,)})
                elif file.suffix == ".safetensors":
                    safe_open(file, framework="np").__enter__()
            except GloVLMError as damage:
                return str(damage)
            except (OSError, SafetensorError) as damage:
                return f"'{file}' is damaged ({first_line_of(damage)}): restore a copy."
    if "ignore_mismatched_sizes" in str(error):
        return "its weights do not fit its config.json: restore both."
    return first_line_of(error)


def first_line_of(error: BaseException) -> str:
    """First line of an error's text; its kind, too, where the text alone says little."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    explained = isinstance(error, OSError | RuntimeError | SafetensorError | StrictDataclassError)
    if first and (explained or type(error) in (GloVLMError, ValueError)):
        return first
    return f"{type(error).__name__}: {first}".rstrip(": ")


def _check_numbers(place: Path, name: str, value: Any) -> None:
    """Refuse whole numbers that no model has, whichever part they stand in."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_numbers(place, f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, list):
        for part in value:
            _check_numbers(place, name, part)
    elif isinstance(value, int):
        most = next((most for end, most in _MOST.items() if name.endswith(end)), _HUGE)
        _refuse_unless(abs(value) <= most, place, name, f"to be {most:,} at most", value)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _refuse_unless(right: bool, place: Path, name: str, expected: str, value: Any) -> None:
    if not right:
        shown = str(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise GloVLMError(
            f"'{place}' is damaged: expected '{name}' {expected}, found {shown}; restore a copy."
        )
