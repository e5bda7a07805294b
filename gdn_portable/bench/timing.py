# SPDX-License-Identifier: Apache-2.0
"""How long a call takes on the device: replays of a captured graph, the median of many."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

Run = Callable[[], object]

MIN_CALLS = 4  # of a graph: what a replay costs itself is shared by them
WARM_UP = 20_000.0  # microseconds of replays before the first that counts
MOST_WARM_UPS = 100
WIDE_SPREAD = 0.1


class CaptureError(Exception):
    """A call cannot be captured in a graph."""


class Clock(Protocol):
    """What is asked of a device to time work on it."""

    def capture(self, run: Run) -> Run:
        """Return what replays the work of ``run`` without its host code.

        Raises:
            CaptureError: it cannot.
        """
        ...

    def time(self, run: Run) -> float:
        """Return the microseconds between the device's start and end of ``run``."""
        ...

    def settle(self) -> None:
        """Wait until the device has nothing to do."""
        ...


class Timing(NamedTuple):
    """The time of one call.

    Attributes:
        microseconds: median.
        spread: from the 10th to the 90th percentile, relative to the median.
        replays: how many were timed.
        calls: how many calls a replay holds.
        fallback: why it is not of a graph, but of eager calls, host time included; None if it is.
    """

    microseconds: float
    spread: float
    replays: int
    calls: int
    fallback: str | None = None

    @property
    def is_wide(self) -> bool:
        """Whether the replays differ too much to trust the median."""
        return self.spread > WIDE_SPREAD


def measure(runs: Sequence[Run], clock: Clock, replays: int) -> Timing:
    """Time one of ``runs``, which are the same call on different memory."""
    rounds = -(-MIN_CALLS // len(runs))
    calls = rounds * len(runs)

    def run_all() -> list[object]:
        # kept to the end, or all calls would write their results to the same place in the cache
        return [run() for _ in range(rounds) for run in runs]

    for run in runs:  # whatever compiles, tunes or allocates does it here
        run()
    clock.settle()
    fallback = None
    try:
        replay = clock.capture(run_all)
    except CaptureError as error:
        replay, fallback = run_all, str(error)
    _warm_up(replay, clock)
    samples = sorted(clock.time(replay) / calls for _ in range(replays))
    median = statistics.median(samples)
    tenth = len(samples) // 10
    spread = (samples[-1 - tenth] - samples[tenth]) / median if median else 0.0
    return Timing(median, spread, replays, calls, fallback)


def _warm_up(replay: Run, clock: Clock) -> None:
    spent = 0.0
    for _ in range(MOST_WARM_UPS):
        spent += clock.time(replay)
        if spent >= WARM_UP:
            return


class GpuClock:
    """Events and graphs of torch, CUDA's or HIP's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, run: Run) -> Run:
        """Capture ``run`` on a stream of its own; what it returns has memory of its own as well."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = run()
            del kept
        # libraries refuse with an assertion what they would have to ask the host for
        except (RuntimeError, AssertionError) as error:
            torch.cuda.synchronize(self.device)
            raise CaptureError(first_line(error)) from error
        return graph.replay

    def time(self, run: Run) -> float:
        """Time ``run`` between two events on the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e3

    def settle(self) -> None:
        """Synchronise with the device."""
        torch.cuda.synchronize(self.device)


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
