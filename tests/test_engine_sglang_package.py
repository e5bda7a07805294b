# SPDX-License-Identifier: Apache-2.0
"""The shim under SGLang's own code, in a process of its own: an import of SGLang changes others."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gdn_portable.engines import sglang

ROOT = Path(__file__).parents[1]
SGLANG = Path(os.environ.get("SGLANG_PATH", Path(sys.prefix) / "sglang"))
FOLDER = ROOT / "tests" / "engine_sglang"
FILES = [path for path in sorted(FOLDER.glob("*.py")) if "def test_" in path.read_text()]


def test_the_shim_serves_sglangs_own_code() -> None:
    if not (SGLANG / "sglang").exists():
        pytest.skip(f"sglang is not in {SGLANG}: ci/sglang installs it for Python 3.11 to 3.13")
    plugins = ("-p", "no:xdist", "-p", "tests.engine_sglang.package")
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", *plugins, *FILES]

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    assert re.search(r"\b1\d\d passed", run.stdout), run.stdout[-2_000:]


def test_an_import_of_the_shim_imports_no_sglang() -> None:
    code = "import sys, gdn_portable.engines.sglang; print(*sys.modules)"

    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "gdn_portable" in loaded
    assert loaded & {"sglang", "triton", "flashinfer", "aiter"} == set()


def test_the_entry_point_of_sglangs_plugins_is_the_plugin() -> None:
    project = (ROOT / "pyproject.toml").read_text()

    entry = re.search(
        r'^\[project\.entry-points\."sglang\.srt\.plugins"\]\ngdn_portable = "(.*):(.*)"$',
        project,
        re.MULTILINE,
    )

    assert entry is not None
    assert getattr(importlib.import_module(entry[1]), entry[2]) is sglang.plugin
