"""Stage of an upload: copied files without private values, searched for identifiers."""

import errno
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import GloVLMError
from ..files import check_fields, read_json, read_text, write_json
from ..model.configuration_glovlm import AUTO_MAP, PIPELINES
from ..settings import read_yaml
from .adapter_only import stage_parts
from .card import SUBGROUPS, Publication, render_card
from .identifiers import COLUMNS, Identifiers, Text, find_shape, refuse_named, texts_of
from .licences import Part, describe_licence
from .source import MODEL_FILES, SHARD, Run, without_places, write_code

_CODE = {*AUTO_MAP.values(), "processing_glovlm.GloVLMProcessor"}
_CODE |= {str(pipeline["impl"]) for pipeline in PIPELINES.values()}
_VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt")
_FIGURES = ("calibration", "confusion_matrix", "per_class", "reliability", "risk_coverage")
# `results.json` as it is published: what stands here, and nothing that was added since.
_CONFIG_KEYS = (
    "method", "shots", "seed", "draw", "shots_from", "allow_fewer", "stain", "validation_shots",
    "test_fraction", "loss", "method_config", "epochs", "lr", "weight_decay", "batch_size",
    "max_steps", "cross_validate", "calibration_groups", "temperature", "conformal", "alpha",
    "per_class", "max_risk", "prior", "augment", "views", "mixed_precision", "accumulate",
    "clip_norm", "n_resamples", "outline", "outline_of", "centre",
)  # fmt: skip
_DATA_KEYS = (
    "name", "hub_id", "fingerprint", "classes", "counts", "groups", "group_column", "split_hash",
    "shots", "sampler", "support", "notes", "mpp", "stain", "trained_stains", "license", "citation",
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
        except RecursionError as error:
            raise GloVLMError(
                "A file of the run is nested too deep to be published: restore a copy of it."
            ) from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stage(stage: Path, run: Run, repo_id: str, what: Part, reason: str | None) -> None:
    """Write the files of an upload, then search them for identifiers."""
    import yaml

    written = [Text("repository", repo_id), Text("reason", reason or "", by_hand=True)]
    refuse_named("the command", written, run.identifiers)
    if what == "full":
        _stage_model(stage, run)
    else:
        stage_parts(stage, run, what)
    results = _publishable(run)
    write_json(stage / "results.json", results, ensure_ascii=False)
    classes = {
        c["name"]: {"display_name": c["display_name"], "prompts": list(c["prompts"])}
        | ({"grade": c["grade"]} if isinstance(c.get("grade"), int) else {})
        for c in results["data"]["classes"]
    }
    text = yaml.safe_dump({"classes": classes}, sort_keys=False, allow_unicode=True)
    (stage / "classes.yaml").write_text(text, encoding="utf-8")
    for file in sorted((run.folder / "figures").glob("*")):
        if file.stem in _FIGURES and file.suffix in (".png", ".svg"):
            (stage / "figures").mkdir(exist_ok=True)
            run.copy(f"figures/{file.name}", stage / "figures" / file.name)
        else:
            run.left_out.append(f"figures/{file.name} stays here: it may show an image.")
    terms = describe_licence(run.config, what, reason)
    base, revision = run.config.backbone_name, run.config.backbone_revision
    card = render_card(results, Publication(repo_id, what, base, revision, terms))
    (stage / "README.md").write_text(card, encoding="utf-8")
    search_folder(stage, run.identifiers)


def _stage_model(stage: Path, run: Run) -> None:
    """Copy the files that `from_pretrained` reads, and write the code that they name."""
    model = run.folder / "model"
    for name in sorted(path.name for path in model.iterdir()):
        if name not in MODEL_FILES and not SHARD.fullmatch(name):
            continue
        run.copy(f"model/{name}", stage / name)
        if name.endswith("config.json"):
            content = without_places(read_json(stage / name))
            _check_code(model / name, content)
            write_json(stage / name, content, ensure_ascii=False)
        elif name.endswith(".index.json"):
            _check_shards(model / name, read_json(stage / name), stage)
    write_code(stage, run)


def _check_code(file: Path, content: dict[str, Any]) -> None:
    """Refuse a file that names code other than the package's own."""
    check_fields(file, content, dict.fromkeys(("auto_map", "custom_pipelines"), (dict, type(None))))
    pipelines = (content.get("custom_pipelines") or {}).values()
    named = [one.get("impl") if isinstance(one, dict) else one for one in pipelines]
    for name in _strings([*(content.get("auto_map") or {}).values(), *named]):
        if name not in _CODE:
            raise GloVLMError(
                f"'{file}' names the code '{name}', which is none of this package, and no code of "
                "others is published: restore a copy, or train the run again."
            )


def _strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _strings(value)
        elif value is not None:
            yield str(value)


def _check_shards(file: Path, content: dict[str, Any], stage: Path) -> None:
    """Refuse an index of weights that lie elsewhere."""
    check_fields(file, content, {"weight_map": (dict,)})
    for name in set(map(str, content["weight_map"].values())):
        if not SHARD.fullmatch(name) or not (stage / name).is_file():
            raise GloVLMError(
                f"'{file}' names the weights '{name}', which are not inside the model's folder "
                "under such a name: restore a copy, or train the run again."
            )


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
    if _bad(data["name"], run.identifiers, by_hand=True):
        run.left_out.append("The name of the data stays here: it names a file, a group or a place.")
        data["name"] = public["data"] = "unnamed data"
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
        if not _bad(text, forbidden):
            return False
        dropped.append(text)
        return True

    if isinstance(value, dict):
        return {k: clean(v, forbidden, dropped) for k, v in value.items() if not bad(k)}
    if isinstance(value, list):
        return [clean(v, forbidden, dropped) for v in value if not bad(v)]
    return "" if bad(value) else value


def _bad(text: Any, forbidden: Identifiers, *, by_hand: bool = False) -> bool:
    return isinstance(text, str) and bool(
        forbidden.find(text, by_hand=by_hand) or find_shape(text, by_hand=by_hand)
    )


# -------------------------------------------------------------------------------- the search


def check_identifiers(
    folder: str | Path,
    *,
    names: Iterable[str] = (),
    files: Iterable[str] = (),
    labels: Iterable[str] = (),
) -> None:
    """Check that no file of a folder names a patient, a slide or a file, before it is passed on.

    Args:
        folder: What leaves: JSON, YAML, Markdown, vocabularies, weights, figures.
        names: Identifiers, such as patient, case and slide ids, in any spelling.
        files: Names of image files.
        labels: Class names, which folders of images may bear.

    Raises:
        GloVLMError: One does, or holds what looks like a case number, a date or a path; names the
            file and the field.
    """
    given = (frozenset(map(str, part)) for part in (names, files, labels))
    forbidden = dict(zip(("names", "files", "labels"), given, strict=True))
    search_folder(Path(folder), Identifiers(**forbidden))


def search_folder(folder: Path, forbidden: Identifiers) -> None:
    """Search all files of a folder, and their names, for identifiers.

    Args:
        folder: What leaves: JSON, YAML, Markdown, vocabularies, weights, figures, code.
        forbidden: The identifiers.

    Raises:
        GloVLMError: There are some; names the file, the field and the identifier.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        refuse_named(name, [Text("its name", name)], forbidden)
        if file.suffix == ".safetensors":
            refuse_named(name, texts_of(_read_header(file, name)), forbidden)
        elif file.name in _VOCABULARIES:
            _search_vocabulary(name, read_text(file), forbidden)
        elif file.suffix == ".json":
            content = read_json(file)
            _refuse_columns(name, content)
            if file.name == "tokenizer.json":
                model = content.get("model")
                model = model if isinstance(model, dict) else {}
                words = (_plain(model.pop(part, None)) for part in ("vocab", "merges"))
                _search_vocabulary(name, "\n".join(chain(*words)), forbidden)
            refuse_named(name, texts_of(content), forbidden)
        elif file.suffix == ".yaml":
            refuse_named(name, texts_of(read_yaml(file)), forbidden)
        elif file.suffix == ".png":
            _redraw(file, name)
        elif file.suffix not in (".onnx", ".data", ".py"):  # graphs, and the package's own
            text = read_text(file)
            if file.suffix == ".svg" and re.search(r"<image|data:|<script|href\s*=", text):
                raise GloVLMError(f"{name} holds an image, and no image may leave: remove it.")
            refuse_named(name, texts_of(_front_matter(text)), forbidden)
            refuse_named(name, [Text("", text)], forbidden)


def _front_matter(text: str) -> Any:
    """YAML before a Markdown text, where its escapes would hide something."""
    import yaml

    parts = re.split(r"^---$", text, maxsplit=2, flags=re.M)
    return yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None


def _read_header(file: Path, name: str) -> Any:
    """Metadata and names of the tensors of a file of weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as stream:
            return {"metadata": stream.metadata(), "tensors": list(stream.keys())}
    except (OSError, SafetensorError) as error:
        raise GloVLMError(
            f"Nothing was published: {name} of the run is damaged ({error}): restore a "
            "copy, or train it again."
        ) from error


def _plain(entries: Any) -> Iterator[str]:
    """Entries of a vocabulary or list of merges, in whichever form it has."""
    for entry in entries if isinstance(entries, list | dict) else ():
        yield entry if isinstance(entry, str) else " ".join(map(str, entry))


def _search_vocabulary(name: str, text: str, forbidden: Identifiers) -> None:
    for line in text.splitlines():
        if identifier := forbidden.find_entry(line):
            refuse_named(name, [Text("its vocabulary", identifier)], forbidden)


def _refuse_columns(name: str, content: Any) -> None:
    """Refuse a value that stands under the name of a column of identifiers."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in COLUMNS and key not in ("block", "reader") and value not in (None, "", []):
                raise GloVLMError(
                    f"Nothing was published: {name} holds a value of '{key}', which names "
                    "somebody: remove it."
                )
            _refuse_columns(name, value)
    elif isinstance(content, list):
        for value in content:
            _refuse_columns(name, value)


def _redraw(file: Path, name: str) -> None:
    """Keep nothing but the pixels of a figure."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as opened:
            pixels = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
        clean_copy = Image.new(pixels.mode, pixels.size)
        clean_copy.paste(pixels)
        clean_copy.save(file, "PNG")
    except Exception as error:  # of whatever is no figure
        raise GloVLMError(
            f"Nothing was published: {name} is no PNG image ({error}): remove it."
        ) from error
