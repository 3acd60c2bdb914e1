"""The Hub: publish a run in one commit, load what was published, write a plain CLIP checkpoint."""

from ..licences import check_publishing
from .parts import load_model, load_published
from .plain_clip import export_clip
from .pushing import PushReport, push

__all__ = ["PushReport", "check_publishing", "export_clip", "load_model", "load_published", "push"]
