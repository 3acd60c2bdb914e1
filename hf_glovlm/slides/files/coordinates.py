"""Origin of outlines: where a file of annotations counts its pixels from.

All coordinates inside this package are pixels of level 0, counted from its upper left corner.
QuPath counts from the corner of the part that was scanned (OpenSlide's `openslide.bounds-x` and
`openslide.bounds-y`), which lies elsewhere in slides of Leica (SCN), 3DHISTECH (MRXS) and Ventana
(BIF). A file is converted where it is read and where it is written, and nowhere else.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import GloVLMError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Source = Literal["slide", "bounds", "given", "file"]
ORIGINS = ("auto", "slide", "bounds", "X,Y")  # what `--origin` takes


@dataclass(frozen=True)
class Origin:
    """Origin of a file's coordinates, in pixels of level 0.

    Attributes:
        x: Column of level 0 at which the file's x is 0.
        y: Row of level 0 at which the file's y is 0.
        source: Level 0's own corner (`slide`), the `bounds` of the scanned part, `given` by a
            person, or stated in the `file`.
    """

    x: float = 0.0
    y: float = 0.0
    source: Source = "slide"

    def to_level0(self, points: "NDArray[Any]") -> "NDArray[np.float64]":
        """Points `[..., 2]` (x, y) of a file in pixels of level 0."""
        import numpy as np  # settings are checked without it

        return np.add(points, (self.x, self.y), dtype=np.float64)

    def from_level0(self, points: "NDArray[Any]") -> "NDArray[np.float64]":
        """Points `[..., 2]` (x, y) in pixels of level 0 as a file counts them."""
        import numpy as np

        return np.subtract(points, (self.x, self.y), dtype=np.float64)

    def describe(self) -> dict[str, Any]:
        """As results and GeoJSON files state it."""
        return {"x": self.x, "y": self.y, "source": self.source}


LEVEL0 = Origin()


def parse_origin(text: str, bounds: tuple[int, int] | None) -> Origin:
    """Origin of a slide's outlines by a setting.

    Args:
        text: `auto` (the bounds where the slide states any, as QuPath counts), `slide` (level 0's
            corner), `bounds`, or `X,Y` in pixels of level 0.
        bounds: Corner of the scanned part, as the slide states it; `None` where it states none.

    Raises:
        GloVLMError: Another text, or `bounds` of a slide that states none.
    """
    name = text.strip().casefold()
    if name == "slide" or (name == "auto" and bounds is None):
        return LEVEL0
    if name in ("auto", "bounds") and bounds is not None:
        return Origin(float(bounds[0]), float(bounds[1]), "bounds")
    if name == "bounds":
        raise GloVLMError(
            "The slide states no bounds of the scanned part, so outlines cannot be counted from "
            "there: give --origin slide, or --origin X,Y in pixels of level 0."
        )
    numbers = re.split(r"\s*[,;]\s*|\s+", name)
    try:
        x, y = map(float, numbers)
    except ValueError:
        x = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise GloVLMError(
            f"Expected an origin of {', '.join(ORIGINS)} (pixels of level 0, such as 1024,2048), "
            f"found '{text}'."
        )
    return Origin(x, y, "given")
