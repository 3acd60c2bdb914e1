"""Every code block and command of the README and the documentation.

Commands are read by the real command line and made into the settings that it would run with. Those
of the pages for users are run, too, one after another in one folder, on synthetic images and
`mini`; `NOT_RUN` says which are not. Pages that lead from slides to a sheet (qupath, road, sheet)
have tests of their own, and cells of notebooks are executed when the site is built.
"""

import ast
import json
import shutil
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from clinic_made import Layout, write_clinic
from command_line import Glovlm
from doc_pages import (
    NOTEBOOK,
    ROOT,
    Block,
    blocks,
    commands_of,
    name_of,
    pages,
    shell_lines,
    spans,
)

import hf_glovlm
from hf_glovlm.cli.app import app
from hf_glovlm.cli.options import read_config
from hf_glovlm.lab.pretraining_config import PretrainConfig
from hf_glovlm.runs.config import TrainConfig
from hf_glovlm.settings import Settings, declarations
from hf_glovlm.slides.config import SlideConfig
from hf_glovlm.slides.finder.config import FindConfig, FindTrainConfig
from hf_glovlm.slides.mil.config import MilConfig

PAGES = [pytest.param(page, id=name_of(page)) for page in pages()]
LANGUAGES = {"bash", "python", "yaml", "json", "csv", "groovy", "bibtex", "text"}
# Commands whose options are the settings of a class, with the one that `--set` fills.
CONFIGS: dict[tuple[str, ...], tuple[type[Settings], str]] = {
    ("train",): (TrainConfig, "method_config"),
    ("mil",): (MilConfig, "aggregator_config"),
    ("slide",): (SlideConfig, ""),
    ("pretrain",): (PretrainConfig, ""),
    ("find", "train"): (FindTrainConfig, ""),
    ("find", "run"): (FindConfig, ""),
}
# Folders of the repository: what a command names in them is there.
OURS = ("docs/", "experiments/", "hf_glovlm/", "spaces/", "tests/")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TARGETS = {
    line.split(":")[0]
    for line in (ROOT / "Makefile").read_text("utf-8").splitlines()
    if line[:1].isalpha() and ":" in line and "=" not in line.split(":")[1][:1]
}


@cache
def command_line() -> Any:
    """The command `glovlm` with all that stands below it."""
    return typer.main.get_command(app)


def read_command(words: list[str], *, whole: bool = True) -> dict[str, Any]:
    """Read the arguments of `glovlm` as it reads them, and make its settings of them.

    Args:
        words: What follows `glovlm`.
        whole: Whether all that is required must be there.

    Returns:
        The command's parameters.
    """
    command: Any = command_line()
    rest: list[str] = [] if words[:1] == ["COMMAND"] else list(words)  # any of them
    path: list[str] = []
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"no command '{name}' in {' '.join(words)}"
        path.append(name)
        command = command.commands[name]
    if hasattr(command, "commands"):
        alone = command.invoke_without_command
        assert rest or alone or not whole, f"'{' '.join(path)}' is not a whole command"
        if not rest:
            return {}
    context = command.make_context(" ".join(path), rest, resilient_parsing=not whole)
    given: dict[str, Any] = context.params
    if tuple(path) in CONFIGS and whole and not given.get("config"):
        config, own = CONFIGS[tuple(path)]
        names = {*declarations(config), "settings", "config"}
        read_config(config, {k: v for k, v in given.items() if k in names}, own)
    if isinstance(given.get("backbone"), str):
        assert is_backbone(given["backbone"]), f"no backbone '{given['backbone']}'"
    return given


def is_backbone(name: str) -> bool:
    """Whether a page may name it: a known one, a Hub id, a pair of these, or a place for one."""
    known = set(hf_glovlm.BACKBONES) | {"mini", "dinov2-small-10l", "all-MiniLM-L6-v2"}
    return all(part in known or "/" in part or part.isupper() for part in name.split("+"))


def check_shell(words: list[str]) -> None:
    """Check one command of a shell block as far as it can be without running it."""
    program, *rest = words
    for word in rest:
        if word.startswith(OURS):
            assert (ROOT / word).exists(), f"{word} is not in the repository"
    if program == "glovlm":
        read_command(rest)
    elif program == "make":
        targets = {word for word in rest if "=" not in word and not word.startswith("-")}
        assert targets <= TARGETS, f"the Makefile has no {targets - TARGETS}"
    elif program in ("pip", "pip3"):
        check_install(rest)
    elif program == "accelerate":
        at = rest.index("hf_glovlm/train.py")
        read_command(["train", *rest[at + 1 :]], whole="..." not in rest)
    elif program in ("python", "python3"):
        check_python(rest)
    else:
        # Programs of others, whose options we cannot check.
        assert program in ("git", "cd", "source", "apt-get", "hf", "unzip"), f"what is {program}?"


def check_install(words: list[str]) -> None:
    """Extras and files that `pip install` names are there."""
    assert words[0] == "install"
    for word in words[1:]:
        if "[" in word:
            extras = set(word.partition("[")[2].partition("]")[0].split(","))
            assert extras <= set(PROJECT["optional-dependencies"]), f"unknown extras in {word}"
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()


def check_python(words: list[str]) -> None:
    """Modules of ours that `python -m` names are there."""
    if words[0] == "-m" and words[1].startswith("hf_glovlm"):
        assert find_spec(words[1]), f"no module {words[1]}"
        if words[1] == "hf_glovlm":
            read_command(words[2:])
    elif words[0] == "-m":
        assert words[1] in ("venv", "pytest", "pip", "sphinx", "http.server"), (
            f"what is {words[1]}?"
        )


def names_of_package(tree: ast.AST) -> Iterator[str]:
    """The names of `hf_glovlm` that a piece of code takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_glovlm"):
            assert node.module in ("hf_glovlm", "hf_glovlm.explain"), f"{node.module} is not public"
            yield from (alias.name for alias in node.names if node.module == "hf_glovlm")
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hf_glovlm":
            yield node.attr


def check_python_block(block: Block) -> None:
    """Compile a block; what it takes of the package is public, with arguments that are there."""
    lines = block.text.splitlines()
    text = "\n".join("pass" if line.startswith("%") else line for line in lines)
    tree = ast.parse(text, block.page)
    assert set(names_of_package(tree)) <= set(hf_glovlm.__all__)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("hf_glovlm."):
            continue
        names = {keyword.arg for keyword in node.keywords if keyword.arg}
        called = getattr(hf_glovlm, ast.unparse(node.func).split(".")[1])
        if isinstance(called, type) and issubclass(called, Settings):
            assert names <= set(declarations(called)), f"{called.__name__} has no {names}"
    for line in lines:
        if line.startswith(NOTEBOOK):
            check_shell(["glovlm", *shell_words(line.removeprefix(NOTEBOOK))])


def shell_words(line: str) -> list[str]:
    return next(shell_lines(line))


def check_yaml(block: Block) -> None:
    """Read a block; a study's or a run's settings are made of it, where it is one."""
    values = yaml.safe_load(block.text)
    if not isinstance(values, dict) or "data" not in values:
        return
    if "methods" in values:
        hf_glovlm.StudyConfig.from_mapping(values)
    elif "method" in values:
        TrainConfig.from_mapping(values)


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_what_its_language_says(page: Path) -> None:
    for block in blocks(page):
        where = f"{block.page}, line {block.line}"
        assert block.language in LANGUAGES, f"{where}: name one of {sorted(LANGUAGES)}"
        try:
            if block.language == "bash":
                for words in shell_lines(block.text):
                    check_shell(words)
            elif block.language == "python":
                check_python_block(block)
            elif block.language == "yaml":
                check_yaml(block)
            elif block.language == "json":
                json.loads(block.text)
        except Exception as error:
            raise AssertionError(f"{where}: {error or type(error).__name__}") from error


@pytest.mark.parametrize("page", PAGES)
def test_each_command_in_a_sentence_is_one_of_ours(page: Path) -> None:
    for text in spans(page):
        try:
            if text.startswith("glovlm "):
                read_command(next(shell_lines(text))[1:], whole=False)
            elif text.startswith("make "):
                check_shell(text.split())
            elif text.startswith("hf_glovlm.") and text.count(".") == 1:
                check_python_block(Block(name_of(page), 0, "python", text))
        except Exception as error:
            raise AssertionError(f"{text}: {error or type(error).__name__}") from error


# ------------------------------------------------------------------------------------- run for true

# Why a command of these pages is not run, by how it begins; all others are.
NOT_RUN = {
    "demo": "takes half a minute and has tests of its own",
    "doctor": "looks at the machine, and has tests of its own",
    "push run lab/glo-vlm": "needs the Hub, unless it ends in --dry-run",
    "find": "is run by the tests of the page on the whole road",
    "study": "a study is run by a notebook",
}
WALKED = ["README.md", "docs/get-started.md"]
LONGER = [
    *("choosing-a-method", "runs", "outline", "outlines", "slides", "exported", "heat-maps"),
    "publishing",
]
SMALL = Layout(size=(420, 340), step=72, sides=(52, 60), margin=24)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages presuppose, by the names that they use; synthetic."""
    folder = tmp_path_factory.mktemp("world")
    names = [f"B{i}" for i in range(10)]
    classes = ("globally sclerosed", "viable")
    write_clinic(folder, {name: name[1:] for name in names}, names[8:], classes, SMALL)
    cohort = hf_glovlm.write_cohort(folder / "my_images", 20, 5, seed=1)
    others = hf_glovlm.write_cohort(folder / "other_images", 4, 5, seed=2)
    table = (others / "metadata.csv").read_text().replace(",P0", ",Q0")  # other patients
    (others / "metadata.csv").write_text(table)
    shutil.copytree(others, folder / "other_hospital")
    shutil.copytree(cohort, folder / "biopsies")
    (folder / "new_images").mkdir()
    for i, picture in enumerate(sorted((folder / "other_images").rglob("*.png"))[:3]):
        shutil.copy(picture, folder / "new_images" / ("one.png" if i == 0 else f"{i}.png"))
    shutil.copy(folder / "new_images/one.png", folder / "image.png")
    shutil.copytree(folder / "biopsies", folder / "more_crops")
    return folder


def quick(words: list[str]) -> list[str]:
    """A command with fewer resamples, and fewer steps where it trains inside the towers."""
    more = []
    if words[0] == "train":
        more = ["--n-resamples", "50", "--shots", "4"]
        if "lora" in words:
            more += ["--max-steps", "1"]
        if "--calibration-groups" in words:
            more += ["--calibration-groups", "4", "--alpha", "0.5", "--max-risk", "0.9"]
    elif words[0] == "evaluate":
        more = ["--n-resamples", "50"]
    return [*words, *more]


@pytest.mark.parametrize(
    "name",
    [*WALKED, *(pytest.param(f"docs/{name}.md", marks=pytest.mark.long) for name in LONGER)],
)
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_blocks_of_a_page_run_one_after_another(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glovlm: Glovlm
) -> None:
    pytest.importorskip("openslide")
    folder = tmp_path / "world"
    shutil.copytree(world, folder, copy_function=shutil.copy)
    monkeypatch.chdir(folder)
    given = True  # whether `biopsies` is still what a person gave
    for block in blocks(ROOT / name):
        if block.language == "python":
            before = set(folder.iterdir())
            exec(block.text.replace("vinid/plip", "mini"), {})
            for made in set(folder.iterdir()) - before:  # the commands make it again
                shutil.rmtree(made)
        for words in commands_of(block, backbone="mini"):
            line = " ".join(words)
            if "--dry-run" not in words and any(line.startswith(start) for start in NOT_RUN):
                continue
            if words[:2] == ["data", "crops"] and given:
                shutil.rmtree(folder / "biopsies")
                given = False
            done = glovlm(*quick(words))
            assert done.code == 0, (line, done.err[-2000:])


def test_the_block_on_embeddings_of_others_runs() -> None:
    (block,) = (
        one for one in blocks(ROOT / "docs/choosing-a-method.md") if one.language == "python"
    )
    scope: dict[str, Any] = {}
    exec(block.text, scope)
    assert scope["logits"].shape == (5, 2)
