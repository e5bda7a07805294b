# SPDX-License-Identifier: Apache-2.0
"""What probes ask of a library: how old it is, and what a module of it lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterable


def is_older(distribution: str, oldest: tuple[int, ...]) -> str | None:
    """Say which version is installed, where it is older than that."""
    version = importlib.metadata.version(distribution)
    if release(version) >= oldest:
        return None
    return f"{distribution} is {version}, needs {'.'.join(map(str, oldest))} or newer"


def lacks(module: str, names: Iterable[str]) -> str | None:
    """Import a module and return what speaks against it; a library's error is a reason."""
    try:
        found = importlib.import_module(module)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"{module} cannot be imported: {type(error).__name__}: {first}"
    missing = [name for name in names if getattr(found, name, None) is None]
    return f"{module} has no {', '.join(missing)}" if missing else None


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version that releases are compared by."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
