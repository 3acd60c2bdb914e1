"""Data sets of labelled images, class names, splits and few-shot episodes; no models."""

from .catalog import (
    CatalogEntry,
    ClassInfo,
    catalog_entries,
    catalog_entry,
    describe_source,
    load_classes,
)
from .check import DataReport, check_dataset
from .folder import MANIFEST, dataset_fingerprint, load_dataset, open_image
from .splits import (
    Episode,
    Groups,
    all_rows,
    assert_disjoint,
    draw_episode,
    group_rows,
    load_episode,
    reserve_calibration,
    save_episodes,
    split_groups,
    split_hash,
)

__all__ = [
    "MANIFEST",
    "CatalogEntry",
    "ClassInfo",
    "DataReport",
    "Episode",
    "Groups",
    "all_rows",
    "assert_disjoint",
    "catalog_entries",
    "catalog_entry",
    "check_dataset",
    "dataset_fingerprint",
    "describe_source",
    "draw_episode",
    "group_rows",
    "load_classes",
    "load_dataset",
    "load_episode",
    "open_image",
    "reserve_calibration",
    "save_episodes",
    "split_groups",
    "split_hash",
]
