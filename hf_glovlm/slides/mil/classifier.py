"""Slide classifier: from the tile features of a slide to its label and a heat map."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ...errors import GloVLMError
from ...files import digest_value, model_folder, replacing, write_json
from ..files.bags import Bag
from .aggregators import Aggregator, build_aggregator

# Attributes of a bag: features of another model are refused, other tiles are noted.
FINGERPRINT = "fingerprint"
TILES = ("tile_mpp", "tile_size", "overlap_fraction")


@dataclass(frozen=True)
class SlidePrediction:
    """Prediction for a slide of n tiles.

    Attributes:
        label: The most probable class, the first one on a tie.
        probabilities: Of each class, summing to 1; not calibrated.
        logits: `[K]`, float32.
        attention: Weight of each tile `[n]`, float32, summing to 1; `None` for `max`.
        tile_scores: Evidence of each tile for each class `[n, K]`, float32; see `BagOutput`. As a
            heat map of one class these show more than the attention, which also marks tiles that
            are plainly of another class.
        notes: Sentences on what does not quite fit.
    """

    label: str
    probabilities: dict[str, float]
    logits: NDArray[np.float32]
    attention: NDArray[np.float32] | None
    tile_scores: NDArray[np.float32]
    notes: tuple[str, ...] = ()


@dataclass
class SlideClassifier:
    """Slide classifier: an aggregator with its classes and the encoder of its features.

    Attributes:
        aggregator: In evaluation mode.
        classes: `[K]`.
        encoder: Attributes of the training bags, as far as they agree: of the model that made
            them (`fingerprint`) and of their tiles (`tile_mpp`, `tile_size`, `overlap_fraction`).
    """

    aggregator: Aggregator
    classes: list[str]
    encoder: dict[str, Any]

    def predict(self, bag: Bag) -> SlidePrediction:
        """Classify a slide.

        Raises:
            GloVLMError: The bag is empty, or its features come from another model.
        """
        notes = self._compare(bag)
        device = self.aggregator.classify.weight.device
        with torch.inference_mode():
            output = self.aggregator(torch.from_numpy(bag.features).to(device))
        probabilities = output.logits.double().softmax(0).tolist()
        return SlidePrediction(
            label=self.classes[int(output.logits.argmax())],
            probabilities=dict(zip(self.classes, probabilities, strict=True)),
            logits=output.logits.cpu().numpy(),
            attention=None if output.attention is None else output.attention.cpu().numpy(),
            tile_scores=output.tile_scores.cpu().numpy(),
            notes=notes,
        )

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        facts = {
            "aggregator": self.aggregator.name,
            "settings": asdict(self.aggregator.config),
            "dim": self.aggregator.dim,
            "classes": self.classes,
            "encoder": self.encoder,
        }
        weights = {n: t.detach().cpu() for n, t in self.aggregator.state_dict().items()}
        with replacing(folder / "model.safetensors") as fresh:
            save_file(weights, fresh)
        write_json(folder / "config.json", facts)

    def digest(self) -> str:
        """Digest of all that decides its predictions."""
        weights = {
            name: xxhash.xxh3_128_hexdigest(tensor.detach().cpu().contiguous().numpy().tobytes())
            for name, tensor in self.aggregator.state_dict().items()
        }
        about = (self.aggregator.name, asdict(self.aggregator.config), self.classes, self.encoder)
        return digest_value([*about, weights])

    def _compare(self, bag: Bag) -> tuple[str, ...]:
        width = bag.features.shape[1]
        if width != self.aggregator.dim:
            raise GloVLMError(
                f"{bag.name}: the features have width {width}, the classifier was trained on width "
                f"{self.aggregator.dim}: encode the slide with the model that encoded its training "
                "slides."
            )
        if not len(bag.features):
            raise GloVLMError(f"{bag.name} has no tile: no tissue was found, or the file is empty.")
        known, given = self.encoder.get(FINGERPRINT), bag.attributes.get(FINGERPRINT)
        if known and given and known != given:
            raise GloVLMError(
                f"{bag.name}: the features come from another model ({str(given)[:12]}) than the "
                f"classifier was trained on ({str(known)[:12]}): encode the slide with that one."
            )
        notes = []
        if known and not given:
            notes.append("The features do not say which model made them; it was not checked.")
        for name in TILES:
            here, there = bag.attributes.get(name), self.encoder.get(name)
            if not isinstance(here, int | float) or not isinstance(there, int | float):
                continue
            if not same_tiles(here, there):
                notes.append(f"The tiles have {name} {here:g}, those of the training {there:g}.")
        return tuple(notes)


def same_tiles(one: float, other: float) -> bool:
    """Whether two scales, sizes or overlaps are the same but for a scanner's 5%."""
    return math.isclose(one, other, rel_tol=0.05)


def load_aggregator(folder: str | Path) -> SlideClassifier:
    """Load what `train_mil` wrote, on the CPU and in evaluation mode.

    Args:
        folder: The output folder of a run, or its `model/`.

    Raises:
        GloVLMError: There is no classifier of slides, it is damaged, or of another kind.
    """
    place = model_folder(folder, "mil")
    try:
        facts = json.loads((place / "config.json").read_text(encoding="utf-8"))
        aggregator = build_aggregator(
            facts["aggregator"], facts["dim"], len(facts["classes"]), facts["settings"]
        )
        aggregator.load_state_dict(load_file(place / "model.safetensors"))
        return SlideClassifier(aggregator.eval(), list(facts["classes"]), dict(facts["encoder"]))
    except GloVLMError:
        raise
    except Exception as error:  # of whatever library reads it
        raise GloVLMError(
            f"Expected a slide classifier in '{folder}', the output folder of `glovlm mil`; found "
            f"none that can be read ({type(error).__name__})."
        ) from None


def apply_mil(folder: str | Path | SlideClassifier, bag: Bag) -> SlidePrediction:
    """Classify a slide by a trained run.

    Args:
        folder: As `load_aggregator` takes it, or a classifier that is loaded.
        bag: The slide's tiles, encoded by the model that encoded the training slides.

    Raises:
        GloVLMError: There is no such run, or the features are not those it was trained on.
    """
    classifier = folder if isinstance(folder, SlideClassifier) else load_aggregator(folder)
    return classifier.predict(bag)
