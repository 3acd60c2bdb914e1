"""Training of a finder (`glovlm find train`): outlined regions to a folder that finds glomeruli.

The folder is written whole or not at all, and holds `finder.json`, `head.safetensors` and
`manifest.json`, which states what it was made from. No picture is in it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...data.folder import is_synthetic
from ...errors import GloVLMError
from ...files import (
    LOCK,
    UNFINISHED,
    finish_move,
    one_writer,
    put_in_place,
    read_manifest,
    remove,
    staging,
    write_manifest,
)
from ...inference import resolve_device
from ...progress import showing
from ..encoding import encoder_fingerprint, load_encoder
from .config import FindTrainConfig
from .folder import CONFIG, FINDER_FILES, KIND, WEIGHTS
from .learning import Finder
from .outlined import OutlinedRegions, read_regions

VERSION = 1  # of what a finder is made of

Event = Callable[[str, dict[str, Any]], None]


def train_finder(
    config: FindTrainConfig, *, on_event: Event | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """Train a finder on outlined regions, measure it on groups left out, and save it.

    Args:
        config: What to do.
        on_event: Progress: `("stage", {"name"})`.
        progress: Whether to show how far it is; by default in a notebook.

    Returns:
        What was learned from and how well it finds: `kind`, `research_use_only`, `synthetic`,
        `head`, `backbone`, `regions`, `groups`, `group`, `glomeruli` (by class), `without` (regions
        without a glomerulus), `left_out_pictures` (why, by name), `threshold`, `left_out` (as in
        `finder.json`), `notes`.

    Raises:
        GloVLMError: The input is bad, or the output folder holds something else; nothing has been
            written then.
    """
    output = Path(config.output_dir).expanduser()
    with one_writer(output), showing(progress) as show:
        notify = on_event or show
        finish_move(output / UNFINISHED, output)
        remove(output / UNFINISHED)
        _check_output(config, output)
        notify("stage", {"name": "reading the regions"})
        read = read_regions(config)
        name = config.backbone or "mini"
        notify("stage", {"name": f"loading the backbone {name}"})
        model, processor = load_encoder(name)
        model.to(resolve_device(config.device))
        groups = len({region.group for region in read.regions})
        what = f"learning from {len(read.regions)} regions of {groups} groups"
        notify("stage", {"name": f"{what}, all of them left out in turn" if groups > 1 else what})
        finder = Finder.fit(
            getattr(model, "glovlm", model),
            processor,
            read.regions,
            head=config.head,
            seed=config.seed,
            group=read.group,
        )
        finder.synthetic |= is_synthetic(config.regions)
        made_from = {
            "version": VERSION,
            "backbone": encoder_fingerprint(model, processor),
            "regions": read.digests,
            **config.result_settings(),
        }
        with staging(output) as work:
            finder.save(work)
            write_manifest(work, KIND, made_from, [CONFIG, WEIGHTS])
            put_in_place(work, output, FINDER_FILES)
    return _describe(finder, read, config)


def _check_output(config: FindTrainConfig, output: Path) -> None:
    """Refuse a folder that holds something else, or a finder that is not to be replaced."""
    for path in (config.regions, config.outlines):
        given = Path(path).expanduser().resolve()
        if output.resolve() == given:
            raise GloVLMError(
                f"'{output}' holds the regions or outlines: give another --output-dir."
            )
    there = {path.name for path in output.iterdir()} - {LOCK}
    manifest = read_manifest(output)
    is_ours = manifest is not None and manifest.kind == KIND
    if there and not (is_ours and there <= {*FINDER_FILES}):
        raise GloVLMError(
            f"Output folder '{output}' holds files that are no finder: give an empty or a new "
            "folder."
        )
    if there and not config.overwrite:
        raise GloVLMError(
            f"Output folder '{output}' holds a finder: give --overwrite to replace it, or another "
            "folder."
        )


def _describe(finder: Finder, read: OutlinedRegions, config: FindTrainConfig) -> dict[str, Any]:
    """What a person should see of a finder that was just made."""
    left_out: Mapping[str, Any] = finder.left_out
    notes = [*read.notes, *finder.notes]
    if finder.mpp is None:
        notes.append(
            "The scale of the regions is not known: the finder works on pictures whose pixels are "
            "as large as theirs. --mpp or the table's mpp state it."
        )
    if finder.synthetic:
        notes.append("The backbone or the pictures are synthetic: it finds nothing of a kidney.")
    if not finder.stains:
        notes.append("No stain is stated (--stain, or the table's stain), so none is compared.")
    return {
        "kind": KIND,
        "research_use_only": True,
        "synthetic": finder.synthetic,
        "head": config.head,
        "backbone": finder.backbone,
        "mpp": finder.mpp,
        "stains": finder.stains,
        "regions": len(read.regions),
        "groups": len({region.group for region in read.regions}),
        "group": read.group,
        "glomeruli": read.counts,
        "without": sum(not len(region.polygons) for region in read.regions),
        "left_out_pictures": read.left_out,
        "threshold": finder.threshold,
        "left_out": dict(left_out),
        "notes": notes,
    }
