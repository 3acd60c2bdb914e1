"""Labelled images in, `datasets.DatasetDict` and few-shot episodes out; knows nothing of models."""

from .annotations import SlideObject, read_geojson, write_geojson
from .bags import Bag, BagWriter, list_bags, read_bag
from .catalog import (
    CatalogEntry,
    ClassInfo,
    catalog_entries,
    catalog_entry,
    describe_source,
    load_classes,
)
from .check import DataReport, check_dataset
from .crops import CropSummary, cut_crops, parse_colours
from .folder import MANIFEST, dataset_fingerprint, load_dataset, open_image
from .slide_table import SlideTable, read_slide_table
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
from .tiles import TileGrid, TissueMask, find_tissue, lay_tiles
from .wsi import Slide, open_slide

__all__ = [
    "MANIFEST",
    "Bag",
    "BagWriter",
    "CatalogEntry",
    "ClassInfo",
    "CropSummary",
    "DataReport",
    "Episode",
    "Groups",
    "Slide",
    "SlideObject",
    "SlideTable",
    "TileGrid",
    "TissueMask",
    "all_rows",
    "assert_disjoint",
    "catalog_entries",
    "catalog_entry",
    "check_dataset",
    "cut_crops",
    "dataset_fingerprint",
    "describe_source",
    "draw_episode",
    "find_tissue",
    "group_rows",
    "lay_tiles",
    "list_bags",
    "load_classes",
    "load_dataset",
    "load_episode",
    "open_image",
    "open_slide",
    "parse_colours",
    "read_bag",
    "read_geojson",
    "read_slide_table",
    "reserve_calibration",
    "save_episodes",
    "split_groups",
    "split_hash",
    "write_geojson",
]
