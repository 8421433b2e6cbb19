"""Sphinx makes the site from what ``make_site.py`` wrote; ``tox -e docs`` runs both."""

import importlib.metadata

project = "keymgmt"
html_title = f"keymgmt {importlib.metadata.version('keymgmt')}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# A block of code says its language, or is shown as it is.
highlight_language = "text"
# A heading has the anchor that forges give it.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
# `--add` stays as it is typed.
smartquotes = False
# Pygments has no lexer for the policies of Vault, and marks what it knows of them.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["keymgmt.css"]
html_favicon = "static/key.svg"
html_use_index = False
html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "monokai"

# The links to other hosts are looked at by night.
linkcheck_anchors = False
linkcheck_timeout = 30
linkcheck_retries = 2
# Ours are there once there is a release.
linkcheck_ignore = [r"https://github\.com/keymgmt/keymgmt", r"https://pypi\.org/project/keymgmt"]
