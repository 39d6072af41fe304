"""How Sphinx makes pages of the notebooks as they are committed: ``make site``."""

project = "basinlab"
author = "the basinlab team"
copyright = "the basinlab team; licences in NOTICE"
root_doc = "index"
extensions = ["myst_nb"]
exclude_patterns = ["site", "**/.ipynb_checkpoints", ".*"]
nb_execution_mode = "off"  # the committed outputs are the pages
myst_enable_extensions = ["dollarmath"]
html_theme = "sphinx_book_theme"
html_title = "The attraction basin, step by step"
html_static_path, html_css_files = ["_static"], ["phone.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
suppress_warnings = ["myst.header", "myst.xref_missing", "mystnb.unknown_mime_type"]
