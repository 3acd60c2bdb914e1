"""Processor: a backbone's image transform and tokenizer, and learned context tokens."""

from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.utils import logging

from .outlines import KEY, OUTLINES, pools, take_apart

DRAFT_MARGIN = 2  # a JPEG is decoded at no less than so many times the input's side

logger = logging.get_logger(__name__)


class GloVLMProcessor(ProcessorMixin):
    """Image processor and tokenizer of a backbone, with its padding and truncation of texts.

    Args:
        image_processor: The backbone's image processor.
        tokenizer: The backbone's tokenizer.
        max_length: Longest text in tokens, special tokens included; longer texts are cut.
        pad_to_max: Whether every text is padded to `max_length` (SigLIP was trained so).
        context_token_ids: Rows of the token embedding that prompt tuning trained, in order: `[M]`
            for a unified context, `[K, M]` for one a class. `encode_prompts` splices them in.
        torchvision_crop: Whether the centre crop lies where torchvision puts it. That is so for
            checkpoints that were published for open_clip or timm and converted, whose image
            processor has this mark when this is not given; a checkpoint that was published for
            transformers keeps the crop of its own image processor.
        outline: What the model sees of an outlined picture, one of OUTLINES (see `outlines.py`).
        draft: Whether a JPEG far larger than the input is decoded smaller, see `draft_side`.
        chat_template: Not used; accepted because `ProcessorMixin` passes it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        pad_to_max: bool = False,
        context_token_ids: list[Any] | None = None,
        torchvision_crop: bool | None = None,
        outline: str = "ignore",
        draft: bool = False,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
        self.max_length = max_length or (limit if 0 < limit < 10_000 else 77)
        self.pad_to_max = pad_to_max
        self.context_token_ids = context_token_ids
        if torchvision_crop is None:
            torchvision_crop = bool(getattr(image_processor, "torchvision_crop", False))
        self.torchvision_crop = torchvision_crop
        if outline not in OUTLINES:
            raise ValueError(f"outline must be one of {', '.join(OUTLINES)}; found '{outline}'.")
        self.outline = outline
        self.draft = draft

    @property
    def draft_side(self) -> int:
        """Least side in pixels that a JPEG is decoded at by whoever opens its file.

        libjpeg leaves out high frequencies and decodes at a half, a quarter or an eighth of the
        size (its draft mode). Twice the side that the transform resizes to is always left. 0 where
        files are decoded in full: without `draft`, and where the transform resizes to no fixed
        size.
        """
        images = self.image_processor
        if not self.draft or not getattr(images, "do_resize", False):
            return 0
        size = {} if getattr(images, "max_num_patches", None) else dict(images.size or {})
        sides = [size.get(name) or 0 for name in ("shortest_edge", "height", "width")]
        return DRAFT_MARGIN * int(max(sides))

    def to_dict(self) -> dict[str, Any]:
        """Settings as they are saved; `draft` only where it is on."""
        fields: dict[str, Any] = super().to_dict()
        if not self.draft:
            fields.pop("draft", None)
        return fields

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts, or both.

        Args:
            images: One image or a list (PIL, array, tensor). The outline of a picture is its alpha
                channel (PIL, or uint8 arrays of 4 channels).
            text: One text or a list; padded and cut as the backbone was trained.
            **kwargs: `return_tensors`, `padding`, `truncation` and what the parts take.

        Returns:
            `pixel_values` and/or `input_ids`, `attention_mask`. Where the model pools inside of the
            outline, `pixel_values` has a fourth channel: the part of each pixel that lies inside;
            of a picture without an outline all does, and the log says so once.
        """
        if text is not None:
            kwargs.setdefault("truncation", True)
            kwargs.setdefault("max_length", self.max_length)
            if self.pad_to_max:
                kwargs["padding"] = "max_length"
            else:
                kwargs.setdefault("padding", True)
        if images is None:
            texts: BatchFeature = super().__call__(images=None, text=text, **kwargs)
            return texts
        if self.outline == "ignore":
            return self._prepare(_hide_alpha(images), text, kwargs)
        pictures, masks = self._take_apart(images)
        prepared = self._prepare(pictures, text, dict(kwargs))
        if pools(self.outline):
            kind = kwargs.get("return_tensors")
            inside = self._prepare(masks, None, kwargs | {"do_normalize": False})["pixel_values"]
            pixels = torch.stack([torch.as_tensor(image) for image in prepared["pixel_values"]])
            part = torch.stack([torch.as_tensor(mask)[:1] for mask in inside]).to(pixels.dtype)
            part = part / 255 if part.max() > 1.5 else part  # a transform that does not rescale
            prepared["pixel_values"] = torch.cat([pixels, part.clamp(0, 1)], dim=1)
            converted: BatchFeature = prepared.convert_to_tensors(kind)
            return converted
        return prepared

    def _prepare(self, images: Any, text: Any, kwargs: dict[str, Any]) -> BatchFeature:
        """Transform images as the backbone's processor does, but for the place of the crop."""
        crop = self._crop_size(kwargs)
        if crop is None:
            prepared: BatchFeature = super().__call__(images=images, text=text, **kwargs)
            return prepared
        kind = kwargs.pop("return_tensors", None)
        prepared = super().__call__(images=images, text=text, **kwargs | {"do_center_crop": False})
        cropped = [center_crop(torch.as_tensor(image), *crop) for image in prepared["pixel_values"]]
        prepared["pixel_values"] = torch.stack(cropped)
        converted: BatchFeature = prepared.convert_to_tensors(kind)
        return converted

    def _take_apart(self, images: Any) -> tuple[list[Any], list[Any]]:
        """What the model sees of each picture, and where its inside lies, as RGB pictures."""
        rows = list(images) if isinstance(images, list | tuple) else [images]
        pictures, masks, without = [], [], 0
        for row in map(_to_picture, rows):
            picture, mask = take_apart(row, self.outline)
            if mask is None:
                without += 1
                mask = picture.convert("L").point([255] * 256)
            pictures.append(picture)
            masks.append(mask.convert("RGB"))
        if without:
            logger.warning_once(
                f"This model was adapted to outlined pictures (outline '{self.outline}') and got "
                "some without an outline, of which it takes the whole: give RGBA pictures whose "
                "alpha channel is the outline (255 inside, 0 outside)."
            )
        return pictures, masks

    def _crop_size(self, kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Crop height and width, where the transform first makes the shorter side long enough."""
        images = self.image_processor
        if not self.torchvision_crop or not kwargs.get(
            "do_center_crop", getattr(images, "do_center_crop", False)
        ):
            return None
        size, crop = kwargs.get("size", images.size), kwargs.get("crop_size", images.crop_size)
        height, width = int(crop["height"]), int(crop["width"])
        resizes = kwargs.get("do_resize", images.do_resize) and size.get("shortest_edge")
        return (height, width) if resizes and resizes >= max(height, width) else None

    def encode_prompts(self, prompts: list[list[str]]) -> dict[str, torch.Tensor]:
        """Tokenise the prompts of every class, with the learned context tokens if there are any.

        The learned tokens stand right after the start token, if the tokenizer sets
        one (CoOp: the class name and the rest follow).

        Args:
            prompts: Per class, its texts.

        Returns:
            `input_ids` and `attention_mask` `[prompts, length]`, `class_index` `[prompts]`.
        """
        flat = [text for texts in prompts for text in texts]
        index = [k for k, texts in enumerate(prompts) for _ in texts]
        context = self.context_token_ids
        if context is None:
            encoded = self(text=flat, return_tensors="pt")
            mask = encoded.get("attention_mask", torch.ones_like(encoded["input_ids"]))
            return {
                "input_ids": encoded["input_ids"],
                "attention_mask": mask,
                "class_index": torch.tensor(index),
            }
        per_class = context if isinstance(context[0], list) else [context] * len(prompts)
        room = self.max_length - len(per_class[0])
        rows = self.tokenizer(flat, truncation=True, max_length=room)["input_ids"]
        starts = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id}
        begin = int(rows[0][0] in starts)  # SigLIP's texts have no start token
        ids = [[*r[:begin], *per_class[k], *r[begin:]] for r, k in zip(rows, index, strict=True)]
        length = self.max_length if self.pad_to_max else max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        return {
            "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in ids]),
            "class_index": torch.tensor(index),
        }


def center_crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Centre crop with torchvision's rounding.

    Where the margin is odd, torchvision rounds half of it to an even number and transformers rounds
    it down, so that the crops of transformers may lie one pixel off.

    Args:
        image: `[channels, rows, columns]`, at least as large as the crop.
        height: Rows of the crop.
        width: Columns of the crop.
    """
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]


def _to_picture(image: Any) -> Any:
    """A Pillow image of a picture; the fourth channel of an array or tensor becomes its alpha."""
    if hasattr(image, "getchannel"):
        return image
    values = image if isinstance(image, torch.Tensor) else torch.tensor(image)
    if values.dim() == 3 and values.shape[0] in (3, 4) and values.shape[-1] not in (3, 4):
        values = values.permute(1, 2, 0)
    if values.dim() != 3 or values.dtype != torch.uint8 or values.shape[-1] not in (3, 4):
        raise ValueError(
            "A model that was adapted to outlined pictures takes Pillow images, or uint8 arrays of "
            f"3 or 4 channels; found {values.dtype} of shape {tuple(values.shape)}."
        )
    picture = to_pil_image(values[..., :3].numpy(), input_data_format="channels_last")
    if values.shape[-1] == 4:
        picture.putalpha(to_pil_image(values[..., 3:].numpy(), input_data_format="channels_last"))
    return picture


def _hide_alpha(images: Any) -> Any:
    """Pictures as they are, but whole where the alpha channel is an outline."""
    if isinstance(images, list | tuple):
        return [_hide_alpha(image) for image in images]
    return images.convert("RGB") if KEY in getattr(images, "info", ()) else images
