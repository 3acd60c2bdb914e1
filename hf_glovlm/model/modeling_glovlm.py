"""Dual-encoder model, and the image classifier on top of it."""

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging

from .configuration_glovlm import GloVLMConfig
from .context import ContextGuide
from .guard import SupportGuard
from .heads import Head, build_head, describe_head
from .outlines import choose_inside, cover_patches, mean_inside, split_channels
from .prompts import TEXT_CHUNK, AdapterModules, Bottleneck, LayerTokens
from .stains import StainCentres
from .towers import (
    AttentionalPooler,
    TowerPair,
    accepted_arguments,
    count_patches,
    patch_grid,
)

logger = logging.get_logger(__name__)


@dataclass
class GloVLMOutput(ModelOutput):
    """Output of `GloVLMModel`.

    Args:
        loss: Of the batch, when `return_loss=True` (see `forward`).
        logits_per_image: Scaled cosines `[images, texts]`.
        logits_per_text: The same `[texts, images]`.
        image_embeds: L2-normalised image features `[images, dim]`.
        text_embeds: L2-normalised text features `[texts, dim]`.
        vision_model_output: What the vision tower returned, attentions included if requested.
        text_model_output: What the text tower returned.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """All that is not `None`; the towers' outputs as tuples, too (as `CLIPOutput`)."""
        values: tuple[Any, ...] = super().to_tuple()
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in values)


@dataclass
class GloVLMImageClassifierOutput(ModelOutput):
    """Output of `GloVLMForImageClassification`.

    Args:
        loss: By the config's `problem_type`, when labels were given.
        logits: Calibrated logits `[n, classes]` (temperature, prior correction).
        image_embeds: Image features `[n, dim]`, not normalised.
        hidden_states: Of the vision tower, when requested.
        attentions: Of the vision tower, when requested. Inserted tokens stand behind the class
            token (see `AdapterModules`), patches last.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class GloVLMPreTrainedModel(PreTrainedModel):
    """Base class of both models: configuration class, attention back ends, initialisation."""

    config: GloVLMConfig
    config_class = GloVLMConfig
    base_model_prefix = "glovlm"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    # Otherwise `Trainer` takes **kwargs to mean that the loss is already divided among the steps
    # over which gradients accumulate.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload the model, where the licence of its base allows that.

        Args:
            *args: As `PreTrainedModel.push_to_hub` takes them.
            **kwargs: As `PreTrainedModel.push_to_hub` takes them.

        Raises:
            ValueError: It does not, see `GloVLMConfig.check_publishing`.
        """
        self.config.check_publishing()
        return super().push_to_hub(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model, which is always allowed; for an upload, see `push_to_hub`.

        A pipeline and `Trainer` save the model and upload the folder themselves, so this is the
        last that is asked.

        Args:
            save_directory: Where to write.
            *args: As `PreTrainedModel.save_pretrained` takes them.
            **kwargs: As `PreTrainedModel.save_pretrained` takes them.

        Raises:
            ValueError: It is to be uploaded, and the licence of its base does not allow that.
        """
        if kwargs.get("push_to_hub") or any(args[2:3]) or _is_for_upload():
            self.config.check_publishing()
        super().save_pretrained(save_directory, *args, **kwargs)
        from .pipeline_glovlm import GloVLMImageClassificationPipeline

        # No other file of the code needs this one, so nothing else would take it along.
        custom_object_save(GloVLMImageClassificationPipeline, save_directory)

    def get_input_embeddings(self) -> nn.Module:
        """Token embedding of the text tower."""
        embedding: nn.Module = self._backbone.text_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of the text tower.

        Args:
            value: A `torch.nn.Embedding`.
        """
        self._backbone.text_model.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the token embedding of the text tower, as `PreTrainedModel` does.

        Args:
            *args: As `PreTrainedModel.resize_token_embeddings` takes them.
            **kwargs: As `PreTrainedModel.resize_token_embeddings` takes them.

        Raises:
            ValueError: The last row is the class token of the texts, which has to stay the last.
        """
        resizes = any(value is not None for value in (*args[:2], *kwargs.values()))
        if self.config.text_pooling == "appended_cls" and resizes:
            raise ValueError(
                "The last row of this text tower's embedding is its class token (text_pooling "
                "'appended_cls'), so rows behind it would take its place: keep the embedding, or "
                "write into rows that no text uses."
            )
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self._backbone.text_model.config.vocab_size = embedding.num_embeddings
        return embedding

    @property
    def _backbone(self) -> Any:
        return getattr(self, self.base_model_prefix, self).backbone

    def _reply(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output, or a tuple where the caller or the config asks for one."""
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only what is ours: the towers are transformers models and initialise themselves.
        if isinstance(module, TowerPair):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            for projection in (module.visual_projection, module.text_projection):
                for linear in projection.modules():
                    if isinstance(linear, nn.Linear):
                        init.normal_(linear.weight, std=linear.in_features**-0.5)
                        if linear.bias is not None:
                            init.zeros_(linear.bias)
        elif isinstance(
            module,
            AttentionalPooler
            | LayerTokens
            | Bottleneck
            | ContextGuide
            | SupportGuard
            | StainCentres,
        ):
            module.reset()
        elif isinstance(module, Head):
            module.reset()
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.BatchNorm1d):
                    layer.reset_parameters()


class GloVLMModel(GloVLMPreTrainedModel):
    """Dual encoder of images and texts: CLIP, SigLIP, SigLIP 2, or any pair of towers.

    `get_image_features`, `get_text_features` and the output names are those of `CLIPModel`.

    Args:
        config: See `GloVLMConfig`.
        backbone: Pretrained towers to wrap; built from the config, untrained, when not given.
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\.", r"^guard\.", r"^centres\."]  # noqa: RUF012

    backbone: Any  # a transformers dual encoder or a TowerPair

    def __init__(self, config: GloVLMConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = (
                TowerPair(config)
                if config.is_pair
                else AutoModel.from_config(config.backbone_config, dtype=torch.get_default_dtype())
            )
        else:
            _keep_weights(backbone)
        self.backbone = backbone
        if config.inserts and config.context:
            raise ValueError(_ONE_OF_BOTH)
        # Saved weights and configs keep the name `inserts`.
        self.inserts = AdapterModules(config.inserts, backbone) if config.inserts else None
        self.context = ContextGuide(config.context, backbone) if config.context else None
        self.post_init()

    def add_adapter_modules(self, spec: dict[str, Any]) -> AdapterModules:
        """Add adapter modules (tokens, bottlenecks) between the towers' blocks, and to the config.

        Args:
            spec: See `AdapterModules`.

        Raises:
            ValueError: There are some already, or a tower cannot take them.
        """
        if self.inserts is not None:
            raise ValueError(
                "This model has tokens or bottlenecks between its blocks already "
                f"({', '.join(self.config.inserts or {})}): start from the backbone without them."
            )
        if self.context is not None:
            raise ValueError(_ONE_OF_BOTH)
        modules = AdapterModules(spec, self.backbone)
        self.inserts = modules.to(self.logit_scale.device, self.logit_scale.dtype)
        self.config.inserts = spec
        return modules

    def add_context(self, spec: dict[str, Any]) -> ContextGuide:
        """Add context guidance (ConVLM) to the vision tower, and to the config.

        Args:
            spec: See `ContextGuide`.

        Raises:
            ValueError: The model has a context or inserted tokens already, or the tower cannot be
                guided.
        """
        if self.context is not None:
            raise ValueError(
                "This model has a context already: start from the backbone without it."
            )
        if self.inserts is not None:
            raise ValueError(_ONE_OF_BOTH)
        guide = ContextGuide(spec, self.backbone)
        self.context = guide.to(self.logit_scale.device, self.logit_scale.dtype)
        guide.train(self.training)
        self.config.context = spec
        return guide

    def remove_context(self) -> None:
        """Remove context guidance: the vision tower is plain again."""
        if self.context is not None:
            self.context.release(self.backbone.vision_model)
        self.context = self.config.context = None

    @torch.no_grad()
    def kept_patches(self, pixel_values: Tensor, **kwargs: Any) -> list[Tensor]:
        """Patches kept by each context-guided layer.

        Args:
            pixel_values: `[n, 3, height, width]`, from the processor.
            **kwargs: What the tower takes.

        Returns:
            For each such layer, patch numbers `[n, kept]`, counted row by row over the whole
            image, the most attended first; -1 is the token that others were fused into.

        Raises:
            ValueError: The model has no context.
        """
        if self.context is None:
            raise ValueError("This model has no context: every patch goes through every block.")
        with self.context.read() as seen:
            self.pool_images(pixel_values, **kwargs)
        return seen.patches

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logit scale: logarithm of the factor between cosines and logits."""
        scale: nn.Parameter = self.backbone.logit_scale
        return scale

    @property
    def has_joint_space(self) -> bool:
        """Whether image and text features share a space, so that they can be compared."""
        return self.config.joint_space

    def get_image_features(
        self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `[n, 3, height, width]` (SigLIP 2: flattened patches), from the processor;
                a fourth channel is the part of each pixel inside of the outline.
            return_dict: Whether to return an output object rather than a tuple.
            **kwargs: What the tower takes: `interpolate_pos_encoding`, `output_attentions`, ...

        Returns:
            The vision tower's output; `pooler_output` holds the features `[n, dim]`.
        """
        if self.config.pools_inside:
            features, pooled = self._pool_inside(pixel_values, **self._asked(kwargs))
            features.pooler_output = self.project_images(pooled)
        else:
            features = self.backbone.get_image_features(
                pixel_values=split_channels(pixel_values)[0], **self._asked(kwargs)
            )
        answer: BaseModelOutputWithPooling = self._reply(features, return_dict)
        return answer

    def pool_images(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Pooled image vectors before the projection: what a frozen tower computes once.

        `project_images(pool_images(x))` equals `get_image_features(x).pooler_output`.

        Args:
            pixel_values: `[n, 3, height, width]`, from the processor; see `get_image_features`.
            **kwargs: What the tower takes.

        Returns:
            Pooled vectors `[n, width]`.
        """
        if self.config.pools_inside:
            return self._pool_inside(pixel_values, **_given(kwargs))[1]
        pixel_values, _ = split_channels(pixel_values)
        if isinstance(self.backbone, TowerPair):
            return self.backbone.pool_images(pixel_values, **_given(kwargs))[1]
        pooled: Tensor = self.backbone.vision_model(
            pixel_values=pixel_values, **_given(kwargs)
        ).pooler_output
        return pooled

    def _pool_inside(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Any, Tensor]:
        """The vision tower's output, and its patch tokens pooled inside of the outline.

        Returns:
            The output, and `[n, width]`.
        """
        picture, inside = split_channels(pixel_values)
        tower: Any = self.backbone.vision_model
        if isinstance(self.backbone, TowerPair):
            kwargs = accepted_arguments(tower, kwargs)
        if self.context is None:
            outputs, kept = tower(pixel_values=picture, **kwargs), None
        else:
            with self.context.follow() as seen:
                outputs = tower(pixel_values=picture, **kwargs)
            kept = seen.patches[-1] if seen.patches else None
        tokens, coverage = self._patch_tokens(outputs.last_hidden_state, picture, inside, kept)
        return outputs, self.pool_tokens(tokens, coverage)

    def pool_tokens(self, tokens: Tensor, coverage: Tensor) -> Tensor:
        """Pool the patch tokens inside of an outline, as a model with `pools_inside` does.

        The mean of those of which more than half lies inside; an attentional pooler attends to
        these alone. CLIP's final norm, which its tower applies to the class token, is applied to
        each token.

        Args:
            tokens: `[n, patches, width]` of the vision tower.
            coverage: Part of each that lies inside `[n, patches]`.

        Returns:
            `[n, vision_pooled_dim]`.
        """
        tower: Any = self.backbone.vision_model
        pooler = getattr(self.backbone, "vision_pooler", None)
        if pooler is not None:
            attended: Tensor = pooler(tokens, choose_inside(coverage) > 0)
            return attended
        if hasattr(tower, "post_layernorm") and "siglip" not in tower.config.model_type:
            tokens = tower.post_layernorm(tokens)
        pooled = mean_inside(tokens, coverage)
        if self.config.is_pair and self.config.normalize_pooled:
            pooled = nn.functional.normalize(pooled, dim=-1)
        return pooled

    def _patch_tokens(
        self, states: Tensor, picture: Tensor, inside: Tensor | None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens `[n, patches, width]` of a tower's states, and how much of each is inside.

        Args:
            states: Tokens `[n, length, width]`, patches last, or a map `[n, width, rows, columns]`.
            picture: `[n, 3, height, width]`.
            inside: `[n, height, width]`; all is inside when not given.
            kept: Of a context-guided tower, the numbers of the patches that are left
                `[n, patches]`; -1 is the token of the others, which counts as outside.
        """
        if inside is None:
            inside = torch.ones_like(picture[:, 0])
        if states.dim() == 4:
            rows, columns = states.shape[-2:]
            states = states.flatten(2).transpose(1, 2)
        else:
            rows, columns = patch_grid(self.config._backbone().vision_config, picture)
            while kept is None and rows * columns > states.shape[1] and rows % 2 == 0:
                rows, columns = rows // 2, columns // 2  # a hierarchical tower merges patches
        size = picture.shape[-2] // rows, picture.shape[-1] // columns
        coverage = cover_patches(inside, (rows, columns), size)
        if kept is not None:
            coverage = coverage.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, 0.0)
        return states[:, states.shape[1] - coverage.shape[1] :], coverage

    def pool_images_and_middle(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pooled image vectors, and the mean patch token behind the middle block, in one pass.

        The middle of a tower knows texture, stain and sharpness, which its end has put aside.

        Args:
            pixel_values: `[n, 3, height, width]`, from the processor.
            **kwargs: What the tower takes.

        Returns:
            Pooled vectors `[n, width]` and mean patches `[n, hidden]`; the latter `[n, 0]` where
            the tower has no blocks that tokens pass through one after the other.
        """
        lists = [m for m in self.backbone.vision_model.modules() if isinstance(m, nn.ModuleList)]
        blocks = max(lists, key=len, default=nn.ModuleList())
        seen: list[Tensor] = []
        vision = self.config._backbone().vision_config
        patches = 0 if pixel_values.dim() < 4 else count_patches(vision, pixel_values)
        picture, inside = split_channels(pixel_values)
        inside = inside if self.config.pools_inside and patches else None

        def read(module: nn.Module, args: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            if tokens.dim() == 3:
                mask = kwargs.get("pixel_attention_mask")
                if inside is not None and tokens.shape[1] >= patches:
                    seen.append(mean_inside(*self._patch_tokens(tokens, picture, inside)))
                else:
                    seen.append(_mean_patch(tokens, patches, mask))

        hooks = [block.register_forward_hook(read) for block in blocks[len(blocks) // 2 :][:1]]
        try:
            pooled = self.pool_images(pixel_values=pixel_values, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return pooled, seen[0] if seen else pooled[:, :0]

    def project_images(self, pooled: Tensor) -> Tensor:
        """Project pooled vectors `[n, width]` to image features `[n, dim]`."""
        projection = getattr(self.backbone, "visual_projection", None)
        return pooled if projection is None else projection(pooled)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: `[n, length]`.
            attention_mask: `[n, length]`, 1 where a token is text.
            return_dict: Whether to return an output object rather than a tuple.
            **kwargs: What the tower takes.

        Returns:
            The text tower's output; `pooler_output` holds the features `[n, dim]`.
        """
        if "siglip" in self.config._backbone().model_type:
            # SigLIP was trained on texts padded to its full context and attends to the padding.
            input_ids, attention_mask = self._pad_to_context(input_ids), None
        features = self.backbone.get_text_features(
            input_ids=input_ids, attention_mask=attention_mask, **self._asked(kwargs)
        )
        answer: BaseModelOutputWithPooling = self._reply(features, return_dict)
        return answer

    def class_prototypes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        class_index: Tensor,
        chunk_size: int = TEXT_CHUNK,
    ) -> Tensor:
        """Class prototypes: each class's normalised text features, averaged and normalised again.

        Texts are encoded in chunks; where gradients are needed, a chunk's activations are computed
        again on the way back, so that memory does not grow with the number of classes.

        Args:
            input_ids: `[prompts, length]`, all prompts of all classes.
            attention_mask: `[prompts, length]` or `None`.
            class_index: `[prompts]`, the class of each prompt; classes are 0 ... K-1.
            chunk_size: Most texts that are encoded at a time.

        Returns:
            Unit class prototypes `[K, dim]`.
        """

        def encode(ids: Tensor, mask: Tensor | None) -> Tensor:
            features: Any = self.get_text_features(ids, mask, return_dict=True).pooler_output
            return nn.functional.normalize(features, dim=-1)

        n = len(input_ids)
        parts = []
        for start in range(0, n, chunk_size):
            rows = slice(start, start + chunk_size)
            mask = None if attention_mask is None else attention_mask[rows]
            if n > chunk_size and torch.is_grad_enabled():
                parts.append(checkpoint(encode, input_ids[rows], mask, use_reentrant=False))
            else:
                parts.append(encode(input_ids[rows], mask))
        features = torch.cat(parts)
        total = features.new_zeros(int(class_index.max()) + 1, features.shape[-1])
        return nn.functional.normalize(total.index_add(0, class_index, features), dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> GloVLMOutput | BaseModelOutputWithPooling | tuple[Any, ...]:
        """Image-text similarity: scaled cosines between images and texts.

        Given images alone, what `get_image_features` returns, as a vision model's would, so that
        `pipeline("image-feature-extraction")` works.

        Args:
            input_ids: `[texts, length]`.
            pixel_values: `[images, 3, height, width]`.
            attention_mask: `[texts, length]`.
            return_loss: Whether to return a loss of as many texts as images: symmetric InfoNCE, or
                the sigmoid loss where the backbone has a bias of the logits (SigLIP).
            return_dict: Whether to return a `GloVLMOutput` rather than a tuple.
            token_type_ids: For text towers that take it.
            position_ids: For text towers that take it.
            pixel_attention_mask: For SigLIP 2, which patches are image `[images, patches]`.
            spatial_shapes: For SigLIP 2, rows and columns of patches `[images, 2]`.
            **kwargs: `interpolate_pos_encoding` goes to the vision tower; `output_attentions` and
                `output_hidden_states` to both.

        Raises:
            ValueError: There are no images, or a loss but no texts, or the two towers have no joint
                space.
        """
        if pixel_values is None or (input_ids is None and return_loss):
            raise ValueError(
                "GloVLMModel compares images with texts: give pixel_values and input_ids, or call "
                "get_image_features or get_text_features for one of them."
            )
        if input_ids is not None and not self.has_joint_space:
            raise ValueError(
                "These two towers were never trained together, so their features cannot be "
                "compared; adapt them first (glovlm train), which fits a projection."
            )
        shared = {
            k: kwargs.pop(k) for k in ("output_attentions", "output_hidden_states") if k in kwargs
        }
        vision: Any = self.get_image_features(
            pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            return_dict=True,
            **kwargs,
            **shared,
        )
        if input_ids is None:
            answer: BaseModelOutputWithPooling = self._reply(vision, return_dict)
            return answer
        text: Any = self.get_text_features(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            return_dict=True,
            **shared,
        )
        image_embeds = nn.functional.normalize(vision.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(text.pooler_output, dim=-1)
        if not (self.training or return_loss or torch.compiler.is_compiling()):
            _check_texts(input_ids, text_embeds)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()
        bias = getattr(self.backbone, "logit_bias", None)
        if bias is not None:
            logits_per_text = logits_per_text + bias
        loss = None
        if return_loss:
            contrast = _contrast if bias is None else _contrast_pairwise
            loss = contrast(logits_per_text)
        output = GloVLMOutput(
            loss=loss,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=vision,
            text_model_output=text,
        )
        both: GloVLMOutput = self._reply(output, return_dict)
        return both

    def _asked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a tower: those given, and what the config asks for beside the features."""
        given = {k: v for k, v in kwargs.items() if v is not None}
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name):
                given.setdefault(name, True)
        return given

    def _pad_to_context(self, input_ids: Tensor) -> Tensor:
        text = self.config._backbone().text_config
        missing = int(text.max_position_embeddings) - input_ids.shape[1]
        pad = text.pad_token_id if text.pad_token_id is not None else 0
        return nn.functional.pad(input_ids, (0, max(missing, 0)), value=pad)


def _check_texts(input_ids: Tensor, embeds: Tensor) -> None:
    """Refuse different texts `[n, length]` of one vector `[n, dim]`: no image tells them apart."""
    if not 2 <= len(embeds) <= 256 or input_ids.is_meta:
        return
    for row in range(len(embeds) - 1):
        same = (embeds[row + 1 :] == embeds[row]).all(-1)
        if (same & (input_ids[row + 1 :] != input_ids[row]).any(-1)).any():
            raise ValueError(
                f"Text {row + 1} and another one are different tokens, but the text tower gives "
                "them one vector: it pools them in front of the difference. Its end token "
                "(eos_token_id) or text_pooling is set wrongly, or it was never trained."
            )


class GloVLMForImageClassification(GloVLMPreTrainedModel):
    """Image classifier: a GloVLM model and an adapted head.

    Args:
        config: See `GloVLMConfig`; `id2label` names the classes, `head` specifies the head.
        glovlm: An existing model to put the head on; built from the config when not given.
        head: An existing head; built from the config when not given.
    """

    def __init__(
        self,
        config: GloVLMConfig,
        glovlm: GloVLMModel | None = None,
        head: nn.Module | None = None,
    ) -> None:
        if head is not None:
            config.head = describe_head(head)
        super().__init__(config)
        for given in (glovlm, head):
            if given is not None:
                _keep_weights(given)
        self.glovlm = glovlm if glovlm is not None else GloVLMModel(config)
        self.head = (
            head
            if head is not None
            else build_head(config.head, config.image_feature_dim, int(config.num_labels or 2))
        )
        self.guard = SupportGuard(**config.guard) if config.guard else None
        self.centres = StainCentres(**config.stain_centres) if config.stain_centres else None
        self.post_init()

    def set_guard(self, guard: SupportGuard | None) -> None:
        """Put a guard against images unlike the support into the model, or take it away.

        Args:
            guard: As `inference.guard.fit_guard` fits it.
        """
        if guard is not None:
            _keep_weights(guard)
            guard = guard.to(self.device, self.dtype)
        self.guard = guard
        self.config.guard = None if guard is None else guard.describe()

    def set_centres(self, centres: StainCentres | None) -> None:
        """Put the centres of stains into the model, or take them away.

        Args:
            centres: As `inference.stains.fit_centres` fits them; the head was fitted behind them.
        """
        if centres is not None:
            _keep_weights(centres)
            centres = centres.to(self.device, self.dtype)
        self.centres = centres
        self.config.stain_centres = None if centres is None else centres.describe()

    def classify_features(self, features: Tensor, stain_ids: Tensor | None = None) -> Tensor:
        """Map image features `[n, dim]`, not normalised, to calibrated logits `[n, classes]`.

        Centred by stain where the model has centres; the head's logits divided by the temperature,
        plus the prior correction where there is one.

        Args:
            features: `[n, dim]`.
            stain_ids: `[n]`, see `StainCentres.forward`; not needed by a model without centres.
        """
        if self.centres is not None:
            if stain_ids is None and not torch.compiler.is_compiling():
                logger.warning_once(_NO_STAIN.format(", ".join(self.centres.stains)))
            features = self.centres(features, stain_ids)
        # CoCoOp's class texts depend on the image, so its head reads them anew.
        more = (self.glovlm,) if getattr(self.head, "needs_model", False) else ()
        logits: Tensor = self.head(features, *more) / self.config.temperature
        shift = self.config.prior_shift
        return logits if shift is None else logits + logits.new_tensor(shift)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        stain_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> GloVLMImageClassifierOutput | tuple[Any, ...]:
        """Classify images.

        Args:
            pixel_values: `[n, 3, height, width]`, from the processor; see
                `GloVLMModel.get_image_features`.
            labels: Gives a loss, as in the image classifiers of transformers, by the config's
                `problem_type`: `single_label_classification` takes class numbers `[n]` (softmax
                cross-entropy), `multi_label_classification` floats 0 or 1 `[n, classes]` (binary
                cross-entropy), `regression` numbers `[n]` or `[n, classes]` (mean squared error).
                Without one, whole numbers are classes and floats are multi-label.
            return_dict: Whether to return an output object rather than a tuple.
            pixel_attention_mask: For SigLIP 2. (`Trainer` drops inputs that are not named here.)
            spatial_shapes: For SigLIP 2.
            stain_ids: Stain of each image `[n]`, for a model that centres by it, see
                `StainCentres.forward`.
            **kwargs: What the vision tower takes.
        """
        vision = self.glovlm.get_image_features(
            pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            return_dict=True,
            **kwargs,
        )
        features: Any = vision.pooler_output
        logits = self.classify_features(features, stain_ids)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = GloVLMImageClassifierOutput(
            loss=loss,
            logits=logits,
            image_embeds=features,
            hidden_states=getattr(vision, "hidden_states", None),
            attentions=getattr(vision, "attentions", None),
        )
        answer: GloVLMImageClassifierOutput = self._reply(output, return_dict)
        return answer


_NO_STAIN = (
    "This model centres features by the stain ({}), and none is given: the mean of its centres "
    "stands in for that of the images' own stain. `stain_ids` states it."
)
_ONE_OF_BOTH = (
    "A context drops patches between the blocks, and inserted tokens or bottlenecks expect them "
    "all: start from the backbone without the other."
)


def _is_for_upload() -> bool:
    """Whether a caller of transformers saves the model in order to upload the folder."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "push_to_hub":
            return True
        if frame.f_code.co_name == "_save_checkpoint":
            settings = getattr(frame.f_locals.get("self"), "args", None)
            at_end = getattr(settings, "hub_strategy", None) == "end"
            if getattr(settings, "push_to_hub", False) and not at_end:
                return True
        frame = frame.f_back
    return False


def _keep_weights(module: nn.Module) -> None:
    """Mark a module as initialised, or `post_init` would initialise it again."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


def _mean_patch(tokens: Tensor, patches: int, mask: Tensor | None) -> Tensor:
    """Mean of the patch tokens, which stand last; of those that a mask `[n, patches]` keeps."""
    tokens = tokens[:, -min(patches or tokens.shape[1], tokens.shape[1]) :]
    if mask is None or mask.shape != tokens.shape[:2]:
        return tokens.mean(1)
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def _contrast(logits: Tensor) -> Tensor:
    """Symmetric InfoNCE of logits `[n, n]` whose diagonal belongs together, as CLIP."""
    target = torch.arange(len(logits), device=logits.device)
    rows = nn.functional.cross_entropy(logits, target)
    return (rows + nn.functional.cross_entropy(logits.T, target)) / 2


def _contrast_pairwise(logits: Tensor) -> Tensor:
    """Sigmoid loss of logits `[n, n]` whose diagonal belongs together, as SigLIP."""
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -nn.functional.logsigmoid(signs * logits).sum(-1).mean()


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop arguments left at `None`: not every tower accepts them."""
    return {k: v for k, v in kwargs.items() if v is not None}
