"""Backbone loading, by table name, Hub id, folder, or a pair of these."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GloVLMError, nearest
from ..files import digest_tensors, digest_value, model_folder, read_json
from .checkpoints import (
    Checkpoint,
    cannot_load,
    convert_folder,
    read_origin,
    refuse_damaged,
    write_origin,
)
from .saved import check_folder, check_processor, read_config, split_revision
from .table import BACKBONES, Backbone

MINI = Path(__file__).parents[1] / "mini"
DUAL_ENCODERS = ("clip", "siglip", "siglip2")
_NATIVE = ("transformers", "dinov2_with_registers")  # layouts that need no conversion

_HUB_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([^/]+)$")

logger = logging.getLogger("hf_glovlm")
_warned: set[str] = set()  # names whose restrictions were logged in this process


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    vision_pooling: str | None = None,
    text_pooling: str | None = None,
) -> tuple[Any, Any]:
    """Load a pretrained backbone in fp32, with its image transform and tokenizer.

    Weights in a layout of others (open_clip, timm, CoCa) are converted the first time and kept
    beside the feature cache; from then on they load like any transformers model, also offline.

    Args:
        name: A name of the table, a Hub id, a local folder (also one that this package saved, or
            one with published files), or two of these joined by `+`: a vision tower and a text
            tower.
        revision: Commit or branch on the Hub; not for pairs.
        vision_pooling: For pairs: `pooler`, `cls`, `mean` or `cls_mean` (default).
        text_pooling: For pairs: `pooler`, `cls`, `mean` (default) or `eos`.

    Returns:
        A `GloVLMModel` in evaluation mode and its `GloVLMProcessor`. The config carries the
        backbone's name, commit, licence and what the licence forbids.

    Raises:
        GloVLMError: The name is unknown, nothing is there, access was not granted, tensors are
            missing, or it is half of a pair.
    """
    if "+" in name and not Path(name).expanduser().exists():
        vision, _, text = name.partition("+")
        if not vision.strip() or not text.strip():
            raise GloVLMError(
                f"A pair is a vision tower, '+', and a text tower; found '{name}': name both."
            )
        model, processor = _load_pair(
            _locate(vision.strip()), _locate(text.strip()), vision_pooling, text_pooling
        )
    else:
        model, processor = _load_dual(_locate(name, revision))
    check_processor(processor, model.config, name)
    _warn_restrictions(model.config)
    return model.eval(), processor


def describe_weights(model: Any, processor: Any) -> dict[str, str]:
    """Digests of what a backbone computes with: one changed weight, token or pixel size shows.

    Args:
        model: A `GloVLMModel`.
        processor: Its processor.

    Returns:
        Of `weights`, `configuration`, `tokenizer` and `transform` (of images), 32 hexadecimal
        digits each.
    """
    tokenizer, images = processor.tokenizer, processor.image_processor
    words: Any = sorted(tokenizer.get_vocab().items())
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        words = json.loads(fast.to_str())
        words = {k: v for k, v in words.items() if k not in ("truncation", "padding")}
    texts = (processor.max_length, processor.pad_to_max, processor.context_token_ids)
    transform = (type(images).__name__, processor.torchvision_crop, _plain(images.to_dict()))
    return {
        "weights": digest_tensors(model.state_dict().items()),
        "configuration": digest_value(_plain(model.config.to_dict())),
        "tokenizer": digest_value([words, texts, str(tokenizer.special_tokens_map)]),
        "transform": digest_value(transform),
    }


def _plain(value: Any) -> Any:
    """A configuration without where it came from, as JSON takes it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in _ORIGIN}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value)


_ORIGIN = frozenset({
    "_attn_implementation", "_name_or_path", "_processor_class", "architectures", "auto_map",
    "attn_implementation", "backbone_license", "backbone_name", "backbone_restrictions",
    "backbone_revision", "dtype", "processor_class", "torch_dtype", "transformers_version",
})  # fmt: skip


def convert_backbone(
    name: str, output_dir: str | Path, *, kind: str | None = None, revision: str | None = None
) -> Any:
    """Convert published weights into a transformers folder, which loads in seconds.

    Args:
        name: A name of the table, a Hub id, or a folder that holds the published files.
        output_dir: Where to write.
        kind: Their layout (`open_clip`, `biomedclip`, `conch`, `keep`, `timm`), where it cannot be
            recognised.
        revision: Commit or branch on the Hub.

    Returns:
        The report of `conversion.convert_checkpoint`.

    Raises:
        GloVLMError: They are in the layout of transformers already, or cannot be converted.
    """
    from .conversion import convert_checkpoint

    place, row = _resolve(name)
    published, origin = Path(place), None
    if row is not None and row.layout in _NATIVE:
        raise GloVLMError(
            f"Backbone '{name}' is published in the layout of transformers: there is nothing to "
            f"convert, give --backbone {name}."
        )
    if not published.is_dir():
        checkpoint = _checkpoint(place, name, row, revision)
        published, kind = checkpoint.download(), kind or checkpoint.kind
        origin = {"hub_id": place, "revision": published.parent.name}
    report = convert_checkpoint(published, Path(output_dir), kind)
    if origin is not None:
        write_origin(Path(output_dir), origin)
    return report


@dataclass(frozen=True)
class _Source:
    """Source of a backbone: its location, table row and public name.

    `place` is a folder or Hub id, as `from_pretrained` takes it; every part is loaded from the same
    commit, which is not known of a folder of one's own.
    """

    name: str
    place: str
    row: Backbone | None
    public: str
    commit: str | None = None
    converted: bool = False

    @property
    def license(self) -> str | None:
        return self.row.license if self.row else None

    @property
    def restrictions(self) -> list[str] | None:
        return self.row.restrictions if self.row else None


def _locate(name: str, revision: str | None = None) -> _Source:
    """Locate weights in transformers' layout; others are converted into the cache."""
    if name not in BACKBONES:
        name, revision = split_revision(name, revision)
    place, row = _resolve(name)
    folder = Path(place)
    if folder.is_dir():
        return _locate_folder(folder, name, row)
    checkpoint = _checkpoint(place, name, row, revision)
    config = checkpoint.fetch("config.json")
    if row is not None:
        native = row.layout in _NATIVE
    elif config is not None:
        native = _is_native(config)
    else:
        native = checkpoint.fetch("open_clip_config.json") is None
    if native:
        commit = config.parent.name if config else checkpoint.revision
        return _Source(name, place, row, place, commit)
    folder = checkpoint.convert()
    return _Source(name, str(folder), row, place, folder.name, converted=True)


def _locate_folder(folder: Path, name: str, row: Backbone | None) -> _Source:
    public = row.name if row else folder.resolve().name
    check_folder(folder)
    refuse_damaged(folder)
    hub_id, commit = read_origin(folder)
    if cached := _HUB_CACHE.search(folder.resolve().as_posix()):
        # The Hub's own cache names a folder by its commit: what lies there keeps its name.
        public, commit = f"{cached[1]}/{cached[2]}", cached[3]
        row = next((row for row in BACKBONES.values() if row.hub_id == public), row)
    if hub_id is not None:
        row = next((row for row in BACKBONES.values() if row.hub_id == hub_id), None)
        return _Source(name, str(folder), row, hub_id, commit, converted=True)
    if (folder / "config.json").is_file() and _is_native(folder / "config.json"):
        read_config(folder / "config.json", f"Backbone '{name}'")
        return _Source(name, str(folder), row, public, commit)
    converted = convert_folder(folder)
    if converted is None:
        raise GloVLMError(
            f"Folder '{name}' holds no model: expected config.json in it. "
            "Give the folder that save_pretrained wrote (for a run of ours: RUN/model)."
        )
    return _Source(name, str(converted), None, public, converted=True)


def _checkpoint(hub_id: str, name: str, row: Backbone | None, revision: str | None) -> Checkpoint:
    if row is None:
        return Checkpoint(hub_id, name, revision)
    return Checkpoint(hub_id, name, revision or row.revision, row.layout, row.weights, row.gated)


def _resolve(name: str) -> tuple[str, Backbone | None]:
    """Resolve a name: a row of the table, a folder, or else a Hub id."""
    if not name.strip():
        raise GloVLMError("No backbone was named; `glovlm backbones` lists those that are known.")
    if name in BACKBONES:
        row = BACKBONES[name]
        return (str(MINI) if row.hub_id is None else row.hub_id), row
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(model_folder(folder, "adaptation", "pretraining")), None
    by_id = next((row for row in BACKBONES.values() if row.hub_id == name), None)
    if by_id is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise GloVLMError(
            f"Unknown backbone '{name}': it is no name of `glovlm backbones`, no folder here, and "
            f"no Hub id (owner/name).{nearest(name, BACKBONES)}"
        )
    return name, by_id


def _is_native(config: Path) -> bool:
    """Whether a config.json is of a transformers model (a broken one: yes, loading reports it)."""
    from transformers import CONFIG_MAPPING

    try:
        kind = read_json(config).get("model_type")
    except GloVLMError:
        return True
    if not isinstance(kind, str):
        return kind is not None
    return kind == "glovlm" or kind in CONFIG_MAPPING


# ------------------------------------------------------------------------------------------ models


def _load_dual(source: _Source) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel

    from ..model import GloVLMConfig, GloVLMModel

    config = _from_hub(AutoConfig, source)
    if config.model_type == "glovlm":
        model: Any = _load_weights(GloVLMModel, source)
        if source.converted:
            model.config.backbone_name = source.public
            model.config.backbone_revision = source.commit
            model.config.backbone_license = source.license
            model.config.backbone_restrictions = source.restrictions
            _clear_path(model)
        return model, _load_processor(source, model.config)
    if config.model_type not in DUAL_ENCODERS:
        known = ", ".join(DUAL_ENCODERS)
        raise GloVLMError(
            f"Backbone '{source.name}' is a '{config.model_type}' model, not a dual encoder "
            f"({known}). Pair a vision tower with a text tower: --backbone VISION+TEXT, for "
            f"example '{source.name}+minilm'."
        )
    towers = _load_weights(AutoModel, source, config=config)
    config = GloVLMConfig(
        backbone_config=towers.config,
        backbone_name=source.public,
        backbone_revision=source.commit,
        backbone_license=source.license,
        backbone_restrictions=source.restrictions,
        joint_space=True,
    )
    processor = _load_processor(source, config)
    if processor.pad_to_max:
        # SigLIP 2 files leave the id at SigLIP's default, which is another token there.
        towers.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    if source.converted:
        _clear_path(towers)
    return GloVLMModel(config, backbone=towers), processor


def _load_pair(
    vision: _Source, text: _Source, vision_pooling: str | None, text_pooling: str | None
) -> tuple[Any, Any]:
    from transformers import AutoConfig, VisionTextDualEncoderConfig
    from transformers.initialization import no_init_weights

    from ..model import GloVLMConfig, GloVLMModel
    from ..model.configuration_glovlm import TEXT_POOLINGS, VISION_POOLINGS

    for pooling, known in ((vision_pooling, VISION_POOLINGS), (text_pooling, TEXT_POOLINGS)):
        if pooling is not None and pooling not in known:
            raise GloVLMError(
                f"Unknown pooling '{pooling}': expected one of {', '.join(known)}."
                f"{nearest(pooling, known)}"
            )
    vision_config, text_config = (_tower_config(AutoConfig, part) for part in (vision, text))
    if not hasattr(text_config, "vocab_size") or not hasattr(vision_config, "num_channels"):
        raise GloVLMError(
            f"A pair is a vision tower, '+', and a text tower; found '{vision.name}' "
            f"({vision_config.model_type}) + '{text.name}' ({text_config.model_type}). "
            "Put the vision tower first."
        )
    poolings: tuple[Any, Any] = (
        vision_pooling or (vision.row.vision_pooling if vision.row else "cls_mean"),
        text_pooling or (text.row.text_pooling if text.row else "mean"),
    )
    towers = [
        _load_tower(part, part_config, pooling)
        for part, part_config, pooling in zip(
            (vision, text), (vision_config, text_config), poolings, strict=True
        )
    ]
    commits = (vision.commit, text.commit)
    config = GloVLMConfig(
        backbone_config=VisionTextDualEncoderConfig(
            vision_config=towers[0].config.to_dict(), text_config=towers[1].config.to_dict()
        ),
        backbone_name=f"{vision.public}+{text.public}",
        backbone_revision="+".join(c or "unknown" for c in commits) if any(commits) else None,
        backbone_license=" + ".join(filter(None, (vision.license, text.license))) or None,
        backbone_restrictions=_join_restrictions(vision.restrictions, text.restrictions),
        vision_pooling=poolings[0],
        text_pooling=poolings[1],
        normalize_pooled=True,
        joint_space=False,
    )
    with no_init_weights():  # every weight is loaded below
        model = GloVLMModel(config)
    model.backbone.vision_model.load_state_dict(towers[0].state_dict())
    model.backbone.text_model.load_state_dict(towers[1].state_dict())
    return model, _load_processor(vision, config, text)


def _tower_config(auto_class: Any, source: _Source) -> Any:
    """Configuration of a tower; Hibou's repository has code of its own for a stock model."""
    if source.row is None or source.row.layout != "dinov2_with_registers":
        return _from_hub(auto_class, source)
    from transformers import Dinov2WithRegistersConfig, PreTrainedConfig

    fields = _from_hub(PreTrainedConfig, source, method="get_config_dict")[0]
    own = ("auto_map", "model_type")
    config = {key: value for key, value in fields.items() if key not in own}
    return Dinov2WithRegistersConfig.from_dict(config)


def _load_tower(source: _Source, config: Any, pooling: str) -> Any:
    from transformers import AutoModel

    # A tower published for its tokens may lack the pooler on top of them.
    optional = () if pooling == "pooler" else ("pooler.",)
    exact = source.row is not None and source.row.layout != "transformers"
    tower = _load_weights(AutoModel, source, optional, exact, config=config)
    if source.converted:
        _clear_path(tower)
    return tower


def _load_weights(
    auto_class: Any, source: _Source, optional: tuple[str, ...] = (), exact: bool = False, **kw: Any
) -> Any:
    """`from_pretrained` in fp32; transformers would make up missing tensors at random."""
    import torch

    if "config" in kw and (assigned := _assign_weights(auto_class, source, kw["config"])):
        return assigned
    model, info = _from_hub(auto_class, source, dtype=torch.float32, output_loading_info=True, **kw)
    wrong = {key: "missing" for key in info["missing_keys"] if not key.startswith(optional)}
    if exact:
        wrong |= dict.fromkeys(info["unexpected_keys"], "unknown")
    if wrong:
        key, what = min(wrong.items())
        raise GloVLMError(
            f"Backbone '{source.name}' cannot be loaded: its weights do not fit its config.json "
            f"({len(wrong)} tensors; '{key}' is {what}). Download the folder again, or give "
            "another revision."
        )
    return model


def _assign_weights(auto_class: Any, source: _Source, config: Any) -> Any:
    """Assign the tensors of a local file to a model, where they are exactly its own in fp32.

    What takes more is left to `from_pretrained`, which is three times as slow: renamed, missing,
    split or half-precision tensors, and errors about a file. `None` then.
    """
    import torch
    from safetensors.torch import load_file
    from transformers.initialization import no_init_weights

    file = Path(source.place) / "model.safetensors"
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
        with no_init_weights():  # every weight is assigned below
            model = auto_class.from_config(config, dtype=torch.float32)
    except Exception:
        return None
    expected = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    if expected != {key: (value.shape, value.dtype) for key, value in tensors.items()}:
        return None
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _load_processor(source: _Source, config: Any, text: _Source | None = None) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    from ..model import GloVLMProcessor

    if text is None and (Path(source.place) / "processor_config.json").is_file():
        saved = _from_hub(GloVLMProcessor, source)
        if config.model_type == "glovlm":
            return saved
    backbone = config.backbone_config
    images = _from_hub(AutoImageProcessor, source)
    texts = text or source
    if texts.converted and not (Path(texts.place) / "tokenizer.json").is_file():
        raise _no_tokenizer(texts)
    tokenizer = _from_hub(AutoTokenizer, texts, **_added_tokens(Path(texts.place)))
    context = int(getattr(backbone.text_config, "max_position_embeddings", 77))
    with _explaining(texts):
        if set(tokenizer("glomerulus")["input_ids"]) <= set(tokenizer.all_special_ids):
            # transformers makes up an empty one where the files are missing.
            raise _no_tokenizer(texts)
        return GloVLMProcessor(
            images,
            tokenizer,
            max_length=min(context, 256),
            pad_to_max="siglip" in backbone.model_type,
        )


def _added_tokens(folder: Path) -> dict[str, Any]:
    """Tokens beside the vocabulary, where tokenizer.json alone lists them.

    transformers would parse that whole file for them, and then again for the rest.
    """
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        match = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
        others = [folder / name for name in ("special_tokens_map.json", "added_tokens.json")]
        if match is None or "added_tokens_decoder" in settings or any(map(Path.exists, others)):
            return {}
        tokens = json.JSONDecoder().raw_decode(text, match.end())[0]
        return {"added_tokens_decoder": {token.pop("id"): token for token in tokens}}
    except Exception:
        return {}  # missing or broken: the tokenizer's own loading reports it


def _no_tokenizer(source: _Source) -> GloVLMError:
    again = " and convert the folder again" if source.converted else ""
    return GloVLMError(
        f"Backbone '{source.name}' has no usable tokenizer: expected tokenizer.json (or its "
        f"vocabulary files) beside the weights; save the tokenizer into that folder{again}."
    )


def _join_restrictions(*restrictions: list[str] | None) -> list[str] | None:
    """Union of two towers' restrictions; unknown if unknown for both."""
    known = [part for part in restrictions if part is not None]
    return sorted({word for part in known for word in part}) if known else None


def _clear_path(model: Any) -> None:
    """Clear a cache path that transformers took for the model's name."""
    model.name_or_path = model.config.name_or_path = ""


def _warn_restrictions(config: Any) -> None:
    """Warn, once per process, about what a backbone's licence forbids."""
    name, forbids = config.backbone_name, config.backbone_restrictions or []
    if not forbids or name in _warned:
        return
    _warned.add(name)
    words = {
        "non-commercial": "not for commercial use",
        "no-derivatives": "no derivatives may be shared, to which its authors may count models "
        "trained on its outputs",
    }
    logger.warning(
        "Backbone '%s' is licensed %s: %s. This holds for what is made from it, too.",
        name,
        config.backbone_license,
        "; ".join(words[key] for key in forbids),
    )


def _from_hub(
    auto_class: Any, source: _Source, *, method: str = "from_pretrained", **kwargs: Any
) -> Any:
    """`from_pretrained`; its errors become one sentence."""
    if source.commit is not None and not Path(source.place).is_dir():
        kwargs["revision"] = source.commit
    with _explaining(source):
        return getattr(auto_class, method)(source.place, **kwargs)


@contextmanager
def _explaining(source: _Source) -> Iterator[None]:
    """Turn what libraries raise about a backbone's files into one sentence."""
    try:
        yield
    except GloVLMError:
        raise
    except Exception as error:  # of whatever library reads it
        gated = source.row is not None and source.row.gated
        raise cannot_load(source.name, source.place, error, gated=gated) from error
