"""Pretraining config of `mini`."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import GloVLMError
from ..settings import SEEDS, Settings, setting


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """Pretraining config of `mini`."""

    _what: ClassVar[str] = "Pretraining"

    output_dir: str = setting(
        help="Takes weights, tokenizer, image processor and card.", group="Output"
    )
    seed: int = setting(
        0, help="Of images, initialisation and order.", group="Images", least=0, most=SEEDS
    )
    patients: int = setting(1000, help="Synthetic patients.", group="Images", least=1, most=10**6)
    per_patient: int = setting(10, help="Images of each.", group="Images", least=1, most=10**6)
    captions: int = setting(
        8,
        help="Wordings of each image; every step draws one.",
        group="Images",
        least=1,
        most=1000,
    )
    epochs: int = setting(10, help="Passes over the images.", group="Training", least=1, most=10**5)
    batch_size: int = setting(
        64, help="Images per step over all processes.", group="Training", least=2, most=10**6
    )
    lr: float = setting(1e-3, help="Peak learning rate.", group="Training", above=0)
    image_size: int = setting(
        96, help="Side of an image in pixels.", group="Images", least=8, most=1024
    )
    patch_size: int = setting(
        12, help="Side of a patch in pixels.", group="Images", least=1, most=1024
    )
    workers: int = setting(2, help="Processes that render.", group="Machine", least=1, most=1024)
    resume: bool = setting(
        False, help="Go on from the checkpoint in the output folder.", group="Output"
    )

    def check(self) -> None:
        """Rules over several settings."""
        if self.image_size % self.patch_size:
            raise GloVLMError(
                f"image_size must be a multiple of patch_size; found {self.image_size} and "
                f"{self.patch_size}."
            )
        if self.patients * self.per_patient > 10**6:
            raise GloVLMError(
                f"{self.patients} patients of {self.per_patient} images do not fit into memory: "
                "draw at most 1,000,000 images."
            )
