# SPDX-License-Identifier: Apache-2.0
"""Time every contender of every case; one that fails is a row that says why."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_portable.bench.cases import OPS, Case
from gdn_portable.bench.floors import Rates, floor_of, work_of
from gdn_portable.bench.inputs import Batch, Rotation, Slots
from gdn_portable.bench.ours import Call, Contender, contenders
from gdn_portable.bench.peers import peers
from gdn_portable.bench.timing import WIDE_SPREAD, Clock, Timing, first_line, measure
from gdn_portable.errors import DeviceLostError, UnknownBackendError, UnsupportedError
from gdn_portable.spec import Device, Op, torch_device

ROTATION = 256 * 2**20  # bytes that are touched before any is touched again
CACHES = 4  # and as a multiple of the L2
MOST_BATCHES = 2048
REPLAYS = 30
REPLAYS_OF_PREFILL = 15
PREFILL_OPS = ("front_end", "conv1d_prefill", "chunk_prefill", "prefill_step")
LARGEST_DIFFERENCE = 0.05  # of results, relative to the largest value


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one case.

    Attributes:
        case: what was timed.
        kernel: name of the contender.
        ours: whether it is of this library.
        includes: what the time covers.
        floor: microseconds that the case takes at least.
        timing: None where it was not timed.
        error: why not.
        warnings: why the time is not to be trusted.
        difference: from the first of our kernels, relative to the largest value; None where they
            compute different things.
    """

    case: Case
    kernel: str
    ours: bool
    includes: str
    floor: float
    timing: Timing | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    difference: float | None = None

    @property
    def of_floor(self) -> float | None:
        """Return the floor as a share of the time."""
        return None if self.timing is None else self.floor / self.timing.microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to time.

    Attributes:
        device: where.
        clock: what times there.
        rates: of the card.
        rotation: bytes that are touched before any is touched again.
        memory: bytes that the inputs of a case may take.
        kernels: of ours, by op, where named.
        replays: how many to time; None takes 30, and 15 of prefill.
        with_peers: whether to time other libraries.
        deadline: of ``now``, after which nothing is started.
        now: seconds of the host.
    """

    device: Device
    clock: Clock
    rates: Rates
    rotation: int
    memory: int
    kernels: Mapping[Op, tuple[str, ...]]
    replays: int | None = None
    with_peers: bool = True
    deadline: float = math.inf
    now: Callable[[], float] = time.monotonic


def run(cases: Sequence[Case], plan: Plan, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield a row for every contender of every case.

    Args:
        cases: what to time.
        plan: how.
        say: told what is about to run.

    Raises:
        DeviceLostError: nothing more can be timed.
        UnknownBackendError: a kernel that was named does not exist.
    """
    for case in sorted(cases, key=lambda case: OPS.index(case.op)):
        if plan.now() > plan.deadline:
            yield _failed(case, plan, None, "not timed: the time given is over")
            continue
        say(f"{case.name}: inputs")
        try:
            found = contenders(case, plan.device, plan.kernels)
        except UnknownBackendError:
            raise
        except UnsupportedError as error:
            yield _failed(case, plan, None, str(error))
            found = []
        # a kernel that cannot be loaded must not end the run either
        except Exception as error:
            yield _failed(case, plan, None, first_line(error))
            found = []
        found += peers(case) if plan.with_peers else []
        if found:
            yield from _rows(case, found, plan, say)
        _free(plan)


def _rows(
    case: Case, found: Sequence[Contender], plan: Plan, say: Callable[[str], None]
) -> Iterator[Row]:
    try:
        rotation = draw(case, torch_device(plan.device), plan.rotation, plan.memory)
    except (RuntimeError, MemoryError) as error:
        yield _failed(case, plan, None, first_line(error))
        return
    expected: Tensor | None = None
    for contender in found:
        if contender.refusal is not None:
            yield _failed(case, plan, contender, contender.refusal)
            continue
        if plan.now() > plan.deadline:
            yield _failed(case, plan, contender, "not timed: the time given is over")
            continue
        say(f"{case.name}: {contender.name}")
        try:
            row, result = _time(case, contender, rotation, plan, expected)
        # other libraries raise what they like, and one of them must not end the run
        except Exception as error:
            yield _failed(case, plan, contender, first_line(error))
            _free(plan)
            continue
        if expected is None and contender.ours and contender.compares:
            expected = result
        yield row


def _time(
    case: Case, contender: Contender, rotation: Rotation, plan: Plan, expected: Tensor | None
) -> tuple[Row, Tensor]:
    result = _result(contender, rotation.batches[0])
    plan.clock.settle()
    rotation.refresh()
    calls: list[Call] = [contender.prepare(batch) for batch in rotation.batches]
    replays = plan.replays or (REPLAYS_OF_PREFILL if case.op in PREFILL_OPS else REPLAYS)
    timing = measure(calls, plan.clock, replays)
    difference = _difference(result, expected) if contender.compares else None
    row = Row(
        case=case,
        kernel=contender.name,
        ours=contender.ours,
        includes=contender.includes,
        floor=floor_of(work_of(case), plan.rates),
        timing=timing,
        warnings=tuple(_warnings(timing, rotation, result, difference)),
        difference=difference,
    )
    return row, result


def _result(contender: Contender, batch: Batch) -> Tensor:
    """Return what the first call gives, after one that may tune on the live states."""
    for _ in range(2):
        batch.refresh()
        result = contender.prepare(batch)()
    compared = result if isinstance(result, Tensor) else result[2]  # v: not all normalise q and k
    return compared.detach().clone()


def _difference(result: Tensor, expected: Tensor | None) -> float | None:
    if expected is None:
        return None
    x, y = result.float().flatten(), expected.float().flatten()
    if x.shape != y.shape:
        return math.inf
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))


def _warnings(
    timing: Timing, rotation: Rotation, result: Tensor, difference: float | None
) -> Iterator[str]:
    if timing.fallback is not None:
        yield f"timed by events around eager calls, host time included: {timing.fallback}"
    if timing.is_wide:
        yield f"the replays spread over more than {WIDE_SPREAD:.0%} of their median"
    if not rotation.is_cold:
        yield "the inputs fit in the caches: more do not fit in the memory allowed"
    if not bool(result.isfinite().all()):
        yield "the result is not finite"
    if difference is not None and not difference <= LARGEST_DIFFERENCE:
        yield f"the result differs from the first of our kernels by {difference:.2g}"


def draw(case: Case, device: torch.device, rotation: int, memory: int) -> Rotation:
    """Draw inputs until a round of calls touches ``rotation`` bytes, or takes all the memory."""
    generator = torch.Generator(device).manual_seed(0)
    slots = Slots(case, device, generator)
    touched = max(1, work_of(case).bytes)
    wanted = -(-rotation // touched)
    allowed = max(1, memory // size_of(case, slots.num_slots))
    batches = [
        Batch(case, slots, device, seed) for seed in range(min(wanted, allowed, MOST_BATCHES))
    ]
    return Rotation(tuple(batches), len(batches) >= wanted)


def size_of(case: Case, num_slots: int) -> int:
    """Return about how many bytes one draw takes, with what contenders allocate beside it."""
    spec = case.spec
    state = spec.num_v_heads * spec.head_v_dim * spec.head_k_dim * spec.state_dtype.itemsize
    rows = case.num_tokens * spec.conv_dim * spec.dtype.itemsize
    if case.op in ("gated_rms_norm", "conv1d_update", "conv1d_prefill", "front_end"):
        state = 0
    kept = case.num_tokens * state if case.protocol else 0  # a state per draft
    return 2 * num_slots * state + kept + 3 * rows + 1


def _failed(case: Case, plan: Plan, contender: Contender | None, error: str) -> Row:
    return Row(
        case=case,
        kernel=contender.name if contender else "-",
        ours=contender.ours if contender else True,
        includes=contender.includes if contender else "",
        floor=floor_of(work_of(case), plan.rates),
        error=error,
    )


def _free(plan: Plan) -> None:
    """Give memory back, and find out whether the device is still there."""
    gc.collect()
    try:
        plan.clock.settle()
    except RuntimeError as error:
        raise DeviceLostError(f"the device is lost: {first_line(error)}") from error
    if plan.device.kind in ("cuda", "rocm"):
        torch.cuda.empty_cache()
