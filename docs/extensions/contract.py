# SPDX-License-Identifier: Apache-2.0
"""The directive ``op``: the contract of an op, out of the docstrings in ``interface``."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_type_hints

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

from gdn_portable import GdnOps

PROTOCOLS = {
    name: protocol
    for name, protocol in get_type_hints(GdnOps).items()
    if name not in ("spec", "device", "kernels")
}
# a docstring names a protocol, a reader calls the attribute
CALLED = {protocol.__name__: name for name, protocol in PROTOCOLS.items()}


class OpDirective(SphinxDirective):
    """Document the attribute of ``GdnOps`` that is named, as a method."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the method's signature and docstrings."""
        name = self.arguments[0]
        lines = _described(name, PROTOCOLS[name])
        source = f"the contract of {name}"
        return self.parse_text_to_nodes(StringList(lines, source))


def _described(name: str, protocol: Any) -> list[str]:
    call = protocol.__call__
    parameters = list(inspect.signature(call).parameters.values())[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    text = f"{inspect.getdoc(protocol)}\n\n{inspect.getdoc(call)}"
    body = str(GoogleDocstring(_with_links(text))).splitlines()
    head = f".. py:method:: GdnOps.{name}{inspect.Signature(plain)}"
    return [head, "   :module: gdn_portable", "", *(f"   {line}" for line in body), ""]


def _with_links(text: str) -> str:
    """Let what names a protocol lead to the attribute."""

    def called(match: re.Match[str]) -> str:
        name = CALLED.get(match[1])
        return f":py:meth:`~gdn_portable.GdnOps.{name}`" if name else match[0]

    return re.sub(r":class:`(?:interface\.)?(\w+)`", called, text)


def _link(app: Sphinx, what: str, name: str, obj: object, options: object, lines: Any) -> None:
    lines[:] = [_with_links(line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("op", OpDirective)
    app.connect("autodoc-process-docstring", _link)
    return {"parallel_read_safe": True}
