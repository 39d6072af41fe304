"""How Sphinx makes pages of the notebooks as they are committed: ``make site``.

The pages ask nothing of a network. MathJax comes with no installed package, so formulas are drawn by matplotlib.
"""

import base64
import html
import io

from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

project = "basinlab"
author = "the basinlab team"
copyright = "the basinlab team; licences in NOTICE"
root_doc = "index"
extensions = ["myst_nb"]
exclude_patterns = ["site", "**/.ipynb_checkpoints", ".*"]
nb_execution_mode = "off"  # the committed outputs are the pages
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2  # paper.md names sections
html_theme = "sphinx_book_theme"
html_title = "The attraction basin, step by step"
html_static_path, html_css_files = ["_static"], ["pages.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
suppress_warnings = ["myst.header", "myst.xref_missing", "mystnb.unknown_mime_type"]
html_math_renderer = "mathtext"

# TeX that matplotlib knows under another name
KNOWN = {r"\lVert": r"\Vert", r"\rVert": r"\Vert", r"\le\epsilon": r"\leq\epsilon", r"\ge\;": r"\geq\;"}
KNOWN |= {r"\mathcal N": r"\mathcal{N}", r"\big": ""}


def formula(tex: str, size: int) -> str:
    """An <img> with the formula as SVG, on the line of the text."""
    known, drawn, font = " ".join(tex.split()), io.BytesIO(), FontProperties(size=size, math_fontfamily="cm")
    for ours, theirs in KNOWN.items():
        known = known.replace(ours, theirs)
    depth = math_to_image(f"${known}$", drawn, prop=font, dpi=72, format="svg")
    source = base64.b64encode(drawn.getvalue()).decode()
    look = f'class="formula" style="vertical-align: {-depth:.1f}pt"'
    return f'<img src="data:image/svg+xml;base64,{source}" alt="{html.escape(tex)}" {look}>'


def inline(translator, node) -> None:
    translator.body.append(formula(node.astext(), 12))
    raise nodes.SkipNode


def display(translator, node) -> None:
    translator.body.append(f'<p class="formula">{formula(node.astext(), 14)}</p>')
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathtext", inline_renderers=(inline, None), block_renderers=(display, None))
