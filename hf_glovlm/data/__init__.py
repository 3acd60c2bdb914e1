"""Data sets of labelled images, class names, splits and few-shot episodes; no models."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .catalog import (
        CatalogEntry,
        ClassInfo,
        catalog_entries,
        catalog_entry,
        describe_source,
        load_classes,
    )
    from .check import DataReport, check_dataset
    from .columns import MANIFEST, Columns
    from .folder import dataset_fingerprint, describe_reading, load_dataset, open_image
    from .groups import Groups, group_rows
    from .splits import (
        Episode,
        all_rows,
        assert_disjoint,
        draw_episode,
        load_episode,
        reserve_calibration,
        save_episodes,
        split_groups,
        split_hash,
    )
    from .visibility import hidden_classes

_HOMES = {
    "catalog": (
        "CatalogEntry", "ClassInfo", "catalog_entries", "catalog_entry", "describe_source",
        "load_classes",
    ),
    "check": ("DataReport", "check_dataset"),
    "columns": ("MANIFEST", "Columns"),
    "folder": ("dataset_fingerprint", "describe_reading", "load_dataset", "open_image"),
    "groups": ("Groups", "group_rows"),
    "splits": (
        "Episode", "all_rows", "assert_disjoint", "draw_episode", "load_episode",
        "reserve_calibration", "save_episodes", "split_groups", "split_hash",
    ),
    "visibility": ("hidden_classes",),
}  # fmt: skip

__all__ = [
    "MANIFEST",
    "CatalogEntry",
    "ClassInfo",
    "Columns",
    "DataReport",
    "Episode",
    "Groups",
    "all_rows",
    "assert_disjoint",
    "catalog_entries",
    "catalog_entry",
    "check_dataset",
    "dataset_fingerprint",
    "describe_reading",
    "describe_source",
    "draw_episode",
    "group_rows",
    "hidden_classes",
    "load_classes",
    "load_dataset",
    "load_episode",
    "open_image",
    "reserve_calibration",
    "save_episodes",
    "split_groups",
    "split_hash",
]

__getattr__ = lazy_names(
    __name__, {name: module for module, names in _HOMES.items() for name in names}
)
