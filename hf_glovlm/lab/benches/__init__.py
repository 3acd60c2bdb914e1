"""Benchmarks as ratios measured inside one run: what the package's own ways gain or cost.

The images are synthetic unless `--data` names others, and no quality is measured but by the benches
that run alone. `BENCHES` is all that a command line needs; it imports none of them.
"""

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...errors import GloVLMError, nearest


@dataclass(frozen=True)
class Bench:
    """Benchmark of one subject.

    Attributes:
        functions: `module:function`, the module relative to `lab`. A function takes options and
            gives rows `name`, `value`, `unit`, `ratio`, `what`; one that fails keeps no other
            from running.
        help: What it measures, in a line.
        takes: Options that it knows, all of them optional.
        needs: Options that it cannot do without.
        alone: Whether it measures data or statistics rather than speed, and runs alone.
        shown: Columns of its rows in a table.
        summary: `module:function` that makes of its rows those of a table, where these are many.
    """

    functions: tuple[str, ...]
    help: str
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    alone: bool = False
    shown: tuple[str, ...] = ("name", "value", "unit", "ratio", "what")
    summary: str | None = None


BENCHES: dict[str, Bench] = {
    "startup": Bench(("benches.startup:bench_startup",), "help and import, in fresh processes"),
    "data": Bench(
        ("benches.data:bench_data", "benches.reading:bench_check", "benches.reading:bench_draft"),
        "how often images are read and decoded, and how fast",
        takes=("backbone",),
    ),
    "encode": Bench(
        ("benches.encode:bench_encode", "benches.runtimes:bench_runtimes"),
        "loading, encoding and runtimes against bare transformers",
        takes=("backbone",),
    ),
    "methods": Bench(
        ("benches.methods:bench_methods", "benches.heads:bench_heads"),
        "shortcuts of the methods, and heads on features",
    ),
    "metrics": Bench(
        ("benches.metrics:bench_metrics", "benches.metrics:bench_auc"), "the bootstrap over groups"
    ),
    "near_duplicates": Bench(
        ("benches.near_duplicates:bench_near_duplicates",), "the search for near-duplicate images"
    ),
    "slide": Bench(
        ("slide_bench:bench_slide",), "memory and rate on a synthetic slide", takes=("backbone",)
    ),
    "study": Bench(("benches.study:bench_study",), "what a cell costs beside its fitting"),
    "train": Bench(("benches.train:bench_train",), "epochs against a plain PyTorch loop"),
    "context": Bench(("benches.context:bench_context",), "a tower that drops patches"),
    "cache": Bench(("benches.cache:bench_cache",), "the feature cache", takes=("backbone",)),
    "gpu": Bench(("benches.gpu:bench_gpu",), "precisions and epochs on a CUDA GPU"),
    "counting": Bench(
        ("counting:bench_counting",),
        "error of a slide's percentage",
        takes=("progress",),
        needs=("data", "backbone"),
        alone=True,
    ),
    "intervals": Bench(
        ("interval_bench:bench_intervals",),
        "coverage of the 95% intervals",
        takes=("cohorts", "on_row"),
        alone=True,
        summary="interval_bench:summarise_coverage",
    ),
    "tissue": Bench(
        ("tissue_bench:bench_tissue",),
        "outlined glomeruli that are tissue",
        needs=("data",),
        alone=True,
    ),
}


@dataclass(frozen=True)
class Finished:
    """A function of a bench that has ended.

    Attributes:
        bench: Name of the bench.
        rows: Those that it gave, also where it failed.
        seconds: How long it took.
        failure: Why it gave no more; `None` where it is complete.
        unavailable: Whether that is the machine's doing.
    """

    bench: str
    rows: list[dict[str, Any]]
    seconds: float
    failure: str | None = None
    unavailable: bool = False


def choose_benches(names: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Check what is asked for, before anything runs.

    Args:
        names: Of `BENCHES`; all that need not run alone when empty.
        options: By name, where given.

    Returns:
        The benches to run, each once.

    Raises:
        GloVLMError: There is no such bench; one runs alone, or needs an option; or no bench takes
            an option that is given.
    """
    for name in names:
        if name not in BENCHES:
            raise GloVLMError(
                f"Expected a bench of {', '.join(BENCHES)}, found '{name}'.{nearest(name, BENCHES)}"
            )
    chosen = list(dict.fromkeys(names)) or [n for n, bench in BENCHES.items() if not bench.alone]
    for name in chosen:
        bench = BENCHES[name]
        if bench.alone and len(chosen) > 1:
            raise GloVLMError(f"`bench {name}` runs alone: name just one.")
        if any(option not in options for option in bench.needs):
            needed = " and ".join(f"--{option}" for option in bench.needs)
            raise GloVLMError(f"`bench {name}` needs {needed}.")
    for option in options:
        if not any(option in _options_of(name) for name in chosen):
            able = ", ".join(takers(option))
            raise GloVLMError(f"--{option} is for {able}: name one of these, or leave it out.")
    return chosen


def takers(option: str) -> list[str]:
    """Benches that take an option."""
    return [name for name in BENCHES if option in _options_of(name)]


def _options_of(name: str) -> tuple[str, ...]:
    return (*BENCHES[name].takes, *BENCHES[name].needs)


def run_benches(
    names: Sequence[str], options: Mapping[str, Any] | None = None
) -> Iterator[Finished]:
    """Run benchmarks one after the other; what one of them raises does not keep the others back.

    Args:
        names: Of `BENCHES`, see `choose_benches`.
        options: Handed to the benches that know them.

    Yields:
        Each function of each bench as it ends.
    """
    for name in names:
        known = {k: v for k, v in (options or {}).items() if k in _options_of(name)}
        for place in BENCHES[name].functions:
            yield _run(name, place, known)


def _run(name: str, place: str, options: Mapping[str, Any]) -> Finished:
    from .timing import UnavailableError

    rows: list[dict[str, Any]] = []
    start, failure, unavailable = time.perf_counter(), None, False
    try:
        function = load_function(place)
        taken = inspect.signature(function).parameters  # one function of several may know less
        for row in function(**{k: v for k, v in options.items() if k in taken}):
            rows.append(row)  # one by one: a generator may fail behind some
    except UnavailableError as reason:
        failure, unavailable = str(reason), True
    except GloVLMError as error:
        failure = str(error)
    except Exception as error:  # a fault in one bench is no reason to lose the rows of others
        failure = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    return Finished(name, rows, time.perf_counter() - start, failure, unavailable)


def load_function(place: str) -> Any:
    """Import `module:function`, the module relative to `lab`."""
    module, _, function = place.partition(":")
    return getattr(import_module(f"hf_glovlm.lab.{module}"), function)
