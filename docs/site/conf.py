"""Sphinx's settings; build.py runs it in a copy of the pages."""

from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import GoogleDocstring

ROOT = Path(__file__).resolve().parents[2]

project = "Finegrain"
extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon"]
default_role = "literal"
add_module_names = False
python_use_unqualified_type_names = True
html_theme = "furo"
html_title = "Finegrain"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
html_show_copyright = html_show_sphinx = html_copy_source = False
pygments_style, pygments_dark_style = "friendly", "github-dark"

# GitHub's anchors, so that the same links lead somewhere on both.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

autoapi_dirs = [str(ROOT / name) for name in ("train", "data", "launch")]
autoapi_python_use_implicit_namespaces = True
autoapi_root = "api"
autoapi_options = ["members", "show-module-summary", "undoc-members"]
autoapi_keep_files = True
autoapi_add_toctree_entry = False
autoapi_python_class_content = "both"

# A name of ours that leads nowhere is an error; other projects' pages are not asked for.
nitpicky = True
# Imports of other projects; the packages' own pages, which build.py replaces; annotations such as `bytes`,
# which is a field's name too.
suppress_warnings = ["autoapi.python_import_resolution", "toc.not_included", "ref.python"]
nitpick_ignore_regex = [(r"py:.*", r"(?!(train|data|launch)\.).*")]


def follow_import(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """Resolves a name that a module only imports; packages, which have pages but no object, stay text."""
    target = node["reftarget"]
    if node.get("refdomain") != "py" or not target.startswith(("train.", "data.", "launch.")):
        return None
    if (ROOT / target.replace(".", "/")).is_dir():
        return shown
    python, name = env.get_domain("py"), target.rpartition(".")[2]
    defined = [
        full for full, it in python.objects.items() if full.endswith(f".{name}") and it.objtype != "attribute"
    ]
    if len(defined) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", defined[0], node, shown)


def setup(app: Any) -> None:
    """Adds the directive of recipe keys, `.. recipe-key:: seed`."""
    app.add_object_type("recipe-key", "key", "%s (recipe key)")
    app.connect("missing-reference", follow_import)
    # Napoleon takes a field's docstring up to its first colon for the type; ours are annotated.
    GoogleDocstring._consume_inline_attribute = lambda self: ("", self._consume_to_end())
