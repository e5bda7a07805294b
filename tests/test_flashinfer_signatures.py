# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's functions take what its adapters pass, read from the wheels without importing them.

``ci/flashinfer`` downloads the wheels and names their folder; else the installed package is read.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gdn_backend_cuda import OLDEST, OLDEST_PREFILL
from gdn_backend_cuda.flashinfer_probe import (
    DISTRIBUTION,
    PREFILL,
    SCRATCH,
    SEMANTIC,
    TUNING,
)
from gdn_backend_cuda.probe import release


def _packages() -> dict[str, zipfile.Path | Path]:
    """Return what holds the folder ``flashinfer``, by version."""
    folder = os.environ.get("FLASHINFER_WHEELS")
    if folder is not None:
        wheels = sorted(Path(folder).glob("flashinfer_python-*.whl"))
        return {wheel.name.split("-")[1]: zipfile.Path(wheel) for wheel in wheels}
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        return {}
    return {importlib.metadata.version(DISTRIBUTION): Path(spec.origin).parents[1]}


PACKAGES = _packages()
if not PACKAGES:
    pytest.skip("needs flashinfer-python, or its wheels: ci/flashinfer", allow_module_level=True)


def _passed(version: str) -> Iterator[str]:
    """Yield the functions that adapters call in a version."""
    for function in SEMANTIC:
        oldest = OLDEST_PREFILL if function in (PREFILL, SCRATCH) else OLDEST
        if release(version) >= oldest:
            yield function


def _parameters(package: zipfile.Path | Path, function: str) -> set[str]:
    module, _, name = function.partition(":")
    *folders, file = module.split(".")
    path = package
    for part in (*folders, f"{file}.py"):
        path = path / part
    found = next(
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}


@pytest.mark.parametrize(
    ("version", "function"),
    [(version, function) for version in PACKAGES for function in _passed(version)],
)
def test_a_function_takes_what_is_passed(version: str, function: str) -> None:
    assert set(SEMANTIC[function]) - _parameters(PACKAGES[version], function) == set()


@pytest.mark.parametrize("version", [v for v in PACKAGES if release(v) >= OLDEST_PREFILL])
def test_prefill_knows_what_tunes_it(version: str) -> None:
    assert set(TUNING) <= _parameters(PACKAGES[version], PREFILL)
