"""The hf-glovlm Space: classify glomeruli, in your words too, compare, adapt, batch.

`python app.py` serves it; the environment says what may be used (see README.md). Research use
only, not for diagnosis.
"""

import atexit
import logging
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
import markup
from desk import MIN_BOXES, MOST_PROBABLE, NO_SECOND, WORDS, Desk, Session, show_errors
from gate import Gate
from labelled_sets import IMAGES
from shelf import Settings
from starlette.middleware import Middleware
from uploads import MAX_BATCH, MAX_FILE, sweep
from work import MAX_CLASSES, OUTLINES

from hf_glovlm import GloVLMError, explain, frozen_methods

FOLDER = Path(os.environ["GRADIO_TEMP_DIR"])
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
OFFERED = 600  # seconds that a file may lie there, such as a model that can be downloaded
KEPT = 1800  # seconds that a page's images stay in memory after it was last used
TYPES = list(IMAGES)
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
LOOKS = {  # contrasts of 4.5 and more in light and dark, labels as plain text
    "block_title_background_fill": "none", "block_title_background_fill_dark": "none",
    "block_title_text_color": "*neutral_800", "block_title_text_color_dark": "*neutral_100",
    "block_title_padding": "0", "block_label_background_fill": "none",
    "block_label_background_fill_dark": "none", "block_label_text_color": "*neutral_800",
    "block_label_text_color_dark": "*neutral_100", "block_label_shadow": "none",
    "block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300",
    "body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_hover_dark": "*primary_600",
    "button_secondary_background_fill_hover_dark": "*neutral_600",
    "checkbox_label_background_fill_selected": "*primary_700",
    "checkbox_label_background_fill_selected_dark": "*primary_700",
    "input_border_color": "*neutral_300", "input_border_width": "1px", "input_shadow": "none",
    "input_placeholder_color": "*neutral_500", "layout_gap": "*spacing_lg",
    "block_border_width": "1px", "block_border_color": "*neutral_200",
    "block_border_color_dark": "*neutral_700", "block_shadow": "none",
}  # fmt: skip
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "adapt", "concurrency_limit": 1}
PICK = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-example]");
  if (button) trigger("click", { example: button.dataset.example });
});
"""


def build(settings: Settings | None = None) -> gr.Blocks:
    """The page and its endpoints."""
    desk = Desk(settings or Settings.from_environment())
    choices = desk.settings.choices
    with gr.Blocks(
        title="Glomeruli and words", analytics_enabled=False, delete_cache=(60, OFFERED)
    ) as page:
        session = gr.State(Session(), time_to_live=KEPT)
        gr.HTML(markup.HEADER, elem_id="header")
        where = "Hub id, backbone or folder" if desk.settings.folders else "Hub id or backbone"
        with gr.Row(elem_classes="two"):
            model = gr.Dropdown(
                choices, value=desk.settings.model, allow_custom_value=True, label="Model",
                info=f"{where}; type another and press Enter.", elem_id="model",
            )  # fmt: skip
            about = gr.HTML(elem_id="about-model")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Classify", id="classify"):
                one = _lay_out_classify(choices)
            with gr.Tab("Adapt", id="adapt"):
                two = _lay_out_adapt()
            with gr.Tab("Batch", id="batch"), gr.Row(elem_classes="two"):
                with gr.Column():
                    many = gr.File(
                        label=f"Up to {MAX_BATCH} images", file_count="multiple", file_types=TYPES,
                        height=150, elem_id="batch-images",
                    )  # fmt: skip
                    run = gr.Button("Classify all", variant="primary", elem_id="batch-run")
                    table = gr.DownloadButton(
                        "Download CSV", interactive=False, elem_id="batch-csv"
                    )
                with gr.Column(elem_classes="answer"):
                    counts = gr.HTML(markup.show_empty("batch"), elem_id="batch-counts")
            with gr.Tab("About", id="about"):
                gr.Markdown(markup.read_card(), elem_id="card")
        # Opened at the start, so that nobody waits while `auto` measures.
        gr.HTML(markup.show_footer(desk.shelf.engine), elem_id="foot")

        # First of all, so that the names are theirs.
        for name in ("describe", "classify", "own_words", "compare", "batch", "heat_map"):
            gr.api(show_errors(getattr(desk, f"api_{name}")), api_name=name)
        gr.api(show_errors(desk.api_adapt), api_name="adapt", **ONE_AT_A_TIME)

        def on(
            event: Any, function: Any, inputs: Any, outputs: Any, reveal: str = "", **more: Any
        ) -> None:
            # Not preprocessed: Gradio would keep an empty file for every upload.
            step = event(
                show_errors(function), inputs, outputs, preprocess=False, **PRIVATE, **more
            )
            if reveal:
                step.success(None, None, None, js=f"() => reveal('{reveal}')", **PRIVATE)

        described = [about, one["words"], one["target"], one["lines"]]
        on(page.load, desk.choose_model, [model, session], described)
        on(model.input, desk.choose_model, [model, session], described)
        on(
            run.click, desk.batch, [model, many, session], [many, counts, table],
            reveal="#batch-counts",
        )  # fmt: skip
        on(two["use"].click, desk.use_adapted, [session], [model, *described])
        _connect_classify(desk, on, one, model, session)
        _connect_adapt(desk, on, two, model, one["other"], session)
    # The queue is finite: whoever comes when it is full gets an error at once.
    return page.queue(max_size=64, default_concurrency_limit=2)


def _lay_out_classify(choices: list[str]) -> dict[str, Any]:
    """The tab Classify: images, words and a second model; answers and a heat map."""
    with gr.Row(elem_classes="two"):
        with gr.Column():
            drop = gr.File(
                label="Images of single glomeruli", file_count="multiple", file_types=TYPES,
                height=130, elem_id="images",
            )  # fmt: skip
            gallery = gr.HTML(markup.show_gallery(), js_on_load=PICK, elem_id="examples")
            tray = gr.HTML(markup.show_tray([]), elem_id="tray")
            with gr.Accordion("Options: second model, words, scale", open=False, elem_id="options"):
                other = gr.Dropdown(
                    [NO_SECOND, *choices], value=NO_SECOND, allow_custom_value=True,
                    elem_id="other", label="Second model, to compare",
                    info="Both answer, side by side.",
                )  # fmt: skip
                which = gr.Radio(
                    list(WORDS), value=WORDS[0], label="Classes and their words",
                    elem_id="which-words",
                )  # fmt: skip
                lines = gr.Textbox(
                    label="Your classes and prompts", lines=6, max_lines=20, visible=False,
                    elem_id="own-lines",
                    info="A line a class: its name, a colon, its prompts with | between them. "
                    "Needs a model whose image and text towers share a space.",
                )  # fmt: skip
                mpp = gr.Textbox(
                    label="Micrometres per pixel, if known", placeholder="0.25", elem_id="mpp"
                )
            with gr.Row(elem_classes="buttons"):
                ask = gr.Button("Classify", variant="primary", elem_id="classify")
                remove = gr.Button("Remove all", elem_id="remove")
        with gr.Column(elem_classes="answer"):
            answers = gr.HTML(markup.show_empty("answers"), elem_id="answers")
            with gr.Accordion("Heat map", open=False, elem_id="heat-open"):
                with gr.Row(elem_classes="three"):
                    image = gr.Dropdown([], label="Image", elem_id="heat-image")
                    titles = [(m.title, name) for name, m in explain.HEAT_MAPS.items()]
                    method = gr.Dropdown(
                        titles, value="gradient", label="Method", elem_id="heat-method"
                    )
                    target = gr.Dropdown(
                        [MOST_PROBABLE], value=MOST_PROBABLE, label="Class", elem_id="heat-class"
                    )
                draw = gr.Button("Draw heat map", elem_id="heat-draw")
                heat = gr.HTML(elem_id="heat")
                opacity = gr.Slider(
                    0, 1, 0.5, step=0.05, label="Opacity of the map", elem_id="opacity",
                    visible=False,
                )  # fmt: skip
            with gr.Accordion("Prompts and definitions", open=False, elem_id="words-open"):
                words = gr.HTML(elem_id="words")
    return {
        "drop": drop, "gallery": gallery, "tray": tray, "ask": ask, "remove": remove,
        "other": other, "which": which, "lines": lines, "mpp": mpp, "words": words,
        "answers": answers, "image": image, "method": method, "target": target, "draw": draw,
        "heat": heat, "opacity": opacity,
    }  # fmt: skip


def _connect_classify(desk: Desk, on: Any, parts: dict[str, Any], model: Any, session: Any) -> None:
    tray, image, which, lines = (parts[name] for name in ("tray", "image", "which", "lines"))
    asked = [model, parts["other"], which, lines, parts["mpp"], session]
    on(
        parts["drop"].upload, desk.add_images, [parts["drop"], session],
        [parts["drop"], session, tray, image],
    )  # fmt: skip
    on(
        parts["gallery"].click, desk.pick_example, asked, [session, tray, image, parts["answers"]],
        reveal="#answers",
    )  # fmt: skip
    on(parts["remove"].click, desk.remove_images, [session], [session, tray, image])
    on(parts["ask"].click, desk.classify, asked, parts["answers"], reveal="#answers")
    which.change(
        lambda chosen: gr.Textbox(visible=chosen == WORDS[1]), which, lines, preprocess=False,
        **PRIVATE,
    )  # fmt: skip
    on(
        parts["draw"].click, desk.heat, [model, image, parts["method"], parts["target"], session],
        [parts["heat"], parts["opacity"]], reveal="#heat",
    )  # fmt: skip
    parts["opacity"].input(
        None, parts["opacity"], None, **PRIVATE,
        js="(v) => { document.documentElement.style.setProperty('--heat', v); return [] }",
    )  # fmt: skip


def _lay_out_adapt() -> dict[str, Any]:
    """The boxes and buttons of the tab Adapt."""
    with gr.Row(elem_classes="two"):
        with gr.Column():
            gr.HTML(markup.ADAPTING)
            pack = gr.File(
                label="A ZIP of images with a table, or with one folder per class",
                file_types=[".zip"], height=130, elem_id="set-zip",
            )  # fmt: skip
            with gr.Row(elem_classes="buttons"):
                folder = gr.UploadButton(
                    "Choose a folder", file_count="directory", elem_id="set-folder"
                )
                fill = gr.Button("Synthetic examples", elem_id="support-fill")
                clear = gr.Button("Empty all", elem_id="support-clear")
            read = gr.HTML(elem_id="set-read")
            names, boxes, trays, folds = [], [], [], []
            for k in range(MAX_CLASSES):
                with gr.Accordion(
                    f"Class {k + 1}", visible=k < MIN_BOXES, elem_id=f"class-{k}"
                ) as fold:
                    folds.append(fold)
                    names.append(
                        gr.Textbox(label=f"Name of class {k + 1}", elem_id=f"class-name-{k}")
                    )
                    boxes.append(
                        gr.File(
                            label=f"Images of class {k + 1}", file_count="multiple",
                            file_types=TYPES, height=120, elem_id=f"class-images-{k}",
                        )
                    )  # fmt: skip
                    trays.append(gr.HTML(markup.show_tray([]), elem_id=f"class-tray-{k}"))
            more = gr.Button("One more class", elem_id="more-classes")
            with gr.Accordion("Patients of dropped images", open=False, elem_id="patients-open"):
                by_name = gr.Checkbox(
                    label="File names begin with the patient and an underscore (P012_3.png)",
                    elem_id="patients-by-name",
                )
                table = gr.File(
                    label="Or a table: file_name, patient_id (CSV)", file_types=[".csv"],
                    height=120, elem_id="patients-table",
                )  # fmt: skip
            methods = [(f"{name}: trains {what}", name) for name, what in frozen_methods().items()]
            method = gr.Dropdown(
                methods, value="linear_probe", label="Method",
                info="All leave the towers as they are.", elem_id="adapt-method",
            )  # fmt: skip
            outline = gr.Dropdown(
                [(title, name) for name, title in OUTLINES.items()], value="ignore",
                label="What the model sees", elem_id="adapt-outline",
                info="What lies outside is hidden; the limits beside the result say what that is.",
            )  # fmt: skip
            start = gr.Button("Adapt", variant="primary", elem_id="adapt-start")
        with gr.Column(elem_classes="answer"):
            result = gr.HTML(markup.show_empty("adapt"), elem_id="adapt-result", min_height=60)
            with gr.Row(elem_classes="buttons"):
                download = gr.DownloadButton(
                    "Download the model", interactive=False, elem_id="adapt-zip"
                )
                use = gr.Button("Use this model above", elem_id="adapt-use", interactive=False)
    return {
        "pack": pack, "folder": folder, "read": read, "fill": fill, "clear": clear,
        "names": names, "boxes": boxes, "trays": trays, "folds": folds, "more": more,
        "by_name": by_name, "table": table, "method": method, "outline": outline, "start": start,
        "result": result, "download": download, "use": use,
    }  # fmt: skip


def _connect_adapt(
    desk: Desk, on: Any, parts: dict[str, Any], model: Any, other: Any, session: Any
) -> None:
    names, trays = parts["names"], parts["trays"]
    filled = [session, parts["read"], *names, *trays, *parts["folds"]]
    on(parts["fill"].click, desk.fill_support, [session], filled)
    on(parts["clear"].click, desk.clear_support, [session], filled)
    on(parts["more"].click, desk.add_box, [session], [session, *parts["folds"]])
    for box in (parts["pack"], parts["folder"]):
        on(box.upload, desk.read_support, [box, session], [box, parts["outline"], *filled])
    for k, (box, tray) in enumerate(zip(parts["boxes"], trays, strict=True)):

        def add(files: Any, held: Session, place: int = k) -> tuple[Any, ...]:
            return desk.add_support(place, files, held)

        on(box.upload, add, [box, session], [box, session, tray])
    on(
        parts["start"].click,
        desk.adapt,
        [
            model, parts["method"], parts["outline"], parts["by_name"], parts["table"], session,
            *names,
        ],
        [
            session, parts["table"], parts["result"], parts["download"], parts["use"], model, other,
        ],
        reveal="#adapt-result",
        **ONE_AT_A_TIME,
    )  # fmt: skip


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

    # Warnings of the package name files and patients, which are strangers' here.
    logging.getLogger("hf_glovlm").setLevel(logging.ERROR)
    # Gradio deletes only the files that it has handled itself.
    Thread(target=keep_clean, daemon=True).start()
    here = Path(__file__).parent
    script = (here / "page.js").read_text(encoding="utf-8")
    theme = gr.themes.Soft(primary_hue="violet", font=FONTS, font_mono=MONO).set(**LOOKS)
    return page.launch(
        **{
            "theme": theme,
            "css_paths": here / "style.css",
            "head": f"<script>{script}</script>",
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
