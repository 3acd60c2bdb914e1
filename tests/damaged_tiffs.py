"""Seeded damage to TIFF slides: bytes of their headers and pixels overwritten, or cut off."""

import random
import traceback
from pathlib import Path

from hostile import _alarm
from tiff_layouts import make_layout

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.wsi import open_slide

LIMIT = 20  # seconds of one file
KINDS = 60  # layouts that are damaged in turn


def check(seed: int, folder: Path) -> str:
    """What is wrong with how a damaged slide is read or refused; empty is nothing."""
    layout = make_layout(seed % KINDS, folder)
    rng = random.Random(f"damage {seed}")
    content = bytearray(layout.path.read_bytes())
    if seed % 5 == 0:
        content = content[: rng.randrange(1, len(content))]
    else:
        first, last = ((0, 3000), (-6000, 0), (0, 0))[seed % 3]
        places = range(len(content))[first or None : last or None]
        for _ in range(rng.choice((1, 2, 5, 20))):
            content[rng.choice(places)] = rng.choice((0, 255, rng.randrange(256)))
    layout.path.write_bytes(content)
    said = ""
    try:
        with _alarm(LIMIT), open_slide(layout.path) as slide:
            width, height = slide.size
            slide.thumbnail(64)
            slide.read(0, 0, 100, 100)
            slide.read(width // 2, height // 2, 90, 90, downsample=3)
    except GloVLMError as error:
        said = str(error)
        said = "" if len(said) < 600 and "\n" not in said else f"no sentence: {said[:700]}"
    except Exception:
        said = traceback.format_exc()[-700:]
    layout.path.unlink()
    return said and f"{seed}: {layout}\n    {said}"
