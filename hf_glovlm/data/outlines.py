"""Outlined images: what an image's alpha channel, or a mask beside it, goes around.

An outlined image is a Pillow image of mode RGBA whose colours are the whole picture and whose alpha
channel is 255 inside of the outline. A file may hold it (a PNG with the text `outline`, as
`glovlm data crops` writes it), or a mask of the same size lies beside the picture.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import GloVLMError, nearest
from .columns import LOOK, MASK, OUTLINE
from .folder import ImageValue, column, decode_image, image_name, in_threads, open_decoded

if TYPE_CHECKING:
    from datasets import Dataset

STRUCTURES = ("capsule", "tuft")  # what an outline may go around
UNSTATED = "unstated"
UNSEEN = "unseen"  # of an outline that is bad, which is an error only where it is asked for
_GREY = ("1", "L", "I;16", "I", "F")
_LOSSY = ("JPEG", "WEBP", "JPEG2000")  # whose black is not quite black


def open_outlined(value: ImageValue, mask: ImageValue | None = None) -> Image.Image:
    """Decode an image with its outline, if it has one.

    Args:
        value: As `open_image` takes it.
        mask: Picture of its outline, of the same size: nonzero inside (in a lossy format above
            127). It counts in place of an alpha channel.

    Returns:
        Pillow image of mode RGBA, 255 inside and 0 outside, with `outline` in its `info`
        (`capsule`, `tuft` or `unstated`); of mode RGB without an outline, which an alpha channel
        that hides nothing is not.

    Raises:
        GloVLMError: As `open_image`; the mask has another size; nothing is inside.
    """
    return _open_outline(decode_image(value), image_name(value), mask)


def _open_outline(image: Image.Image, name: str, mask: ImageValue | None) -> Image.Image:
    """What `open_outlined` makes of an image that was decoded."""
    stated = _known(image)
    if mask is not None:
        picture = open_decoded(image, name)
        inside = _read_mask(mask)
        if inside.shape != (picture.height, picture.width):
            raise GloVLMError(
                f"The mask {image_name(mask)} has {inside.shape[1]} x {inside.shape[0]} pixels, "
                f"and its image {name} {picture.width} x {picture.height}: cut both "
                "alike."
            )
        where = image_name(mask)
    elif image.has_transparency_data:
        alpha = image.convert("RGBA")
        picture, inside = alpha.convert("RGB"), np.asarray(alpha.getchannel("A")) > 127
        where = name
    else:
        return open_decoded(image, name)
    if not inside.any():
        raise GloVLMError(
            f"The outline of {where} encloses nothing: every pixel lies outside. Outline the "
            "glomerulus, or leave its mask out."
        )
    if inside.all():
        return picture
    return outlined(picture, inside, stated)


def outlined(picture: Image.Image, inside: Any, structure: str | None = None) -> Image.Image:
    """An outlined image of a picture.

    Args:
        picture: Mode RGB.
        inside: Boolean `[height, width]`.
        structure: What the outline goes around: `capsule`, `tuft`, or not stated.
    """
    image = picture.copy()
    image.putalpha(Image.fromarray(np.asarray(inside, dtype=np.uint8) * np.uint8(255)))
    image.info[OUTLINE] = structure or UNSTATED
    return image


def outlines_of(rows: "Dataset") -> list[str | None]:
    """What the outline of each image goes around, from headers where these tell.

    Args:
        rows: Images, with a column `mask`, `outline`, both or none.

    Returns:
        For each `capsule`, `tuft`, `unstated`, or `None` without an outline.

    Raises:
        GloVLMError: A column or a file states something else.
    """
    looks = column(rows, LOOK) if LOOK in rows.column_names else []
    own_words: list[str | None] = [look["outline"] for look in looks]
    if not looks or UNSEEN in own_words:
        pairs = list(zip(column(rows, "image"), masks_of(rows), strict=True))
        own_words = in_threads(lambda pair: _outline_of(*pair), pairs)
    stated = column(rows, OUTLINE) if OUTLINE in rows.column_names else [None] * len(rows)
    both = zip(own_words, stated, strict=True)
    return [None if own is None else check_structure(written or own) for own, written in both]


def masks_of(rows: "Dataset") -> list[dict[str, Any] | None]:
    """Undecoded mask of each row, `None` where there is none."""
    if MASK not in rows.column_names:
        return [None] * len(rows)
    # The Hub may write an empty one for none.
    return [
        mask if mask and (mask["bytes"] is not None or mask["path"]) else None
        for mask in column(rows, MASK)
    ]


def structure_of(outlines: Sequence[str | None], given: str | None = None) -> str | None:
    """What all outlines go around.

    Args:
        outlines: As `outlines_of` returns them.
        given: What a person states of them.

    Returns:
        `capsule`, `tuft`, or `None` where nothing states it.

    Raises:
        GloVLMError: Some go around the one and some around the other, or the images state another
            structure than the person.
    """
    counts = Counter(one for one in outlines if one not in (None, UNSTATED))
    if len(counts) > 1:
        raise GloVLMError(
            f"{counts['capsule']} outlines go around the capsule and {counts['tuft']} around the "
            "tuft: a model sees other things in each, so outline all alike, or leave the outlines "
            "out (outline ignore)."
        )
    own = next(iter(counts), None)
    if given is not None and own is not None and given != own:
        raise GloVLMError(
            f"The images state that their outlines go around the {own}, and outline_of says "
            f"{given}: correct the one that is wrong."
        )
    return given or own


def check_structure(written: str, place: str = f"the column {OUTLINE}") -> str:
    """What an outline goes around, as written: `capsule`, `tuft` or `unstated`.

    Args:
        written: By a person.
        place: Where it stands, for the sentence.

    Raises:
        GloVLMError: Something else.
    """
    word = str(written).strip().casefold()
    if word in (*STRUCTURES, UNSTATED):
        return word
    raise GloVLMError(
        f"An outline goes around the {' or the '.join(STRUCTURES)}; found '{str(written)[:60]}' in "
        f"{place}: correct it, or leave it empty."
        f"{nearest(word, STRUCTURES)}"
    )


def outline_in(image: Image.Image, name: str, mask: ImageValue | None = None) -> str | None:
    """What the outline of a decoded image goes around, see `outlines_of`.

    Args:
        image: As `decode_image` returns it.
        name: Of its file, for errors.
        mask: See `open_outlined`.

    Returns:
        As `outlines_of`; `UNSEEN` where the alpha channel is no outline that can be used.

    Raises:
        GloVLMError: The mask cannot be used.
    """
    stated = _known(image)
    if mask is not None:
        _open_outline(image, name, mask)
        return stated or UNSTATED
    if stated or not image.has_transparency_data:
        return stated if image.has_transparency_data else None
    try:
        return _open_outline(image, name, None).info.get(OUTLINE)
    except GloVLMError:
        return UNSEEN


def _outline_of(value: ImageValue, mask: Mapping[str, Any] | None) -> str | None:
    """What an image's outline goes around; decoded only where its header does not tell."""
    transparent, stated = _read_header(value)
    if mask is not None:
        return stated or UNSTATED
    if not transparent:
        return None
    return stated or open_outlined(value).info.get(OUTLINE)  # an alpha channel may hide nothing


def _read_header(value: Any) -> tuple[bool, str | None]:
    """Whether an image has an alpha channel, and what its file says that it goes around.

    A file that cannot be read has none here: decoding reports it.
    """
    if isinstance(value, Image.Image):
        return value.has_transparency_data, _known(value)
    content = value["bytes"] if isinstance(value, Mapping) else None
    path = value["path"] if isinstance(value, Mapping) else value
    try:
        with Image.open(io.BytesIO(content) if content is not None else path) as image:
            return image.has_transparency_data, _known(image)
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False, None


def _known(image: Image.Image) -> str | None:
    """What a file says that its alpha channel goes around; `None` where it says nothing known."""
    stated = image.info.get(OUTLINE)
    return stated if stated in (*STRUCTURES, UNSTATED) else None


def _read_mask(value: ImageValue) -> Any:
    """Mask as boolean `[height, width]`."""
    image = decode_image(value)
    lossy = getattr(image, "format", None) in _LOSSY
    pixels = np.asarray(image if image.mode in _GREY else image.convert("RGB"))
    most = pixels.max(-1) if pixels.ndim == 3 else pixels
    return most > 127 if lossy else most > 0
