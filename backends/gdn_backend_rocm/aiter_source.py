# SPDX-License-Identifier: Apache-2.0
"""AMD's aiter, read from its files: an import edits the process, and may be of another project.

A function is usable when its source takes every parameter that we pass: names moved, came and went
between releases, and trees built from source often have no version at all.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn_portable.errors import UnsupportedError

DISTRIBUTION = "amd-aiter"  # on PyPI "aiter" is another project


@dataclass(frozen=True, slots=True)
class Function:
    """A function of aiter as we call it.

    Attributes:
        module: where it is defined, below ``aiter``.
        name: of the function.
        parameters: what we pass, all by keyword.
        since: the first release that takes them.
        libraries: modules that it imports and that aiter does without.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    since: str
    libraries: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Return why it cannot be called, without importing aiter."""
        spec = importlib.util.find_spec("aiter")
        if spec is None:
            return f"AMD's aiter ({DISTRIBUTION}) is not installed"
        folders = map(Path, spec.submodule_search_locations or ())
        root = next((folder for folder in folders if _is_amds(folder)), None)
        if root is None:
            return f"module 'aiter' is another project's, needs AMD's ({DISTRIBUTION})"
        source = root / f"{self.module.replace('.', '/')}.py"
        taken = _parameters(source, self.name) if source.is_file() else None
        aiter = f"aiter {_version()}"
        if taken is None:
            return f"{aiter} has no {self.module}.{self.name}, needs {self.since} or newer"
        absent = ", ".join(name for name in self.parameters if name not in taken)
        if absent:
            return f"{self.name} of {aiter} takes no {absent}, needs {self.since} or newer"
        for library in self.libraries:
            if importlib.util.find_spec(library) is None:
                return f"{library}, which {self.name} of aiter needs, is not installed"
        return None

    def load(self, *, deterministic: bool = False) -> Callable[..., Any]:
        """Import aiter, and return the function.

        Args:
            deterministic: refuse, for a function whose tiles depend on the batch.

        Raises:
            UnsupportedError: ``deterministic`` was asked for.
        """
        if deterministic:
            reason = "it takes its tiles by the batch, not deterministic"
            raise UnsupportedError(f"aiter's {self.name}: {reason}", {self.name: [reason]})
        module = importlib.import_module(f"aiter.{self.module}")
        function: Callable[..., Any] = getattr(module, self.name)
        return function


def _is_amds(folder: Path) -> bool:
    return (folder / "jit" / "core.py").is_file() and (folder / "ops").is_dir()


def _parameters(source: Path, name: str) -> set[str] | None:
    """Return the names of a function's parameters, None where a file does not define it."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            arguments = node.args
            return {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
    return None


def _version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "without a version"
