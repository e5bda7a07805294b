# SPDX-License-Identifier: Apache-2.0
"""The program as a function, for tests of the commands."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import pytest

from gdn_portable import __main__, select

QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class Command:
    """The program, run in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)
        monkeypatch.setenv("COLUMNS", "200")  # so that no line is broken

    def __call__(self, *arguments: object) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", ["gdn-portable", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            __main__.main()
        streams = self.capsys.readouterr()
        return Outcome(int(end.value.code or 0), streams.out, streams.err)

    def document(self, *arguments: object) -> Any:
        """Return what is printed with ``--json``."""
        outcome = self(*arguments, "--json")
        assert outcome.code == 0, outcome.stderr
        return json.loads(outcome.stdout)

    def mistake(self, *arguments: object) -> str:
        """Return the one line that is all that a mistaken command says."""
        outcome = self(*arguments)
        assert outcome.code == 2
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("error: ")
        assert outcome.stderr.count("\n") == 1
        return outcome.stderr
