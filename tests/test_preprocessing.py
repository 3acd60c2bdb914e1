"""The image transforms against the pipelines that the towers were trained with, written plainly.

Every family resizes and crops as its reference does, to the pixel, and differs by at most 2 of 255
levels: the reference resizes with Pillow, transformers with torch. What was published for open_clip
or timm is cropped as torchvision does it; what was published for transformers, as transformers does
it, which is one pixel off where half of the margin is not whole.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from PIL import Image
from tiny import tiny_bert, tiny_clip, tiny_dinov2
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    CLIPImageProcessor,
    SiglipImageProcessor,
)

from hf_glovlm.backbones import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_backbone,
)
from hf_glovlm.data import open_image
from hf_glovlm.model import GloVLMProcessor
from hf_glovlm.model.processing_glovlm import center_crop

BICUBIC = InterpolationMode.BICUBIC
LEVELS = 2.001  # float32 holds two levels only so well
Stats = tuple[tuple[float, ...], tuple[float, ...]]
CLIP, IMAGENET, SIGLIP = (CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD), (HALF, HALF)


class FloorCrop:
    """A centre crop that rounds half of the margin down."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, top = (picture.width - self.size) // 2, (picture.height - self.size) // 2
        return picture.crop((left, top, left + self.size, top + self.size))


def crop_pipeline(resize: int, crop: int, stats: Stats, centre: Any = CenterCrop) -> Compose:
    """Make the shorter side so long, and cut out the middle."""
    steps = [Resize(resize, interpolation=BICUBIC), centre(crop), ToTensor(), Normalize(*stats)]
    return Compose(steps)


def squash_pipeline(size: int, stats: Stats) -> Compose:
    """SigLIP's: both sides to the input size, whatever the picture's shape."""
    return Compose([Resize((size, size), interpolation=BICUBIC), ToTensor(), Normalize(*stats)])


def _wrap(images: Any) -> Callable[[Path], GloVLMProcessor]:
    """The transform that a native checkpoint of a family ships, under our processor."""
    return lambda folder: GloVLMProcessor(images, AutoTokenizer.from_pretrained(tiny_clip()))


def _dinov2() -> Any:
    return BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    )


def _converted(layout: str, size: int) -> Callable[[Path], GloVLMProcessor]:
    """The transform that a conversion writes."""

    def load(folder: Path) -> GloVLMProcessor:
        place = getattr(published, layout)(folder / layout, size)
        text = f"+{tiny_bert()}" if layout in ("uni", "virchow2") else ""
        processor: GloVLMProcessor = load_backbone(f"{place}{text}")[1]
        return processor

    return load


SIGLIP_IMAGES = SiglipImageProcessor(image_mean=list(HALF), image_std=list(HALF), resample=3)
FAMILIES: dict[str, tuple[Callable[[Path], GloVLMProcessor], Compose, Stats]] = {
    "clip": (_wrap(CLIPImageProcessor()), crop_pipeline(224, 224, CLIP, FloorCrop), CLIP),
    "siglip": (_wrap(SIGLIP_IMAGES), squash_pipeline(224, SIGLIP), SIGLIP),
    "dinov2": (_wrap(_dinov2()), crop_pipeline(256, 224, IMAGENET, FloorCrop), IMAGENET),
    "open_clip": (_converted("quiltnet", 224), crop_pipeline(224, 224, CLIP), CLIP),
    "biomedclip": (_converted("biomedclip", 224), crop_pipeline(224, 224, CLIP), CLIP),
    "conch": (_converted("conch", 448), crop_pipeline(448, 448, CLIP), CLIP),
    "keep": (_converted("keep", 224), crop_pipeline(224, 224, IMAGENET), IMAGENET),
    "uni": (_converted("uni", 224), crop_pipeline(224, 224, IMAGENET), IMAGENET),
    "virchow2": (_converted("virchow2", 224), crop_pipeline(224, 224, IMAGENET), IMAGENET),
}


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, GloVLMProcessor]]:
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOVLM_CACHE", str(folder / "cache"))
        yield {name: load(folder) for name, (load, _, _) in FAMILIES.items()}


def pattern(width: int, height: int) -> Image.Image:
    """A gradient in every channel, waves of several lengths, and a disc with a hard edge."""
    y, x = np.mgrid[:height, :width]
    waves = 40 * np.sin(2 * np.pi * x / 23) * np.cos(2 * np.pi * y / 31)
    channels = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    pixels = np.stack(channels, -1) * 0.6 + 60 + waves[..., None]
    disc = np.hypot(x - width / 2.3, y - height / 1.8) < min(width, height) / 4
    pixels[disc] = pixels[disc] * 0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def levels(processor: GloVLMProcessor, name: str, pictures: list[Image.Image]) -> float:
    """Largest difference from the reference, in levels of 255."""
    _, reference, (_, std) = FAMILIES[name]
    actual = processor(images=pictures, return_tensors="pt")["pixel_values"]
    expected = torch.stack([reference(picture) for picture in pictures])
    assert actual.shape == expected.shape
    scale = 255 * torch.tensor(std).view(3, 1, 1)
    return float(((actual - expected) * scale).abs().max())


# Landscape, portrait, smaller and larger than the input; margins of every remainder by 4.
SIZES = [(300, 451), (451, 300), (225, 224), (223, 226), (260, 263), (97, 64), (1024, 700)]


@pytest.mark.parametrize("name", FAMILIES)
def test_synthetic_images(name: str, processors: dict[str, GloVLMProcessor]) -> None:
    pictures = [pattern(*size) for size in SIZES]
    assert levels(processors[name], name, pictures) <= LEVELS


@pytest.mark.parametrize("name", FAMILIES)
def test_real_images(name: str, shared: Path, processors: dict[str, GloVLMProcessor]) -> None:
    sets = ("glomeruli_rois", "glomeruli_sclerosis", "breakhis_400x_mini", "lc25000_dedup")
    files = [
        sorted(path for path in (shared / "data" / s).rglob("*") if path.suffix in suffixes)[
            :: 7**3
        ]
        for s in sets
        for suffixes in [{".png", ".jpg", ".jpeg", ".tif"}]
    ]
    pictures = [open_image(path) for some in files for path in some[:3]]
    if not pictures:
        pytest.skip("the folder with real data holds no images")
    assert levels(processors[name], name, pictures) <= LEVELS


def test_the_measure_sees_a_shift_by_one_pixel(processors: dict[str, GloVLMProcessor]) -> None:
    """Else the tests above could not fail."""
    picture = pattern(300, 227)
    shifted = picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 0))
    _, reference, (_, std) = FAMILIES["open_clip"]
    actual = processors["open_clip"](images=[shifted], return_tensors="pt")["pixel_values"][0]
    scale = 255 * torch.tensor(std).view(3, 1, 1)
    assert float(((actual - reference(picture)) * scale).abs().max()) > 10 * LEVELS


@pytest.mark.parametrize("margin", range(9))
def test_the_crop_lies_where_torchvision_puts_it(margin: int) -> None:
    image = torch.arange(3 * (20 + margin) * (25 + margin)).view(3, 20 + margin, 25 + margin)
    assert center_crop(image, 20, 25).equal(CenterCrop((20, 25))(image))


def test_a_transform_that_only_crops_is_left_alone() -> None:
    """Where nothing makes the picture large enough, transformers pads it."""
    images = CLIPImageProcessor(do_resize=False, crop_size={"height": 40, "width": 40})
    processor = GloVLMProcessor(images, AutoTokenizer.from_pretrained(tiny_clip()))
    picture = pattern(33, 52)
    actual = processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert actual.equal(images([picture], return_tensors="pt")["pixel_values"])


def test_arguments_of_a_call_win() -> None:
    processor = load_backbone(str(tiny_clip()))[1]
    processor.torchvision_crop = True
    picture = pattern(60, 41)
    whole = processor(images=[picture], return_tensors="pt", do_center_crop=False)
    assert whole["pixel_values"].shape == (1, 3, 32, 46)
    small = processor(images=[picture], return_tensors="np", crop_size={"height": 8, "width": 9})
    assert small["pixel_values"].shape == (1, 3, 8, 9)


def test_a_timm_margin_is_resized_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`crop_pct` of timm: the shorter side becomes larger than the crop, rounded down."""
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    folder = published.uni(tmp_path / "uni", 224)
    about = (folder / "config.json").read_text().replace('"crop_pct": 1.0', '"crop_pct": 0.9')
    (folder / "config.json").write_text(about)
    processor = load_backbone(f"{folder}+{tiny_bert()}")[1]
    picture = pattern(301, 400)
    actual = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    difference = (actual - crop_pipeline(248, 224, IMAGENET)(picture)).abs().amax((1, 2))
    assert float((difference * torch.tensor(IMAGENET_STD) * 255).max()) <= LEVELS


@pytest.mark.parametrize("name", ["open_clip", "uni"])
def test_the_plain_references_are_the_libraries_own(name: str) -> None:
    """open_clip's and timm's own functions make the same pipeline, where they are installed."""
    picture = pattern(300, 451)
    if name == "uni":
        data = pytest.importorskip("timm.data")
        made = data.create_transform(
            input_size=(3, 224, 224),
            interpolation="bicubic",
            crop_pct=1.0,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
    else:
        transform = pytest.importorskip("open_clip.transform")
        made = transform.image_transform_v2(transform.PreprocessCfg(), is_train=False)
    assert torch.equal(made(picture), FAMILIES[name][1](picture))


def test_dinov2_files_have_the_tested_settings() -> None:
    """The published preprocessor_config.json is that of a BitImageProcessor."""
    assert '"BitImageProcessor"' in (tiny_dinov2() / "preprocessor_config.json").read_text()
