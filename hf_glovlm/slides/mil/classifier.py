"""Slide classifier: from the tile features of a slide to its label and a heat map."""

import json
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
from ..files.tile_attributes import TileAttributes, find_differences, other_encoder
from .aggregators import Aggregator, build_aggregator


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
            them and of their tiles, as `TileAttributes.to_dict` gives them.
    """

    aggregator: Aggregator
    classes: list[str]
    encoder: dict[str, Any]

    def predict(self, bag: Bag, *, allow_scale: bool = False) -> SlidePrediction:
        """Classify a slide.

        Args:
            bag: Its tiles.
            allow_scale: Accept tiles of another scale, size or overlap than those of the training.

        Raises:
            GloVLMError: The bag is empty, its features come from another model, or its tiles are
                of another kind.
        """
        notes = self._compare(bag, allow_scale)
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

    def _compare(self, bag: Bag, allow_scale: bool) -> tuple[str, ...]:
        width = bag.features.shape[1]
        if width != self.aggregator.dim:
            raise GloVLMError(
                f"{bag.name}: the features have width {width}, the classifier was trained on width "
                f"{self.aggregator.dim}: encode the slide with the model that encoded its training "
                "slides."
            )
        if not len(bag.features):
            raise GloVLMError(f"{bag.name} has no tile: no tissue was found, or the file is empty.")
        both = [TileAttributes.of(self.encoder), TileAttributes.of(bag.attributes)]
        known, given = ((one.fingerprint or "")[:12] or one.encoder for one in both)
        if other_encoder(both):
            raise GloVLMError(
                f"{bag.name}: the features come from another model ({given}) than the classifier "
                f"was trained on ({known}): encode the slide with that one."
            )
        notes = []
        if known and not given:
            notes.append("The features do not say which model made them; it was not checked.")
        other = find_differences(["the training", bag.name], both)
        if other and not allow_scale:
            raise GloVLMError(
                f"{bag.name}: the tiles are not of the kind that the classifier was trained on "
                f"({'; '.join(other)}): encode the slide as its training slides were, or accept it "
                "with --allow-scale."
            )
        notes += [f"The tiles differ in {sentence}." for sentence in other]
        return tuple(notes)


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


def apply_mil(
    folder: str | Path | SlideClassifier, bag: Bag, *, allow_scale: bool = False
) -> SlidePrediction:
    """Classify a slide by a trained run.

    Args:
        folder: As `load_aggregator` takes it, or a classifier that is loaded.
        bag: The slide's tiles, encoded by the model that encoded the training slides.
        allow_scale: Accept tiles of another scale, size or overlap than those of the training.

    Raises:
        GloVLMError: There is no such run, or the features are not those it was trained on.
    """
    classifier = folder if isinstance(folder, SlideClassifier) else load_aggregator(folder)
    return classifier.predict(bag, allow_scale=allow_scale)
