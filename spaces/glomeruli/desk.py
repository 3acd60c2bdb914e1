"""Handlers of the page's buttons and endpoints, and the session of one open page."""

import html
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import markup
from labelled_sets import MAX_SET, read_set
from shelf import Loaded, Settings, Shelf
from uploads import MAX_BATCH, Upload, make_examples, read_patients, read_uploads, take_files
from work import (
    BATCH,
    MAX_CLASSES,
    AdaptedModel,
    adapt_classifier,
    ask_in_words,
    classify,
    draw_heat,
    read_words,
    to_csv,
    to_table,
    zip_model,
)

from hf_glovlm import GloVLMError, describe_classes, describe_limits

Files = list[dict[str, Any]] | None  # as Gradio hands them on, not preprocessed
ADAPTED = "adapted here"
MOST_PROBABLE = "the most probable class"
MIN_BOXES = 2  # of classes
INSIDE = "blank+pool"  # what a model sees of images that all have an outline
NO_SECOND = "none"  # in place of a second model
WORDS = ("the model's own", "mine")  # whose classes are asked for
CHUNK = BATCH  # images of a batch between two signs of progress


class Session:
    """Session of one open page, in memory alone: images, labelled images, an adapted model."""

    def __init__(self) -> None:
        self.images: list[Upload] = []
        self.support: dict[int, list[Upload]] = {}
        self.boxes = MIN_BOXES  # of classes that are shown
        self.adapted: AdaptedModel | None = None


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show an input's error as an escaped sentence, without a traceback."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except GloVLMError as error:
            raise gr.Error(
                html.escape(str(error), quote=False), duration=20, print_exception=False
            ) from None

    return call


class Desk:
    """Handlers of the page's buttons and endpoints.

    Args:
        settings: What the machine's owner allows.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.shelf = Shelf(settings)

    def find(self, name: str | None, session: Session | None = None) -> Loaded:
        """A model by name; `adapted here` is the session's own."""
        if name == ADAPTED:
            if session is None or session.adapted is None:
                raise GloVLMError("No model was adapted on this page yet: see the tab Adapt.")
            return session.adapted.loaded
        return self.shelf.get(name)

    # --------------------------------------------------------------------------- the page

    def choose_model(self, name: str, session: Session) -> tuple[Any, ...]:
        """Load and describe a model; its classes go to the heat map and to own words."""
        loaded = self.find(name, session)
        if loaded.classifier is None:
            return markup.show_model(loaded), "", gr.update(), gr.update()
        config = loaded.classifier.config
        names = [str(label) for label in config.id2label.values()]
        targets = gr.Dropdown(choices=[MOST_PROBABLE, *names], value=MOST_PROBABLE)
        texts = config.prompts or [[name.replace("_", " ")] for name in names]
        words = "\n".join(f"{n}: {' | '.join(t)}" for n, t in zip(names, texts, strict=True))
        return markup.show_model(loaded), markup.show_words(config), targets, words

    def use_adapted(self, session: Session) -> tuple[Any, ...]:
        """Choose the session's own model."""
        return ADAPTED, *self.choose_model(ADAPTED, session)

    def add_images(self, files: Files, session: Session) -> tuple[Any, ...]:
        """Put uploads into the tray."""
        session.images, refused = read_uploads(take_files(files), session.images)
        return None, session, *self._tray(session, refused)

    def pick_example(
        self, name: str, other: str, which: str, words: str, mpp: str, session: Session,
        event: gr.EventData,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Put the synthetic drawing that was clicked into the tray, and classify it."""
        name_of = (event._data or {}).get("example")
        picked = [drawing for drawing in markup.first_examples() if drawing.name == name_of]
        if not picked:
            raise GloVLMError("There is no such drawing.")
        there = {image.name for image in session.images}
        session.images = [*session.images, *(d for d in picked if d.name not in there)]
        answers = self.classify(name, other, which, words, mpp, session)
        return session, *self._tray(session), answers

    def remove_images(self, session: Session) -> tuple[Any, ...]:
        """Forget the tray."""
        session.images = []
        return session, *self._tray(session)

    def _tray(self, session: Session, refused: list[str] | None = None) -> tuple[Any, ...]:
        names = [image.name for image in session.images]
        choice = gr.Dropdown(choices=names, value=names[0] if names else None)
        return markup.show_tray(session.images, refused or []), choice

    def classify(
        self, name: str, other: str, which: str, words: str, mpp: str, session: Session
    ) -> str:
        """Classify the tray: with one model or two, in the model's words or someone's own."""
        pixel = _number(mpp)
        names = [name] if other in (NO_SECOND, "", None) else [name, other]
        models = [self.find(one, session) for one in names]
        if which == WORDS[1]:
            prompts = read_words(words)
            models = [ask_in_words(loaded, prompts) for loaded in models]
        results = [classify(loaded, session.images, pixel) for loaded in models]
        if len(results) > 1:
            return markup.show_pair([loaded.name for loaded in models], results, session.images)
        support = session.adapted.support if name == ADAPTED and session.adapted else []
        return markup.show_answers(results[0], session.images, support)

    def heat(
        self, name: str, image: str, method: str, target: str, session: Session
    ) -> tuple[Any, ...]:
        """Draw a heat map of one image of the tray."""
        chosen = next((i for i in session.images if i.name == image), None)
        if chosen is None:
            raise GloVLMError("Choose one of the images above for a heat map.")
        asked = None if target == MOST_PROBABLE else target
        heat = draw_heat(self.find(name, session), chosen, method, asked)
        return markup.show_heat(heat), gr.Slider(visible=True)

    def batch(
        self, name: str, files: Files, session: Session,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio finds it
    ) -> tuple[Any, ...]:  # fmt: skip
        """Classify many images into a CSV."""
        loaded = self.find(name, session)
        images, refused = read_uploads(take_files(files), limit=MAX_BATCH)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(images), CHUNK):
            progress((start, len(images)), f"{images[start].name}", unit="images")
            rows += to_table(classify(loaded, images[start : start + CHUNK]))
        if not rows and not refused:
            raise GloVLMError("There are no images yet: drop some into the box of this tab.")
        limits = describe_limits(loaded.ask().config)
        table = to_csv(rows, refused, limits)
        download = gr.DownloadButton(value=str(write_text(table)), interactive=True)
        return None, markup.show_batch(rows, refused, limits), download

    def add_support(self, place: int, files: Files, session: Session) -> tuple[Any, ...]:
        """Put uploads into a class's box."""
        kept = session.support.get(place, ())
        session.support[place], refused = read_uploads(take_files(files), kept)
        return None, session, markup.show_tray(session.support[place], refused)

    def fill_support(self, session: Session) -> tuple[Any, ...]:
        """Fill the boxes with images of four synthetic patients."""
        labels = list(dict.fromkeys(d.label for d in make_examples()))
        support = {x: [d for d in make_examples() if d.label == x] for x in labels}
        note = "Synthetic drawings of four invented patients."
        return self._fill(session, support, markup.show_set(support, [note], []))

    def read_support(self, files: Files, session: Session) -> tuple[Any, ...]:
        """Fill the boxes from a ZIP or a folder with a table."""
        try:
            read = read_set(take_files(files))
            if len(read.support) > MAX_CLASSES:
                raise GloVLMError(
                    f"The set has {len(read.support)} classes, at most {MAX_CLASSES} are taken "
                    "here: leave some out, or use `glovlm train` on your own machine."
                )
        except GloVLMError as error:  # said where its table would stand; the boxes stay
            same = [gr.update()] * (3 * MAX_CLASSES)
            return None, gr.update(), session, markup.show_refused([str(error)]), *same
        notes, outline = read.notes, gr.update()
        if read.support and all(i.outline for part in read.support.values() for i in part):
            outline = gr.update(value=INSIDE)
            notes = [
                "All images have an outline: the model will see its inside, unless another is "
                "chosen under 'What the model sees'.",
                *notes,
            ]
        shown = markup.show_set(read.support, notes, read.refused)
        return None, outline, *self._fill(session, read.support, shown)

    def clear_support(self, session: Session) -> tuple[Any, ...]:
        """Empty the boxes."""
        return self._fill(session, {}, "")

    def add_box(self, session: Session) -> tuple[Any, ...]:
        """Show the box of one more class."""
        session.boxes = min(session.boxes + 1, MAX_CLASSES)
        return session, *(gr.Accordion(visible=k < session.boxes) for k in range(MAX_CLASSES))

    def _fill(
        self, session: Session, support: Mapping[str, Sequence[Upload]], shown: str
    ) -> tuple[Any, ...]:
        """The session, what was read, then names, trays and folds of all boxes."""
        session.support = dict(enumerate(list(part) for part in support.values()))
        names = [*support, *[""] * (MAX_CLASSES - len(support))]
        trays = [markup.show_tray(session.support.get(k, [])) for k in range(MAX_CLASSES)]
        session.boxes = max(MIN_BOXES, len(support))
        folds = [
            gr.Accordion(
                label=f"Class {k + 1}: {name}" if name else f"Class {k + 1}",
                open=not support,
                visible=k < session.boxes,
            )
            for k, name in enumerate(names)
        ]
        return session, shown, *names, *trays, *folds

    def adapt(
        self, name: str, method: str, outline: str, by_name: bool, table: Files,
        session: Session, *names: str, progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:  # fmt: skip
        """Adapt the chosen model to the boxes, estimate, and offer the model's folder."""
        boxes = {k: images for k, images in session.support.items() if images}
        given = [names[k].strip() for k in boxes]
        if len(set(given)) < len(given) or "" in given:
            raise GloVLMError("Give every class that has images a name of its own.")
        support = {names[k].strip(): images for k, images in boxes.items()}
        given_table = take_files(table)
        patients = read_patients(given_table[0][1]) if given_table else {}
        if by_name:
            support = {label: [_from_name(i) for i in part] for label, part in support.items()}
        session.adapted = adapt_classifier(
            self.find(name, session), support, method, patients, outline,
            lambda p, what: progress(p, what),
        )  # fmt: skip
        limits = describe_limits(session.adapted.loaded.ask().config)
        try:
            path = zip_model(session.adapted, Path(os.environ["GRADIO_TEMP_DIR"]), self.settings)
            download = gr.DownloadButton(value=str(path), interactive=True)
        except GloVLMError as error:
            limits = [str(error), *limits]
            download = gr.DownloadButton(interactive=False)
        shown = markup.show_adapted(
            session.adapted.estimate, session.adapted.results, session.adapted.notes, limits
        )
        choices = [*self.settings.choices, ADAPTED]
        return (
            session, None, shown, download, gr.Button(interactive=True),
            gr.Dropdown(choices=choices), gr.Dropdown(choices=[NO_SECOND, *choices]),
        )  # fmt: skip

    # ----------------------------------------------------------------------- the endpoints

    def api_describe(self, model: str = "") -> dict[str, Any]:
        """Describe a model: its classes with prompts and definitions, and its limits.

        Args:
            model: A Hub id or a known backbone; the page's own when empty.
        """
        loaded = self.shelf.get(model)
        config = loaded.ask().config
        classes = [
            {**vars(words), "prompts": list(words.prompts)} for words in describe_classes(config)
        ]
        return {"model": loaded.name, "classes": classes, "limits": describe_limits(config)}

    def api_classify(
        self, files: list[dict[str, Any]], model: str = "", mpp: float | None = None
    ) -> dict[str, Any]:
        """Classify images: probabilities, conformal set and abstention, a sentence each.

        Args:
            files: Images, each by `handle_file`.
            model: A Hub id or a known backbone; the page's own when empty.
            mpp: Micrometres per pixel, if known.
        """
        images, refused = read_uploads(take_files(files))
        return self._answer(self.shelf.get(model), images, refused, mpp)

    def api_own_words(
        self, files: list[dict[str, Any]], prompts: dict[str, list[str]], model: str = ""
    ) -> dict[str, Any]:
        """Classify images zero-shot with your own classes and prompts.

        Args:
            files: Images, each by `handle_file`.
            prompts: Per class its prompts.
            model: A Hub id or a known backbone; the page's own when empty.
        """
        images, refused = read_uploads(take_files(files))
        words = {
            name: [texts] if isinstance(texts, str) else texts for name, texts in prompts.items()
        }
        return self._answer(ask_in_words(self.shelf.get(model), words), images, refused)

    def api_compare(self, files: list[dict[str, Any]], model: str, other: str) -> dict[str, Any]:
        """Classify images with two models.

        Args:
            files: Images, each by `handle_file`.
            model: A Hub id or a known backbone; the page's own when empty.
            other: The second one.
        """
        images, refused = read_uploads(take_files(files))
        first, second = (self._answer(self.shelf.get(m), images, refused) for m in (model, other))
        pairs = zip(first["answers"], second["answers"], strict=True)
        return {
            "first": first,
            "second": second,
            "same": sum(a["label"] == b["label"] for a, b in pairs),
        }

    def api_batch(self, files: list[dict[str, Any]], model: str = "") -> str:
        """Classify up to 500 images into the text of a CSV.

        Args:
            files: Images, each by `handle_file`.
            model: A Hub id or a known backbone; the page's own when empty.
        """
        loaded = self.shelf.get(model)
        images, refused = read_uploads(take_files(files), limit=MAX_BATCH)
        parts = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
        rows = [row for part in parts for row in to_table(classify(loaded, part))]
        return to_csv(rows, refused, describe_limits(loaded.ask().config))

    def api_heat_map(
        self, file: dict[str, Any], method: str = "gradient", target: str = "", model: str = ""
    ) -> dict[str, Any]:
        """Draw a heat map: its values in rows and columns, with the scores beside it.

        Args:
            file: An image, by `handle_file`.
            method: rollout, gradient, similarity, occlusion or kept.
            target: A class; the most probable when empty.
            model: A Hub id or a known backbone; the page's own when empty.
        """
        images, refused = read_uploads(take_files([file]))
        if refused:
            raise GloVLMError(refused[0])
        heat = draw_heat(self.shelf.get(model), images[0], method, target)
        return {**heat.about, "sentences": heat.sentences}

    def api_adapt(
        self,
        files: list[dict[str, Any]],
        labels: list[str],
        method: str = "linear_probe",
        patients: list[str] | None = None,
        model: str = "",
        outline: str = "ignore",
    ) -> dict[str, Any]:
        """Adapt a model to labelled images: leave-one-patient-out metrics and the model as a zip.

        Where the licence of the base does not allow a download, `model` is empty and `limits` says
        so.

        Args:
            files: Images, each by `handle_file`.
            labels: Class of each image.
            method: A method on frozen features, such as linear_probe or tip_adapter.
            patients: Patient of each image, if known.
            model: A Hub id or a known backbone; the page's own when empty.
            outline: What the model sees: ignore (the whole image), centre, blank, pool, blank+pool.
        """
        images, refused = read_uploads(take_files(files), limit=MAX_SET)
        if refused or len(labels) != len(images) or len(patients or labels) != len(images):
            raise GloVLMError(" ".join(refused) or "Give one label, and one patient, an image.")
        if patients:
            pairs = zip(images, patients, strict=True)
            images = [replace(image, patient=patient) for image, patient in pairs]
        support: dict[str, list[Upload]] = {}
        for image, label in zip(images, labels, strict=True):
            support.setdefault(label, []).append(image)
        adapted = adapt_classifier(self.shelf.get(model), support, method, outline=outline)
        measured = adapted.results["metrics"] if adapted.results else None
        file, limits = None, describe_limits(adapted.loaded.ask().config)
        try:
            path = zip_model(adapted, Path(os.environ["GRADIO_TEMP_DIR"]), self.settings)
            file = gr.FileData(path=str(path), orig_name=path.name).model_dump()
        except GloVLMError as error:
            limits = [str(error), *limits]
        return {
            "estimate": adapted.estimate,
            "metrics": measured,
            "notes": adapted.notes,
            "limits": limits,
            "model": file,
        }

    def _answer(
        self, loaded: Loaded, images: list[Upload], refused: list[str], mpp: float | None = None
    ) -> dict[str, Any]:
        if refused and not images:
            raise GloVLMError(" ".join(refused))
        result = classify(loaded, images, mpp)
        answers = [vars(answer) for answer in result.answers]
        return {
            "model": loaded.name,
            "engine": {name: self.shelf.engine[name] for name in ("precision", "runtime")},
            "answers": answers,
            "refused": refused,
            "scale": result.scale,
            "limits": result.limits,
        }


def _number(text: str | None) -> float | None:
    """A number that may be left out."""
    if not text or not text.strip():
        return None
    try:
        return float(text.replace(",", "."))
    except ValueError:
        raise GloVLMError(f"Expected a number such as 0.25, found '{text.strip()[:40]}'.") from None


def _from_name(image: Upload) -> Upload:
    """The patient from a file name such as `P012_3.png`."""
    patient, line, _ = image.name.partition("_")
    return replace(image, patient=patient) if line and not image.patient else image


def write_text(text: str) -> Path:
    """A file for one download; the page's clean-up removes it after some minutes."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / "predictions.csv"
    path.write_text(text, encoding="utf-8")
    return path
