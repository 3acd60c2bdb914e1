"""The rules of the code's shape, read off the syntax tree of each file without importing any."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "hf_glovlm"
# Floors from the ground up. A room never imports one above it, and none of its own floor but those
# in NEIGHBOURS. On the top floor stand the doors: the package root names what is public and brings
# it in when it is asked for; `lab` makes data and measures, and nothing but the doors imports it.
FLOORS = {
    1: {
        "arrays",
        "environment",
        "errors",
        "files",
        "intervals",
        "lazy",
        "model",
        "progress",
        "roc",
        "runtimes",
    },
    2: {"backbones", "calibration", "curves", "metrics", "settings", "tables"},
    3: {"data", "rendering"},
    4: {"charts", "methods"},
    5: {"inference"},
    6: {"explain", "publish", "training"},
    7: {"reports", "runs"},
    8: {"slides"},
    9: {"__init__", "__main__", "cli", "lab", "train"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
NEIGHBOURS = {"__main__": {"cli"}, "cli": {"lab"}, "train": {"cli"}}
NEIGHBOURS |= {room: {"errors"} for room in ("arrays", "environment", "files")}
ONLY: dict[str, set[str]] = {  # stricter than the floor
    "backbones": {"errors", "files", "model"},
    "calibration": {"errors", "intervals"},
    "curves": {"arrays", "errors", "intervals"},
    "data": {"errors", "files", "lazy", "progress", "settings", "tables"},
    "metrics": {"arrays", "errors", "intervals", "roc"},
    "settings": {"errors", "files"},
    "tables": {"errors", "files"},
}
CLOSURE = {"torch", "transformers", *sys.stdlib_module_names}
BAD_NAMES = {"utils", "helpers", "common", "manager", "misc"}
BAD_NAMES |= {"accelerate", "clip", "datasets", "evaluate", "gradio", "open_clip", "peft"}
BAD_NAMES |= {"sklearn", "torch", "torchvision", "transformers"}
PICKLES = {"pickle", "joblib", "dill", "cloudpickle", "shelve"}
# Names say what a thing is in the field's words, not what somebody does with it.
VAGUE = {"borrow", "claim", "found", "mind", "reword", "said", "settle", "steer", "taught", "tell"}
VAGUE |= {"told", "wanted"}
MAX_LINES = 900
Import = tuple[ast.stmt, str, str]  # the statement, the absolute module, the name taken or ""


@lru_cache(maxsize=1)  # all rules look at one file before the next
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a syntax tree."""
    return tuple(ast.walk(tree))


def imports(tree: ast.AST, package: str) -> Iterator[Import]:
    """Every import of a file, in functions too, with relative ones made absolute."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield from ((node, base, alias.name) for alias in node.names)


def unit(module: str, name: str) -> str:
    """`hf_glovlm.data.splits` -> `data`; `from hf_glovlm import data` -> `data`."""
    parts = [*module.split("."), *([name] if name in FLOOR else [])]
    return parts[1] if len(parts) > 1 else "__init__"


def guarded(tree: ast.AST) -> set[ast.AST]:
    """What stands inside `try: ... except ImportError`."""
    inside: set[ast.AST] = set()
    for node in nodes(tree):
        caught = [ast.unparse(h) for h in node.handlers] if isinstance(node, ast.Try) else []
        if any(re.search(r"except.*(ImportError|ModuleNotFoundError)", text) for text in caught):
            inside |= {inner for statement in node.body for inner in ast.walk(statement)}
    return inside


def floors(path: Path, tree: ast.Module) -> Iterator[str]:
    """What a file of the package may import from the package."""
    home = path.parts[1] if len(path.parts) > 2 else path.stem
    if home not in FLOOR:
        yield f"'{home}' has no floor: give it one in this test"
        return
    for _, module, name in imports(tree, ".".join(path.parent.parts)):
        if module.split(".")[0] != PACKAGE or (module, name) == (PACKAGE, "__version__"):
            continue
        target = unit(module, name)
        below = FLOOR.get(target, 99) < FLOOR[home] and target in ONLY.get(home, {target})
        if target != home and not (below or target in NEIGHBOURS.get(home, ())):
            yield f"'{home}' must not import '{target}'"


def closure(path: Path, tree: ast.Module) -> Iterator[str]:
    """What transformers can copy to the Hub: a flat folder, flat imports, no other library."""
    if path.parts[:2] != (PACKAGE, "model"):
        return
    if len(path.parts) != 3:
        yield "model/ is flat"
    optional = guarded(tree)
    for node, module, _ in imports(tree, ".".join(path.parent.parts)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level != 1 or not node.module or "." in node.module:
                yield f"only `from .file import name` is copied along, not `{ast.unparse(node)}`"
        elif module.split(".")[0] == PACKAGE:
            yield f"'{module}' is not there without the package"
        elif module.split(".")[0] not in CLOSURE and node not in optional:
            yield f"'{module}' must stand inside try ... except ImportError"


UNSAFE = ("weights_only", "allow_pickle", "trust_remote_code")  # arguments that decide


def safety(path: Path, tree: ast.Module) -> Iterator[str]:
    """No pickle and no code from elsewhere."""
    for _, module, name in imports(tree, ".".join(path.parent.parts)):
        if {module.split(".")[0], name} & PICKLES:
            yield f"'{module}' pickles"
    for node in nodes(tree):
        if not isinstance(node, ast.Call | ast.Dict | ast.ClassDef):
            continue
        given = [(k.arg, k.value) for k in getattr(node, "keywords", [])]
        if isinstance(node, ast.Dict):
            given = [
                (getattr(k, "value", None), v) for k, v in zip(node.keys, node.values, strict=True)
            ]
        keywords = {name: ast.unparse(value) for name, value in given if name in UNSAFE}
        function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if function == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load needs weights_only=True"
        if function.endswith("_pickle") or keywords.get("allow_pickle") == "True":
            yield f"'{function}' pickles"
        if (
            function in ("os.replace", "os.rename")
            and path.parts[1:] != ("files.py",)
            and path.parts[0] == PACKAGE
        ):
            yield f"{function} is for files.py: write through it"
        if keywords.get("trust_remote_code") == "True":
            yield "trust_remote_code=True: models of others bring weights, never code"


def form(path: Path, tree: ast.Module) -> Iterator[str]:
    """A file's name, its size, and a docstring on what is public."""
    if bad := BAD_NAMES & {*path.parts[1:-1], path.stem}:
        yield f"the name {bad} says nothing, or hides a library"
    for node in tree.body if path.parts[0] == PACKAGE else []:
        definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if definition and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{node.name} has no docstring"


def terms(tree: ast.Module) -> Iterator[str]:
    """What definitions, arguments and variables are called."""
    for node in nodes(tree):
        name = ""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if VAGUE & set(name.lower().split("_")):
            yield f"'{name}' is no term of the field"


def namesakes(file: Path, path: Path, tree: ast.Module) -> Iterator[str]:
    """A package's attribute is a function first and a module once that was imported: never both."""
    beside = {other.stem for other in file.parent.glob("*.py")}
    beside |= {other.parent.name for other in file.parent.glob("*/__init__.py")}
    for node in tree.body if path.parts[0] == PACKAGE else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in beside:
            yield f"{node.name} is called like a module beside it"


def public_only(path: Path, tree: ast.Module, public: set[str]) -> Iterator[str]:
    """A Space uses what every user has."""
    used = {(module, name) for _, module, name in imports(tree, "") if module.startswith(PACKAGE)}
    used |= {
        (PACKAGE, node.attr)
        for node in nodes(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == PACKAGE
    }
    for module, name in sorted(used):
        if module != PACKAGE or name not in public | {"", "__version__"}:
            yield f"'{module}' '{name}' is not public"


def exported(root: Path) -> set[str]:
    """The public names: those of the table in the package's root, and its one public module."""
    text = (root / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    tables = [
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    ]
    return {name for table in tables for names in table.values() for name in names} | {"explain"}


def violations(root: Path) -> list[str]:
    """Every broken rule below `root`, as `file: what`."""
    violated: list[str] = []
    public = exported(root)
    folders = [root / PACKAGE, root / "spaces", root / "tests"]
    for file in sorted(chain(*(folder.rglob("*.py") for folder in folders))):
        path = file.relative_to(root)
        if path.parts[:2] == ("tests", "frozen"):
            continue
        text = file.read_text(encoding="utf-8")
        broken = [f"{n} lines, at most {MAX_LINES}"] if (n := text.count("\n")) > MAX_LINES else []
        tree = ast.parse(text if path.parts[0] != "tests" else "")  # of tests, the length alone
        if path.parts[0] == PACKAGE:
            broken += [*floors(path, tree), *closure(path, tree)]
        if path.parts[0] == "spaces":
            broken += public_only(path, tree, public)
        if path.parts[0] != "tests":
            broken += [*safety(path, tree), *form(path, tree), *namesakes(file, path, tree)]
            broken += terms(tree)
        violated += [f"{path.as_posix()}: {what}" for what in broken]
    return violated


def test_the_rules_hold() -> None:
    assert violations(REPOSITORY) == []


BAD = [
    ("metrics.py", "from .data import load_dataset", "must not import 'data'"),
    ("data/folder.py", "from ..model import GloVLMModel", "must not import 'model'"),
    (
        "data/folder.py",
        "def _f():\n    import hf_glovlm.training",
        "must not import 'training'",
    ),
    ("methods/heads.py", "from .. import inference", "must not import 'inference'"),
    ("training/loop.py", "from hf_glovlm import adapt", "must not import '__init__'"),
    ("publish/card.py", "from ..training import adapt", "must not import 'training'"),
    ("slides/report.py", "from ..lab.counting import x", "must not import 'lab'"),
    ("backbones/table.py", "from ..data import load_classes", "must not import 'data'"),
    ("__init__.py", "from .cli import main", "must not import 'cli'"),
    ("novelty.py", "", "has no floor"),
    ("model/heads.py", "import numpy", "except ImportError"),
    ("model/heads.py", "try:\n    import peft\nexcept OSError:\n    pass", "except ImportError"),
    ("model/heads.py", "from . import towers", "from .file import name"),
    ("model/heads.py", "from .a.b import c", "from .file import name"),
    ("model/heads.py", "from ..errors import GloVLMError", "must not import 'errors'"),
    ("model/heads.py", "from hf_glovlm.model.towers import TowerPair", "without the package"),
    ("model/sub/heads.py", "", "model/ is flat"),
    ("data/utils.py", "", "says nothing"),
    ("data/peft.py", "", "hides a library"),
    ("slides/files/wsi.py", "from joblib import load", "pickles"),
    ("slides/files/wsi.py", "import torch\ntorch.load('x')", "weights_only"),
    ("slides/files/wsi.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "pickles"),
    ("data/folder.py", "import os\nos.replace('a', 'b')", "write through it"),
    ("publish/upload.py", "_a = dict(trust_remote_code=True)", "never code"),
    ("publish/upload.py", "_a = {'trust_remote_code': True}", "never code"),
    ("publish/upload.py", "def push(): ...", "push has no docstring"),
    ("publish/card.py", 'def card():\n    """A card."""', "called like a module"),
    ("data/folder.py", "def _read(_wanted): ...", "no term of the field"),
    ("data/folder.py", "_found = 1", "no term of the field"),
    ("runs/study.py", "\n" * 901, "at most 900"),
    (
        "../spaces/glomeruli/app.py",
        "from hf_glovlm.inference import predict",
        "not public",
    ),
    ("../spaces/glomeruli/app.py", "import hf_glovlm\nhf_glovlm._secret", "not public"),
]
GOOD = [
    ("training/loop.py", "from .. import __version__, inference\nfrom ..data import splits"),
    ("cli/app.py", "from ..lab.demo import run_demo\nfrom ..runs import run"),
    ("data/folder.py", "from ..errors import GloVLMError\nfrom .catalog import load_classes"),
    ("backbones/loading.py", "from ..errors import GloVLMError\nfrom ..model import GloVLMModel"),
    (
        "model/heads.py",
        "import math\nimport torch.nn.functional as F\nfrom .towers import TowerPair",
    ),
    ("model/heads.py", "try:\n    import timm\nexcept ImportError:\n    timm = None"),
    ("publish/upload.py", '_a = 1\n"""Say trust_remote_code=True."""\n\ndef _quiet(): ...'),
    (
        "../spaces/glomeruli/app.py",
        "from hf_glovlm import adapt\nimport hf_glovlm\nhf_glovlm.adapt",
    ),
]


def _write(root: Path, file: str, source: str) -> list[str]:
    (root / PACKAGE).mkdir()
    (root / PACKAGE / "__init__.py").write_text("_MODULES = {'training': ('adapt',)}\n")
    path = (root / PACKAGE / file).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"_MODULES = {{'training': ('adapt',)}}\n{source}\n")
    return violations(root)


@pytest.mark.parametrize(("file", "source", "expected"), BAD)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    assert any(expected in line for line in _write(tmp_path, file, source))


@pytest.mark.parametrize(("file", "source"), GOOD)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    assert _write(tmp_path, file, source) == []


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {_canonical(re.split(r"[<>=!~\[; ]", line)[0]) for line in lines}
    homes = packages_distributions()
    files = [*(REPOSITORY / PACKAGE).rglob("*.py"), *(REPOSITORY / "spaces").rglob("*.py")]
    for file in files:
        package = ".".join(file.relative_to(REPOSITORY).parent.parts)
        for _, module, _ in imports(ast.parse(file.read_text(encoding="utf-8")), package):
            top = module.split(".")[0]
            if top in {PACKAGE, *sys.stdlib_module_names}:
                continue
            if file.with_name(f"{top}.py").is_file():  # a Space's modules stand side by side
                continue
            known = {_canonical(name) for name in homes.get(top, [top])}
            assert known & declared, (
                f"{file.name} imports {top}, which pyproject.toml does not name"
            )


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
