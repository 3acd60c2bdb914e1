"""Build a Space's folder: `python spaces/build.py FOLDER` writes one to push to the Hub as it is.

The Hub installs `requirements.txt` before the other files of a Space are there, and no index
carries the package: so the package lies in the folder, and its requirements stand in the file.
"""

import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = "hf_glovlm"
EXTRA = "space"
WITH_SDK = ("gradio",)  # comes with the Space's sdk_version
HEADER = """\
# What {name} {version} and its page need; the package itself lies beside this file.
# CPU wheels of torch are a tenth of the others.
--extra-index-url https://download.pytorch.org/whl/cpu
"""


def build_space(folder: Path, space: str = "glomeruli") -> Path:
    """Copy the page and the package into a new folder, with their requirements.

    Args:
        folder: Is made; it must not hold anything yet.
        space: Name of a folder beside this file.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something: give a new folder.")
    left_out = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache")
    shutil.copytree(HERE / space, folder, dirs_exist_ok=True, ignore=left_out)
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=left_out)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "requirements.txt").write_text(read_requirements(), encoding="utf-8")
    return folder


def read_requirements() -> str:
    """Requirements of the package with the extra of the page, as `pip` reads them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"][EXTRA]]
    lines = [line for line in lines if not line.startswith(WITH_SDK)]
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    version = text.split('__version__ = "', 1)[1].split('"', 1)[0]
    return HEADER.format(name=project["name"], version=version) + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build_space(Path(sys.argv[1]))}\n")
    except (IndexError, FileExistsError) as error:
        sys.exit(str(error) if isinstance(error, FileExistsError) else __doc__)
