"""The table of known pretrained towers, and the one way in: a name, a Hub id, a folder, or a pair.

Adding a backbone is adding a row.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import GloVLMError, nearest

MINI = Path(__file__).parent / "mini"
DUAL_ENCODERS = ("clip", "siglip", "siglip2")


@dataclass(frozen=True)
class Backbone:
    """One row of the table.

    Args:
        name: Short name for the command line.
        hub_id: Where the weights are; `None` for what ships in the package.
        kind: `dual` (image and text), `vision` or `text` (to be paired with `+`).
        image_size: Input size in pixels; 0 for text.
        text_context: Longest text in tokens; 0 for vision.
        pretrained_on: What it saw.
        license: As its page states it.
        gated: Whether access has to be asked for.
        citation: Paper.
        revision: Commit to load; `None` is the newest.
        vision_pooling: How a pair pools its tokens.
        text_pooling: How a pair pools its tokens.
    """

    name: str
    hub_id: str | None
    kind: str
    image_size: int
    text_context: int
    pretrained_on: str
    license: str
    citation: str
    gated: bool = False
    revision: str | None = None
    vision_pooling: str = "cls_mean"
    text_pooling: str = "mean"


_CLIP = "Radford et al. 2021, arXiv:2103.00020"
_ROWS = (
    Backbone(
        "mini", None, "dual", 96, 64, "drawings of glomeruli only", "apache-2.0", "this package"
    ),
    Backbone(
        "clip-vit-b-32",
        "openai/clip-vit-base-patch32",
        "dual",
        224,
        77,
        "400M web pairs",
        "mit",
        _CLIP,
    ),
    Backbone(
        "clip-vit-b-16",
        "openai/clip-vit-base-patch16",
        "dual",
        224,
        77,
        "400M web pairs",
        "mit",
        _CLIP,
    ),
    Backbone(
        "clip-vit-l-14",
        "openai/clip-vit-large-patch14",
        "dual",
        224,
        77,
        "400M web pairs",
        "mit",
        _CLIP,
    ),
    Backbone(
        "pubmedclip",
        "flaviagiammarino/pubmed-clip-vit-base-patch32",
        "dual",
        224,
        77,
        "ROCO radiology figures",
        "mit",
        "Eslami et al. 2023, Findings of EACL",
    ),
    Backbone(
        "plip",
        "vinid/plip",
        "dual",
        224,
        77,
        "208k pathology pairs from Twitter (OpenPath)",
        "not stated",
        "Huang et al. 2023, Nature Medicine",
    ),
    Backbone(
        "siglip-b-16",
        "google/siglip-base-patch16-224",
        "dual",
        224,
        64,
        "WebLI",
        "apache-2.0",
        "Zhai et al. 2023, arXiv:2303.15343",
    ),
    Backbone(
        "siglip2-b-16",
        "google/siglip2-base-patch16-224",
        "dual",
        224,
        64,
        "WebLI",
        "apache-2.0",
        "Tschannen et al. 2025, arXiv:2502.14786",
    ),
    Backbone(
        "dinov2-small",
        "facebook/dinov2-small",
        "vision",
        224,
        0,
        "LVD-142M",
        "apache-2.0",
        "Oquab et al. 2023, arXiv:2304.07193",
    ),
    Backbone(
        "phikon-v2",
        "owkin/phikon-v2",
        "vision",
        224,
        0,
        "460M pathology tiles, H&E and IHC",
        "owkin non-commercial",
        "Filiot et al. 2024, arXiv:2409.09173",
    ),
    Backbone(
        "minilm",
        "sentence-transformers/all-MiniLM-L6-v2",
        "text",
        0,
        256,
        "1B sentence pairs",
        "apache-2.0",
        "Reimers and Gurevych 2019, EMNLP",
    ),
    Backbone(
        "pubmedbert",
        "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext",
        "text",
        0,
        512,
        "PubMed abstracts and full texts",
        "mit",
        "Gu et al. 2021, ACM HEALTH",
        text_pooling="cls",
    ),
)
BACKBONES: dict[str, Backbone] = {row.name: row for row in _ROWS}


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    vision_pooling: str | None = None,
    text_pooling: str | None = None,
) -> tuple[Any, Any]:
    """Load pretrained towers, with image transform and tokenizer, in fp32.

    Args:
        name: A name of the table, a Hub id, a local folder (also one that this package saved), or
            two of these joined by `+`: a vision tower and a text tower.
        revision: Commit or branch on the Hub; not for pairs.
        vision_pooling: For pairs: `pooler`, `cls`, `mean` or `cls_mean` (default).
        text_pooling: For pairs: `pooler`, `cls`, `mean` (default) or `eos`.

    Returns:
        A `GloVLMModel` in evaluation mode and its `GloVLMProcessor`.

    Raises:
        GloVLMError: The name is unknown, nothing is there, or it is half of a pair.
    """
    if "+" in name and not Path(name).expanduser().exists():
        vision, _, text = name.partition("+")
        if not vision.strip() or not text.strip():
            raise GloVLMError(
                f"A pair is a vision tower, '+', and a text tower; found '{name}': name both."
            )
        return _load_pair(vision.strip(), text.strip(), vision_pooling, text_pooling)
    return _load_dual(name, revision)


def _load_dual(name: str, revision: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModel

    from .model import GloVLMConfig, GloVLMModel

    source, row = _resolve(name)
    revision = revision or (row.revision if row else None)
    config = _from_hub(AutoConfig, source, name, revision=revision)
    if config.model_type == "glovlm":
        model: Any = _from_hub(GloVLMModel, source, name, revision=revision, dtype=torch.float32)
        return model.eval(), _load_processor(source, name, revision, model.config)
    if config.model_type not in DUAL_ENCODERS:
        known = ", ".join(DUAL_ENCODERS)
        raise GloVLMError(
            f"Backbone '{name}' is a '{config.model_type}' model, not a dual encoder ({known}). "
            f"Pair a vision tower with a text tower: --backbone VISION+TEXT, for example "
            f"'{name}+minilm'."
        )
    towers = _from_hub(AutoModel, source, name, revision=revision, dtype=torch.float32)
    config = GloVLMConfig(
        backbone_config=towers.config,
        backbone_name=_public_name(name, row),
        backbone_revision=revision or getattr(towers.config, "_commit_hash", None),
        backbone_license=row.license if row else None,
        joint_space=True,
    )
    processor = _load_processor(source, name, revision, config)
    if processor.pad_to_max:
        # SigLIP 2 files leave the id at SigLIP's default, which is another token there.
        towers.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    return GloVLMModel(config, backbone=towers).eval(), processor


def _load_pair(
    vision: str, text: str, vision_pooling: str | None, text_pooling: str | None
) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModel, VisionTextDualEncoderConfig
    from transformers.initialization import no_init_weights

    from .model import GloVLMConfig, GloVLMModel
    from .model.configuration_glovlm import TEXT_POOLINGS, VISION_POOLINGS

    for pooling, known in ((vision_pooling, VISION_POOLINGS), (text_pooling, TEXT_POOLINGS)):
        if pooling is not None and pooling not in known:
            raise GloVLMError(
                f"Unknown pooling '{pooling}': expected one of {', '.join(known)}."
                f"{nearest(pooling, known)}"
            )
    (vision_source, vision_row), (text_source, text_row) = _resolve(vision), _resolve(text)
    vision_config = _from_hub(AutoConfig, vision_source, vision)
    text_config = _from_hub(AutoConfig, text_source, text)
    if not hasattr(text_config, "vocab_size") or not hasattr(vision_config, "num_channels"):
        raise GloVLMError(
            f"A pair is a vision tower, '+', and a text tower; found '{vision}' "
            f"({vision_config.model_type}) + '{text}' ({text_config.model_type}). "
            "Put the vision tower first."
        )
    vision_tower = _from_hub(AutoModel, vision_source, vision, dtype=torch.float32)
    text_tower = _from_hub(AutoModel, text_source, text, dtype=torch.float32)
    licenses = [row.license for row in (vision_row, text_row) if row]
    poolings: dict[str, Any] = {
        "vision_pooling": vision_pooling or (vision_row.vision_pooling if vision_row else None),
        "text_pooling": text_pooling or (text_row.text_pooling if text_row else None),
    }
    config = GloVLMConfig(
        backbone_config=VisionTextDualEncoderConfig(
            vision_config=vision_tower.config.to_dict(), text_config=text_tower.config.to_dict()
        ),
        backbone_name=f"{_public_name(vision, vision_row)}+{_public_name(text, text_row)}",
        backbone_license=" + ".join(licenses) or None,
        vision_pooling=poolings["vision_pooling"] or "cls_mean",
        text_pooling=poolings["text_pooling"] or "mean",
        normalize_pooled=True,
        joint_space=False,
    )
    with no_init_weights():  # every weight is loaded below
        model = GloVLMModel(config)
    model.backbone.vision_model.load_state_dict(vision_tower.state_dict())
    model.backbone.text_model.load_state_dict(text_tower.state_dict())
    return model.eval(), _load_processor(vision_source, vision, None, config, text_source)


def _load_processor(
    source: str, name: str, revision: str | None, config: Any, text_source: str | None = None
) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    from .model import GloVLMProcessor

    if text_source is None and (Path(source) / "processor_config.json").is_file():
        saved = _from_hub(GloVLMProcessor, source, name, revision=revision)
        if config.model_type == "glovlm":
            return saved
    backbone = config.backbone_config
    images = _from_hub(AutoImageProcessor, source, name, revision=revision)
    tokenizer = _from_hub(AutoTokenizer, text_source or source, name, revision=revision)
    if set(tokenizer("glomerulus")["input_ids"]) <= set(tokenizer.all_special_ids):
        # transformers makes up an empty one where the files are missing.
        raise GloVLMError(
            f"Backbone '{name}' has no usable tokenizer: expected tokenizer.json (or its "
            "vocabulary files) beside the weights; save the tokenizer into that folder."
        )
    context = int(getattr(backbone.text_config, "max_position_embeddings", 77))
    return GloVLMProcessor(
        images,
        tokenizer,
        max_length=min(context, 256),
        pad_to_max="siglip" in backbone.model_type,
    )


def _resolve(name: str) -> tuple[str, Backbone | None]:
    """Find what a name means: a row of the table, a folder, or else a Hub id."""
    if not name.strip():
        raise GloVLMError("No backbone was named; `glovlm backbones` lists those that are known.")
    if name in BACKBONES:
        row = BACKBONES[name]
        return (str(MINI) if row.hub_id is None else row.hub_id), row
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise GloVLMError(
                f"Folder '{name}' holds no model: expected config.json in it. "
                "Give the folder that save_pretrained wrote (for a run of ours: RUN/model)."
            )
        return str(folder), None
    by_id = next((row for row in _ROWS if row.hub_id == name), None)
    if by_id is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise GloVLMError(
            f"Unknown backbone '{name}': it is no name of `glovlm backbones`, no folder here, and "
            f"no Hub id (owner/name).{nearest(name, BACKBONES)}"
        )
    return name, by_id


def _public_name(name: str, row: Backbone | None) -> str:
    """Name weights without betraying where they lie on this disk."""
    if row is not None:
        return row.hub_id or row.name
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def _from_hub(auto_class: Any, source: str, name: str, **kwargs: Any) -> Any:
    """`from_pretrained`, with one sentence when nothing can be loaded."""
    from safetensors import SafetensorError

    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        gated = "gated" in str(error) or "401" in str(error)
        hint = (
            f"ask for access at https://huggingface.co/{source} and run `hf auth login`"
            if gated
            else "check the name, the connection (or HF_HUB_OFFLINE), or give a local folder"
        )
        raise GloVLMError(
            f"Backbone '{name}' cannot be loaded: {first} What to do: {hint}."
        ) from error
