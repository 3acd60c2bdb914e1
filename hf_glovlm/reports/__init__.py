"""Reports: pages of finished work, from its result files alone."""

from .writing import write_report

__all__ = ["write_report"]
