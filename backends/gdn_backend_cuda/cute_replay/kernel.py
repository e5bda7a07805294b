# SPDX-License-Identifier: Apache-2.0
"""Verification by replay in one kernel for Hopper.

A block takes an item, a sequence and a key head, and its warps own tiles of the states of its
value heads. Threads load what the convolution needs of their channels; then a lane of every warp
sends for the warp's tiles in bulk copies, and meanwhile X and the values are gathered. A warp for
every value head solves its R x R problem, while others multiply their first tiles by X. Then each
warp, waiting for no other, finishes the outputs of a tile, changes it where it lies, and copies
it back. The maths is that of ``gdn_backend_triton.replay``.

A block has one item alone: SMs do not get the same share of the memory's bandwidth, and where
blocks stayed and took as many items each, all waited for the slowest.
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
    ROWS,
    V_ROW,
    X_ROW,
    Item,
    K,
    Shape,
    Tensors,
)

NUMBERS = len(Tensors._fields) + 5


def _place(shape: Shape, item: Item, warp, n):
    """Return the value head of tile ``n`` of a warp, and which of the head's tiles it is."""
    return item.head * shape.heads + n // shape.parts, warp * shape.parts + n % shape.parts


def _tile(shape: Shape, x: Tensors, item: Item, warp, n):
    """Return where tile ``n`` of a warp is in the pool."""
    value_head, part = _place(shape, item, warp, n)
    state = x.state + item.slot * x.state_s + Int64(value_head) * x.state_h
    return state + Int64(part) * shape.tile


@cute.jit
def _gather(
    values, item, shape: cutlass.Constexpr, vectors: cutlass.Constexpr, channel, warp, lane,
    gathered, stages, barriers,
):  # fmt: skip
    x, item = Tensors(*values), Item(*item)
    filters = solve.fetch_filters(ptx, shape, x, item.head, channel, vectors)
    drafted = solve.fetch_drafts(ptx, shape, x, item.row, item.head, channel, vectors)
    channels = solve.fetch_channels(ptx, shape, x, item, channel, vectors)
    # what is waited for first is not to queue behind states
    if lane == 0:
        for n in cutlass.range_constexpr(shape.depth):
            source = _tile(shape, x, item, warp, n)
            ptx.fetch(stages + n * shape.tile, source, shape.tile, barriers + n * 8)
    solve.gather(ptx, shape, x, item, channel, gathered, vectors, filters, drafted, channels)


@cute.jit
def _verify(values, item, shape: cutlass.Constexpr, base, thread, warp, lane):
    x, item = Tensors(*values), Item(*item)
    depth, heads = shape.depth, shape.heads
    stages = base + warp * (depth * shape.tile)
    barriers = base + shape.barriers_at + warp * (depth * 8)
    is_solved = base + shape.is_solved_at
    gathered = base + shape.gathered_at
    own_head = item.head * heads + ptx.select(warp < heads, warp, Int32(0))
    rates = solve.fetch_rates(ptx, shape, x, own_head)
    new = solve.fetch_new_gates(ptx, shape, x, item.row, own_head, lane)
    old = solve.fetch_pending(ptx, shape, x, item.slot, own_head, lane)
    # a thread has a channel of every vector or, with 8 warps, of every other one
    halves = shape.warps * 32 // K
    for half in cutlass.range_constexpr(halves):
        if thread // K == half:
            _gather(
                values, item, shape, range(half, 2 + heads, halves), thread % K, warp, lane,
                gathered, stages, barriers,
            )  # fmt: skip
    cute.arch.sync_threads()
    # warps that solve leave it to the others, if there are any
    first = heads % shape.warps
    if warp >= first:
        others = (shape.warps - first) * 32
        solve.keep(ptx, shape, x, item, thread - first * 32, others, gathered)
    if warp < heads:
        gates = solve.Gates(*new, *old)
        decays = solve.decays(ptx, shape, x, item, own_head, lane, rates, gates)
        XX = solve.products(ptx, shape, lane, gathered)
        solved = gathered + shape.solved + warp * shape.solved_size
        solve.solve(ptx, shape, XX, decays, lane, solved)
        ptx.sync_warp()
        if lane == 0:
            ptx.arrive(is_solved)
    X = apply.operands(ptx, shape, lane, gathered)
    stage, phase = Int32(0), Int32(0)
    for n in cutlass.range(shape.tiles, unroll=1):
        tile, barrier, head = stages + stage * shape.tile, barriers + stage * 8, n // shape.parts
        solved = gathered + shape.solved + head * shape.solved_size
        ptx.wait(barrier, phase)
        products = apply.multiply(ptx, shape, lane, tile, X)
        ptx.wait(is_solved, 0)
        value_head, part = _place(shape, item, warp, n)
        changes = apply.attend(
            ptx, shape, x, item, value_head, lane, part * ROWS,
            gathered + shape.values + head * (shape.keys * V_ROW), solved, products,
        )  # fmt: skip
        if item.pending > 0:
            apply.update(ptx, shape, lane, tile, solved, changes, X)
        ptx.fence_async()
        ptx.sync_warp()
        if lane == 0:
            if item.pending > 0:
                ptx.put_back(_tile(shape, x, item, warp, n), tile, shape.tile)
            if n + depth < shape.tiles:
                ptx.wait_read()
                ptx.fetch(tile, _tile(shape, x, item, warp, n + depth), shape.tile, barrier)
        stage = stage + 1
        wraps = stage == depth
        stage = ptx.select(wraps, Int32(0), stage)
        phase = ptx.select(wraps, phase ^ 1, phase)
    if lane == 0:
        ptx.wait_read()


@cute.jit
def _clear(values, item, shape: cutlass.Constexpr, warp, lane):
    """Store the outputs of a padded slot."""
    x, item = Tensors(*values), Item(*item)
    for n in cutlass.range_constexpr(shape.tiles):
        value_head, part = _place(shape, item, warp, n)
        apply.zeros(ptx, shape, x, item, value_head, lane, part * ROWS)


@cute.kernel
def _replay(values, shape: cutlass.Constexpr, indices, indices_b, accepted, accepted_b):
    thread, _, _ = cute.arch.thread_idx()
    index, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(thread // 32)
    lane = thread % 32
    base = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
    if lane == 0:
        barriers = base + shape.barriers_at
        for n in cutlass.range_constexpr(shape.depth):
            ptx.create(barriers + (warp * shape.depth + n) * 8, 1)
        if warp == 0:
            ptx.create(base + shape.is_solved_at, shape.heads)
        ptx.fence_created()
    if cutlass.const_expr(shape.group == 4):
        if thread < 4 * X_ROW // 16:
            no_rows = base + (shape.gathered_at + shape.keys * X_ROW)
            ptx.put_words(no_rows + thread * 16, (ptx.no_bits(),) * 4)
    # launched to start early: here all that was launched before is done
    cute.arch.griddepcontrol_wait()
    sequence = index // shape.H
    slot = ptx.global_word(indices + Int64(sequence) * indices_b)
    pending = Int32(0)
    if cutlass.const_expr(shape.has_accepted):
        pending = ptx.global_word(accepted + Int64(sequence) * accepted_b)
        pending = ptx.select(pending < 0, Int32(0), pending)
        pending = ptx.select(pending > shape.room, Int32(shape.room), pending)
    item = (Int64(slot), pending, Int64(sequence) * shape.drafts, index % shape.H)
    if slot > shape.pad_slot:
        _verify(values, item, shape, base, thread, warp, lane)
    else:
        _clear(values, item, shape, warp, lane)


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
    *values, indices, indices_b, accepted, accepted_b, items = numbers.all()
    _replay(tuple(values), shape, indices, indices_b, accepted, accepted_b).launch(
        grid=(Int32(items), 1, 1),
        block=(shape.warps * 32, 1, 1),
        smem=shape.shared,
        min_blocks_per_mp=shape.blocks,
        preferred_smem_carveout=100,
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
    stream_of = functools.lru_cache(cuda.CUstream)

    def start(numbers: Sequence[int]) -> None:
        stream = stream_of(torch.cuda.current_stream().cuda_stream)
        call(Numbers(numbers), stream)

    return start
