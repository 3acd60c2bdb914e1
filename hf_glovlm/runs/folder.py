"""Output folder of a run: made in `unfinished/` inside it, moved into place when complete.

So a former result stays until there is a new one, and a run that was stopped can go on.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ..errors import GloVLMError
from ..files import move_over, write_text

UNFINISHED = "unfinished"  # there until the run is complete


class Repeatable(Protocol):
    """Configuration that can be repeated: what the folder needs to know of it."""

    @property
    def overwrite(self) -> bool:
        """Whether an earlier run there goes."""

    @property
    def resume(self) -> bool:
        """Whether it goes on from what is there."""

    def to_repeat(self) -> dict[str, Any]:
        """Plain values that repeat this run."""


def check_output(
    output: Path, config: Repeatable, incidental: Sequence[str]
) -> dict[str, Any] | None:
    """Check that the output folder may be written.

    Args:
        output: The folder.
        config: What is to be done.
        incidental: Settings in which a run may differ from the one it goes on with.

    Returns:
        The results, where `resume` finds a finished run.

    Raises:
        GloVLMError: It is a file, holds something else, or a run that is not to be replaced.
    """
    if output.exists() and not output.is_dir():
        raise GloVLMError(f"--output-dir must be a folder; '{output}' is a file.")
    begun = (output / UNFINISHED / "config.yaml").is_file()
    finished = (output / "results.json").is_file() and (output / "config.yaml").is_file()
    if not begun and not finished:
        if output.is_dir() and any(output.iterdir()):
            raise GloVLMError(
                f"Output folder '{output}' holds files that are no run of ours: give an empty or a "
                "new folder."
            )
        return None
    if config.resume:
        _check_same(output / UNFINISHED if begun else output, config, incidental)
        if begun:
            return None
        results: dict[str, Any] = json.loads((output / "results.json").read_text("utf-8"))
        return results
    if not config.overwrite:
        raise GloVLMError(
            f"Output folder '{output}' already holds a run: give --overwrite to replace it, "
            "--resume to go on with it, or another folder."
        )
    return None


@contextmanager
def unfinished(output: Path, config: Repeatable, main: bool) -> Iterator[Path]:
    """The folder in which a run is made.

    It stays when the run is interrupted, for `resume`, and goes when the input was at fault.

    Args:
        output: The run's folder.
        config: Written there first.
        main: Whether this process is the one that writes.
    """
    import yaml

    work = output / UNFINISHED
    fresh, new = not (config.resume and work.is_dir()), not output.exists()
    if main:
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / "config.yaml", yaml.safe_dump(config.to_repeat(), sort_keys=True))
    try:
        yield work
    except GloVLMError:
        if main and fresh:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # it holds something else
                if new:
                    output.rmdir()
        raise


def put_in_place(work: Path, output: Path, names: Sequence[str]) -> None:
    """Move a complete run's files and folders where they belong, in the order of their names.

    `results.json` must be the last of them: its presence means that the run is complete.
    """
    (output / "results.json").unlink(missing_ok=True)
    for name in names:
        place = output / name
        if (work / name).exists():
            move_over(work / name, place)
        elif place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    shutil.rmtree(work)


def _check_same(folder: Path, config: Repeatable, incidental: Sequence[str]) -> None:
    """Refuse to go on with a run that was begun with other settings."""
    import yaml

    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    other = [
        f"{key} was {stored.get(key)!r} and is {value!r}"
        for key, value in config.to_repeat().items()
        if key not in incidental and stored.get(key) != value
    ]
    if other:
        raise GloVLMError(
            f"The run in '{folder}' was begun with other settings ({'; '.join(other)}): repeat its "
            "config.yaml to go on with it, give --overwrite, or another folder."
        )
