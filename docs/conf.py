# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds these pages; the command is ``ci/docs``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "docs" / "extensions")]

from gdn_portable import __version__  # noqa: E402

project = "gdn_portable"
version = release = __version__
copyright = "the gdn_portable authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "contract"]
exclude_patterns = ["_site", "examples", "extensions", "style"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|typing|collections)\..*|Tensor|optional")]

myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3

autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"
highlight_language = "none"

html_theme = "furo"
html_title = f"gdn_portable {version}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["style"]
html_css_files = ["pages.css"]
