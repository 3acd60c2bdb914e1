"""What runs are made from: data that are read and checked, backbones, and their digests."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones import describe_weights, load_backbone
from ..files import digest_file, digest_value
from ..inference import FeatureCache, MemoryCache
from ..inference.frozen import share_towers
from ..methods import Method, TowerMethod
from .config import MINI, TrainConfig
from .folder import CODE_VERSION

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..data import ClassInfo
    from ..data.check import DataReport
    from ..data.folder import Reading


class Loader:
    """Loader of checked data and of backbones.

    Args:
        keep: Whether each is read once and handed out as a copy: for a study, whose cells share
            them.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self._kept: dict[str, Any] = {}
        # Small, so these are kept in any case.
        self._digests: dict[str, dict[str, str]] = {}
        self._reports: dict[Any, tuple[DatasetDict, DataReport]] = {}
        self._inputs: dict[Any, dict[str, Any]] = {}

    def data(self, config: TrainConfig) -> tuple["Dataset", "Reading", "DataReport"]:
        """Rows of a run's data, without problems, how they were read, and what is known of them.

        Raises:
            GloVLMError: They have problems.
        """
        from ..data import all_rows, check_dataset, describe_reading, load_dataset

        def read() -> tuple["Dataset", "Reading", "DataReport"]:
            cache, before = FeatureCache() if config.cache else None, None
            if self.keep and source in self._reports:  # hashed by `inputs`
                dataset, hashed = self._reports[source]
                before = hashed.looks
            else:
                dataset = load_dataset(config.data, columns=config.columns)
            report = check_dataset(dataset, cache=cache, before=before)
            report.raise_problems()
            if self.keep:
                self._reports[source] = dataset, report
            return report.looks.mark(all_rows(dataset)), describe_reading(dataset), report

        source = _data_key(config)
        checked: tuple[Dataset, Reading, DataReport] = self._get(source, read)
        return checked

    def backbone(self, name: str, method: Method) -> tuple[Any, Any]:
        """A model and its processor, for a method that may change both, but for frozen towers."""
        loaded = self._load(name)
        if not self.keep:
            return loaded
        if isinstance(method, TowerMethod):
            return copy.deepcopy(loaded)
        return share_towers(*loaded)

    def features(self) -> FeatureCache:
        """Cache of features; what a loader that keeps has read of it stays in memory."""
        if not self.keep:
            return FeatureCache()
        kept: FeatureCache = self._get("features", lambda: MemoryCache(FeatureCache()))
        return kept

    def inputs(self, config: TrainConfig) -> dict[str, Any]:
        """What a run would be made from beside its settings and split; no image is decoded."""
        from ..data import check_dataset, load_dataset

        source = _data_key(config)
        if source not in self._reports:
            dataset = load_dataset(config.data, columns=config.columns)
            self._reports[source] = dataset, check_dataset(dataset, decode=False)
        _, report = self._reports[source]
        shown = (config.prompts, config.stain, config.outline, config.outline_of)
        key = (source, *shown, config.episodes, config.backbone)
        if key not in self._inputs:
            classes = task_classes(config, report.classes)
            self._inputs[key] = describe_inputs(config, report.digests, classes, self)
        return self._inputs[key]

    def describe_backbone(self, name: str) -> dict[str, str]:
        """Digests of a backbone, computed once; see `describe_weights`."""
        if name not in self._digests:
            self._load(name)
        return self._digests[name]

    def _load(self, name: str) -> tuple[Any, Any]:
        def read() -> tuple[Any, Any]:
            loaded = load_backbone(name)
            self._digests[name] = describe_weights(*loaded)
            return loaded

        loaded: tuple[Any, Any] = self._get(f"backbone {name}", read)
        return loaded

    def _get(self, key: str, read: Callable[[], Any]) -> Any:
        if not self.keep:
            return read()
        if key not in self._kept:
            self._kept[key] = read()
        return self._kept[key]


def _data_key(config: TrainConfig) -> str:
    """Data of a run and how they are read, for a loader that keeps them."""
    return f"data {config.data} {config.columns}"


def describe_inputs(
    config: TrainConfig, data: Mapping[str, str], classes: Sequence["ClassInfo"], loader: Loader
) -> dict[str, Any]:
    """What a run is made from beside its settings and its split.

    Args:
        config: What to do.
        data: Digests of the data, as `DataReport` has them.
        classes: Names and prompts, in label order.
        loader: Has the backbone.
    """
    episodes = config.episodes and digest_file(Path(config.episodes).expanduser())
    return {
        "code": CODE_VERSION,
        **data,
        "classes": digest_value([c.to_dict() for c in classes]),
        "episodes": episodes,
        "backbone": loader.describe_backbone(config.backbone or MINI),
    }


def task_classes(config: TrainConfig, names: Sequence[str]) -> list["ClassInfo"]:
    """Classes of a run with their prompts."""
    from ..data import load_classes

    return load_classes(
        names,
        source=config.folder,
        prompts=config.prompts,
        stain=config.stain,
        outline=config.outline,
        outline_of=config.outline_of,
    )
