"""Pipelines for models that were adapted to outlined pictures: the alpha channel is the outline.

The pipelines of transformers turn every picture into RGB, so that its outline would be lost.
"""

import base64
import os
from io import BytesIO
from typing import Any
from urllib.request import urlopen

from transformers import ImageClassificationPipeline, ZeroShotImageClassificationPipeline

try:
    from PIL import Image, ImageOps
except ImportError:  # transformers says so when a pipeline is made
    Image = ImageOps = None  # type: ignore[assignment]


class _Outlined:
    """Parts of a pipeline: the whole processor, which knows what the model sees of an outline."""

    _load_processor: Any = True
    _load_image_processor: Any = False  # the processor has both
    _load_tokenizer: Any = False
    processor: Any

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save model and processor."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        self.processor.save_pretrained(save_directory)


class GloVLMImageClassificationPipeline(_Outlined, ImageClassificationPipeline):
    """Image classification that keeps outlines; otherwise as transformers' own.

    An image is a Pillow image, a path, an address or base64; its alpha channel is the outline, 255
    inside and 0 outside. Of one without an outline the model takes the whole, and the log says so.
    """

    def preprocess(  # type: ignore[override]
        self, image: Any, timeout: float | None = None
    ) -> Any:
        """Prepare an image, or an array, with its outline."""
        inputs = self.processor(images=load_outlined(image, timeout), return_tensors="pt")
        return inputs.to(self.dtype)


class GloVLMZeroShotImageClassificationPipeline(_Outlined, ZeroShotImageClassificationPipeline):
    """Zero-shot image classification that keeps outlines; otherwise as transformers' own."""

    def preprocess(  # type: ignore[override]
        self, image: Any, *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> Any:
        """Prepare an image with its outline, and the texts."""
        picture = load_outlined(image, timeout)
        inputs = super().preprocess(picture.convert("RGB"), *args, **kwargs)
        outlined = self.processor(images=picture, return_tensors="pt")
        inputs.update(outlined.to(self.dtype))
        return inputs


def load_outlined(source: Any, timeout: float | None = None) -> Any:
    """Load a picture with its alpha channel; else as `transformers.image_utils.load_image`.

    Args:
        source: A Pillow image, a path, an http(s) address, base64 or a `data:image/` address;
            what is no picture yet (an array) is returned as it is.
        timeout: Seconds that an address may take.

    Raises:
        ValueError: A text is none of these.
    """
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            with urlopen(source, timeout=timeout) as reply:
                source = Image.open(BytesIO(reply.read()))
        elif os.path.isfile(source):
            source = Image.open(source)
        else:
            source = _decode(source)
    return ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else source


def _decode(text: str) -> Any:
    """Picture of base64."""
    content = text.split(",", 1)[-1] if text.startswith("data:image/") else text
    try:
        return Image.open(BytesIO(base64.b64decode(content)))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"Expected an image, a path, an http(s) address or base64, found '{text[:200]}'."
        ) from error
