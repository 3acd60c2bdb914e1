"""HTML of the page from plain values; all text is escaped."""

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from shelf import Loaded
from uploads import Upload
from work import OUTLINES, Classification, Heat

from hf_glovlm import describe_classes, describe_limits

HEADER = """
# Glomeruli and words

Classify images of single glomeruli with an image-text model, in its words or in yours, and adapt it
to a few labelled images. **Research use only, not for diagnosis.**

Images stay in memory for half an hour after the last click and are not stored or sent elsewhere.
"""

ABOUT = """
Every image is decoded in memory, and the uploaded file is deleted at once. The answers are those of
`glovlm predict`, the heat maps those of `glovlm explain`, and what is adapted here loads with
`hf_glovlm.load_classifier`. The same is served without a page: see *Use via API* below, and the
README of this Space.

An image may carry the outline of its glomerulus: a PNG whose colours are the whole image and whose
alpha channel is 255 inside and 0 outside, as `glovlm data crops` writes it. A model that was
adapted to outlined images sees the inside; the page says when an image has no outline, and what
cannot be judged: inside the outline of a tuft neither crescents nor adhesions nor ischaemia, inside
that of a capsule not what lies around the glomerulus. Pictures are shown whole, paler outside of
the outline.

Everything called *synthetic*, the examples too, comes from a computer program, not from patients.
Numbers made with it test the software and say nothing about kidneys.

**Research use only, not for diagnosis.**
"""


def _wrap(*parts: str) -> str:
    return f'<div class="glo">{"".join(parts)}</div>'


def _name(text: str) -> str:
    """A file's or a class's name, which may break after a line or a dot."""
    return escape(text).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _class(text: str) -> str:
    """A class's name as words."""
    return escape(text.replace("_", " "))


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def _mark(sentences: Sequence[str], kind: str = "mark") -> str:
    if not sentences:
        return ""
    # a calibrated model has much to say: on a phone it would push the answers out of sight
    shown, folded, last = sentences, sentences[:0], sentences[:0]
    if kind == "mark" and len(sentences) > 4:
        shown, folded, last = sentences[:2], sentences[2:-1], sentences[-1:]
    more = ""
    if folded:
        more = f"<details><summary>How far that goes</summary>{_paragraphs(folded)}</details>"
    return f'<div class="{kind}">{_paragraphs(shown)}{more}{_paragraphs(last)}</div>'


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _bars(probabilities: dict[str, float]) -> str:
    rows = "".join(
        f'<dt>{_class(name)}</dt><dd class="bar" aria-hidden="true">'
        f'<i style="width:{100 * p:.1f}%"></i></dd><dd class="n">{p:.2f}</dd>'
        for name, p in probabilities.items()
    )
    return f'<dl class="bars">{rows}</dl>'


def show_tray(images: Sequence[Upload], refused: Sequence[str] = ()) -> str:
    """Tray of thumbnails, and refused files."""
    items = "".join(
        f'<li><img src="{image.thumbnail}" alt=""><span>{_name(image.name)}'
        f"{' (synthetic)' if image.synthetic else ''}{' (outlined)' if image.outline else ''}"
        "</span></li>"
        for image in images
    )
    count = f"{len(images)} image{'' if len(images) == 1 else 's'}"
    if outlined := sum(bool(image.outline) for image in images):
        count += f", {outlined} with an outline"
    return _wrap(
        _mark(refused, "refused"),
        f'<p class="quiet" role="status">{count}</p>',
        f'<ul class="tray">{items}</ul>' if images else "",
    )


def show_engine(engine: Mapping[str, Any]) -> str:
    """Foot of the page: what encodes images, and whether it was measured."""
    sentence = f"Images are encoded in {engine['precision']} by {engine['runtime']}"
    if engine.get("measured"):
        sentence += ", the fastest here that gives the same features, as was measured at the start"
    if (engine["precision"], engine["runtime"]) != ("fp32", "torch"):
        sentence += "; heat maps, and models that are adapted here, in fp32 by torch"
    return _wrap(f'<p class="quiet">{escape(sentence)}.</p>')


def show_model(loaded: Loaded) -> str:
    """Facts of a model, in a few lines."""
    if loaded.classifier is None:
        return _wrap(f"<p>{escape(loaded.name)}</p>", _mark([loaded.why_not]))
    config = loaded.classifier.config
    facts = {
        "Base": config.backbone_name or "not known",
        "Licence": config.backbone_license or "not known",
        "Head": (config.head or {}).get("kind", "not known").replace("_", " "),
        "Classes": ", ".join(map(str, config.id2label.values())).replace("_", " "),
        "Sees": OUTLINES.get(config.outline, f"outlines ({config.outline})"),
    }
    items = "".join(f"<span><b>{k}</b> {escape(v)}</span>" for k, v in facts.items())
    return _wrap(f'<div class="facts">{items}</div>', _mark(describe_limits(config)))


def show_answers(
    result: Classification, images: Sequence[Upload], support: Sequence[Upload] = ()
) -> str:
    """A card an image: the picture, the sentence, the probabilities, the nearest support images."""
    cards = []
    for answer, image, near in itertools.zip_longest(result.answers, images, result.neighbours):
        more = ""
        if near:
            cases = [
                f"{support[row].name if row < len(support) else f'number {row + 1}'}, "
                f"{label}, cosine {cosine:.2f}"
                for row, label, cosine in near
            ]
            more = f'<p class="quiet">Nearest support images:</p>{_list(cases)}'
        mark = ' <span class="quiet">(synthetic)</span>' if image.synthetic else ""
        cards.append(
            f'<article><img src="{image.thumbnail}" alt="">'
            f"<h3>{_name(answer.file_name)}{mark}</h3><p>{escape(answer.sentence)}</p>"
            f"{_bars(answer.probabilities)}{more}</article>"
        )
    return _wrap(
        _mark(result.limits),
        f'<p class="quiet">{escape(result.scale)}</p>',
        f'<div class="cards">{"".join(cards)}</div>',
    )


def show_words(config: Any) -> str:
    """Prompts and definitions of a classifier's classes."""
    rows = "".join(
        f"<tr><th scope=row>{_class(words.name)}</th>"
        f"<td>{_list(words.prompts) if words.prompts else 'no text has a part in it'}</td>"
        f"<td>{escape(words.definition or 'not in the terminology')}</td></tr>"
        for words in describe_classes(config)
    )
    return _wrap(
        '<div class="scroll"><table class="words"><thead><tr><th scope=col>Class'
        f"<th scope=col>Prompts<th scope=col>Definition</tr></thead><tbody>{rows}</tbody></table>"
        "</div>"
    )


def show_heat(heat: Heat) -> str:
    """The picture with the map over it; the slider sets how strongly the map shows."""
    return _wrap(
        f'<div class="heat"><img src="{heat.image}" alt="The image"><img src="{heat.colours}" '
        f'alt="Heat map over the image"></div>',
        "".join(f"<p>{escape(sentence)}</p>" for sentence in heat.sentences),
    )


def show_adapted(
    estimate: str, results: dict[str, Any] | None, notes: Sequence[str], limits: Sequence[str]
) -> str:
    """Estimate, metrics by class and notes of an adapted model."""
    table = ""
    if results is not None:
        rows = "".join(
            f"<tr><th scope=row>{_class(name)}</th><td>{c['n']}</td><td>{c['groups']}</td>"
            f"<td>{_number(c['recall'])}</td><td>{_number(c['auc'])}</td></tr>"
            for name, c in results["per_class"].items()
        )
        heads = "".join(
            f"<th scope=col>{h}</th>" for h in ("Class", "Images", "Patients", "Recall", "AUC")
        )
        table = (
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return _wrap(
        _mark(limits), f"<p><b>{escape(estimate)}</b></p>", table, _list(notes) if notes else ""
    )


def _number(entry: dict[str, Any]) -> str:
    value = entry["value"]
    return "undefined" if value is None else f"{value:.2f}"


def show_pair(
    names: Sequence[str], results: Sequence[Classification], images: Sequence[Upload]
) -> str:
    """Two models' answers side by side."""
    first, second = (part.answers for part in results)
    same = sum(a.label == b.label for a, b in zip(first, second, strict=True))
    heads = "".join(f"<th scope=col>{escape(h)}</th>" for h in ("Image", *names))
    rows = "".join(
        f'<tr><th scope=row><ul class="tray"><li><img src="{image.thumbnail}" alt="">'
        f"{_name(image.name)}</li></ul></th>"
        + "".join(
            f'<td data-model="{escape(name)}"><p>{escape(a.sentence)}</p>'
            f"{_bars(a.probabilities)}</td>"
            for name, a in zip(names, pair, strict=True)
        )
        + "</tr>"
        for image, *pair in zip(images, first, second, strict=True)
    )
    common = [s for s in results[0].limits if s in results[1].limits]
    limits = [
        f"{name}: {sentence}"
        for name, part in zip(names, results, strict=True)
        for sentence in part.limits
        if sentence not in common
    ]
    return _wrap(
        _mark([*limits, *common]),
        f"<p><b>The two name the same class for {same} of {len(first)} images.</b></p>",
        f'<div class="scroll"><table class="pair"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
    )


def show_batch(
    rows: Sequence[dict[str, Any]], refused: Sequence[str], limits: Sequence[str]
) -> str:
    """Number of images of each predicted class, and refused files."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["predicted"]] = counts.get(row["predicted"], 0) + 1
    cells = "".join(
        f"<tr><th scope=row>{_class(name)}</th><td>{n}</td></tr>" for name, n in counts.items()
    )
    return _wrap(
        _mark(limits),
        _mark(refused, "refused"),
        f"<p><b>{len(rows)} images classified, {len(refused)} refused.</b></p>"
        "<table><thead><tr><th scope=col>Predicted</th><th scope=col>Images</th></tr></thead>"
        f"<tbody>{cells}</tbody></table>",
    )
