"""Prepares an upload: copies files, removes private values, scans for identifiers."""

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import GloVLMError
from ..files import check_fields, read_json, write_json
from .adapter_only import stage_parts
from .card import SUBGROUPS, Publication, render_card
from .identifiers import (
    MODEL_FILES,
    SHARD,
    Identifiers,
    Run,
    without_places,
)
from .licences import Part, describe_licence

_PATH = re.compile(r"(?<![\w./])(?:~?/|[A-Za-z]:[\\/])[\w.-]+[\\/]")
_FIGURES = ("calibration", "confusion_matrix", "per_class", "reliability", "risk_coverage")
# `results.json` as it is published: what stands here, and nothing that was added since.
_CONFIG_KEYS = (
    "method", "shots", "seed", "draw", "shots_from", "allow_fewer", "stain", "validation_shots",
    "test_fraction", "loss", "method_config", "epochs", "lr", "weight_decay", "batch_size",
    "max_steps", "cross_validate", "calibration_groups", "temperature", "conformal", "alpha",
    "per_class", "max_risk", "prior", "augment", "views", "mixed_precision", "accumulate",
    "clip_norm", "n_resamples",
)  # fmt: skip
_DATA_KEYS = (
    "name", "hub_id", "fingerprint", "classes", "counts", "groups", "group_column", "split_hash",
    "shots", "sampler", "support", "notes", "mpp", "stain", "license", "citation",
)  # fmt: skip
_RESULT_KEYS = (
    "kind", "metrics", "per_class", "confusion_matrix", "reliability", "prior", "threshold", "n",
    "n_groups", "bootstrap", "method", "backbone", "training", "transductive", "prompt_sets",
    "prior_correction", "calibration", "abstention", "sets", "notes",
    "synthetic", "timing", "environment",
)  # fmt: skip


@contextmanager
def staged(run: Run, repo_id: str, what: Part, reason: str | None) -> Iterator[Path]:
    """Temporary folder with the files of an upload; removed at the end, whatever happens.

    Args:
        run: The run.
        repo_id: Where it goes.
        what: What of it.
        reason: Why it may, for the card.

    Raises:
        GloVLMError: The disk is full, or something that may not leave would.
    """
    folder = Path(tempfile.mkdtemp(prefix="glovlm-push-"))
    try:
        try:
            _stage(folder, run, repo_id, what, reason)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise GloVLMError(
                    f"The disk of {folder.parent} is full: set TMPDIR to a folder with room for "
                    "the model. Nothing was published."
                ) from error
            raise GloVLMError(f"The run cannot be laid out for publishing: {error}") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stage(stage: Path, run: Run, repo_id: str, what: Part, reason: str | None) -> None:
    """Write the files of an upload, then scan them for identifiers."""
    import yaml

    if what == "full":
        _stage_model(stage, run.folder / "model")
    else:
        stage_parts(stage, run, what)
    results = _publishable(run)
    write_json(stage / "results.json", results, ensure_ascii=False)
    classes = {
        c["name"]: {"display_name": c["display_name"], "prompts": list(c["prompts"])}
        for c in results["data"]["classes"]
    }
    text = yaml.safe_dump({"classes": classes}, sort_keys=False, allow_unicode=True)
    (stage / "classes.yaml").write_text(text, encoding="utf-8")
    for file in sorted((run.folder / "figures").glob("*")):
        if file.stem in _FIGURES and file.suffix in (".png", ".svg"):
            (stage / "figures").mkdir(exist_ok=True)
            shutil.copyfile(file, stage / "figures" / file.name)
        else:
            run.left_out.append(f"figures/{file.name} stays here: it may show an image.")
    terms = describe_licence(run.config, what, reason)
    base, revision = run.config.backbone_name, run.config.backbone_revision
    card = render_card(results, Publication(repo_id, what, base, revision, terms))
    (stage / "README.md").write_text(card, encoding="utf-8")
    _scan(stage, run.identifiers)


def _stage_model(stage: Path, model: Path) -> None:
    """Copy the files that `from_pretrained` reads, and the code that they name."""
    for file in sorted(model.iterdir()):
        if file.name not in MODEL_FILES and not SHARD.fullmatch(file.name):
            continue
        if file.suffix == ".json" and file.name.endswith("config.json"):
            write_json(stage / file.name, without_places(read_json(file)), ensure_ascii=False)
        else:
            shutil.copyfile(file, stage / file.name)
    _stage_code(stage, model)


def _stage_code(stage: Path, model: Path) -> None:
    """Copy the modules of `auto_map` and what these import from each other."""
    from transformers.dynamic_module_utils import get_relative_import_files

    named: list[dict[str, Any]] = []
    for file in stage.glob("*config.json"):
        content = read_json(file)
        check_fields(model / file.name, content, {"auto_map": (dict, type(None))})
        named.append(content.get("auto_map") or {})
    for module in sorted({str(name).split(".")[0] for row in named for name in row.values()}):
        file = model / f"{module}.py"
        if not file.is_file():
            raise GloVLMError(
                f"{model} names the code {file.name} and does not hold it: train the run again."
            )
        for path in (file, *map(Path, get_relative_import_files(file))):
            shutil.copyfile(path, stage / path.name)


def _publishable(run: Run) -> dict[str, Any]:
    """Results for publication: without what leads to a person or a disk."""
    results, config = run.results, run.results["config"]
    prompts = config.get("prompts")
    public = {key: config[key] for key in _CONFIG_KEYS if key in config} | {
        "data": results["data"]["name"],
        "backbone": results["backbone"].get("name"),
        "episodes": "frozen" if config.get("episodes") else None,
        "prompts": prompts if prompts in ("auto", "catalog", "terminology") else "classes.yaml",
    }
    data = {key: results["data"][key] for key in _DATA_KEYS if key in results["data"]}
    rest = {key: results[key] for key in _RESULT_KEYS if key in results}
    if parts := {k: v for k, v in results.get("subgroups", {}).items() if k in SUBGROUPS}:
        rest["subgroups"] = parts
    dropped: list[str] = []
    cleaned: dict[str, Any] = clean(
        {"config": public, "data": data, **rest}, run.identifiers, dropped
    )
    if dropped:
        run.left_out.append(
            f"{len(dropped)} texts of results.json stay here: they name a file, a group or a place."
        )
    return cleaned


def clean(value: Any, forbidden: Identifiers, dropped: list[str]) -> Any:
    """Remove texts that hold identifiers or paths: from a list wholly, elsewhere as `""`.

    Args:
        value: Plain values.
        forbidden: The identifiers.
        dropped: Takes the removed texts.
    """

    def bad(text: Any) -> bool:
        if not isinstance(text, str) or not (forbidden.find(text) or _PATH.search(text)):
            return False
        dropped.append(text)
        return True

    if isinstance(value, dict):
        return {k: clean(v, forbidden, dropped) for k, v in value.items() if not bad(k)}
    if isinstance(value, list):
        return [clean(v, forbidden, dropped) for v in value if not bad(v)]
    return "" if bad(value) else value


def _scan(stage: Path, forbidden: Identifiers) -> None:
    """Scan the staged files for identifiers, and refuse if there are any."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(path for path in stage.rglob("*") if path.is_file()):
        name = file.relative_to(stage).as_posix()
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="np") as stream:
                    text = json.dumps(stream.metadata())
            except (OSError, SafetensorError) as error:
                raise GloVLMError(
                    f"Nothing was published: {name} of the run is damaged ({error}): restore a "
                    "copy, or train it again."
                ) from error
        elif file.suffix in (".png", ".txt") or file.name in ("tokenizer.json", "vocab.json"):
            continue  # the words of a vocabulary are nobody's; a figure of ours holds no words
        else:
            text = file.read_text(encoding="utf-8")
        if file.suffix == ".svg" and "<image" in text:
            raise GloVLMError(f"{name} holds an image, and no image may leave: remove it.")
        if identifier := forbidden.find(text):
            raise GloVLMError(
                f"Nothing was published: {name} names '{identifier}', which is a patient, a "
                "file or a folder of the run. Rename the class or the prompt that holds it."
            )
