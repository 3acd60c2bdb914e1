"""Finder of glomeruli: learned from a few outlined regions, run over slides."""
