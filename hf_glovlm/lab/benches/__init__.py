"""Benchmarks as ratios measured inside one run: what the package's own ways gain or cost.

The images are synthetic, and no quality is measured here.
"""

from collections.abc import Callable, Sequence

from ...errors import GloVLMError, nearest
from .cache import bench_cache
from .context import bench_context
from .encode import bench_encode
from .methods import bench_methods
from .metrics import bench_metrics
from .timing import Row

BENCHES: dict[str, Callable[..., list[Row]]] = {
    "metrics": bench_metrics,
    "cache": bench_cache,
    "encode": bench_encode,
    "methods": bench_methods,
    "context": bench_context,
}


def run_benches(names: Sequence[str] = (), *, backbone: str | None = None) -> list[Row]:
    """Run benchmarks one after the other.

    Args:
        names: Of `BENCHES`; all when empty.
        backbone: For those that encode; if not given, `mini` fills the cache, and loading and
            encoding are timed with random weights of the size of ViT-B/16.

    Returns:
        Rows `name`, `value`, `unit`, `ratio` (or `None`) and `what`.

    Raises:
        GloVLMError: There is no such bench.
    """
    for name in names:
        if name not in BENCHES:
            raise GloVLMError(
                f"Expected a bench of {', '.join(BENCHES)}, found '{name}'.{nearest(name, BENCHES)}"
            )
    given = {"backbone": backbone} if backbone else {}
    options = {"cache": given, "encode": given}
    return [row for name in names or BENCHES for row in BENCHES[name](**options.get(name, {}))]
