"""Settings of the pages, which Sphinx builds: `make docs`.

The source folder is the root of the repository, so that links lead to the same files in the site as in a checkout.
"""

import dataclasses
from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

project = "hf_layerfuse"
version = release = version_of("hf-layerfuse")
html_title = project
language = "en"

root_doc = "docs/index"
include_patterns = ["docs/*.md", "CONTRIBUTING.md", "notebooks/*.ipynb"]
exclude_patterns = [".*"]
PAGES = """

```{toctree}
:hidden:

Start <self>
which-mode
```

```{toctree}
:hidden:
:caption: Methods

fusion
collapse
merge
```

```{toctree}
:hidden:
:caption: Use

running
sharing
architectures
results
troubleshooting
api
```

```{toctree}
:hidden:
:caption: Notebooks

../notebooks/01_fuse_gpt2
../notebooks/02_collapse_bert
../notebooks/03_merge_resnet
../notebooks/04_sweep_and_knee
```

```{toctree}
:hidden:
:caption: Develop

extending
../CONTRIBUTING
```
"""
"""Navigation. It is added to the first page here, because GitHub would show it there as code."""

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "tasklist"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks/run.py stores the outputs
nb_merge_streams = True

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_extra_path = ["extra"]  # the first page of the folder leads to docs/
html_copy_source = False
html_math_renderer = "mathml"
maximum_signature_line_length = 100
add_module_names = False  # all are imported from the package

default_role = "py:obj"  # names in the backticks of docstrings become links
# every recipe has a `validate` that its decorator adds
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "validate"}
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = True

log = logging.getLogger(__name__)


def add_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Add the navigation to the first page."""
    if name == root_doc:
        source[0] += PAGES


def shown(field: dataclasses.Field) -> str | None:
    """Default of a field, as code; None for a field that must be given."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.default_factory.__name__}()"
    return None


def complete_fields(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Show the type and the default of a field beside its name; napoleon gives the type below the description."""
    fields = {field.name: field for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    done: list[str] = []
    head = 0
    for line in lines:
        if line.startswith(".. attribute:: "):
            done += [line, "   :no-contents-entry:"]
            field = fields.get(line.removeprefix(".. attribute:: "))
            if field is not None and (default := shown(field)) is not None:
                done.append(f"   :value: {default}")
            head = len(done)
        elif line.startswith("   :type: "):
            done.insert(head, line)
        else:
            done.append(line)
    lines[:] = done


def hide_signature(app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returns: str) -> Any:
    """Leave out the signature of a recipe, `(**values)`: its fields follow one by one."""
    return ("", None) if what == "class" and hasattr(value, "_renamed") else None


def visit_math(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers typeset without a script or a font from elsewhere."""
    block, source = isinstance(node, nodes.math_block), node.astext()
    try:
        if source.count("{") != source.count("}"):
            raise MathError("its braces do not match")  # docutils accepts that
        formula = tex2mathml(source, as_block=block)
    except MathError as error:
        log.warning("formula %r: %s", source, error, location=node)
        formula = ""
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the functions above."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", add_pages)
    app.connect("autodoc-process-docstring", complete_fields, priority=600)  # after napoleon
    app.connect("autodoc-process-signature", hide_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
