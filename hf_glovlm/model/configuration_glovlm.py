"""Model configuration: the two towers, their pooling, and the classification task."""

import re
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .outlines import OUTLINES, pools

VISION_POOLINGS = ("pooler", "cls", "mean", "cls_mean", "attentional")
TEXT_POOLINGS = ("pooler", "cls", "mean", "eos", "appended_cls")
PROJECTIONS = ("none", "linear", "mlp")
_CHOICES = {
    "vision_pooling": VISION_POOLINGS,
    "text_pooling": TEXT_POOLINGS,
    "vision_projection": PROJECTIONS,
    "text_projection": PROJECTIONS,
    "outline": OUTLINES,
}
_LABELS = "_labels"  # the class names that prompts, calibration, ... are of
PAIR_TYPE = "vision-text-dual-encoder"

# Bases that are gated or forbid derivatives, by every name that a config may give them.
LOCKED_BASES = frozenset(
    {
        *("conch", "mahmoodlab/conch", "pathgen-clip", "jamessyx/pathgen-clip", "medsiglip"),
        *("medsiglip-448", "google/medsiglip-448", "uni", "mahmoodlab/uni", "virchow2"),
        "paige-ai/virchow2",
    }
)

# Every saved folder names all of its classes, whichever of them was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_glovlm.GloVLMConfig",
    "AutoModel": "modeling_glovlm.GloVLMModel",
    "AutoModelForImageClassification": "modeling_glovlm.GloVLMForImageClassification",
    "AutoModelForZeroShotImageClassification": "modeling_glovlm.GloVLMModel",
}
# Pipelines of a model that was adapted to outlined pictures, whichever head it has.
PIPELINES = {
    "image-classification": {
        "impl": "pipeline_glovlm.GloVLMImageClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    },
    "zero-shot-image-classification": {
        "impl": "pipeline_glovlm.GloVLMZeroShotImageClassificationPipeline",
        "pt": ["AutoModelForZeroShotImageClassification"],
        "type": "multimodal",
    },
}
# Where the package is installed, it registers them (see `__init__.py`). `pipeline` asks for
# trust_remote_code for what a configuration names, so this one names them in files alone.
_INSTALLED = __name__.startswith("hf_glovlm.")


class GloVLMConfig(PreTrainedConfig):
    """Configuration of `GloVLMModel` and `GloVLMForImageClassification`.

    Args:
        backbone_config: Configuration of a transformers dual encoder (CLIP, SigLIP, SigLIP 2), or a
            `VisionTextDualEncoderConfig` that names any vision and any text tower.
        backbone_name: Hub id or table name of the pretrained weights, for cards and adapters.
        backbone_revision: The commit of these weights, if known.
        backbone_license: Licence of these weights, if known.
        backbone_restrictions: What it forbids: `non-commercial`, `no-derivatives`; `None` is
            unknown.
        vision_pooling: How a pair turns vision tokens into one vector: the tower's own `pooler`,
            the class token, the mean of the patch tokens, both joined (`cls_mean`, twice wide), or
            a learned query that attends to all tokens (`attentional`).
        text_pooling: The same for text: `pooler`, first token, masked mean, end-of-text token, or a
            class token behind the text, the last row of the vocabulary (`appended_cls`).
        vision_projection: What follows the vision pooling of a pair.
        text_projection: What follows the text pooling of a pair.
        projection_dim: Width after a projection; `None` when neither tower is projected.
        vision_projection_hidden: Hidden width of an `mlp`; that of its input when not given.
        text_projection_hidden: The same for text.
        projection_bias: Whether the projections have biases.
        pooler_dim: Width of attentional pooling.
        pooler_heads: Its heads.
        normalize_pooled: L2-normalise the pooled vision vector of a pair before its projection.
        joint_space: Whether image and text features may be compared by their cosine.
        logit_scale_init_value: Logarithm of the initial scale of a pair's cosines.
        prompts: Per class, the texts whose normalised features are averaged into its prototype.
        head: The adapted classifier head (see `heads.py`): `{"kind": ..., ...}`.
        inserts: Adapter modules between the towers' blocks (see `AdapterModules`); `None` where the
            towers are plain. The key of saved folders.
        context: Context-guided tokens of the vision tower (see `context.py`); `None` where every
            patch goes through every block.
        temperature: Divides the logits of the classifier; 1 means uncalibrated.
        prior_shift: Per class, what is added to the classifier's logits after the temperature, to
            correct for a prevalence other than that of the training labels.
        calibration: Conformal sets and abstention, as `calibration` fitted them on held-out
            groups; `None` where that was not done.
        guard: Distance to the support and its limit (see `SupportGuard`); `None` where images
            unlike the support are not noticed.
        stains: The stains of the images that it learned from, in canonical names; `None` is
            unknown.
        stain_centres: Stains whose mean feature is taken away before the head (see
            `StainCentres`); `None` where features are not centred.
        mpp: Micrometres per input pixel (after the image transform's resizing) that the model was
            adapted at; `None` is unknown.
        image_scale: Of the images that it learned from `mpp`, their median micrometres per pixel,
            and `low`, `p5`, `median`, `p95` and `high` of their longer sides in micrometres; `None`
            is unknown.
        outline: What the model sees of an outlined picture, one of OUTLINES (see `outlines.py`);
            the processor has the same.
        outline_of: What the outlines of its training images go around: `capsule` or `tuft`; `None`
            where that was not stated.
        draft: Whether JPEG files far larger than the input are decoded smaller, see
            `GloVLMProcessor.draft_side`; the processor has the same.
        synthetic: Whether its training images were synthetic, not of patients.
    """

    model_type = "glovlm"
    # Beside what is predicted: `Trainer` would hand `compute_metrics` a tuple.
    keys_to_ignore_at_inference = [  # noqa: RUF012 - of either model
        "image_embeds",
        "text_embeds",
        "logits_per_text",
        "vision_model_output",
        "text_model_output",
    ]
    sub_configs_defaults = {  # noqa: RUF012 - the name and type are transformers' own
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="clip")
    }

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    backbone_name: str | None = None
    backbone_revision: str | None = None
    backbone_license: str | None = None
    backbone_restrictions: list[str] | None = None
    vision_pooling: Literal["pooler", "cls", "mean", "cls_mean", "attentional"] = "pooler"
    text_pooling: Literal["pooler", "cls", "mean", "eos", "appended_cls"] = "pooler"
    vision_projection: Literal["none", "linear", "mlp"] = "none"
    text_projection: Literal["none", "linear", "mlp"] = "none"
    projection_dim: int | None = None
    vision_projection_hidden: int | None = None
    text_projection_hidden: int | None = None
    projection_bias: bool = True
    pooler_dim: int | None = None
    pooler_heads: int = 8
    normalize_pooled: bool = False
    joint_space: bool = True
    logit_scale_init_value: float = 2.6592
    prompts: list[list[str]] | None = None
    head: dict[str, Any] | None = None
    inserts: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    temperature: float = 1.0
    prior_shift: list[float] | None = None
    calibration: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    stains: list[str] | None = None
    stain_centres: dict[str, Any] | None = None
    mpp: float | None = None
    image_scale: dict[str, float] | None = None
    outline: Literal["ignore", "centre", "blank", "pool", "blank+pool"] = "ignore"
    outline_of: Literal["capsule", "tuft"] | None = None
    draft: bool = False
    synthetic: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        backbone = self.backbone_config
        if isinstance(backbone, dict):
            # Code of the backbone's own repository is never run from inside this one.
            self.backbone_config = {
                k: v for k, v in backbone.items() if k not in ("trust_remote_code", "auto_map")
            }
        elif backbone is not None:
            # Without this, wrapping towers that are already loaded would reset them from sdpa.
            kwargs.setdefault("attn_implementation", {"backbone_config": _attention(backbone)})
        kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                value = getattr(self, field)
                raise ValueError(f"{field} must be one of {', '.join(known)}; found '{value}'.")
        if (self.vision_pooling == "attentional") != (self.pooler_dim is not None):
            raise ValueError(
                "Attentional pooling, and only that, needs pooler_dim; found vision_pooling "
                f"'{self.vision_pooling}' and pooler_dim {self.pooler_dim}."
            )
        if not all(isinstance(stain, str) for stain in self.stains or ()):
            raise ValueError(f"stains must be names; found {self.stains}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}.")
        if not _INSTALLED and (named := self._pipelines()):
            self.custom_pipelines = named["custom_pipelines"]
        if self.head is not None and len(self.prompts or []) not in (0, self.num_labels):
            raise ValueError(
                f"prompts must hold one list per class: {self.num_labels} classes, "
                f"{len(self.prompts or [])} lists."
            )

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Configuration of the text tower; arguments as in `PreTrainedConfig`, not used."""
        text: PreTrainedConfig = self._backbone().text_config
        return text

    @property
    def is_pair(self) -> bool:
        """Whether the model joins two separate towers, rather than a trained dual encoder."""
        return self._backbone().model_type == PAIR_TYPE

    @property
    def image_feature_dim(self) -> int:
        """Width of `get_image_features`."""
        backbone = self._backbone()
        if self.is_pair:
            if self.vision_projection != "none":
                return int(self.projection_dim or 0)
            return self.vision_pooled_dim
        return _joint_dim(backbone, backbone.vision_config)

    @property
    def text_feature_dim(self) -> int:
        """Width of `get_text_features`."""
        backbone = self._backbone()
        if self.is_pair:
            if self.text_projection != "none":
                return int(self.projection_dim or 0)
            return int(backbone.text_config.hidden_size)
        return _joint_dim(backbone, backbone.text_config)

    @property
    def vision_pooled_dim(self) -> int:
        """Width of the pooled vision vector before any projection."""
        if self.pooler_dim is not None:
            return self.pooler_dim
        width = int(self._backbone().vision_config.hidden_size)
        doubled = self.vision_pooling == "cls_mean" and not self.pools_inside
        return 2 * width if doubled else width

    @property
    def pools_inside(self) -> bool:
        """Whether the patch tokens inside of the outline alone are pooled."""
        return pools(self.outline)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if key == "id2label":  # also what `num_labels` sets
            self._match_labels()

    def _match_labels(self) -> None:
        """Reset what belongs to other classes than the present ones: it would not fit them."""
        labels = self.__dict__.get("id2label")
        names = None if labels is None else [str(name) for name in labels.values()]
        before = self.__dict__.get(_LABELS)
        self.__dict__[_LABELS] = names
        if before is not None and names != before:
            self.prompts = self.prior_shift = self.calibration = self.guard = None
            self.temperature = 1.0

    def check_publishing(self) -> None:
        """Check that the licence of the base allows to publish the model's weights.

        Raises:
            ValueError: The base is gated or forbids derivatives, or its licence is not known.
        """
        name = str(self.backbone_name or "")
        bases = [part for part in name.lower().split("+") if part]
        stated = [part.strip() for part in str(self.backbone_license or "").lower().split(" + ")]
        stated = [part for part in stated if part not in ("", "not verified")]
        forbidden = {*(self.backbone_restrictions or ())} & {"no-derivatives"}
        forbidden |= {part for part in stated if re.search(r"\bnd\b|no-?derivatives", part)}
        if forbidden or LOCKED_BASES & {*bases}:
            raise ValueError(
                f"The base '{name}' is gated, or its licence ({self.backbone_license}) allows no "
                "derivatives, so its weights cannot be published. `save_pretrained` keeps them "
                "here; `glovlm push --adapter-only` publishes what was learned beside them, if the "
                "terms allow that."
            )
        if len(stated) < max(len(bases), 1):
            raise ValueError(
                f"The licence of the base '{name or 'unnamed'}' is not known, so its weights "
                "cannot be published: read its terms, then state the licence in the config's "
                "`backbone_license`, or use `glovlm push --reason`, which states why on the card."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, without the path of the backbone on this disk (private)."""
        self._match_labels()  # the names may have been changed in place
        fields = _without_private(super().to_dict() | self._pipelines())
        if not self.draft:  # a configuration from before it was one has the same digest
            fields.pop("draft", None)
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """Fields that differ from the defaults, as a saved folder holds them."""
        self._match_labels()
        return _without_private(super().to_diff_dict() | self._pipelines())

    def _pipelines(self) -> dict[str, Any]:
        """Pipelines that a saved folder names, where those of transformers would not do."""
        if self.outline == "ignore":
            return {}
        # Copies, since `pipeline` writes into them.
        return {"custom_pipelines": {task: dict(one) for task, one in PIPELINES.items()}}

    def _backbone(self) -> PreTrainedConfig:
        assert isinstance(self.backbone_config, PreTrainedConfig)  # made so by __post_init__
        return self.backbone_config


def _attention(config: PreTrainedConfig) -> dict[str, Any]:
    """Attention back end of a configuration and its sub-configurations, for transformers."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    below = {key: _attention(part) for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **below}


def _without_private(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_private(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in ("_name_or_path", _LABELS)
    }


def _joint_dim(backbone: PreTrainedConfig, tower: PreTrainedConfig) -> int:
    """Width of the joint space: CLIP names it; SigLIP's is that of its text tower."""
    if getattr(backbone, "projection_dim", None):
        return int(backbone.projection_dim)
    return int(getattr(tower, "projection_size", None) or tower.hidden_size)
