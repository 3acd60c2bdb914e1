"""Table of known pretrained backbones.

Adding a backbone is adding a row. What its source does not state is written as `not verified`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

NOT_VERIFIED: Literal["not verified"] = "not verified"

Layout = Literal[
    "transformers", "dinov2_with_registers", "open_clip", "biomedclip", "conch", "keep", "timm"
]
Channels = tuple[float, float, float]
CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
HALF: Channels = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Known backbone: one row of the table.

    Args:
        name: Short name for the command line.
        hub_id: Where the weights are; `None` for what ships in the package.
        kind: `dual` (image and text), `vision` or `text` (to be paired with `+`).
        image_size: Input size in pixels; 0 for text.
        mean: Mean of each colour channel that the image transform subtracts; `None` for text.
        std: What it then divides by.
        magnification: Of the pretraining images, in words.
        mpp: Micrometres per input pixel, where pretraining had one scale.
        text_context: Longest text in tokens, special tokens included; 0 for vision.
        pretrained_on: Its pretraining data.
        stains: Of these data; empty where they were no histology in particular.
        datasets: Public cohorts among them, in lower case: results on their images are
            contaminated.
        without: Public cohorts that its source says it left out.
        license: As its page states it.
        non_commercial: Whether the licence forbids commercial use.
        no_derivatives: Whether it forbids sharing what is made from the weights.
        gated: Whether access has to be requested.
        citation: Paper.
        revision: Commit to load; `None` is the newest.
        layout: How its files are published: `transformers`; `dinov2_with_registers`, which is the
            same under code of its own; or what they are converted from once.
        weights: The weights' file, where it has a name of its own.
        vision_pooling: How a pair pools its tokens.
        text_pooling: How a pair pools its tokens.
    """

    name: str
    hub_id: str | None
    kind: Literal["dual", "vision", "text"]
    image_size: int = 0
    mean: Channels | None = None
    std: Channels | None = None
    magnification: str = NOT_VERIFIED
    mpp: float | None = None
    text_context: int = 0
    pretrained_on: str
    stains: tuple[str, ...] | Literal["not verified"] = NOT_VERIFIED
    datasets: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    license: str
    non_commercial: bool = False
    no_derivatives: bool = False
    gated: bool = False
    citation: str
    revision: str | None = None
    layout: Layout = "transformers"
    weights: str | None = None
    vision_pooling: str = "cls_mean"
    text_pooling: str = "mean"

    @property
    def restrictions(self) -> list[str]:
        """Restrictions of the licence, as the model's config holds them."""
        marks = {"non-commercial": self.non_commercial, "no-derivatives": self.no_derivatives}
        return [name for name, forbidden in marks.items() if forbidden]

    @property
    def page(self) -> str | None:
        """Its page on the Hub, also to request access."""
        return None if self.hub_id is None else f"https://huggingface.co/{self.hub_id}"


_CLIP: dict[str, Any] = {
    "kind": "dual", "image_size": 224, "mean": CLIP_MEAN, "std": CLIP_STD, "text_context": 77,
}  # fmt: skip
_OPENAI: dict[str, Any] = {
    **_CLIP, "magnification": "none", "pretrained_on": "400M web pairs", "stains": (),
    "license": "mit", "citation": "Radford et al. 2021, arXiv:2103.00020",
}  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "kind": "dual", "image_size": 224, "mean": HALF, "std": HALF, "text_context": 64,
    "license": "apache-2.0",
}  # fmt: skip
_VISION: dict[str, Any] = {
    "kind": "vision", "image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
}  # fmt: skip
_DINOV2: dict[str, Any] = {
    **_VISION, "magnification": "none", "pretrained_on": "LVD-142M, natural images", "stains": (),
    "license": "apache-2.0", "citation": "Oquab et al. 2023, arXiv:2304.07193",
}  # fmt: skip
_QUILTNET: dict[str, Any] = {
    **_CLIP, "magnification": "frames of teaching videos, mixed",
    "pretrained_on": "Quilt-1M: 1M pairs, most from histopathology videos on YouTube",
    "layout": "open_clip", "weights": "open_clip_pytorch_model.bin",
    "citation": "Ikezogwo et al. 2023, arXiv:2306.11207",
}  # fmt: skip
_BY_NC_ND: dict[str, Any] = {
    "license": "cc-by-nc-nd-4.0", "non_commercial": True, "no_derivatives": True, "gated": True,
}  # fmt: skip
_TEXT: dict[str, Any] = {"kind": "text", "magnification": "none", "stains": ()}

# fmt: off
_ROWS = (
    Backbone(
        name="mini", hub_id=None, kind="dual", image_size=96, mean=CLIP_MEAN, std=CLIP_STD,
        text_context=64, magnification="none", pretrained_on="synthetic images of glomeruli only",
        stains=(), license="apache-2.0", citation="this package",
    ),
    Backbone(name="clip-vit-b-32", hub_id="openai/clip-vit-base-patch32", **_OPENAI),
    Backbone(name="clip-vit-b-16", hub_id="openai/clip-vit-base-patch16", **_OPENAI),
    Backbone(name="clip-vit-l-14", hub_id="openai/clip-vit-large-patch14", **_OPENAI),
    Backbone(
        name="pubmedclip", hub_id="flaviagiammarino/pubmed-clip-vit-base-patch32", **_CLIP,
        magnification="none", pretrained_on="ROCO: radiology figures of PubMed articles", stains=(),
        license="mit", citation="Eslami et al. 2023, Findings of EACL",
    ),
    Backbone(
        name="plip", hub_id="vinid/plip", **_CLIP, license=NOT_VERIFIED,
        pretrained_on="OpenPath: 208k pathology pairs, most from Twitter",
        citation="Huang et al. 2023, Nature Medicine",
    ),
    Backbone(name="quiltnet-b-32", hub_id="wisdomik/QuiltNet-B-32", license="mit", **_QUILTNET),
    Backbone(
        name="quiltnet-b-16", hub_id="wisdomik/QuiltNet-B-16", license=NOT_VERIFIED, **_QUILTNET
    ),
    Backbone(
        name="pathgen-clip", hub_id="jamessyx/PathGen-CLIP", **_CLIP,
        pretrained_on="PathGen-1.6M: patches of TCGA slides with written captions; other pairs too",
        datasets=("tcga",), license=NOT_VERIFIED, gated=True, layout="open_clip",
        weights="pathgenclip.pt", citation="Sun et al. 2024, arXiv:2407.00203",
    ),
    Backbone(
        name="biomedclip", hub_id="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        **_CLIP | {"text_context": 256}, magnification="figures of articles, mixed",
        pretrained_on="PMC-15M: figures of biomedical articles", license="mit",
        layout="biomedclip", weights="open_clip_pytorch_model.bin",
        citation="Zhang et al. 2023, arXiv:2303.00915",
    ),
    Backbone(
        name="conch", hub_id="MahmoodLab/conch",
        **_CLIP | {"image_size": 448, "text_context": 128},
        pretrained_on="1.17M histopathology pairs; no TCGA, PAIP or GTEx by its page",
        without=("tcga", "paip", "gtex"),
        stains=("H&E", "IHC", "special stains"), **_BY_NC_ND,
        layout="conch", weights="pytorch_model.bin",
        citation="Lu et al. 2024, Nature Medicine 30",
    ),
    Backbone(
        name="keep", hub_id="Astaxanthin/KEEP", **_VISION | {"kind": "dual"}, text_context=256,
        pretrained_on="143k semantic groups of public pathology pairs, by a disease graph",
        license="mit", layout="keep", citation="Zhou et al. 2024, arXiv:2412.13126",
    ),
    Backbone(
        name="siglip-b-16", hub_id="google/siglip-base-patch16-224", **_SIGLIP,
        magnification="none", pretrained_on="WebLI", stains=(),
        citation="Zhai et al. 2023, arXiv:2303.15343",
    ),
    Backbone(
        name="siglip2-b-16", hub_id="google/siglip2-base-patch16-224", **_SIGLIP,
        magnification="none", pretrained_on="WebLI", stains=(),
        citation="Tschannen et al. 2025, arXiv:2502.14786",
    ),
    Backbone(
        name="medsiglip", hub_id="google/medsiglip-448", gated=True,
        **_SIGLIP | {"image_size": 448, "license": "health-ai-developer-foundations"},
        pretrained_on="radiology, skin, eye and histopathology images with reports; natural pairs",
        citation="Sellergren et al. 2025, arXiv:2507.05201",
    ),
    Backbone(
        name="uni", hub_id="MahmoodLab/UNI", **_VISION, **_BY_NC_ND, magnification="20x", mpp=0.5,
        pretrained_on="Mass-100K: 100M patches of 100k slides; GTEx among them, no TCGA",
        stains=("H&E",), datasets=("gtex",), without=("tcga",),
        layout="timm", weights="pytorch_model.bin",
        vision_pooling="cls", citation="Chen et al. 2024, Nature Medicine 30",
    ),
    Backbone(
        name="phikon-v2", hub_id="owkin/phikon-v2", **_VISION, magnification="20x", mpp=0.5,
        pretrained_on="PANCAN-XL: 460M tiles of public slides, TCGA, CPTAC and GTEx among them",
        stains=("H&E", "IHC"), datasets=("tcga", "cptac", "gtex"),
        license="owkin non-commercial", non_commercial=True, vision_pooling="cls",
        citation="Filiot et al. 2024, arXiv:2409.09173",
    ),
    Backbone(
        name="virchow2", hub_id="paige-ai/Virchow2", **_VISION, **_BY_NC_ND,
        magnification="5x, 10x, 20x and 40x", stains=("H&E", "IHC"),
        pretrained_on="2B tiles of 3.1M slides of one cancer centre and its consultations",
        layout="timm", citation="Zimmermann et al. 2024, arXiv:2408.00738",
    ),
    Backbone(
        name="hibou-b", hub_id="histai/hibou-b",
        **_VISION | {"mean": (0.7068, 0.5755, 0.722), "std": (0.195, 0.2316, 0.1816)},
        pretrained_on="1.2B patches of 1.1M slides", license="apache-2.0", vision_pooling="cls",
        layout="dinov2_with_registers",
        stains=("H&E", "IHC", "special stains", "cytology"),
        citation="Nechaev et al. 2024, arXiv:2406.05074",
    ),
    Backbone(name="dinov2-small", hub_id="facebook/dinov2-small", **_DINOV2),
    Backbone(name="dinov2-base", hub_id="facebook/dinov2-base", **_DINOV2),
    Backbone(
        name="pubmedbert", hub_id="microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext",
        **_TEXT, text_context=512, pretrained_on="PubMed abstracts and full texts", license="mit",
        text_pooling="cls", citation="Gu et al. 2021, ACM HEALTH",
    ),
    Backbone(
        name="bioclinicalbert", hub_id="emilyalsentzer/Bio_ClinicalBERT", **_TEXT, text_context=512,
        pretrained_on="PubMed, then the notes of MIMIC-III", license="mit",
        citation="Alsentzer et al. 2019, arXiv:1904.03323",
    ),
    Backbone(
        name="minilm", hub_id="sentence-transformers/all-MiniLM-L6-v2", **_TEXT, text_context=256,
        pretrained_on="1B sentence pairs", license="apache-2.0",
        citation="Reimers and Gurevych 2019, EMNLP",
    ),
)
# fmt: on
BACKBONES: dict[str, Backbone] = {row.name: row for row in _ROWS}


def known_rows(name: str | None) -> list[Backbone]:
    """Table rows of a backbone by its name in a config, `vision+text` or one; none if unknown.

    Args:
        name: `config.backbone_name`.
    """
    parts = (name or "").split("+")
    return [row for row in _ROWS if row.name in parts or row.hub_id in parts]


def pretraining_notes(
    row: Backbone,
    stain: str | None = None,
    data: str | None = None,
    mpp: float | None = None,
    cohorts: Collection[str] = (),
) -> list[str]:
    """Notes on how a task relates to a backbone's pretraining data.

    Args:
        row: The backbone.
        stain: Canonical name of the task's stain (`H&E`, `PAS`, ...).
        data: Name of the task's data.
        mpp: Micrometres per input pixel of the task.
        cohorts: That the task's images come from, in lower case.

    Returns:
        Sentences for the results; none where nothing is known.
    """
    notes = []
    special = stain not in ("H&E", "IHC") and "special stains" in row.stains
    if stain is not None and row.kind != "text" and row.stains != NOT_VERIFIED:
        if not row.stains:
            notes.append(
                f"{row.name} was pretrained on no histology in particular ({row.pretrained_on}): "
                f"{stain} lies outside of it."
            )
        elif stain not in row.stains and not special:
            notes.append(
                f"{row.name} was pretrained on {' and '.join(row.stains)}: {stain} lies outside of "
                "it."
            )
    for known in row.datasets:
        if known in cohorts or (data is not None and known in data.lower()):
            notes.append(
                f"{row.name} saw {known.upper()} in pretraining: results on these data are "
                "contaminated."
            )
    if mpp is not None and row.mpp is not None and not 2 / 3 <= mpp / row.mpp <= 1.5:
        notes.append(
            f"{row.name} was pretrained at {row.mpp:g} micrometres per pixel "
            f"({row.magnification}); these images reach it at {mpp:.3g}."
        )
    return notes


def unknown_pretraining_notes(name: str | None, cohorts: Collection[str] = ()) -> list[str]:
    """Notes on what cannot be known of a backbone's pretraining data, which is not "unseen".

    Args:
        name: `config.backbone_name`.
        cohorts: That the task's images come from, in lower case; none where they are unknown.

    Returns:
        A sentence for each image tower that may have seen them; none for `mini`, which saw
        synthetic images alone, or where its source names each cohort as used or left out.
    """
    notes = []
    for part in (name or "this backbone").split("+"):
        row = next(iter(known_rows(part)), None)
        if row is None:
            notes.append(
                f"What '{part}' was pretrained on is not known: it may have seen these images."
            )
        elif row.kind != "text" and row.hub_id is not None:
            rest = sorted({*cohorts} - {*row.datasets} - {*row.without})
            what = " and ".join(cohort.upper() for cohort in rest) or "images of these data"
            if rest or not cohorts:
                notes.append(f"Whether {row.name} saw {what} in pretraining is not known.")
    return notes
