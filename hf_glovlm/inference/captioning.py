"""Image captioning by an image-to-text model, for methods that train with a text per image.

The model gets the image and one fixed question, never the label, the file name or anything else of
the table, and a question that names a class is refused. Captions may be wrong; `captions.json`
marks them as machine-written.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..data.columns import FLOAT_COLUMNS, MANIFEST
from ..data.folder import column, load_dataset, open_image
from ..data.listing import FileNames, plain_path
from ..data.readers import images_column
from ..data.terminology import match_key
from ..errors import GloVLMError
from ..files import (
    check_target,
    digest_file,
    digest_tensors,
    explaining_disk,
    one_writer,
    read_json,
    remove,
    write_csv,
    write_json,
    write_table,
    write_text,
)
from ..progress import counting
from ..tables import column_name, read_table

QUESTION = "Can you provide a concise description of the histopathology image shown?"
_NOTE = "Written by a model, not by a person."
_NO_QUESTION = ("blip", "git", "vision-encoder-decoder")  # models that take no question


@dataclass(frozen=True)
class CaptionSummary:
    """Summary of a captioning run.

    Attributes:
        path: The table with the captions.
        model: The model, as given.
        kind: Architecture and kind; see `Captioner`.
        question: The question; `None` where the model takes none.
        written: Captions written now.
        kept: Captions that were there before.
        empty: Images with an empty caption.
    """

    path: str
    model: str
    kind: str
    question: str | None
    written: int
    kept: int
    empty: list[str]


class Captioner:
    """Captioner: an image-to-text model with its processor.

    Attributes:
        kind: `chat` (gets the question through its chat template, such as LLaVA) or `captioner`
            (takes no question: BLIP, GIT, a vision encoder with a text decoder).
        description: Architecture and kind, in words.
    """

    def __init__(self, model: Any, processor: Any, kind: str, question: str) -> None:
        self.model, self.processor, self.kind, self.question = model, processor, kind, question
        self.description = f"{model.config.model_type} ({type(model).__name__}), {kind}"

    def describe(self, images: Sequence[Any], max_new_tokens: int) -> list[str]:
        """Caption RGB images with greedy decoding: the same batch gives the same captions.

        Args:
            images: Pillow images.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            One text an image, its white space made single; it may be empty.
        """
        inputs = self._inputs(list(images)).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            # The settings that a checkpoint carries for sampling are taken off, else they warn.
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
            )
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if self.kind == "chat":  # these repeat the prompt
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: list[Any]) -> Any:
        if self.kind == "captioner":
            return self.processor(images=images, return_tensors="pt")
        turn = [{"type": "image"}, {"type": "text", "text": self.question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True
        )
        return self.processor(
            images=images, text=[prompt] * len(images), padding=True, return_tensors="pt"
        )


def load_captioner(
    model: str | Path,
    *,
    question: str = QUESTION,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Captioner:
    """Load an image-to-text model of the kind that its config names.

    Args:
        model: Hub id or folder, in the layout of transformers.
        question: For chat models.
        device: By default CUDA where there is one, else the CPU.
        revision: Commit, tag or branch on the Hub.

    Raises:
        GloVLMError: No such model, no image-to-text model, or a chat model without a chat
            template.
    """
    source, pinned = str(model), {"revision": revision}
    try:
        config = AutoConfig.from_pretrained(source, **pinned)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise GloVLMError(
            f"'{source}' is no model that transformers can load ({reason}); weights in LLaVA's "
            "original layout have to be converted to transformers' Llava first."
        ) from None
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise GloVLMError(
            f"'{source}' is a {config.model_type} model, which writes no text about an image; "
            "expected LLaVA or another chat model, BLIP, GIT or a vision-encoder-decoder."
        )
    kind = "captioner" if config.model_type in _NO_QUESTION else "chat"
    processor: Any
    if config.model_type == "vision-encoder-decoder":
        images = AutoImageProcessor.from_pretrained(source, **pinned)
        processor = _ImagesAndTokens(images, AutoTokenizer.from_pretrained(source, **pinned))
    else:
        processor = AutoProcessor.from_pretrained(source, **pinned)
    if kind == "chat":
        if not getattr(processor, "chat_template", None):
            raise GloVLMError(
                f"'{source}' is a {config.model_type} model without a chat template, which puts "
                "the question to it; add chat_template.jinja to its folder."
            )
        processor.tokenizer.padding_side = "left"  # answers begin where the prompts end
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.device(chosen).type == "cuda" and kind == "chat"
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.bfloat16 if half else torch.float32, **pinned
    )
    return Captioner(loaded.to(chosen).eval(), processor, kind, question)


class _ImagesAndTokens:
    """Processor of a vision-encoder-decoder: its image processor and tokenizer."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self._images, self.tokenizer = images, tokenizer

    def __call__(self, **inputs: Any) -> Any:
        return self._images(**inputs)


def write_captions(
    dataset: Path,
    *,
    model: str | Path,
    question: str = QUESTION,
    output: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    device: str | torch.device | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> CaptionSummary:
    """Caption every image of a folder.

    By default `metadata.csv` gets a column `caption` beside what it has (for class folders without
    one, the file is made). Captions that are there are kept. Decoding is greedy, so that no seed
    matters. Every batch is recorded in a hidden folder beside the table as soon as it is done, with
    digests of its images, and an interrupted run continues behind it; the table itself is written
    whole, at the end.

    Args:
        dataset: A folder as `load_dataset` reads it.
        model: An image-to-text model; see `load_captioner`. ConVLM's was Quilt-LLaVA 1.5 7B.
        question: ConVLM's by default; a captioner that takes no question ignores it.
        output: A `.parquet` (`file_name, caption`) or `.csv` (a copy of the table) in place of
            `metadata.csv`.
        batch_size: Images at a time.
        max_new_tokens: Longest caption, in tokens (ConVLM: 1024).
        device: See `load_captioner`.
        revision: See `load_captioner`.
        overwrite: Caption everything anew.
        on_progress: Called with the number of images done and of all.

    Raises:
        GloVLMError: A question that names a class, another suffix, a folder whose parts have
            tables of their own, an image or a model that cannot be read, a run begun with other
            settings, another process that writes there, an output that is something else.
    """
    dataset = Path(dataset)
    if not dataset.is_dir():
        raise GloVLMError(f"Expected a folder of images at {dataset}; captions are written there.")
    if batch_size < 1 or max_new_tokens < 1:
        raise GloVLMError("Expected a batch size and a number of tokens of at least 1.")
    target = output or dataset / "metadata.csv"
    if target.suffix not in (".csv", ".parquet"):
        raise GloVLMError(f"Expected an output ending in .csv or .parquet, found {target.name}.")
    own = dataset / "metadata.csv"  # gets a column more; nothing else of somebody's does
    check_target(target, "a table of captions", lambda path: path == own or _is_captions(path))
    about = target.with_name("captions.json")
    check_target(about, "a record of captions", lambda path: read_json(path).get("note") == _NOTE)
    table = _CaptionTable(dataset, target)
    if target != own and not set(table.known) <= set(table.names):
        raise GloVLMError(
            f"'{target}' is there already and holds captions of other images: name another output."
        )
    _check_question(question, table.classes)
    known = {} if overwrite else dict(table.known)

    place = target.with_name(f".{target.name}.captions")
    with one_writer(place):
        captioner = load_captioner(model, question=question, device=device, revision=revision)
        journal = _Journal(
            place / "captions.jsonl",
            {
                "model": str(model),
                "weights": digest_tensors(captioner.model.state_dict().items()),
                "revision": revision,
                "question": question,
                "max_new_tokens": max_new_tokens,
                "batch_size": batch_size,
            },
        )
        done = journal.read(table)
        uncaptioned = [name for name in table.names if not known.get(name)]
        todo = [name for name in uncaptioned if name not in done]
        before = len(uncaptioned) - len(todo)
        with counting("images", len(uncaptioned), done=before) as count:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                images = [open_image(table.images[name]) for name in batch]
                texts = dict(zip(batch, captioner.describe(images, max_new_tokens), strict=True))
                journal.append({name: (table.digest(name), text) for name, text in texts.items()})
                done |= texts
                count.reach(before + start + len(batch))
                if on_progress is not None:
                    on_progress(count.done, len(uncaptioned))
        captions = {name: known.get(name) or done[name] for name in table.names}
        table.write(captions)
        summary = _summarise(target, model, captioner, captions, uncaptioned)
        facts = {"note": _NOTE, "max_new_tokens": max_new_tokens}
        facts |= {k: v for k, v in asdict(summary).items() if k != "path"} | {"revision": revision}
        write_json(about, facts, indent=2)
        with suppress(OSError):  # an open file, on Windows
            remove(place)
    return summary


def _summarise(
    target: Path,
    model: str | Path,
    captioner: Captioner,
    captions: Mapping[str, str],
    written: Sequence[str],
) -> CaptionSummary:
    return CaptionSummary(
        path=str(target),
        model=str(model),
        kind=captioner.description,
        question=captioner.question if captioner.kind == "chat" else None,
        written=len(written),
        kept=len(captions) - len(written),
        empty=[name for name, text in captions.items() if not text],
    )


def _check_question(question: str, classes: Sequence[str]) -> None:
    """Refuse a question that names a class: it would put the label into every caption."""
    words = f" {match_key(question)} "
    named = [name for name in classes if f" {match_key(name)} " in words]
    if named:
        raise GloVLMError(
            f"The question names the class '{named[0]}', which would leak labels into captions; "
            "choose a question without class names."
        )
    if not question.strip():
        raise GloVLMError("The question is empty.")


class _CaptionTable:
    """Images of a folder, and the table that takes their captions.

    Attributes:
        names: File names, in the order of the data set.
        images: The undecoded image of each.
        classes: Class names.
        known: Captions that the target holds already.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self._target = target
        self.names: list[str] = []
        self.images: dict[str, Any] = {}
        self._header = ["file_name", "label", "split"]
        self._lines: dict[str, list[str]] = {}
        for split, rows in load_dataset(folder).items():
            self.classes: list[str] = rows.features["label"].names
            about = [key for key in MANIFEST if key in rows.column_names]
            self._header[3:] = about
            values = (column(rows, key) for key in ("file_name", "image", "label", *about))
            for name, image, label, *facts in zip(*values, strict=True):
                self.names.append(name)
                self.images[name] = image
                facts = ["" if fact is None else str(fact) for fact in facts]
                part = "" if split == "all" else split
                self._lines[name] = [name, self.classes[label], part, *facts]
        metadata = folder / "metadata.csv"
        if metadata.is_file():
            self._header, self._lines = _read_lines(metadata, self.names)
        elif target.suffix == ".csv" and any(folder.glob("*/metadata.csv")):
            raise GloVLMError(
                f"The parts of {folder} have a metadata.csv each; join them into one with a column "
                "split, or give an output ending in .parquet."
            )
        self.known = _known_captions(target, self.names)
        self._read = metadata.is_file() and digest_file(metadata)
        self._metadata = metadata

    def digest(self, name: str) -> str:
        """Digest of an image's bytes."""
        image = self.images[name]
        if image.get("bytes") is None:
            return digest_file(Path(image["path"]))
        return str(xxhash.xxh3_128_hexdigest(image["bytes"]))

    def write(self, captions: dict[str, str]) -> None:
        """Write the target atomically.

        Raises:
            GloVLMError: `metadata.csv` has changed since it was read.
        """
        if self._read != (self._metadata.is_file() and digest_file(self._metadata)):
            raise GloVLMError(
                f"{self._metadata} has changed since the captions were begun: give the command "
                "again, which keeps those that are written."
            )
        if self._target.suffix == ".parquet":
            texts = [captions[name] for name in self.names]
            write_table(self._target, {"file_name": self.names, "caption": texts})
            return
        index = _column_index("caption", self._header)
        rows = []
        for name, line in self._lines.items():
            where = len(line) if index is None else index
            before = "" if index is None else line[index]  # of a crop without a label: not read
            rows.append([*line[:where], captions.get(name, before), *line[where + 1 :]])
        header = self._header if index is not None else [*self._header, "caption"]
        write_csv(self._target, header, rows)


def _read_lines(path: Path, names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Header and rows of a table by file name, cells as written but for decimal commas."""
    table = read_table(path, "a table of images", strip=False)
    index = images_column(table)
    index = table.need("file_name") if index is None else index
    numbers = [i for i, name in enumerate(table.names) if name in FLOAT_COLUMNS]
    known, lines = FileNames(names, path.parent), {}
    for row in table.rows:
        for i in numbers:
            row[i] = table.number(row[i])
        lines[known.find(row[index]) or plain_path(row[index])] = row
    return table.header, lines


def _known_captions(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Captions in a table, by file name; none without the file."""
    if not path.is_file():
        return {}
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            columns = pq.read_table(path, columns=["file_name", "caption"]).to_pydict()
            return dict(zip(columns["file_name"], columns["caption"], strict=True))
        except (OSError, ValueError, KeyError):  # damaged, or another table
            return {}
    header, lines = _read_lines(path, names)
    index = _column_index("caption", header)
    return {} if index is None else {name: line[index].strip() for name, line in lines.items()}


def _is_captions(path: Path) -> bool:
    """Whether a file is a table as `write_captions` writes it."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(path).names) == ["file_name", "caption"]
    return {"file_name", "caption"} <= {*read_table(path).names}


def _column_index(name: str, header: Sequence[str]) -> int | None:
    """Index of a column; case and blanks aside, as `load_dataset` reads a header."""
    plain = [column_name(cell) for cell in header]
    return plain.index(name) if name in plain else None


class _Journal:
    """Journal of finished captions, one line per batch; other settings are refused."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self._settings = path, settings

    def read(self, table: _CaptionTable) -> dict[str, str]:
        """Captions of an earlier run of the same settings; begins the file where there is none.

        Those of images that have changed since are left out.
        """
        if not self.path.is_file():
            write_text(self.path, json.dumps(self._settings) + "\n")
            return {}
        try:
            whole = [
                (line, json.loads(line))
                for line in self.path.read_text("utf-8").splitlines(True)
                if line[-1] == "\n"
            ]
        except ValueError:
            raise GloVLMError(f"{self.path} is damaged: delete it to begin anew.") from None
        if not whole or whole[0][1] != self._settings:
            raise GloVLMError(
                f"{self.path} holds captions of a run with another model, question or batch size; "
                "finish that one, or delete the file to begin anew."
            )
        # A line that was cut off when the run was killed is dropped, in the file too.
        write_text(self.path, "".join(line for line, _ in whole))
        captions: dict[str, tuple[str, str]] = {}
        for _, batch in whole[1:]:
            captions |= batch
        return {
            name: text
            for name, (digest, text) in captions.items()
            if name in table.images and table.digest(name) == digest
        }

    def append(self, captions: Mapping[str, tuple[str, str]]) -> None:
        """Append one batch: digest of each image and its caption."""
        with explaining_disk(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(captions) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
