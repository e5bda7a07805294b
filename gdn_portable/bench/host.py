# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host, beside the bare launches of the kernels it launches."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gdn_portable.bench.cases import Case
from gdn_portable.bench.ours import contenders
from gdn_portable.bench.run import Plan, draw
from gdn_portable.bench.timing import Run, first_line
from gdn_portable.spec import torch_device

CALLS = 100  # fewer than a queue of launches holds, so that the host never waits
ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """The host's time for one eager call.

    Attributes:
        case: what was called.
        kernel: its name.
        call: microseconds of a call; None where it failed.
        launches: how many Triton kernels a call launches.
        bare: microseconds of these launches alone; None where there is none.
        error: why it failed.
    """

    case: Case
    kernel: str
    call: float | None = None
    launches: int = 0
    bare: float | None = None
    error: str | None = None

    @property
    def ratio(self) -> float | None:
        """Return the call's time over that of its launches."""
        return None if self.call is None or self.bare is None else self.call / self.bare


def host_rows(cases: Sequence[Case], plan: Plan, say: Callable[[str], None]) -> Iterator[HostRow]:
    """Yield a row for each of our kernels, in the smallest case of its op and protocol."""
    smallest: dict[tuple[str, object], Case] = {}
    for case in sorted(cases, key=lambda case: case.num_tokens):
        smallest.setdefault((case.op, case.protocol), case)
    for case in smallest.values():
        say(f"{case.name}: host time")
        try:
            yield from _rows(case, plan)
        # what a case that failed on the device fails with here has been reported in full
        except Exception as error:
            yield HostRow(case=case, kernel="-", error=first_line(error))


def _rows(case: Case, plan: Plan) -> Iterator[HostRow]:
    rotation = draw(case, torch_device(plan.device), rotation=1, memory=plan.memory)
    rotation.refresh()
    for contender in contenders(case, plan.device, plan.kernels):
        call = contender.prepare(rotation.batches[0])
        # the first call: a kernel may remember what Triton found for it
        launches = triton_launches(call)
        runs: list[Run] = [call, partial(_launch, launches)] if launches else [call]
        times = host_times(runs, plan)
        yield HostRow(
            case=case,
            kernel=contender.name,
            call=times[0],
            launches=len(launches),
            bare=times[1] if launches else None,
        )


def host_times(
    runs: Sequence[Run],
    plan: Plan,
    *,
    now: Callable[[], float] = time.perf_counter,
    calls: int = CALLS,
) -> list[float]:
    """Return the host's microseconds for each of ``runs``: the fastest of rounds of many calls.

    The runs take turns, and what other processes take of a host only ever makes a round longer.
    """
    fastest = [math.inf] * len(runs)
    for _ in range(ROUNDS):
        for i, run in enumerate(runs):
            plan.clock.settle()
            start = now()
            for _ in range(calls):
                run()
            fastest[i] = min(fastest[i], (now() - start) / calls * 1e6)
    plan.clock.settle()
    return fastest


def triton_launches(run: Run) -> list[Run]:
    """Return the launches that ``run`` makes, to be made again without what is around them."""
    if importlib.util.find_spec("triton") is None:
        return []
    jit: Any = importlib.import_module("triton.runtime.jit").JITFunction
    launch, launches = jit.run, list[Run]()

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launches.append(lambda: kernel[grid](*args, **kwargs))
        return launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    jit.run = record
    try:
        run()
    finally:
        jit.run = launch
    return launches


def _launch(launches: Sequence[Run]) -> None:
    for launch in launches:
        launch()
