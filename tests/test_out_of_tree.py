# SPDX-License-Identifier: Apache-2.0
"""The example of a backend in a package of its own is installed, found by its name, and passes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "out_of_tree_backend"


def _run(command: Sequence[object], folder: Path) -> str:
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "backends")))
    # threads that wait for each other make the reference's small products slow
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the package was installed into."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("installed")
    options = ("-q", "--no-deps", "--no-build-isolation", "--target", folder)
    _run(("pip", "install", *options, EXAMPLE), folder)
    return folder


def test_its_own_tests_pass(installed: Path) -> None:
    printed = _run(("pytest", "-q", "-p", "no:xdist", EXAMPLE / "tests"), installed)

    assert " passed" in printed
    assert "skipped" not in printed


def test_doctor_lists_it(installed: Path) -> None:
    printed = _run(("gdn_portable", "doctor", "--all"), installed)

    assert "backend einsum" in printed
    assert "einsum.recurrent_decode" in printed
