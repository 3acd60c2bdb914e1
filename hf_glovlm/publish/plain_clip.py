"""Plain CLIP checkpoints: export of a run for code that knows transformers alone."""

from pathlib import Path

from ..errors import GloVLMError
from ..files import read_json, replacing, write_json, write_text
from ..rendering import Markdown, literal, render
from .identifiers import Text, refuse_named
from .licences import check_publishing, describe_licence
from .source import read_run, without_places
from .staging import search_folder

_LAST_CALL = (
    "max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id",
)  # fmt: skip


def export_clip(run: str | Path, folder: str | Path, *, reason: str | None = None) -> Path:
    """Export a run as a plain CLIP checkpoint, which transformers loads without code of ours.

    The towers hold what was merged into them; the classes are then texts: the mean of the unit
    features of a class's prompts, which stand in the folder's README. Temperature and prior
    correction have no place in such a checkpoint.

    Args:
        run: The output folder of `glovlm train`.
        folder: Where to write; must not exist, or be empty.
        reason: Why, where the licence of the base asks for one.

    Returns:
        The folder.

    Raises:
        GloVLMError: The model is no CLIP (a pair, SigLIP), changed its blocks, sees outlines, or
            classifies by something other than texts.
    """
    import torch
    from transformers import CLIPProcessor

    from ..inference import load_classifier

    finished, target = read_run(Path(run).expanduser()), Path(folder).expanduser()
    config, method = finished.config, finished.results["config"]["method"]
    check_publishing(config, "export", reason)
    refuse_named("the command", [Text("reason", reason or "", True)], finished.identifiers)
    kind = "a pair of towers" if config.is_pair else config.backbone_config.model_type
    if kind != "clip":
        raise GloVLMError(f"Only a CLIP can be written as a CLIP checkpoint; this is {kind}.")
    if config.inserts or getattr(config, "context", None):
        raise GloVLMError(
            f"Method '{method}' changed the blocks of the towers, which "
            "a plain CLIP has no place for: publish it as it is (glovlm push)."
        )
    if config.outline != "ignore":
        raise GloVLMError(
            f"This model sees what lies inside of an outline (outline '{config.outline}'), and a "
            "plain CLIP takes the whole image into its class token: publish it as it is (glovlm "
            "push), or export it as ONNX."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GloVLMError(f"{target} is there already: give a new or an empty folder.")
    classifier, processor, _ = load_classifier(str(finished.folder / "model"))
    texts = classifier.config.prompts
    same = False
    if texts and processor.context_token_ids is None and getattr(classifier.head, "cosine", False):
        with torch.inference_mode():
            prototypes = classifier.glovlm.class_prototypes(**processor.encode_prompts(texts))
        same = torch.allclose(prototypes, classifier.head.weight, atol=1e-4)
        same = same and not bool(classifier.head.bias.any())
    if not same:
        raise GloVLMError(
            f"The classes of method '{method}' are no plain texts, so a "
            "CLIP checkpoint would not answer as this model does: publish it as it is (glovlm "
            "push)."
        )
    try:
        with replacing(target) as scratch:
            classifier.glovlm.backbone.save_pretrained(scratch)
            # How texts were last cut and padded here is kept in the tokenizer; others begin afresh.
            processor.tokenizer.backend_tokenizer.no_truncation()
            processor.tokenizer.backend_tokenizer.no_padding()
            CLIPProcessor(processor.image_processor, processor.tokenizer).save_pretrained(scratch)
            for file in scratch.glob("*.json"):
                plain = without_places(read_json(file), {"auto_map", *_LAST_CALL})
                if plain.get("processor_class"):
                    plain["processor_class"] = "CLIPProcessor"
                write_json(file, plain, ensure_ascii=False)
            card = {
                "classes": [
                    [literal(config.id2label[k]), Markdown(" · ".join(map(literal, t)))]
                    for k, t in enumerate(texts)
                ],
                "terms": describe_licence(config, "export", reason),
            }
            write_text(scratch / "README.md", render("plain_clip_card.md.j2", card))
            search_folder(scratch, finished.identifiers)
    except OSError as error:
        raise GloVLMError(f"{target} cannot be written: {error.strerror or error}.") from error
    return target
