# SPDX-License-Identifier: Apache-2.0
"""Verification by replay in one persistent kernel for Hopper.

A block takes items, a sequence and a key head each, in turn; the key head is always the same. Its
solver warps run the convolution of an item, gather what is pending and solve the R x R problem of
every value head, one item ahead, and have loaded by then what the item after needs. Its consumer
warps own 16 rows of V each: a warp's bulk copies bring the next heads' rows into a ring of its own,
it multiplies them, stores outputs, changes the rows where they are, and copies them back.
Consumers never wait for each other, and what passes between the kinds lies in shared memory. The
maths is that of ``gdn_backend_triton.replay``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

from gdn_backend_cuda.cute_replay import apply, ptx, solve
from gdn_backend_cuda.cute_replay.shape import (
    CONSUMERS,
    KEYS,
    ROOM,
    ROWS,
    SCRATCH,
    SOLVED,
    SOLVERS,
    V_ROW,
    X_ROW,
    Item,
    P,
    Shape,
    Tensors,
    W,
)

THREADS = 32 * (CONSUMERS + SOLVERS)
IS_SOLVED, IS_EMPTY = 8, 16  # barriers of a buffer, in bytes behind the one for what is gathered
IS_ASKED = 48  # behind those of both buffers: the first loads of the solver are under way
NUMBERS = len(Tensors._fields) + 6


def _fetch_slot(shape: Shape, indices, indices_b, total, item):
    at = indices + Int64(item // shape.H) * indices_b
    return ptx.global_word_if(item < total, at)


def _fetch_accepted(shape: Shape, accepted, accepted_b, total, item):
    if not shape.has_accepted:
        return Int32(0)
    at = accepted + Int64(item // shape.H) * accepted_b
    return ptx.global_word_if(item < total, at)


def _item(shape: Shape, slot, pending, index) -> Item:
    pending = ptx.select(pending < 0, Int32(0), pending)
    pending = ptx.select(pending > ROOM, Int32(ROOM), pending)
    return Item(Int64(slot), pending, Int64(index // shape.H) * P, index % shape.H)


@cute.jit
def _fetch(values, shape: cutlass.Constexpr, slot, total, item, head, warp, lane, target, barrier):
    """Bring a warp's rows of a head into a stage; those of a padded slot are there at once."""
    x = Tensors(*values)
    if lane == 0:
        if item < total:
            if slot > shape.pad_slot:
                ptx.wait_read()
                value_head = (item % shape.H) * shape.heads + head
                source = x.state + Int64(slot) * x.state_s + Int64(value_head) * x.state_h
                ptx.fetch(target, source + Int64(warp) * shape.tile, shape.tile, barrier)
            else:
                ptx.arrive(barrier)


@cute.jit
def _consume(
    values, shape: cutlass.Constexpr, indices, indices_b, accepted, accepted_b, total, base, warp,
    lane,
):  # fmt: skip
    x = Tensors(*values)
    depth, heads = shape.depth, shape.heads
    index, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    # the ring is depth - 1 heads ahead: of this item's, so many items and a rest
    ahead, rest = (depth - 1) // heads, (depth - 1) % heads
    slots = [
        _fetch_slot(shape, indices, indices_b, total, index + n * grid)
        for n in range(ahead + (2 if rest else 1))
    ]
    pending = _fetch_accepted(shape, accepted, accepted_b, total, index)
    ring = base + warp * (depth * shape.tile)
    barriers = base + shape.barriers_at + warp * (depth * 8)
    of_buffers = base + shape.barriers_at + CONSUMERS * depth * 8
    if lane == 0:
        for n in cutlass.range_constexpr(depth):
            ptx.create(barriers + n * 8, 1)
        ptx.fence_created()
    cute.arch.sync_threads()
    # what the solver waits for is not to queue behind states
    ptx.wait(of_buffers + IS_ASKED, 0)
    for n in cutlass.range_constexpr(depth - 1):
        _fetch(
            values, shape, slots[n // heads], total, index + (n // heads) * grid,
            Int32(n % heads), warp, lane, ring + n * shape.tile, barriers + n * 8,
        )  # fmt: skip
    stage, phase, last = Int32(0), Int32(0), Int32(depth - 1)
    turn, turn_phase = Int32(0), Int32(0)
    while index < total:
        item = _item(shape, slots[0], pending, index)
        # for the next turns of this loop
        slot = _fetch_slot(shape, indices, indices_b, total, index + len(slots) * grid)
        pending = _fetch_accepted(shape, accepted, accepted_b, total, index + grid)
        buffer = base + shape.buffers_at + turn * shape.buffer
        gathered = of_buffers + turn * 24
        ptx.wait(gathered, turn_phase)
        for_Y, for_change = apply.operands(ptx, shape, lane, buffer)
        for head in cutlass.range(heads, unroll=1):
            tile = ring + stage * shape.tile
            value_head = item.head * heads + head
            solved = buffer + shape.solved + head * SOLVED
            wraps = head + rest >= heads
            next_head = ptx.select(wraps, head + (rest - heads), head + rest)
            next_item = index + ptx.select(wraps, grid * (ahead + 1), grid * ahead)
            next_slot = ptx.select(wraps, slots[-1], slots[ahead])
            ptx.wait(barriers + stage * 8, phase)
            if item.slot > shape.pad_slot:
                sums = apply.multiply(ptx, shape, lane, tile, for_Y)
                # what was put back from the stage behind has left it by now
                _fetch(
                    values, shape, next_slot, total, next_item, next_head, warp, lane,
                    ring + last * shape.tile, barriers + last * 8,
                )  # fmt: skip
                ptx.wait(gathered + IS_SOLVED, turn_phase)
                D = apply.attend(
                    ptx, x, item, value_head, lane, warp * ROWS,
                    buffer + shape.values + head * (KEYS * V_ROW), solved, sums,
                )  # fmt: skip
                if item.pending > 0:
                    apply.update(ptx, shape, lane, tile, solved, D, for_change)
                ptx.fence_async()
                ptx.sync_warp()
                if item.pending > 0:
                    if lane == 0:
                        target = x.state + item.slot * x.state_s + Int64(value_head) * x.state_h
                        ptx.put_back(target + Int64(warp) * shape.tile, tile, shape.tile)
            else:
                apply.zeros(ptx, x, item, value_head, lane, warp * ROWS)
                _fetch(
                    values, shape, next_slot, total, next_item, next_head, warp, lane,
                    ring + last * shape.tile, barriers + last * 8,
                )  # fmt: skip
            last = stage
            stage = stage + 1
            wraps = stage == depth
            stage = ptx.select(wraps, Int32(0), stage)
            phase = ptx.select(wraps, phase ^ 1, phase)
        ptx.sync_warp()
        if lane == 0:
            ptx.arrive(gathered + IS_EMPTY)
        turn_phase = turn_phase ^ turn
        turn = turn ^ 1
        slots = [*slots[1:], slot]
        index = index + grid
    if lane == 0:
        ptx.wait_read()


@cute.jit
def _solve(
    values, shape: cutlass.Constexpr, indices, indices_b, accepted, accepted_b, total, base, warp,
    lane,
):  # fmt: skip
    x = Tensors(*values)
    index, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    slot = _fetch_slot(shape, indices, indices_b, total, index)
    pending = _fetch_accepted(shape, accepted, accepted_b, total, index)
    thread = warp * 32 + lane
    key_head = index % shape.H
    filters = solve.fetch_filters(ptx, shape, x, key_head, thread)
    heads, is_mine, rates, sums = [], [], [], []
    for n in cutlass.range_constexpr(0, shape.heads, SOLVERS):
        is_mine.append(warp + n < shape.heads)
        head = ptx.select(is_mine[-1], warp + n, Int32(0))
        heads.append(key_head * shape.heads + head)
        rates.append(solve.fetch_rates(ptx, shape, x, heads[-1]))
        sums.append(solve.Decays(ptx.zero(), ptx.zero(), ptx.zero()))
    of_buffers = base + shape.barriers_at + CONSUMERS * shape.depth * 8
    if thread == 0:
        for n in cutlass.range_constexpr(2):
            ptx.create(of_buffers + n * 24, SOLVERS)
            ptx.create(of_buffers + n * 24 + IS_SOLVED, SOLVERS)
            ptx.create(of_buffers + n * 24 + IS_EMPTY, CONSUMERS)
        ptx.create(of_buffers + IS_ASKED, SOLVERS)
        ptx.fence_created()
    for n in cutlass.range_constexpr(2):
        if thread < 4 * X_ROW // 16:
            at = base + shape.buffers_at + n * shape.buffer + KEYS * X_ROW
            ptx.put_words(at + thread * 16, (ptx.no_bits(),) * 4)
    scratch = base + shape.scratch_at + warp * (SCRATCH * 4)
    cute.arch.sync_threads()
    # a turn of this loop loads for an item, solves the one in front of it, and gathers
    turn, turn_phase = Int32(0), Int32(0)
    has_work, is_before = Int32(1), Int32(0)
    while has_work == 1:
        is_item = index < total
        row = Int64(index // shape.H) * P
        drafted = [[ptx.no_bits()] * P for _ in range(2 + shape.heads)]
        new = [(ptx.no_bits(), ptx.no_bits()) for _ in heads]
        channels = [
            solve.Channel([ptx.no_bits()] * (W - 1), [ptx.no_bits()] * (P if n else 0))
            for n in range(2 + shape.heads)
        ]
        old = [(ptx.zero(), ptx.zero()) for _ in heads]
        if is_item:
            drafted = solve.fetch_drafts(ptx, shape, x, row, key_head, thread)
            new = [solve.fetch_new_gates(ptx, x, row, head, lane) for head in heads]
        # with what is not known to be of all lanes nothing waits where it is loaded
        slot, pending = ptx.shuffle(slot, 0), ptx.shuffle(pending, 0)
        item = _item(shape, slot, pending, index)
        is_there = is_item & (slot > shape.pad_slot)
        if is_there:
            channels = solve.fetch_channels(ptx, shape, x, item, thread)
            old = [solve.fetch_pending(ptx, x, item.slot, head, lane) for head in heads]
        if (index < grid) & (lane == 0):
            ptx.arrive(of_buffers + IS_ASKED)
        slot = _fetch_slot(shape, indices, indices_b, total, index + grid)
        pending = _fetch_accepted(shape, accepted, accepted_b, total, index + grid)
        if index >= grid:
            before = base + shape.buffers_at + (turn ^ 1) * shape.buffer
            if is_before == 1:
                for n in cutlass.range_constexpr(0, shape.heads, SOLVERS):
                    if warp + n < shape.heads:
                        XX = solve.products(ptx, lane, before)
                        solved = before + shape.solved + (warp + n) * SOLVED
                        solve.solve(ptx, shape, XX, sums[n // SOLVERS], lane, scratch, solved)
                        ptx.sync_warp()
            ptx.sync_warp()
            if lane == 0:
                ptx.arrive(of_buffers + (turn ^ 1) * 24 + IS_SOLVED)
        sums = [
            solve.decays(
                ptx, shape, x, item, head, lane, is_there & mine, rate, solve.Gates(*a, *b)
            )
            for head, mine, rate, a, b in zip(heads, is_mine, rates, new, old, strict=True)
        ]
        if is_item:
            ptx.wait(of_buffers + turn * 24 + IS_EMPTY, turn_phase ^ 1)
            if is_there:
                buffer = base + shape.buffers_at + turn * shape.buffer
                solve.gather(ptx, shape, x, item, thread, buffer, filters, drafted, channels)
            ptx.sync_warp()
            if lane == 0:
                ptx.arrive(of_buffers + turn * 24)
            ptx.wait(of_buffers + turn * 24, turn_phase)
        is_before = ptx.select(is_there, Int32(1), Int32(0))
        has_work = ptx.select(is_item, Int32(1), Int32(0))
        turn_phase = turn_phase ^ turn
        turn = turn ^ 1
        index = index + grid


@cute.kernel
def _replay(values, shape: cutlass.Constexpr, indices, indices_b, accepted, accepted_b, total):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(thread // 32)
    lane = thread % 32
    base = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
    # launched to start early: here all that was launched before is done
    cute.arch.griddepcontrol_wait()
    if warp < CONSUMERS:
        _consume(values, shape, indices, indices_b, accepted, accepted_b, total, base, warp, lane)
    else:
        _solve(
            values, shape, indices, indices_b, accepted, accepted_b, total, base,
            warp - CONSUMERS, lane,
        )  # fmt: skip


class Numbers:
    """All numbers of a launch as one argument: one by one they take the DSL 0.3 ms."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.memory = (ctypes.c_int64 * NUMBERS)(*numbers)

    def __c_pointers__(self) -> list[int]:
        """Return where the argument is, which the DSL asks of every argument."""
        return [ctypes.addressof(self.memory)]

    def __get_mlir_types__(self) -> list[Any]:
        """Return what it is in a kernel's host code."""
        return [ir.Type.parse(f"!llvm.array<{NUMBERS} x i64>")]

    def __new_from_mlir_values__(self, values: list[Any]) -> _Traced:
        """Return what stands for it while host code is compiled."""
        return _Traced(values[0])


class _Traced:
    """The same as a value of the host code."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __extract_mlir_values__(self) -> list[Any]:
        return [self.value]

    def __new_from_mlir_values__(self, values: list[Any]) -> _Traced:
        return _Traced(values[0])

    def all(self) -> list[Any]:
        """Return the numbers one by one."""
        kind = Int64.mlir_type
        return [Int64(llvm.extractvalue(kind, self.value, [n])) for n in range(NUMBERS)]


@cute.jit
def _launch(numbers: Numbers, stream: cuda.CUstream, shape: cutlass.Constexpr):
    *values, indices, indices_b, accepted, accepted_b, total, blocks = numbers.all()
    _replay(tuple(values), shape, indices, indices_b, accepted, accepted_b, Int32(total)).launch(
        grid=(Int32(blocks), 1, 1),
        block=(THREADS, 1, 1),
        smem=shape.shared,
        stream=stream,
        use_pdl=True,
    )


def compile_for(shape: Shape, arch: str, options: str = "") -> Any:
    """Compile for an architecture such as ``sm90``, whether such a GPU is here or not."""
    target = f"--gpu-arch {arch.replace('sm', 'sm_')}a {options}"
    nothing = Numbers([0] * NUMBERS)
    return cute.compile(_launch, nothing, cuda.CUstream(0), shape, options=target)


class Start(Protocol):
    """What starts a kernel that is compiled."""

    def __call__(self, numbers: Sequence[int]) -> None:
        """Start it on the current stream with what ``plan.numbers_of`` returns."""
        ...


@functools.cache
def start_of(shape: Shape, arch: str) -> Start:
    """Return what starts the kernel, compiled and loaded when a process first asks for it."""
    call = compile_for(shape, arch).to(None)
    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    # a block's items are all of one key head
    most_blocks = max(here.multi_processor_count // shape.H, 1) * shape.H
    stream_of = functools.lru_cache(cuda.CUstream)

    def start(numbers: Sequence[int]) -> None:
        blocks = min(most_blocks, numbers[-1])
        stream = stream_of(torch.cuda.current_stream().cuda_stream)
        call(Numbers([*numbers, blocks]), stream)

    return start
