# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures that several test files use."""

from __future__ import annotations

import pytest
import torch

from tests.command import Command

# threads that wait for each other on a busy machine make small triangular solves 70 times slower
torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return the program, run in this process."""
    return Command(monkeypatch, capsys)
