"""The documentation site: `sphinx-build -W docs build/site`, or `make docs`.

Pages are docs/**/*.md as they stand on GitHub, and some files from outside of docs. In
docs/reference a heading that is the name of a module is followed, on the site, by what is in it.
"""

import re
import sys
from pathlib import Path

from sphinx.domains.python import PyObject

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import gallery  # noqa: E402  docs/gallery.py

project = "unclip_jax"
html_title = "unclip_jax"
copyright = "the authors of unclip_jax, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["plans"]
suppress_warnings = ["ref.python"]  # a type such as `bytes` that is also some attribute's name

myst_heading_anchors = 3

default_role = "code"  # `x` in a docstring is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["reference.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#c2410c", "color-brand-content": "#c2410c"},
    "dark_css_variables": {"color-brand-primary": "#fb923c", "color-brand-content": "#fb923c"},
}

# Pages that are, or begin with, a file from outside of docs.
OUTSIDE = {
    "index": "README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
MODULE = re.compile(r"^#+ (unclip_jax[\w.]*)$", re.MULTILINE)
SECTION = re.compile(r"^ *(Args|Attributes|Raises|Returns|Yields):$")
# Code, bold and emphasis are RST's too; of the rest, what RST would take for markup of its own.
MARKUP = re.compile(
    r"``.+?``|(?P<joined>`[^`]+`(?=\w))|`[^`]+`"  # code, `name`s too
    r"|\*\*\S.*?\S\*\*|\*\w[\w ]*\*"  # bold, emphasis
    r"|(?P<own>[*|\\]|(?<=\w)_(?!\w))"
)


def read_page(app, page: str, source: list[str]) -> None:
    """Make of a page as it stands on GitHub one of the site."""
    folder = (ROOT / "docs" / page).parent
    if page == "gallery":
        source[0] = gallery.page(gallery.read())
    source[0] = LINK.sub(lambda link: _link(link, folder), source[0])
    if page in OUTSIDE:
        text = (ROOT / OUTSIDE[page]).read_text(encoding="utf-8")
        text = LINK.sub(lambda link: _link(link, ROOT), text).replace("](docs/", "](")
        source[0] = text + "\n" + source[0]
    if page.startswith("reference/"):
        options = "   :members:\n   :ignore-module-all:\n"
        module = f"```{{eval-rst}}\n.. automodule:: \\1\n{options}```\n"
        source[0] = MODULE.sub(rf"\g<0>\n\n{module}", source[0])


def _link(link: re.Match, folder: Path) -> str:
    """A link from a file in `folder`: kept to a page, and else nothing but its text."""
    target = (folder / link["target"]).resolve()
    for page, file in OUTSIDE.items():
        if target == ROOT / file:
            return f"[{link['text']}](/{page}.md{link['anchor'] or ''})"
    if target.is_relative_to(ROOT / "docs") or not target.exists():
        return link[0]
    return link["text"]


def read_as_markdown(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings as they are meant: plain text in which an indented block is code.

    Google's sections are left for napoleon, which comes after.
    """
    text, code, section = [], False, False
    for i, line in enumerate(lines):
        indented = line.startswith("    ") and not section
        if line.strip():
            if indented and not code and not lines[i - 1].strip():
                text += ["::", ""]
            code = indented and (code or not lines[i - 1].strip())
        section = bool(SECTION.match(line)) or (section and (not line or line.startswith(" ")))
        text.append(line if code else MARKUP.sub(_escaped, line))
    lines[:] = text


def _escaped(found: re.Match) -> str:
    if found["joined"]:  # `name`s: RST wants something between, and an escaped space is nothing
        return found[0] + "\\ "
    return "\\" + found[0] if found["own"] else found[0]


def setup(app) -> None:
    """Sphinx calls this."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":  # what napoleon makes of "Attributes:"
            field.label = "Attributes"
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_as_markdown, priority=400)
