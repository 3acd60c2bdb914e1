"""Heat maps as pictures: overlays, figures with their scores, and a folder of both."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..data.folder import ImageValue, open_image
from ..data.listing import SUFFIXES
from ..data.outlines import open_outlined
from ..errors import GloVLMError, nearest
from ..files import check_target, read_json, replacing, write_json
from ..progress import counted
from ..rendering import figure_text
from .maps import HEAT_MAPS, HeatMap, explain

# Even steps of brightness, and the same to people who confuse red and green.
COLORMAP = "cividis"
DISCLAIMER = "Research use only, not for diagnosis."
SOFTWARE = "hf-glovlm heat map"  # by which a figure of ours is known
LINE = 110  # characters that fit below a figure
PALE = 0.6  # how far what lies outside of an outline goes to white
_WHERE = {
    "given": "the given mask",
    "outline": "its outline",
    "centre": "the circle in the middle, which is all that the model sees",
    "central ellipse": "a central ellipse that stands in for a mask, since none was given",
}


def show_outline(image: ImageValue) -> Image.Image:
    """Picture of an outlined image for a person: the whole of it, paler outside of the outline.

    Args:
        image: As `open_image` takes it.

    Returns:
        RGB, as large as the image; without an outline the image as it is.

    Raises:
        GloVLMError: The image cannot be read, or its outline encloses nothing.
    """
    outlined = open_outlined(image)
    if outlined.mode != "RGBA":
        return open_image(image)
    picture, inside = outlined.convert("RGB"), outlined.getchannel("A")
    pale = Image.blend(picture, Image.new("RGB", picture.size, "white"), PALE)
    return Image.composite(picture, pale, inside)


def overlay(
    image: ImageValue, heat: HeatMap, *, opacity: float = 0.5, colormap: str = COLORMAP
) -> Image.Image:
    """Overlay of a heat map on its image.

    Args:
        image: The image that the map is of.
        heat: The map; its lowest value takes the first colour, its highest the last.
        opacity: 0 leaves the image, 1 hides it. What the model did not see stays as it is.
        colormap: A colour map of matplotlib; `cividis` (the default), `viridis` and `gray` are
            read alike with and without colour blindness.

    Returns:
        RGB, as large as the image.

    Raises:
        GloVLMError: The map is of another image, or opacity or colour map are none.
    """
    from matplotlib import colormaps

    picture = open_outlined(image).convert("RGB") if heat.mask == "outline" else open_image(image)
    if picture.size != heat.view.size:
        raise GloVLMError(
            f"Expected the image of this heat map, {heat.view.size[0]} x {heat.view.size[1]} "
            f"pixels, found {picture.width} x {picture.height}."
        )
    if not 0 <= opacity <= 1:
        raise GloVLMError(f"Expected an opacity of 0 to 1, found {opacity:g}.")
    if colormap not in colormaps:
        raise GloVLMError(
            f"Unknown colour map '{colormap}': cividis, viridis and magma read well."
            f"{nearest(colormap, colormaps)}"
        )
    values = heat.on_image()
    low, high = float(heat.values.min()), float(heat.values.max())
    span = high - low if high > low else 1.0
    seen = np.isfinite(values)
    place = np.where(seen, (values - low) / span, 0).clip(0, 1)
    colours: NDArray[np.float64] = colormaps[colormap](place)[..., :3] * 255
    weight = (opacity * seen)[..., None]
    mixed = np.asarray(picture) * (1 - weight) + colours * weight
    return Image.fromarray(mixed.round().astype(np.uint8))


def save_figure(
    path: str | Path,
    image: ImageValue,
    heat: HeatMap,
    *,
    opacity: float = 0.5,
    colormap: str = COLORMAP,
    title: str = "",
) -> Path:
    """Write a figure: the image, the overlay with its legend, the scores, and what it is not for.

    Args:
        path: Where to write; the file appears whole or not at all.
        image: The image that the map is of.
        heat: The map.
        opacity: See `overlay`.
        colormap: See `overlay`.
        title: What stands above; by default the class and its score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    path = Path(path)
    low, high = float(heat.values.min()), float(heat.values.max())
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    shown = figure_text(title or f"{heat.target}: {heat.score:.2f}")
    figure.suptitle(shown, parse_math=False)
    left, right = figure.subplots(1, 2)
    left.imshow(show_outline(image))
    left.set_title("image", fontsize=9)
    right.imshow(overlay(image, heat, opacity=opacity, colormap=colormap))
    right.set_title(HEAT_MAPS[heat.method].title, fontsize=9)
    for axis in (left, right):
        axis.set_axis_off()
    scale = ScalarMappable(Normalize(low, high if high > low else low + 1), colormap)
    figure.colorbar(scale, ax=right, shrink=0.7).set_label(heat.legend, parse_math=False)
    lines = (fill(sentence, LINE) for sentence in describe_scores(heat))
    figure.supxlabel("\n".join(lines), fontsize=8, parse_math=False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120, format="png", metadata={"Software": SOFTWARE})
    return path


def describe_scores(heat: HeatMap) -> list[str]:
    """The lines that stand below every map."""
    where = _WHERE[heat.mask]
    return [
        f"Probability of {heat.target}: {heat.score:.2f}; with the glomerulus blanked "
        f"{heat.glomerulus_blanked[heat.index]:.2f}; with the context blanked "
        f"{heat.context_blanked[heat.index]:.2f} (glomerulus: {where}).",
        *(
            ["The model learned from synthetic images, not from patients."]
            if heat.synthetic
            else []
        ),
        DISCLAIMER,
    ]


def explain_files(
    model: Any,
    processor: Any,
    images: Sequence[str | Path],
    output_dir: str | Path,
    *,
    method: str = "gradient",
    target: str | int | None = None,
    text: str | None = None,
    masks: Sequence[ArrayLike | None] | None = None,
    window: int = 1,
    opacity: float = 0.5,
    colormap: str = COLORMAP,
) -> list[dict[str, Any]]:
    """Explain image files into a folder.

    Args:
        model: The classifier.
        processor: Its processor.
        images: Files.
        output_dir: Takes `STEM.METHOD.png` an image, and `METHOD.json` with all scores (names of
            files, but not of folders). A map that was drawn before is drawn again. It must not be
            the images' own folder, whose readers would take figures for data.
        method: See `explain`.
        target: See `explain`.
        text: See `explain`.
        masks: One an image, or `None` where there is none.
        window: See `explain`.
        opacity: See `overlay`.
        colormap: See `overlay`.

    Returns:
        Per image what the JSON file holds.

    Raises:
        GloVLMError: What `explain` raises; images and masks differ in number; the folder holds the
            images, or files of others where figures would be written.
    """
    folder = Path(output_dir)
    given = [None] * len(images) if masks is None else list(masks)
    if len(given) != len(images):
        raise GloVLMError(f"Expected {len(images)} masks, one an image, found {len(given)}.")
    taken: set[str] = set()
    names = [f"{_free_name(Path(path).stem, taken)}.{method}.png" for path in images]
    _check_folder(folder, [*names, f"{method}.json"], images)
    rows = []
    pieces = zip(images, given, names, strict=True)
    for path, mask, name in counted(pieces, "images", total=len(images)):
        picture = Path(path)
        heat = explain(
            model,
            processor,
            picture,
            method=method,
            target=target,
            text=text,
            mask=mask,
            window=window,
        )
        figure = save_figure(folder / name, picture, heat, opacity=opacity, colormap=colormap)
        rows.append({"file_name": Path(path).name, "figure": figure.name, **heat.describe()})
    about = {
        "method": HEAT_MAPS[method].title,
        "unit": HEAT_MAPS[method].unit,
        "citation": HEAT_MAPS[method].citation,
        "note": DISCLAIMER,
        "images": rows,
    }
    write_json(folder / f"{method}.json", about, indent=2, ensure_ascii=False)
    return rows


def _check_folder(folder: Path, names: Sequence[str], images: Sequence[str | Path]) -> None:
    """Refuse the images' own folder, and files of others where ours would be written."""
    here = folder.resolve()
    parents = [Path(image).resolve().parents for image in images]
    data = any(here == above[0] for above in parents if above)
    if any(here in above for above in parents):  # perhaps a table and classes: a data set
        files = [(here / "metadata.csv").exists(), *map(_holds_images, here.iterdir())]
        data = data or sum(files) > 1
    if data:
        raise GloVLMError(
            f"'{folder}' holds the images, whose readers would take figures for data: give another "
            "--output-dir."
        )
    for name in names:
        check_target(folder / name, "a heat map", _is_ours, images)


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def _is_ours(path: Path) -> bool:
    """Whether a file is a figure, or the scores of some, that an earlier command wrote."""
    if path.suffix == ".json":
        return "citation" in read_json(path)
    with Image.open(path) as image:
        return bool(image.info.get("Software") == SOFTWARE)


def load_masks(folder: str | Path, images: Sequence[str | Path]) -> list[NDArray[np.bool_]]:
    """Read the masks of images: files of the same name, but PNG, in a folder of their own.

    Args:
        folder: Where the masks lie, in the folders that the images lie in below theirs, or all
            together; white is inside.
        images: Names of files, relative to their data's folder.

    Raises:
        GloVLMError: A mask is missing or cannot be read.
    """
    masks = []
    for image in map(Path, images):
        places = [Path(folder) / f"{image.stem}.png"]
        if not image.is_absolute():
            places.insert(0, Path(folder) / image.with_suffix(".png"))
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise GloVLMError(
                f"{folder} holds no mask for {image.name}: expected {places[0].name}, white where "
                "the glomerulus is."
            )
        masks.append(np.asarray(open_image(path)).max(-1) > 127)
    return masks


def _free_name(stem: str, taken: set[str]) -> str:
    name, more = stem, 1
    while name in taken:
        more += 1
        name = f"{stem}-{more}"
    taken.add(name)
    return name
