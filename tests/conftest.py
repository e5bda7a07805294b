# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures that several test files use."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.command import Command

if TYPE_CHECKING:
    from ci.amdgcn import Simulator
    from tests.libraries import Site

# threads that wait for each other on a busy machine make small triangular solves 70 times slower
torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return the program, run in this process."""
    return Command(monkeypatch, capsys)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Make the one site that has the libraries behind the kernels for NVIDIA."""
    pytest.importorskip("triton")
    from tests.libraries import installed

    yield from installed(tmp_path, monkeypatch)


@pytest.fixture
def arch() -> str:
    """Return the AMD GPU that is simulated where a test names none."""
    return "gfx942"


@pytest.fixture
def amd_gpu(arch: str) -> Iterator[Simulator]:
    """Simulate the AMD GPU that the test's parameter ``arch`` names."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("simulates AMD GPUs on Linux x86-64 only")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton to compile for AMD GPUs")
    from ci.amdgcn import simulated

    with simulated(arch) as gpu:
        yield gpu
