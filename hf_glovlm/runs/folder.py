"""Output folder of a run: one writer, made in `unfinished/` inside it, moved when complete.

So a former result stays until there is a new one, and a run that was stopped can go on: from what
it was begun with, and from nothing else.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import GloVLMError, WriteError
from ..files import (
    UNFINISHED,
    changed_inputs,
    explaining_disk,
    finish_interrupted,
    finish_move,
    is_empty,
    one_writer,
    put_in_place,
    read_json,
    read_manifest,
    refuse_damage,
    refuse_other_writer,
    remove,
    replacing,
    write_manifest,
    write_text,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

# Part of what every run is made from. Raise it when the same data, weights and settings would give
# other numbers, or when a run's files are written in another form.
CODE_VERSION = 1
_LAUNCHED = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
T = TypeVar("T")


class Repeatable(Protocol):
    """Configuration that can be repeated: what the folder needs to know of it."""

    @property
    def overwrite(self) -> bool:
        """Whether a run in the folder is replaced."""

    @property
    def resume(self) -> bool:
        """Whether a run in the folder is gone on with."""

    def to_repeat(self) -> dict[str, Any]:
        """Plain values that repeat this run."""


def check_launch(processes: int) -> None:
    """Refuse to run where several processes were launched that do not know of each other.

    Args:
        processes: How many train together.

    Raises:
        GloVLMError: More were launched; each would write the whole run into the same folder.
    """
    counts = (os.environ.get(name, "") for name in _LAUNCHED)
    launched = max((int(count) for count in counts if count.isdecimal()), default=1)
    if launched > processes:
        raise GloVLMError(
            f"{launched} processes were launched, and {processes} would train: they do not train "
            "together on this machine. Launch one, give each a GPU of its own, or launch them by "
            f"`accelerate launch --cpu --num_processes {launched}`."
        )


def make_accelerator(mixed_precision: str | None, *, cpu: bool, **options: Any) -> "Accelerator":
    """Accelerator of a run, in which all processes that were launched train together.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`; `None` is what the launcher states.
        cpu: Whether it is the CPU; else Accelerate chooses.
        **options: Of `accelerate.Accelerator`.

    Raises:
        GloVLMError: Accelerate refuses the settings, or the processes would not train together.
    """
    import accelerate

    try:
        accelerator = accelerate.Accelerator(mixed_precision=mixed_precision, cpu=cpu, **options)
    except (ValueError, RuntimeError, ImportError) as error:  # fp16 or FSDP on a CPU, ...
        reason = str(error).strip().splitlines()[0]
        raise GloVLMError(f"Accelerate cannot run with these settings: {reason}") from error
    check_launch(accelerator.num_processes)
    return accelerator


def on_main(accelerator: "Accelerator | None", act: Callable[[], T]) -> T:
    """Act in the main process, and have its result, or its error, in every process."""
    if accelerator is None or accelerator.num_processes == 1:
        return act()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except GloVLMError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise GloVLMError(outcome[1])
    result: T = outcome[0]
    return result


@dataclass(frozen=True)
class RunFolder:
    """Run folder: of which this process, or the main one of several, is the one writer.

    Attributes:
        output: The folder.
        config: What is to be done.
        kind: What it will hold: `adaptation`, `mil`.
        names: All files and folders of such a run, `results.json` last.
        incidental: Settings in which a run may differ from the one it goes on with.
        accelerator: Of the processes that run together; `None` for one.
    """

    output: Path
    config: Repeatable
    kind: str
    names: Sequence[str]
    incidental: Sequence[str]
    accelerator: "Accelerator | None" = None

    @property
    def work(self) -> Path:
        """Where the run is made."""
        return self.output / UNFINISHED

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator is None or self.accelerator.is_main_process

    def check(self) -> None:
        """Refuse, before any data are read, a folder that may not be written.

        Raises:
            GloVLMError: It is a file, holds something else, or a run that is not to be replaced or
                was begun with other settings; or another process writes there.
        """
        if self.accelerator is None:
            check_launch(1)

        def look() -> None:
            finish_interrupted(self.output)
            refuse_other_writer(self.output)
            self._check()
            if any(self.output.glob(f".{UNFINISHED}.*.tmp")):
                with suppress(GloVLMError), one_writer(self.output):
                    pass  # it removes what a killed writer left

        self._on_main(look)

    def _check(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise GloVLMError(f"--output-dir must be a folder; '{self.output}' is a file.")
        if not (self._begun or self._finished or is_empty(self.output)):
            raise GloVLMError(
                f"Output folder '{self.output}' holds files that are no run of ours: give an "
                "empty or a new folder."
            )
        if self._begun or self._finished:
            self._check_run()

    def finished(self, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
        """Results of the finished run that `resume` meets.

        Raises:
            GloVLMError: It was made from something else, or one of its files is damaged.
        """

        def read() -> dict[str, Any] | None:
            if not self.config.resume or self._begun or not self._finished:
                return None
            self._check_same(self.output, made_from)
            manifest = read_manifest(self.output)
            assert manifest is not None  # compared above
            kept = [name for name in manifest.files if name != "README.md"]  # a person may edit it
            refuse_damage(self.output, manifest, kept)
            results: dict[str, Any] = read_json(self.output / "results.json")
            return results

        return self._on_main(read)

    @contextmanager
    def unfinished(self, made_from: Mapping[str, Any]) -> Iterator[Path]:
        """The folder in which the run is made, by the one writer of the run's folder.

        It stays when the run is interrupted or a trained model cannot be saved, for `resume`, and
        goes when the input was at fault.

        Args:
            made_from: Digests and settings by name, which the run states.

        Raises:
            GloVLMError: The run that it would go on with was begun with something else.
        """
        with ExitStack() as stack:

            def begin() -> bool:
                stack.enter_context(one_writer(self.output))
                finish_move(self.work, self.output)
                self._check()  # again, for nobody else writes from now on
                return self._begin(made_from)

            fresh = self._on_main(begin)
            try:
                with explaining_disk(self.work):
                    yield self.work
            except GloVLMError as error:
                # What has trained can still be saved once the disk has room.
                trained = isinstance(error, WriteError) and any(self.work.rglob("checkpoint.*"))
                if self.main and fresh and not trained:
                    shutil.rmtree(self.work, ignore_errors=True)
                raise

    def _begin(self, made_from: Mapping[str, Any]) -> bool:
        """Begin a run, or go on with one; whether it is a new one."""
        import yaml

        if self.config.resume and self._begun:
            self._check_same(self.work, made_from)
            return False
        if self.config.resume and self._finished:
            raise GloVLMError(
                f"Another process has finished the run in '{self.output}': give the command again."
            )
        remove(self.work)
        with replacing(self.work) as new:
            new.mkdir()
            text = yaml.safe_dump(self.config.to_repeat(), sort_keys=True)
            write_text(new / "config.yaml", text)
            write_manifest(new, self.kind, made_from)
        return True

    def put_in_place(self, made_from: Mapping[str, Any]) -> None:
        """Move the complete run where it belongs, with a manifest of its files."""
        write_manifest(self.work, self.kind, made_from, self.names)
        put_in_place(self.work, self.output, self.names)

    @property
    def _begun(self) -> bool:
        return (self.work / "config.yaml").is_file()

    @property
    def _finished(self) -> bool:
        return (self.output / "results.json").is_file() and (self.output / "config.yaml").is_file()

    def _check_run(self) -> None:
        """Refuse a run that is there and is not to be replaced or gone on with."""
        if not self.config.resume:
            if self.config.overwrite:
                return
            raise GloVLMError(
                f"Output folder '{self.output}' already holds a run: give --overwrite to replace "
                "it, --resume to go on with it, or another folder."
            )
        folder = self.work if self._begun else self.output
        manifest = read_manifest(folder)
        if manifest is None:
            raise GloVLMError(
                f"The run in '{folder}' does not state what it was made from: give --overwrite "
                "to run it again, or another folder."
            )
        if manifest.kind != self.kind:
            raise GloVLMError(
                f"The run in '{folder}' is of another kind ({manifest.kind}): give another folder."
            )
        other = changed_inputs(manifest.made_from.get("settings", {}), self.settings())
        if other:
            raise GloVLMError(
                f"The run in '{folder}' was begun with other settings ({'; '.join(other)}): repeat "
                "its config.yaml to go on with it, give --overwrite, or another folder."
            )

    def settings(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        return {k: v for k, v in self.config.to_repeat().items() if k not in self.incidental}

    def _check_same(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        """Refuse to go on with a run that was begun with something else."""
        manifest = read_manifest(folder)
        other = changed_inputs(manifest.made_from if manifest else {}, made_from)
        if other:
            raise GloVLMError(
                f"Since the run in '{folder}' was begun, {', '.join(other)}: give --overwrite to "
                "begin again, or another folder."
            )

    def _on_main(self, act: Callable[[], T]) -> T:
        return on_main(self.accelerator, act)
