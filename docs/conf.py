"""The documentation as a site: `make docs` builds it into build/docs, without any network.

Nothing on a page comes from another host: no font, no script, no inventory of another project.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A build on the way of a release, or of a test, is of the package beside it.
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
)
# Kernels of the notebooks inherit these: no Hub, no progress line that differs between builds.
os.environ |= {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MPLBACKEND", None)  # figures stand in the notebooks

from pygments.lexers import TextLexer  # noqa: E402

from hf_glovlm import __version__  # noqa: E402

project = "hf-glovlm"
author = "The hf-glovlm authors"
project_copyright = "The hf-glovlm authors. Apache-2.0. Research use only, not for diagnosis."
version = release = __version__

extensions = [
    "myst_nb",
    "house",
    "public_names",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
nitpicky = False
default_role = "code"
highlight_language = "text"

# ------------------------------------------------------------------------------------ Markdown
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4
myst_url_schemes = ("http", "https", "mailto")

# ------------------------------------------------------------------------------------ notebooks
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # they would be fetched from another host

# ------------------------------------------------------------------------------------ reference
add_module_names = False
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# ------------------------------------------------------------------------------------ pages
html_theme = "furo"
html_title = f"hf-glovlm {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_favicon = "_static/mark.svg"
html_theme_options = {
    "announcement": "Research use only. Not for diagnosis.",
    "navigation_with_keys": False,
    "light_css_variables": {"color-brand-primary": "#7a1f4b", "color-brand-content": "#7a1f4b"},
    "dark_css_variables": {"color-brand-primary": "#f0a3c4", "color-brand-content": "#f0a3c4"},
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_exclude = ".linenos, .gp, .go"


def give_captions_a_level(app, page: str, template: str, context: dict, doctree: object) -> None:
    """Captions of the sidebar are headings without a level, which readers aloud need."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def setup(app) -> None:
    app.add_lexer("csv", TextLexer)  # Pygments has none
    app.connect("html-page-context", give_captions_a_level, priority=900)  # after the theme
