"""HTML of the page from plain values; all text is escaped."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from shelf import HUB_ID, Loaded
from uploads import Upload, make_examples
from work import OUTLINES, Classification, Heat

from hf_glovlm import __version__, describe_classes, describe_limits, explain

WARNING = "Research use only, not for diagnosis."  # stands at the top, and nowhere else
HEADER = f"""
<a class="skip" href="#answers">Skip to the answer</a>
<header class="glo"><h1>Glomeruli and words</h1>
<p>Classify images of single glomeruli in words, compare two models, adapt one to your labels.</p>
<p class="warning" role="note"><b>{WARNING}</b> Images stay in memory until half an hour after the
last click; nothing is stored or sent elsewhere.</p></header>
"""
ADAPTING = """
<p class="glo quiet">Give labelled images as a ZIP, as a folder, or by dropping them class by class.
A table names the file, the class and the patient of each image. With patients, each one is
predicted by a model that did not learn from that patient; without, no performance is estimated.</p>
"""
LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"
EMPTY = {  # what an answer's place shows before there is one
    "answers": "The answers come here. Drop images on the left, or click one of the drawings.",
    "adapt": "The estimate and the model come here, once there are labelled images of two classes.",
    "batch": "The table comes here: a row an image, to sort and to download.",
}
MOST_BARS = 6  # classes shown before the others are folded away
MOST_SENTENCES = 3  # of limits and of refusals, likewise


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


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _mark(sentences: Sequence[str], kind: str = "mark", more: str = "How far that goes") -> str:
    """A box of sentences; of many, those after the first are folded away."""
    sentences = [sentence for sentence in sentences if sentence != WARNING]
    if not sentences:
        return ""
    shown, folded = sentences, sentences[:0]
    if len(sentences) > MOST_SENTENCES:
        shown, folded = sentences[: MOST_SENTENCES - 1], sentences[MOST_SENTENCES - 1 :]
    rest = f"<details><summary>{more} ({len(folded)} more)</summary>{_paragraphs(folded)}</details>"
    return f'<div class="{kind}">{_paragraphs(shown)}{rest if folded else ""}</div>'


def _refused(sentences: Sequence[str]) -> str:
    return _mark(sentences, "refused", "Further files that were not taken")


def show_refused(sentences: Sequence[str]) -> str:
    """Why something was not taken."""
    return _wrap('<div role="alert">', _refused(sentences), "</div>")


def _status(text: str) -> str:
    return f'<p class="quiet" role="status">{escape(text)}</p>'


def _count(number: int, what: str = "image") -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bars(probabilities: Mapping[str, float], unsure: bool = False) -> str:
    """Probabilities by size; the greatest is named so, in words."""
    order = sorted(probabilities.items(), key=lambda item: -item[1])
    rows = [
        f'<div class="{"first" if k == 0 else "other"}"><dt>{_class(name)}'
        f"{' <span class=tag>most probable</span>' if k == 0 else ''}</dt>"
        f'<dd class="n">{p:.2f}</dd><dd class="bar" aria-hidden="true">'
        f'<i style="width:{100 * p:.1f}%"></i></dd></div>'
        for k, (name, p) in enumerate(order)
    ]
    shown, folded = rows, rows[:0]
    if len(rows) > MOST_BARS + 1:
        shown, folded = rows[:MOST_BARS], rows[MOST_BARS:]
    kind = "bars unsure" if unsure else "bars"
    bars = f'<dl class="{kind}">{"".join(shown)}</dl>'
    if folded:
        summary = f"{len(folded)} further classes, each below {order[MOST_BARS - 1][1]:.2f}"
        bars += (
            f'<details><summary>{summary}</summary><dl class="{kind}">{"".join(folded)}</dl>'
            "</details>"
        )
    return bars


def show_empty(place: str) -> str:
    """An answer's place before there is one."""
    return _wrap(f'<p class="empty">{escape(EMPTY[place])}</p>')


def show_gallery() -> str:
    """Synthetic drawings to click, one of each class."""
    buttons = "".join(
        f'<button type="button" data-example="{escape(image.name)}" '
        f'aria-label="Classify the synthetic drawing: {_class(image.label)}">'
        f'<img src="{image.thumbnail}" alt=""><span>{_class(image.label)}</span></button>'
        for image in first_examples()
    )
    return _wrap(
        '<p class="quiet">Or click a synthetic drawing, made by a program:</p>'
        f'<div class="gallery" role="group" aria-label="Synthetic drawings">{buttons}</div>'
    )


@cache
def first_examples() -> tuple[Upload, ...]:
    """One synthetic drawing of each class."""
    by_class = {image.label: image for image in reversed(make_examples())}
    return tuple(reversed(by_class.values()))


def show_tray(images: Sequence[Upload], refused: Sequence[str] = ()) -> str:
    """Tray of thumbnails, and refused files."""
    items = "".join(
        f'<li title="{escape(image.name)}"><img src="{image.thumbnail}" alt="">'
        f"<span>{_name(image.name)}"
        f"{_origin(image)}</span></li>"
        for image in images
    )
    count = _count(len(images))
    if outlined := sum(bool(image.outline) for image in images):
        count += f", {outlined} with an outline"
    return _wrap(
        _refused(refused),
        _status(count) if images else "",
        f'<ul class="tray" tabindex="0" aria-label="Images">{items}</ul>' if images else "",
    )


def show_engine(engine: Mapping[str, Any]) -> str:
    """What encodes images, and whether it was measured, in a sentence."""
    sentence = f"Images are encoded in {engine['precision']} by {engine['runtime']}"
    if engine.get("measured"):
        sentence += ", the fastest here that gives the same features, as was measured at the start"
    if (engine["precision"], engine["runtime"]) != ("fp32", "torch"):
        sentence += "; heat maps, and models that are adapted here, in fp32 by torch"
    return f"{escape(sentence)}."


def show_footer(engine: Mapping[str, Any]) -> str:
    """Foot of the page: licence, documentation, cards, and what computes."""
    docs = os.environ.get("GLOVLM_DOCS", "").strip()
    place = (
        f'href="{escape(docs)}"' if re.match("https?://", docs) else 'href="#card" data-tab="About"'
    )
    links = [
        f'<a href="{LICENCE}">Licence: Apache-2.0</a>',
        f"<a {place}>Documentation</a>",
        '<a href="#card" data-tab="About">Card of this Space</a>',
    ]
    items = "".join(f"<li>{link}</li>" for link in links)
    return (
        f'<footer class="glo"><ul><li>hf-glovlm {__version__}</li>{items}</ul>'
        f'<p class="quiet">{show_engine(engine)}</p></footer>'
    )


@cache
def read_card() -> str:
    """The card of this Space: its README, without what the Hub reads and what stands above."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    body = text.split("---", 2)[2].split("\n## ", 1)[1]
    return f"## {body.replace(f'**{WARNING}**', '').replace(WARNING, '')}"


def show_model(loaded: Loaded) -> str:
    """Facts of a model, in a few lines."""
    if loaded.classifier is None:
        return _wrap(f"<p>{escape(loaded.name)}</p>", _mark([loaded.why_not]))
    config = loaded.classifier.config
    classes = [str(name) for name in config.id2label.values()]
    facts = {
        "Base": config.backbone_name or "not known",
        "Licence": config.backbone_license or "not known",
        "Head": (config.head or {}).get("kind", "not known").replace("_", " "),
        "Classes": f"{len(classes)}: {', '.join(classes)}".replace("_", " "),
        "Sees": OUTLINES.get(config.outline, f"outlines ({config.outline})"),
    }
    items = "".join(f"<span><b>{k}</b> {escape(v)}</span>" for k, v in facts.items())
    if HUB_ID.fullmatch(loaded.name) and not Path(loaded.name).exists():
        items += f'<a href="https://huggingface.co/{escape(loaded.name)}">its card on the Hub</a>'
    limits = [sentence for sentence in describe_limits(config) if sentence != WARNING]
    return _wrap(
        f'<div class="facts">{items}</div>',
        f"<details><summary>Limits of this model ({len(limits)})</summary>"
        f"{_paragraphs(limits)}</details>",
    )


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
            more = f"<details><summary>Nearest support images</summary>{_list(cases)}</details>"
        cards.append(
            f'<article><img src="{image.thumbnail}" alt="">'
            f"<div><h2>{_name(answer.file_name)}{_origin(image)}</h2>"
            f"{_sentence(answer)}</div>"
            f"{_bars(answer.probabilities, answer.answered is False)}{more}</article>"
        )
    unlike = sum(_is_unlike(answer) for answer in result.answers)
    count = f"{_count(len(cards))} classified"
    if unlike:
        count += f", {unlike} unlike what the model learned from"
    return _wrap(
        _status(f"{count}. {result.scale}"),
        f'<div class="cards">{"".join(cards)}</div>',
        _mark(result.limits),
    )


def _origin(image: Upload) -> str:
    """What a picture is, beside its name."""
    marks = ["synthetic"] if image.synthetic else []
    marks += ["outlined"] if image.outline else []
    return f' <span class="quiet">({", ".join(marks)})</span>' if marks else ""


def _is_unlike(answer: Any) -> bool:
    return answer.support_distance is not None and answer.support_distance > 1


def _sentence(answer: Any) -> str:
    """A prediction in words; plainly, where the image is a foreign one."""
    if _is_unlike(answer):
        return (
            '<p class="foreign"><b>Unlike what this model learned from.</b> '
            f"{escape(answer.sentence)}</p>"
        )
    far = ""
    if answer.support_distance is not None:
        far = (
            f'<p class="quiet">Distance to what it learned from: {answer.support_distance:.1f} of '
            "the limit.</p>"
        )
    return f"<p>{escape(answer.sentence)}</p>{far}"


def show_words(config: Any) -> str:
    """Prompts and definitions of a classifier's classes."""
    parts = "".join(
        f"<dt>{_class(words.name)}</dt><dd>{escape(words.definition or 'Not in the terminology.')}"
        f"{_list(words.prompts) if words.prompts else '<p>No text has a part in it.</p>'}</dd>"
        for words in describe_classes(config)
    )
    return _wrap(f'<dl class="words">{parts}</dl>')


@cache
def _gradient() -> str:
    """The colours of heat maps as CSS, lowest first."""
    chosen = colormaps[explain.COLORMAP]
    stops = []
    for k in range(9):
        red, green, blue = (round(255 * part) for part in chosen(k / 8)[:3])
        stops.append(f"rgb({red} {green} {blue})")
    return ", ".join(stops)


def show_heat(heat: Heat) -> str:
    """The picture, beside it the map over the picture, with the bar of its colours."""
    return _wrap(
        '<div class="maps">'
        f'<figure><img src="{heat.image}" alt="The image"><figcaption>The image</figcaption>'
        "</figure>"
        f'<figure><div class="heat"><img src="{heat.image}" alt=""><img src="{heat.colours}" '
        f'alt="Heat map over the image"></div><figcaption>{escape(heat.title)}: '
        f"{_class(heat.about['target'])}</figcaption></figure></div>"
        f'<div class="scale"><span>{heat.low:.3g}</span><i role="img" aria-label="Colours from '
        f'dark blue for {heat.low:.3g} to yellow for {heat.high:.3g}" '
        f'style="background:linear-gradient(90deg, {_gradient()})"></i><span>{heat.high:.3g}</span>'
        f'</div><p class="quiet">{escape(heat.legend)}</p>',
        _paragraphs(heat.sentences),
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
        table = _table(("Class", "Images", "Patients", "Recall", "AUC"), rows, "By class")
    return _wrap(
        f'<p role="status"><b>{escape(estimate)}</b></p>',
        table,
        _list(notes) if notes else "",
        _mark(limits),
    )


def _table(heads: Sequence[str], rows: str, caption: str, kind: str = "") -> str:
    cells = "".join(f"<th scope=col>{escape(h)}</th>" for h in heads)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _number(entry: dict[str, Any]) -> str:
    value = entry["value"]
    return "undefined" if value is None else f"{value:.2f}"


def show_set(
    support: Mapping[str, Sequence[Upload]], notes: Sequence[str], refused: Sequence[str]
) -> str:
    """What was read of a labelled set, and what it lacks."""
    images = [image for part in support.values() for image in part]
    patients = {image.patient for image in images} - {""}
    outlined = sum(bool(image.outline) for image in images)
    count = f"{_count(len(images))} in {_count(len(support), 'class')}"
    count = count.replace("classs", "classes")
    count += f" of {_count(len(patients), 'patient')}" if patients else ", patients not known"
    count += f", {outlined} with an outline" if outlined else ""
    rows = "".join(
        f"<tr><th scope=row>{_class(name)}</th><td>{len(part)}</td>"
        f"<td>{len({image.patient for image in part} - {''}) or 'not known'}</td></tr>"
        for name, part in support.items()
    )
    return _wrap(
        _refused(refused),
        f'<p role="status"><b>{count}.</b></p>',
        _table(("Class", "Images", "Patients"), rows, "What was read"),
        _mark(notes, more="More about how it was read"),
    )


def show_pair(
    names: Sequence[str], results: Sequence[Classification], images: Sequence[Upload]
) -> str:
    """Two models' answers side by side."""
    first, second = (part.answers for part in results)
    agree = [a.label == b.label for a, b in zip(first, second, strict=True)]
    pairs = "".join(
        f'<article class="pair"><header><img src="{image.thumbnail}" alt=""><div>'
        f"<h2>{_name(image.name)}{_origin(image)}</h2>"
        f'<p class="{"same" if same else "differ"}">'
        f"{'Both name the same class' if same else 'They name different classes'}</p></div>"
        "</header>"
        + "".join(
            f"<section><h3>{_name(name)}</h3>{_sentence(a)}"
            f"{_bars(a.probabilities, a.answered is False)}</section>"
            for name, a in zip(names, pair, strict=True)
        )
        + "</article>"
        for same, image, *pair in zip(agree, images, first, second, strict=True)
    )
    common = [s for s in results[0].limits if s in results[1].limits]
    limits = [
        f"{name}: {sentence}"
        for name, part in zip(names, results, strict=True)
        for sentence in part.limits
        if sentence not in common
    ]
    return _wrap(
        f'<p role="status"><b>The two name the same class for {sum(agree)} of '
        f"{_count(len(agree))}.</b></p>",
        f'<div class="pairs">{pairs}</div>',
        _mark([*limits, *common]),
    )


def show_batch(
    rows: Sequence[dict[str, Any]], refused: Sequence[str], limits: Sequence[str]
) -> str:
    """Table of predictions that sorts, number of images by class, and refused files."""
    counts = Counter(row["predicted"] for row in rows)
    shares = {name: n / len(rows) for name, n in counts.most_common()}
    bars = "".join(
        f'<div class="other"><dt>{_class(name)}</dt><dd class="n">{counts[name]}</dd>'
        f'<dd class="bar" aria-hidden="true"><i style="width:{100 * p:.1f}%"></i></dd></div>'
        for name, p in shares.items()
    )
    more = [
        (title, key)
        for title, key in (
            ("Set", "set"),
            ("Answers", "answers"),
            ("Unlike", "unlike_support"),
            ("Distance", "support_distance"),
        )
        if any(key in row for row in rows)
    ]
    cells = "".join(
        f"<tr><th scope=row>{_name(row['file_name'])}</th><td>{_class(row['predicted'])}</td>"
        f"<td>{row['p_' + row['predicted']]:.2f}</td>"
        + "".join(f"<td>{escape(str(row.get(key, '')).replace('_', ' '))}</td>" for _, key in more)
        + "</tr>"
        for row in rows
    )
    heads = ("Image", "Predicted", "Probability", *(title for title, _ in more))
    table = _table(heads, cells, "Predictions; the heads sort", "sortable") if rows else ""
    return _wrap(
        f'<p role="status"><b>{_count(len(rows))} classified, {len(refused)} not read.</b></p>',
        _refused(refused),
        f'<dl class="bars counts">{bars}</dl>' if rows else "",
        table,
        _mark(limits),
    )
