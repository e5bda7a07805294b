# SPDX-License-Identifier: Apache-2.0
"""The compilers that the tables are for, each of which runs in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ci.resources.measure import GPUS

ROOT = Path(__file__).parents[2]
OLDEST_TRITON = "triton-3.6.0"
TRITON_OF_TORCH = "triton-3.7.1"  # of torch 2.13, so what most have on AMD
CUTLASS = "nvidia-cutlass-dsl"
CUTLASS_PINS = ROOT / "ci" / "cutlass.txt"
CUTLASS_GPUS = ("sm90", "sm100")
AMD_GPUS = ("gfx942", "gfx950")


def names() -> tuple[str, ...]:
    """Return the oldest Triton supported, others tested, and the CuTe DSL if it runs here."""
    newest = f"triton-{_pinned('triton', ROOT / 'ci' / 'constraints.txt')}"
    tritons = (OLDEST_TRITON, TRITON_OF_TORCH, newest)
    if sys.version_info < (3, 11):  # the newest Triton has no wheel for it
        return tritons[:2]
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return tritons
    return (*tritons, f"cutlass-{_pinned(CUTLASS, CUTLASS_PINS)}")


def gpus(name: str) -> tuple[str, ...]:
    """Return what a compiler compiles for."""
    if name == TRITON_OF_TORCH:
        return AMD_GPUS
    return CUTLASS_GPUS if _is_cutlass(name) else tuple(GPUS)


def folder(name: str) -> Path:
    """Return where a compiler is installed that is not the environment's own."""
    return Path(sys.prefix) / name


def is_installed(name: str) -> bool:
    """Return whether a compiler is here, as the environment's own or beside it."""
    if _is_cutlass(name):
        found = folder(name) / CUTLASS_PINS.name
        return found.exists() and found.read_text() == CUTLASS_PINS.read_text()
    return _is_own(name) or (folder(name) / "triton").exists()


def install(name: str) -> None:
    """Install a compiler beside the environment's own."""
    wanted = ["-r", str(CUTLASS_PINS)] if _is_cutlass(name) else [name.replace("-", "==")]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(folder(name)), *wanted], check=True)
    if _is_cutlass(name):
        (folder(name) / CUTLASS_PINS.name).write_text(CUTLASS_PINS.read_text())


def paths(name: str) -> list[Path]:
    """Return where a process finds a compiler, and this project."""
    found = [] if _is_own(name) else [folder(name)]
    if _is_cutlass(name):
        found.append(folder(name) / "nvidia_cutlass_dsl" / "dsl_packages")
    return [*found, ROOT, ROOT / "backends"]


def compiled(arch: str, name: str, calls: str) -> Iterator[dict[str, Any]]:
    """Yield what every kernel of a set of calls needs, and the end of every call.

    Args:
        arch: to compile for.
        name: of a compiler, which is installed.
        calls: ``"models"``, ``"table"`` or ``"every"``.

    Raises:
        RuntimeError: the process failed; says what it wrote.
    """
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "ci.resources.compile", arch, name, calls],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths(name))),
                "TRITON_CACHE_DIR": cache,
                "CUTE_DSL_DUMP_DIR": cache,
            },
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        with process:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
        if process.returncode:
            stderr.seek(0)
            raise RuntimeError(f"{arch}, {name}: {stderr.read().strip()}")


def _is_cutlass(name: str) -> bool:
    return name.startswith("cutlass-")


def _pinned(distribution: str, file: Path) -> str:
    found = re.search(rf"^{distribution}==([^\s;]+)", file.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _is_own(name: str) -> bool:
    try:
        return name == f"triton-{importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return False
