# SPDX-License-Identifier: Apache-2.0
"""The versions of Triton that the tables are for, each of which runs in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"


def versions() -> tuple[str, ...]:
    """Return the oldest Triton that is supported, and the newest that was tested."""
    if sys.version_info < (3, 11):  # the newest has no wheel for it
        return (OLDEST,)
    text = (ROOT / "ci" / "constraints.txt").read_text()
    newest = re.search(r"^triton==([^\s;]+)", text, re.MULTILINE)
    assert newest is not None
    return OLDEST, newest[1]


def folder(version: str) -> Path:
    """Return where a version is installed that is not the environment's own."""
    return Path(sys.prefix) / f"triton-{version}"


def is_installed(version: str) -> bool:
    """Return whether ``version`` is here, as the environment's own or beside it."""
    return _is_own(version) or (folder(version) / "triton").exists()


def install(version: str) -> None:
    """Install ``version`` beside the environment's own."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    command += ["--target", str(folder(version)), f"triton=={version}"]
    subprocess.run(command, check=True)


def compiled(arch: str, version: str, calls: str) -> Iterator[dict[str, Any]]:
    """Yield what every kernel of a set of calls needs, and the end of every call.

    Args:
        arch: to compile for.
        version: of Triton, which is installed.
        calls: ``"models"``, ``"table"`` or ``"every"``.

    Raises:
        RuntimeError: the process failed; says what it wrote.
    """
    paths = [] if _is_own(version) else [str(folder(version))]
    paths += [str(ROOT), str(ROOT / "backends")]
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "ci.resources.compile", arch, version, calls],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        with process:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
        if process.returncode:
            stderr.seek(0)
            raise RuntimeError(f"{arch}, Triton {version}: {stderr.read().strip()}")


def _is_own(version: str) -> bool:
    try:
        return importlib.metadata.version("triton") == version
    except importlib.metadata.PackageNotFoundError:
        return False
