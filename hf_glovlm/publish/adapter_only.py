"""Adapters and heads without the weights of their base: published alone, loaded onto the base."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones.saved import check_config, check_folder, loading_reason, split_revision
from ..errors import GloVLMError
from ..files import read_json, write_json
from .hub_errors import refusal
from .licences import Part
from .source import ADAPTER_FILES, BESIDE, PARTS, Run, check_repo_id, without_places

if TYPE_CHECKING:
    from torch import Tensor

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_published(
    name: str | Path, *, revision: str | None = None, token: str | None = None
) -> tuple[Any, Any]:
    """Load a published model; base weights that it lacks come from their own page.

    Args:
        name: A Hub id, as `owner/name` or `owner/name@revision`, or a folder with the same files.
        revision: Commit, tag or branch of a Hub id.
        token: Of the Hub.

    Returns:
        The classifier in fp32 and evaluation mode, and its processor.

    Raises:
        GloVLMError: There is nothing of ours, or the base cannot be had at the commit that it was
            adapted from.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from ..model import GloVLMForImageClassification, GloVLMProcessor

    name, revision = split_revision(str(name), revision)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        check_repo_id(name)
        try:
            folder = Path(
                snapshot_download(
                    name, revision=revision, token=token, allow_patterns=["*.json", BESIDE, "ad*"]
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise refusal(name, error, token, "loaded") from error
    if folder.is_dir():
        check_folder(folder)
    if (folder / PARTS).is_file():
        return _assemble(folder)
    source = str(folder) if Path(name).expanduser().is_dir() else name
    try:
        kwargs: dict[str, Any] = {"revision": revision, "token": token}
        classifier = GloVLMForImageClassification.from_pretrained(source, **kwargs)
        return classifier.float().eval(), GloVLMProcessor.from_pretrained(source, **kwargs)
    except Exception as error:  # of whatever library reads it
        reason = loading_reason(error, Path(source))
        raise GloVLMError(f"{name} cannot be loaded: {reason}") from error


def load_model(name: str, *, exported: bool = False) -> tuple[Any, Any, dict[str, Any] | None]:
    """Load a model of a run's folder or of the Hub, whole or an adapter or head alone.

    Args:
        name: A folder or a Hub id, as `owner/name` or `owner/name@revision`.
        exported: See `inference.load_classifier`.

    Returns:
        What `inference.load_classifier` returns; results are known of folders alone.

    Raises:
        GloVLMError: There is nothing, or something else.
    """
    from ..inference import load_classifier

    folder = Path(name).expanduser()
    parts = (folder / PARTS).is_file()
    if not parts and (folder.exists() or not _HUB_ID.fullmatch(split_revision(name)[0])):
        return load_classifier(name, exported=exported)
    return *load_published(name), None


def stage_parts(stage: Path, run: Run, what: Part) -> None:
    """Write adapter and head without the base, after checking that both together are the model.

    Args:
        stage: Takes the files.
        run: The run.
        what: `adapter` or `head`.

    Raises:
        GloVLMError: The towers themselves changed, or others could not load the base.
    """
    import torch
    from safetensors.torch import save_file

    from ..inference import load_classifier

    base, revision = _base_on_hub(run.config, what)
    if what == "adapter":
        for name in ADAPTER_FILES:
            run.copy(f"adapter/{name}", stage / name)
        fields = without_places(read_json(stage / "adapter_config.json"))
        fields |= {"base_model_name_or_path": base, "revision": revision}
        write_json(stage / "adapter_config.json", fields, ensure_ascii=False)
    classifier, processor, _ = load_classifier(str(run.folder / "model"))
    towers, _ = _load_base(run.config, stage if what == "adapter" else None)
    beside: dict[str, Tensor] = {}
    for key, value in classifier.state_dict().items():
        name = key.removeprefix("glovlm.backbone.")
        known = towers.get(name) if name != key else None
        if (
            known is not None
            and known.shape == value.shape
            and torch.allclose(known.to(value), value, rtol=1e-5, atol=1e-6)
        ):
            continue  # the same but for the rounding of a merge
        if name.startswith(("vision_model.", "text_model.")):
            raise GloVLMError(
                f"Method '{run.results['config']['method']}' changed the weights of the towers "
                "themselves, so there is nothing that could be published without them: push "
                "without --adapter-only."
            )
        beside[key] = value.clone().contiguous()
    save_file(beside, stage / BESIDE, metadata={"format": "pt"})
    config = without_places(run.config.to_dict(), {"auto_map", "custom_pipelines"})
    config["context_token_ids"] = processor.context_token_ids
    write_json(stage / PARTS, config, ensure_ascii=False)


def _base_on_hub(config: Any, what: Part) -> tuple[str, str]:
    """Hub id and commit of a base, or of the two towers of a pair."""
    base, revision = config.backbone_name or "", config.backbone_revision or ""
    ids, commits = base.split("+"), revision.split("+")
    known = all(map(_HUB_ID.fullmatch, ids)) and len(commits) == len(ids)
    if not known or not all(commits) or "unknown" in commits:
        raise GloVLMError(
            f"The base '{base}' was loaded from a folder, and no Hub id and commit of it are known "
            "from which others could load it: push without --adapter-only, or train again with "
            "--backbone owner/name."
        )
    if config.is_pair and what == "adapter":
        raise GloVLMError(
            f"The adapter of the pair '{base}' cannot be published alone: a pair is put together "
            "here, so nothing on the Hub could take the adapter. Push without --adapter-only."
        )
    return base, revision


def _load_base(config: Any, adapter: Path | None) -> tuple[dict[str, "Tensor"], Any]:
    """Weights of the base at its commit, an adapter merged into them, and the base's processor."""
    from ..backbones import load_backbone

    revision = None if config.is_pair else config.backbone_revision
    poolings = {"vision_pooling": config.vision_pooling, "text_pooling": config.text_pooling}
    model, processor = load_backbone(
        config.backbone_name, revision=revision, **(poolings if config.is_pair else {})
    )
    if model.config.backbone_revision != config.backbone_revision:
        raise GloVLMError(
            f"The base '{config.backbone_name}' is now at commit {model.config.backbone_revision}; "
            f"the model was adapted from {config.backbone_revision}, and a pair is loaded at the "
            "newest commit only."
        )
    backbone = model.backbone
    if adapter is not None:
        from peft import PeftModel

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's own warnings
                backbone = PeftModel.from_pretrained(backbone, str(adapter)).merge_and_unload()
        except Exception as error:  # of PEFT, about whatever its files hold
            raise GloVLMError(
                f"The adapter of '{config.backbone_name}' cannot be loaded: "
                f"{loading_reason(error, adapter)}"
            ) from error
    return dict(backbone.state_dict()), processor


def _assemble(folder: Path) -> tuple[Any, Any]:
    """Base, adapter and head as one model."""
    from safetensors.torch import load_file
    from transformers.initialization import no_init_weights

    from ..model import GloVLMConfig, GloVLMForImageClassification

    try:
        fields = read_json(folder / PARTS)
        check_config(fields, folder / PARTS)
        context = fields.pop("context_token_ids", None)
        config = GloVLMConfig.from_dict(fields)
        beside = load_file(folder / BESIDE)
    except GloVLMError:
        raise
    except Exception as error:  # of whatever library reads it
        reason = loading_reason(error, folder)
        raise GloVLMError(f"{folder} cannot be loaded: {reason}") from error
    has_adapter = (folder / "adapter_config.json").is_file()
    towers, processor = _load_base(config, folder if has_adapter else None)
    with no_init_weights():  # every weight is loaded below
        classifier = GloVLMForImageClassification(config)
    expected = classifier.state_dict()
    weights = {f"glovlm.backbone.{name}": value for name, value in towers.items()} | beside
    try:
        classifier.load_state_dict({k: v for k, v in weights.items() if k in expected}, strict=True)
    except RuntimeError as error:
        raise GloVLMError(
            f"{folder} does not fit its base '{config.backbone_name}': "
            f"{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    processor.context_token_ids, processor.outline = context, config.outline
    processor.draft = config.draft
    return classifier.float().eval(), processor
