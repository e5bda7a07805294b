# SPDX-License-Identifier: Apache-2.0
"""What tests of the benchmark share: a clock that is told its times, small cases, their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gdn_portable import Device, GdnSpec
from gdn_portable.bench import run
from gdn_portable.bench.cases import Case
from gdn_portable.bench.floors import Rates
from gdn_portable.bench.timing import CaptureError, Run

CPU = Device("cpu")
RATES = Rates(4.23e12, 790e12)
SMALL = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=16,
    head_v_dim=16,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
NORM = Case(op="gated_rms_norm", spec=SMALL, lengths=(5,))
DECODE = Case(op="decode_step", spec=SMALL, lengths=(1, 1))


class FakeClock:
    """A device whose work takes the times it is told, in turn."""

    def __init__(self, *times: float, refuses: bool = False) -> None:
        self.times, self.refuses, self.captured = times or (1000.0,), refuses, 0
        self.asked = 0

    def capture(self, run: Run) -> Run:
        if self.refuses:
            raise CaptureError("it asks the host")
        self.captured += 1
        return run

    def time(self, run: Run) -> float:
        run()
        self.asked += 1
        return self.times[min(self.asked, len(self.times)) - 1]

    def settle(self) -> None:
        pass


def plan_of(**changes: Any) -> run.Plan:
    """Return a plan for the CPU with ``changes``."""
    plan = run.Plan(
        device=CPU,
        clock=FakeClock(),
        rates=RATES,
        rotation=1,
        memory=2**30,
        kernels={},
        replays=3,
        with_peers=False,
    )
    return replace(plan, **changes)


def rows_of(cases: Sequence[Case], **changes: Any) -> list[run.Row]:
    """Return the rows of ``cases`` under a plan with ``changes``."""
    with torch.no_grad():
        return list(run.run(cases, plan_of(**changes), lambda _: None))
