"""Model cache: which models may be used, what computes them, and the two that were used last."""

import os
import re
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

from uploads import CLASSES

from hf_glovlm import (
    BACKBONES,
    GloVLMError,
    build_zero_shot,
    load_backbone,
    load_classes,
    load_classifier,
    open_engine,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, eq=False)
class Loaded:
    """Loaded model, read only: whoever changes something works on a copy of its modules.

    Args:
        name: As it was asked for.
        towers: A `GloVLMModel`.
        processor: Its processor.
        classifier: With the head that adaptation left; of a bare backbone the zero-shot one for
            `CLASSES`; `None` where there can be none.
        why_not: Then, why.
        engine: What computes the towers, as `open_engine` gives it; `None` is PyTorch in fp32.
        lock: Held while texts are encoded: a tokenizer serves one at a time.
    """

    name: str
    towers: Any
    processor: Any
    classifier: Any | None
    why_not: str = ""
    engine: Any = None
    lock: Any = field(default_factory=Lock)

    def ask(self) -> Any:
        """The classifier.

        Raises:
            GloVLMError: There is none.
        """
        if self.classifier is None:
            raise GloVLMError(self.why_not)
        return self.classifier


@dataclass(frozen=True)
class Settings:
    """Settings of the page by the machine's owner, from the environment.

    Args:
        model: `GLOVLM_MODEL`, which the page starts with.
        listed: `GLOVLM_MODELS`, separated by commas: if given, only these can be chosen.
        folders: `GLOVLM_ALLOW_FOLDERS=1`: folders of this machine may be named. Only for a page
            that nobody else can reach.
        precision: `GLOVLM_PRECISION`, in which images are encoded, as `glovlm predict` takes it.
        runtime: `GLOVLM_RUNTIME`, which encodes them, as `glovlm predict` takes it.
    """

    model: str = "mini"
    listed: tuple[str, ...] = ()
    folders: bool = False
    precision: str = "fp32"
    runtime: str = "torch"

    @classmethod
    def from_environment(cls) -> "Settings":
        listed = os.environ.get("GLOVLM_MODELS", "").split(",")
        return cls(
            model=os.environ.get("GLOVLM_MODEL", "").strip() or "mini",
            listed=tuple(name.strip() for name in listed if name.strip()),
            folders=os.environ.get("GLOVLM_ALLOW_FOLDERS") == "1",
            precision=os.environ.get("GLOVLM_PRECISION", "").strip() or "fp32",
            runtime=os.environ.get("GLOVLM_RUNTIME", "").strip() or "torch",
        )

    @property
    def is_plain(self) -> bool:
        """Whether images are encoded as by default: nothing has to be opened to know that."""
        return (self.precision, self.runtime) == ("fp32", "torch")

    @property
    def choices(self) -> list[str]:
        """What the page offers."""
        return list(dict.fromkeys([self.model, *(self.listed or ("mini",))]))

    def check(self, name: str) -> None:
        """Refuse a model that may not be used here, before anything is read.

        Raises:
            GloVLMError: It is not listed, or a folder of the server.
        """
        if name == self.model or name in self.listed:
            return
        if self.listed:
            raise GloVLMError(
                f"This page serves {', '.join(self.choices)}; '{name[:80]}' is not among them."
            )
        if self.folders or name in BACKBONES:
            return
        for part in name.split("+"):
            known = part.strip() in BACKBONES
            # What looks like a Hub id could still be a folder below the working directory.
            if not known and (not HUB_ID.fullmatch(part.strip()) or Path(part.strip()).exists()):
                raise GloVLMError(
                    f"Expected a Hub id (owner/name) or a known backbone, found '{name[:80]}': "
                    "folders can be named only where the page runs on your own machine."
                )


class Shelf:
    """Model cache, least recently used out first.

    Args:
        settings: What may be used.
        size: How many.
    """

    def __init__(self, settings: Settings, size: int = 2) -> None:
        self.settings = settings
        self.size = size
        self._models: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = Lock()
        self._engine: dict[str, Any] | None = None

    @property
    def engine(self) -> dict[str, Any]:
        """Precision and runtime of every model: what `auto` stands for is measured with the first.

        Raises:
            GloVLMError: The page's own model cannot be computed so.
        """
        if self.settings.is_plain:
            return {"precision": self.settings.precision, "runtime": self.settings.runtime}
        if self._engine is None:
            self.get(None)
        return dict(self._engine or {})

    def get(self, name: str | None) -> Loaded:
        """A model by name; the page's own for none.

        Raises:
            GloVLMError: It may not be used here, or cannot be loaded.
        """
        key = (name or "").strip() or self.settings.model
        self.settings.check(key)
        with self._lock:  # one loads at a time: memory is for `size` models and one more
            if key not in self._models:
                while len(self._models) >= self.size:
                    self._models.popitem(last=False)
                self._models[key] = self._open(_load(key))
            self._models.move_to_end(key)
            return self._models[key]

    def _open(self, loaded: Loaded) -> Loaded:
        """A model with what computes it."""
        engine = open_engine(
            loaded.towers if loaded.classifier is None else loaded.classifier,
            loaded.processor,
            precision=self.settings.precision,
            runtime=self.settings.runtime,
            kept=self._engine,
        )
        self._engine = self._engine or engine.describe()
        return replace(loaded, engine=engine)


def _load(name: str) -> Loaded:
    if name not in BACKBONES and "+" not in name:
        try:
            classifier, processor, _ = load_classifier(name)
            return Loaded(name, classifier.glovlm, processor, classifier)
        except GloVLMError as error:
            reason = error
        try:
            towers, processor = load_backbone(name)
        except GloVLMError:
            raise reason from None
    else:
        towers, processor = load_backbone(name)
    words = {info.name: info.prompts for info in load_classes(CLASSES)}
    try:
        return Loaded(name, towers, processor, build_zero_shot(towers, processor, words))
    except GloVLMError as error:
        return Loaded(name, towers, processor, None, str(error))
