# SPDX-License-Identifier: Apache-2.0
"""Runs a program: workgroups in lock step or one at a time, waves that diverge apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from ci.amdgcn.assembly import EXEC
from ci.amdgcn.errors import EndlessLoopError, SimulationError, UnsupportedLaunchError
from ci.amdgcn.lds import Lds
from ci.amdgcn.matrix import flops
from ci.amdgcn.memory import GlobalMemory
from ci.amdgcn.program import Block, Program
from ci.amdgcn.waves import LANE, LANES, POISON, SCALARS, Array, Waves, merge

# waves that run together: their registers should stay in the processor's cache
BATCH = 256
MAX_BLOCKS = 2_000_000


class Order(Enum):
    """The order of workgroups and waves.

    Together, or one workgroup after the other and, from one barrier to the next, one wave after
    the other. Where these give different results, the kernel races through global memory.
    """

    LOCK_STEP = "lock step"
    FORWARD = "forward"
    REVERSED = "reversed"


@dataclass(slots=True)
class Counts:
    """What a run executed, once for every wave.

    Attributes:
        instructions: by opcode.
        blocks: of the program, by the position of their first instruction.
        mfma_flops: of matrix instructions.
        lds_loaded: bytes that lanes loaded from shared memory.
        lds_stored: bytes that lanes stored there.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    blocks: Counter[int] = field(default_factory=Counter)
    mfma_flops: int = 0
    lds_loaded: int = 0
    lds_stored: int = 0


@dataclass(frozen=True, slots=True)
class Grid:
    """How many workgroups there are, and how many waves each has."""

    size: tuple[int, int, int]
    waves: int

    def batches(self, order: Order) -> Iterator[Array]:
        """Yield the [workgroups, 3] places of workgroups that run together."""
        x, y, z = self.size
        places = np.stack(np.meshgrid(*map(np.arange, (z, y, x)), indexing="ij"), axis=-1)
        places = places.reshape(-1, 3)[:, ::-1]
        if order is Order.REVERSED:
            places = places[::-1]
        step = max(1, BATCH // self.waves) if order is Order.LOCK_STEP else 1
        for start in range(0, len(places), step):
            yield places[start : start + step]


def run(
    program: Program,
    memory: GlobalMemory,
    grid: Grid,
    *,
    arguments: int,
    lds_size: int,
    order: Order = Order.LOCK_STEP,
) -> Counts:
    """Execute a kernel, and return what it did.

    Args:
        program: the kernel.
        memory: what it may access, its arguments included.
        grid: its workgroups.
        arguments: address of its arguments.
        lds_size: bytes of shared memory of a workgroup.
        order: of its workgroups.

    Raises:
        SimulationError: the kernel did something wrong.
    """
    counts = Counts()
    with np.errstate(all="ignore"):
        for places in grid.batches(order):
            lds = Lds(len(places), lds_size, program.lds_cell, detects_races=grid.waves > 1)
            waves = _start(program, memory, lds, places, grid.waves, arguments)
            _Batch(program, counts, order).run(waves)
            counts.lds_loaded += lds.loaded
            counts.lds_stored += lds.stored
    return counts


def _start(
    program: Program,
    memory: GlobalMemory,
    lds: Lds,
    places: Array,
    waves_each: int,
    arguments: int,
) -> Waves:
    """Return the waves of workgroups as the hardware starts them, all else poisoned."""
    count = len(places) * waves_each
    numbers = np.tile(np.arange(waves_each), len(places))
    workgroups = np.repeat(np.arange(len(places)), waves_each)
    vectors = np.full((program.num_vectors, count, LANES), POISON, np.uint32)
    scalars = np.full((count, SCALARS), POISON, np.uint32)
    vectors[0] = numbers[:, None] * LANES + LANE
    header = program.assembly.header
    position = 0
    for name in ("dispatch_ptr", "queue_ptr", "kernarg_segment_ptr", "dispatch_id"):
        if header.get(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":
                scalars[:, position] = arguments & 0xFFFFFFFF
                scalars[:, position + 1] = arguments >> 32
            position += 2
    position = header.get("user_sgpr_count", position)
    for axis, letter in enumerate("xyz"):
        if header.get(f"system_sgpr_workgroup_id_{letter}", axis == 0):
            scalars[:, position] = places[workgroups, axis]
            position += 1
    scalars[:, EXEC : EXEC + 2] = 0xFFFFFFFF
    scc = np.zeros(count, np.bool_)
    ids = np.arange(count)
    return Waves(ids, workgroups, numbers, vectors, scalars, scc, memory, lds)


class _Batch:
    """Waves that run together, as groups; a group's waves are at the same instruction.

    The group that is furthest behind runs until it meets the next one, so that waves which went
    different ways join where the ways do. Other orders have groups of one wave that never join.
    """

    def __init__(self, program: Program, counts: Counts, order: Order) -> None:
        self.program = program
        self.counts = counts
        self.order = order
        self.runs: Counter[int] = Counter()  # of waves, by the start of a block

    def run(self, waves: Waves) -> None:
        """Execute until every wave has ended."""
        ready, waiting = self._groups(waves), list[Waves]()
        for _ in range(MAX_BLOCKS):
            if not ready:
                if not waiting:
                    break
                # every wave that has not ended is here
                waiting[0].lds.barrier()
                ready, waiting = waiting[::-1], []
            group = self._next(ready)
            block = self.program.blocks[group.position]
            self._execute(block, group)
            if block.then == "branch":
                ready += _branch(block, group)
            elif block.then == "barrier":
                group.position = block.end
                waiting.append(group)
            elif block.then == "next":
                group.position = block.end
                ready.append(group)
        else:
            raise EndlessLoopError(f"{self.program.assembly.name} does not end")
        self._count()

    def _groups(self, waves: Waves) -> list[Waves]:
        """Return the groups to begin with, the first to run as the last."""
        if self.order is Order.LOCK_STEP:
            return [waves]
        each = [waves.take(waves.ids == i, waves.position) for i in waves.ids]
        return each if self.order is Order.REVERSED else each[::-1]

    def _next(self, ready: list[Waves]) -> Waves:
        """Take the group that is furthest behind, and all that are at the same place."""
        if len(ready) == 1 or self.order is not Order.LOCK_STEP:
            return ready.pop()
        position = min(group.position for group in ready)
        here = [group for group in ready if group.position == position]
        ready[:] = [group for group in ready if group.position != position]
        return merge(here) if len(here) > 1 else here[0]

    def _execute(self, block: Block, group: Waves) -> None:
        self.runs[block.start] += len(group)
        done = 0
        try:
            for execute in block.execute:
                execute(group)
                done += 1
        except SimulationError as error:
            instruction = self.program.assembly.instructions[block.start + done]
            error.locate(self.program.assembly.name, instruction.line, instruction.text)
            raise

    def _count(self) -> None:
        self.counts.blocks += self.runs
        for start, waves in self.runs.items():
            block = self.program.blocks[start]
            for instruction in self.program.assembly.instructions[start : block.end]:
                self.counts.instructions[instruction.name] += waves
                self.counts.mfma_flops += waves * flops(instruction.name)


def _branch(block: Block, group: Waves) -> list[Waves]:
    """Return the group at the branch's target, after it, or in two parts."""
    taken = block.condition(group)
    count = np.count_nonzero(taken)
    if count == 0 or count == len(group):
        group.position = block.target if count else block.end
        return [group]
    jumped = group.take(taken, block.target)
    return [jumped, group.take(~taken, block.end)]


def check(grid: tuple[int, int, int], num_warps: int, lds_size: int, lds_limit: int) -> None:
    """Raise where no GPU could launch this."""
    if min(grid) < 1 or num_warps < 1:
        raise UnsupportedLaunchError(f"grid is {grid} of {num_warps} waves, needs 1 or more")
    if lds_size > lds_limit:
        raise UnsupportedLaunchError(f"a workgroup needs {lds_size} bytes of LDS of {lds_limit}")
