"""Slide files: pixels, tissue, tiles, outlines, crops, bags of features, tables of slides."""
