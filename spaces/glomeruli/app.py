"""The hf-glovlm Space: classify glomeruli, in your words too, adapt, compare, batch.

`python app.py` serves it; the environment says what may be used (see README.md). Research use
only, not for diagnosis.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import Any

# Read when Gradio and the Hub's client are imported: nothing is reported to anyone, and what is
# uploaded goes to a folder of this process alone, which leaves with it.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(
    prefix="glovlm-space-", dir=os.environ.get("GRADIO_TEMP_DIR") or None
)

import gradio as gr
import pages
from desk import MOST_PROBABLE, Desk, Session, show_errors
from gate import Gate
from shelf import Settings
from starlette.middleware import Middleware
from uploads import MAX_BATCH, MAX_FILE, sweep
from work import MAX_CLASSES, OUTLINES

from hf_glovlm import GloVLMError, explain, frozen_methods

FOLDER = Path(os.environ["GRADIO_TEMP_DIR"])
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
OFFERED = 600  # seconds that a file may lie there, such as a model that can be downloaded
KEPT = 1800  # seconds that a page's images stay in memory after it was last used
TYPES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"]
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "adapt", "concurrency_limit": 1}


def build(settings: Settings | None = None) -> gr.Blocks:
    """The page and its endpoints."""
    desk = Desk(settings or Settings.from_environment())
    choices = desk.settings.choices
    with gr.Blocks(
        title="Glomeruli and words", analytics_enabled=False, delete_cache=(60, OFFERED)
    ) as page:
        session = gr.State(Session(), time_to_live=KEPT)
        gr.Markdown(pages.HEADER)
        where = "Hub id, backbone or folder" if desk.settings.folders else "Hub id or backbone"
        model = gr.Dropdown(
            choices, value=desk.settings.model, allow_custom_value=True, label="Model",
            info=f"{where}; type another and press Enter.", elem_id="model",
        )  # fmt: skip
        about = gr.HTML(elem_id="about-model")
        drop = gr.File(
            label="Images of single glomeruli", file_count="multiple", file_types=TYPES,
            height=165, elem_id="images",
        )  # fmt: skip
        with gr.Row():
            examples = gr.Button("Add synthetic examples", elem_id="examples")
            remove = gr.Button("Remove images", elem_id="remove")
        tray = gr.HTML(pages.show_tray([]), elem_id="tray")

        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Classify", id="classify"):
                mpp = gr.Textbox(
                    label="Micrometres per pixel, if known", placeholder="0.25", elem_id="mpp"
                )
                ask = gr.Button("Classify", variant="primary", elem_id="classify")
                answers = gr.HTML(elem_id="answers")
                with gr.Accordion("Prompts and definitions", open=False, elem_id="words-open"):
                    words = gr.HTML(elem_id="words")
                with gr.Accordion("Heat map", open=False, elem_id="heat-open"):
                    with gr.Row():
                        image = gr.Dropdown([], label="Image", elem_id="heat-image")
                        titles = [(m.title, name) for name, m in explain.HEAT_MAPS.items()]
                        method = gr.Dropdown(
                            titles, value="gradient", label="Method", elem_id="heat-method"
                        )
                        target = gr.Dropdown(
                            [MOST_PROBABLE],
                            value=MOST_PROBABLE,
                            label="Class",
                            elem_id="heat-class",
                        )
                    draw = gr.Button("Draw heat map", elem_id="heat-draw")
                    opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", elem_id="opacity")
                    heat = gr.HTML(elem_id="heat")
            with gr.Tab("Your own words", id="own-words"):
                gr.Markdown(
                    "One line a class: its name, a colon, and its prompts with `|` between them. "
                    "Needs a model whose image and text towers share a space."
                )
                lines = gr.Textbox(
                    label="Classes and prompts", lines=6, max_lines=20, elem_id="own-lines"
                )
                own_words_button = gr.Button(
                    "Classify with these words", variant="primary", elem_id="own-ask"
                )
                own_words_answers = gr.HTML(elem_id="own-answers")
            with gr.Tab("Adapt", id="adapt"):
                parts = _lay_out_adapt()
            with gr.Tab("Compare", id="compare"):
                other = gr.Dropdown(
                    choices, value=choices[-1], allow_custom_value=True, elem_id="other",
                    label="Second model, beside the one above",
                )  # fmt: skip
                compare_button = gr.Button("Compare", variant="primary", elem_id="compare")
                pairs = gr.HTML(elem_id="pairs")
            with gr.Tab("Batch", id="batch"):
                many = gr.File(
                    label=f"Up to {MAX_BATCH} images", file_count="multiple", file_types=TYPES,
                    height=165, elem_id="batch-images",
                )  # fmt: skip
                batch_button = gr.Button("Classify all", variant="primary", elem_id="batch-run")
                counts = gr.HTML(elem_id="batch-counts")
                table = gr.DownloadButton("Download CSV", interactive=False, elem_id="batch-csv")
            with gr.Tab("About", id="about"):
                gr.Markdown(pages.ABOUT)
        # Opened at the start, so that nobody waits while `auto` measures.
        gr.HTML(pages.show_engine(desk.shelf.engine), elem_id="engine")

        # First of all, so that the names are theirs.
        for name in ("describe", "classify", "own_words", "compare", "batch", "heat_map"):
            gr.api(show_errors(getattr(desk, f"api_{name}")), api_name=name)
        gr.api(show_errors(desk.api_adapt), api_name="adapt", **ONE_AT_A_TIME)

        def on(event: Any, function: Any, inputs: Any, outputs: Any, **more: Any) -> None:
            # Not preprocessed: Gradio would keep an empty file for every upload.
            event(show_errors(function), inputs, outputs, preprocess=False, **PRIVATE, **more)

        described = [about, words, target, lines]
        on(page.load, desk.choose_model, [model, session], described)
        on(model.input, desk.choose_model, [model, session], described)
        on(drop.upload, desk.add_images, [drop, session], [drop, session, tray, image])
        on(examples.click, desk.add_examples, [session], [session, tray, image])
        on(remove.click, desk.remove_images, [session], [session, tray, image])
        on(ask.click, desk.classify, [model, mpp, session], answers)
        on(draw.click, desk.heat, [model, image, method, target, session], heat)
        opacity.input(
            None, opacity, None, **PRIVATE,
            js="(v) => { document.documentElement.style.setProperty('--heat', v); return [] }",
        )  # fmt: skip
        on(own_words_button.click, desk.own_words, [model, lines, session], own_words_answers)
        on(compare_button.click, desk.compare, [model, other, session], pairs)
        on(batch_button.click, desk.batch, [model, many, session], [many, counts, table])
        on(parts["use"].click, desk.use_adapted, [session], [model, *described])
        _connect_adapt(desk, on, parts, model, other, session)
    # The queue is finite: whoever comes when it is full gets an error at once.
    return page.queue(max_size=64, default_concurrency_limit=2)


def _lay_out_adapt() -> dict[str, Any]:
    """The boxes and buttons of the tab Adapt."""
    gr.Markdown(
        "Name each class and drop a few images of it. With the patient of every image, each "
        "patient is predicted by a model that did not learn from that patient; without, no "
        "performance is estimated."
    )
    with gr.Row():
        fill = gr.Button("Fill with synthetic examples", elem_id="support-fill")
        clear = gr.Button("Empty the boxes", elem_id="support-clear")
    names, boxes, trays = [], [], []
    for k in range(MAX_CLASSES):
        with gr.Accordion(f"Class {k + 1}", open=k < 2, elem_id=f"class-{k}"):
            names.append(gr.Textbox(label=f"Name of class {k + 1}", elem_id=f"class-name-{k}"))
            boxes.append(
                gr.File(
                    label=f"Images of class {k + 1}",
                    file_count="multiple",
                    file_types=TYPES,
                    height=165,
                    elem_id=f"class-images-{k}",
                )
            )
            trays.append(gr.HTML(pages.show_tray([]), elem_id=f"class-tray-{k}"))
    with gr.Accordion("Patients", open=False, elem_id="patients-open"):
        by_name = gr.Checkbox(
            label="File names begin with the patient and an underscore (P012_3.png)",
            elem_id="patients-by-name",
        )
        table = gr.File(
            label="Or a table: file_name,patient_id (CSV)", file_types=[".csv"], height=165,
            elem_id="patients-table",
        )  # fmt: skip
    methods = [(f"{name}: trains {what}", name) for name, what in frozen_methods().items()]
    method = gr.Dropdown(
        methods, value="linear_probe", label="Method", info="All leave the towers as they are.",
        elem_id="adapt-method",
    )  # fmt: skip
    outline = gr.Dropdown(
        [(title, name) for name, title in OUTLINES.items()], value="ignore",
        label="What the model sees", elem_id="adapt-outline",
        info="An outline hides what lies outside of it; the limits above the result say what.",
    )  # fmt: skip
    start = gr.Button("Adapt", variant="primary", elem_id="adapt-start")
    result = gr.HTML(elem_id="adapt-result", min_height=60)
    download = gr.DownloadButton("Download the model", interactive=False, elem_id="adapt-zip")
    use = gr.Button("Use this model above", elem_id="adapt-use")
    return {
        "fill": fill, "clear": clear, "names": names, "boxes": boxes, "trays": trays,
        "by_name": by_name, "table": table, "method": method, "outline": outline,
        "start": start, "result": result, "download": download, "use": use,
    }  # fmt: skip


def _connect_adapt(
    desk: Desk, on: Any, parts: dict[str, Any], model: Any, other: Any, session: Any
) -> None:
    names, trays = parts["names"], parts["trays"]
    on(parts["fill"].click, desk.fill_support, [session], [session, *names, *trays])
    on(parts["clear"].click, desk.clear_support, [session], [session, *names, *trays])
    for k, (box, tray) in enumerate(zip(parts["boxes"], trays, strict=True)):

        def add(files: Any, held: Session, place: int = k) -> tuple[Any, ...]:
            return desk.add_support(place, files, held)

        on(box.upload, add, [box, session], [box, session, tray])
    on(
        parts["start"].click,
        desk.adapt,
        [
            model,
            parts["method"],
            parts["outline"],
            parts["by_name"],
            parts["table"],
            session,
            *names,
        ],
        [session, parts["table"], parts["result"], parts["download"], model, other],
        **ONE_AT_A_TIME,
    )


def forget(page: gr.Blocks, age: float) -> None:
    """Drop the state of pages that nobody has used for some seconds.

    Gradio forgets a `gr.State` in time, but keeps what it showed, thumbnails too, until there are
    too many sessions.
    """
    holder = page.state_holder
    for session, used in list(holder.time_last_used.items()):
        if (datetime.now() - used).total_seconds() > age:
            holder.session_data.pop(session, None)
            holder.time_last_used.pop(session, None)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve the page, with its limits and its looks."""

    def keep_clean() -> None:
        while FOLDER.is_dir():
            sweep(FOLDER, OFFERED)
            time.sleep(60)
            forget(page, KEPT)

    # Gradio deletes only the files that it has handled itself.
    Thread(target=keep_clean, daemon=True).start()
    theme = gr.themes.Soft(primary_hue="violet", font=FONTS, font_mono=MONO)
    return page.launch(
        **{
            "theme": theme,
            "css_paths": Path(__file__).with_name("style.css"),
            "max_file_size": MAX_FILE,
            "state_session_capacity": 200,
            "run_history": False,
            "enable_monitoring": False,
            "footer_links": ["api"],
            "ssr_mode": False,
            "pwa": False,
            "app_kwargs": {"middleware": [Middleware(Gate)]},
            **options,
        }
    )


if __name__ == "__main__":
    # Containers are stopped by SIGTERM: like Ctrl-C it must leave nothing of an upload behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        page = build()
    except GloVLMError as error:  # such as a precision that this machine does not have
        sys.exit(str(error))
    launch(page)
