# SPDX-License-Identifier: Apache-2.0
"""What FlashInfer's prefill needs around it: unit vectors, linear decay, slots, zeros for padding.

A new one takes an index to read, where -1 is a state of zeros, and one to write, where -1 is none.
An older one, or one with context parallelism, takes one index for both, of the pool: a sequence's
row is filled before it where that is not what it starts from, and a sequence that may write no
slot is given a row of memory of ours, by its distance to the pool. Neither touches a sequence
without tokens, so that its row is filled here. One of padding writes nothing into a state of
zeros, so that its outputs are zeros. The last sequence's last chunk of outputs is written whole,
over rows of nobody: so the last one is empty.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS, ceil_div, power_of_two
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import correction, squares_of
from gdn_backend_triton.overlap import begin
from gdn_backend_triton.sequences import sequence_of
from gdn_backend_triton.taps import strides
from torch import Tensor

from gdn_backend_cuda.slots import packed
from gdn_portable.errors import InputError
from gdn_portable.metadata import PrefillMetadata
from gdn_portable.spec import Device


class Given(str, Enum):
    """What a batch's q, k, g and beta are."""

    RAW = "raw"  # q and k are to be normalised, decay is log decay
    VECTORS = "vectors"  # q and k are taken as they are
    FINISHED = "finished"  # all are what a finished front end gives


class Tile(NamedTuple):
    """What a program of the gates owns."""

    rows: int  # of a token and a key head; of a value head where there are no norms
    warps: int  # those of the programs beside it as well


TILES = {Given.RAW: Tile(32, 4), Given.VECTORS: Tile(512, 4), Given.FINISHED: Tile(1, 4)}
SEQUENCES = 128  # that a program places
FILLED = tl.constexpr(32)  # rows of V that a program fills
CLEARED = 64  # tokens whose outputs a program clears
EVERY = 512  # tokens between the states that are kept for checkpoints


@triton.jit
def first_row(start, n, EVERY: tl.constexpr):
    """Return the row of a sequence's initial state among the states kept every EVERY tokens."""
    return start // EVERY + n


@triton.jit
def _holds_padding(state_indices, stride, N, PAD: tl.constexpr):
    """Return whether an index of a batch is padding."""
    found = 0
    for first in range(0, N, 32):
        n = first + tl.arange(0, 32)
        slot = tl.load(state_indices + n * stride, mask=n < N, other=PAD + 1)
        found |= tl.max((slot <= PAD).to(tl.int32), 0)
    return found != 0


@triton.jit
def _unit(x):
    """Return rows normalised, and rounded to their dtype."""
    value = x.to(tl.float32)
    value *= tl.rsqrt(squares_of(value) + 1e-6)[:, None]
    return value.to(x.dtype)


@triton.jit
def _store_gates(
    program, q, k, unit_q, unit_k, g, beta, alpha, strength, cu_seqlens, state_indices, T, N,
    q_t, q_h, k_t, k_h, g_t, g_h, b_t, b_h, cu_s, indices_s, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Store a program's gates, and its rows of q and k normalised where q is not None."""
    RATIO: tl.constexpr = HV // H
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < T * H
    token = row // H
    t = token.to(tl.int64)
    h = row % H
    i = tl.arange(0, HEADS)[None, :]
    head = h * RATIO + i
    mask = inside & (i < RATIO)
    decay = tl.load(g + t * g_t + head * g_h, mask=mask, other=0.0)
    amount = tl.load(beta + t * b_t + head * b_h, mask=mask, other=0.0)
    if q is not None:
        o_k = tl.arange(0, K)[None, :]
        key = tl.load(k + t * k_t + h * k_h + o_k, mask=inside, other=0.0)
        query = tl.load(q + t * q_t + h * q_h + o_k, mask=inside, other=0.0)
        key = _unit(key)
        at = row.to(tl.int64) * K + o_k
        tl.store(unit_q + at, _unit(query), mask=inside)
        tl.store(unit_k + at, key, mask=inside)
        amount *= correction(squares_of(key))[:, None]
    # usually no sequence is padding, which one load tells
    live = token < tl.load(cu_seqlens + N * cu_s).to(tl.int32)
    if _holds_padding(state_indices, indices_s, N, PAD):
        n = sequence_of(cu_seqlens, cu_s, N, token)
        live = tl.load(state_indices + n * indices_s, mask=n < N, other=PAD) > PAD
    tl.store(strength + t * HV + head, tl.where(live, amount, 0.0), mask=mask)
    tl.store(alpha + t * HV + head, tl.where(live, tl.exp(decay), 1.0), mask=mask)


@triton.jit(do_not_specialize=(*STEP_SIZES, "own"), do_not_specialize_on_alignment=STEP_TENSORS)
def _place(
    q, k, unit_q, unit_k, g, beta, alpha, strength, o, cu_seqlens, state_indices,
    out_state_indices, has_initial_state, checkpoint_offsets, offsets, slots, targets, starts,
    state, kept, T, N, own, q_t, q_h, k_t, k_h, g_t, g_h, b_t, b_h, cu_s, indices_s,
    out_indices_s, initial_s, checkpoints_s, state_s,
    state_h: tl.constexpr, state_v: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAD: tl.constexpr, EVERY: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, SEQUENCES: tl.constexpr, CLEARED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Run a program of the gates, of the sequences' lists, of rows of nobody or of rows to fill.

    Where alpha is None there are none of the gates; where targets is None slots are read and
    written.
    """
    begin(OVERLAPS)
    program = tl.program_id(0)
    lists = (N + 1 + SEQUENCES) // SEQUENCES
    clears = (T + CLEARED - 1) // CLEARED
    if alpha is not None:
        gates = (T * H + ROWS - 1) // ROWS
        if program < gates:
            _store_gates(
                program, q, k, unit_q, unit_k, g, beta, alpha, strength, cu_seqlens, state_indices,
                T, N, q_t, q_h, k_t, k_h, g_t, g_h, b_t, b_h, cu_s, indices_s, H, HV, K, PAD, ROWS,
                HEADS,
            )  # fmt: skip
            return
        program -= gates
    if program < lists:
        n = program * SEQUENCES + tl.arange(0, SEQUENCES)
        inside = n <= N + 1
        offset = tl.load(cu_seqlens + tl.minimum(n, N) * cu_s, mask=inside, other=0).to(tl.int32)
        tl.store(offsets + n, offset, mask=inside)
        if kept is not None:
            tl.store(starts + n, first_row(offset, n, EVERY) + 1, mask=inside)
        source = tl.load(state_indices + n * indices_s, mask=n < N, other=PAD).to(tl.int64)
        reads = source > PAD
        writes = reads
        slot = source
        if out_state_indices is not None:
            at = out_state_indices + n * out_indices_s
            slot = tl.load(at, mask=n < N, other=PAD).to(tl.int64)
            writes = writes & (slot > PAD)
        if targets is None:
            row = own
            if out_state_indices is not None:
                row += tl.minimum(n, N - 1)
            tl.store(slots + n, tl.where(writes, slot, row).to(tl.int32), mask=n <= N)
        else:
            if has_initial_state is not None:
                reads &= tl.load(has_initial_state + n * initial_s, mask=n < N, other=0) != 0
            tl.store(slots + n, tl.where(reads, source, -1).to(tl.int32), mask=n <= N)
            tl.store(targets + n, tl.where(writes, slot, -1).to(tl.int32), mask=n <= N)
        return
    program -= lists
    if program < clears:
        first = program * CLEARED
        total = tl.load(cu_seqlens + N * cu_s).to(tl.int32)
        if first + CLEARED <= total:
            return
        token = first + tl.arange(0, CLEARED)[:, None]
        nobody = (token >= total) & (token < T)
        at = o + token.to(tl.int64) * (HV * V) + tl.arange(0, V)[None, :]
        for head in range(HV):
            nothing = tl.zeros([CLEARED, V], o.dtype.element_ty)
            tl.store(at + head * V, nothing, mask=nobody)
        return
    program -= clears
    part = program % (V // FILLED)
    head = program // (V // FILLED) % HV
    n = program // (V // FILLED * HV)
    o_v = part * FILLED + tl.arange(0, FILLED)[:, None]
    o_k = tl.arange(0, K)[None, :]
    inside = head * state_h + o_v * state_v + o_k
    if out_state_indices is None and has_initial_state is None and kept is None:
        # every sequence starts from its slot, and padding shares a row
        if targets is None:
            if _holds_padding(state_indices, indices_s, N, PAD):
                nothing = tl.zeros([FILLED, K], state.dtype.element_ty)
                tl.store(state + own.to(tl.int64) * state_s + inside, nothing)
        return
    source = tl.load(state_indices + n * indices_s).to(tl.int64)
    start = tl.load(cu_seqlens + n * cu_s).to(tl.int32)
    live = source > PAD
    empty = start == tl.load(cu_seqlens + (n + 1) * cu_s).to(tl.int32)
    if (not live) & empty:
        return
    reads = live
    if has_initial_state is not None:
        reads = live & (tl.load(has_initial_state + n * initial_s) != 0)
    target = source
    if out_state_indices is not None:
        target = tl.load(out_state_indices + n * out_indices_s).to(tl.int64)
    if targets is None:
        if (not live) | (target <= PAD):
            target = own.to(tl.int64)
            if out_state_indices is not None:
                target += n
    fills = (not reads) | (target != source)
    if targets is not None:
        fills &= empty & (target > PAD)
    keeps = n < 0
    if kept is not None:
        checkpoint = tl.load(checkpoint_offsets + n * checkpoints_s).to(tl.int32)
        keeps = live & (checkpoint >= 0) & (checkpoint < EVERY)
    if fills | keeps:
        value = tl.zeros([FILLED, K], state.dtype.element_ty)
        if reads:
            value = tl.load(state + source * state_s + inside)
        if fills:
            tl.store(state + target * state_s + inside, value)
        if kept is not None:
            if keeps:
                row = first_row(start, n, EVERY).to(tl.int64) * HV + head
                tl.store(kept + row * (V * K) + o_v * K + o_k, value.to(tl.float32))


def placing(device: Device, given: Given) -> Launch:
    """Return what launches the kernel behind :class:`Placed`."""
    return Launch(_place, device, num_warps=TILES[given].warps)


class Placed:
    """A batch as FlashInfer may be given it; the pool's rows hold what sequences start from.

    Attributes:
        q: [T, H, K] queries, normalised where they are to be; contiguous.
        k: [T, H, K] keys, likewise.
        alpha: [T, HV] linear decay.
        beta: [T, HV] write strength.
        cu_seqlens: [N + 2] int32, an empty sequence behind the batch's.
        slots: [N + 1] int32 rows of the pool that are read, -1 for zeros; without ``targets``
            those that are written as well, or of ``own``, counted from the pool's first.
        targets: [N + 1] int32 rows of the pool that are written, -1 for none.
        own: memory for what may write no slot, where there are no ``targets``.
        kept: [rows, HV, V, K] float32 where checkpoints are wanted: a sequence's initial state,
            and room for the states every EVERY tokens behind it.
        starts: [N + 2] int32 rows of ``kept`` behind the sequences' initial states.
    """

    __slots__ = (
        "alpha", "beta", "cu_seqlens", "k", "kept", "own", "q", "slots", "starts", "targets",
    )  # fmt: skip

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        o: Tensor,
        *,
        metadata: PrefillMetadata,
        given: Given,
        has_targets: bool,
        pad: int,
        launch: Launch,
    ) -> None:
        """Make it, in one launch, which writes zeros to the outputs of nobody as well.

        Args:
            q: [T, H, K] queries.
            k: [T, H, K] keys.
            g: [T, HV] log decay, or linear.
            beta: [T, HV] write strength.
            state: the pool.
            o: [T, HV, V] contiguous, where outputs will be.
            metadata: the batch.
            given: what q, k, g and beta are.
            has_targets: whether rows to read and rows to write are two lists.
            pad: an index at or below it is padding.
            launch: of ``placing``.
        """
        (T, HV), N = g.shape, len(metadata.cu_seqlens) - 1
        V, K = state.shape[2:]
        H, tile = q.shape[1] if given is Given.RAW else HV, TILES[given]
        written, fresh = metadata.out_state_indices, metadata.has_initial_state
        checkpoints = metadata.checkpoint_offsets

        def integers(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int32, device=g.device)

        queries: Tensor | None = None
        keys: Tensor | None = None
        alpha: Tensor | None = None
        if given is Given.RAW:
            queries, keys = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
            self.q, self.k = torch.empty((2, *q.shape), dtype=q.dtype, device=q.device).unbind()
        else:
            self.q, self.k = packed(q), packed(k)
        if given is Given.FINISHED:
            self.alpha, self.beta = packed(g), packed(beta)
        else:
            alpha = torch.empty((T, HV), dtype=torch.float32, device=g.device)
            self.alpha, self.beta = alpha, torch.empty_like(alpha)
        self.cu_seqlens, self.slots = integers(N + 2), integers(N + 1)
        self.targets = self.own = self.kept = self.starts = None
        first = 0
        if checkpoints is not None:
            rows = T // EVERY + N + 1
            self.kept = torch.empty((rows, HV, V, K), dtype=torch.float32, device=g.device)
            self.starts = integers(N + 2)
        if has_targets:
            self.targets = integers(N + 1)
        else:
            self.own, first = _rows_beside(state, 1 if written is None else N)
        programs = 0 if alpha is None else ceil_div(T * H, tile.rows)
        programs += ceil_div(N + 2, SEQUENCES) + ceil_div(T, CLEARED)
        filled = N
        if written is None and fresh is None and checkpoints is None:
            filled = 0 if has_targets else 1
        programs += filled * HV * (V // FILLED.value)
        cu_seqlens, slots = metadata.cu_seqlens, metadata.state_indices
        launch(
            programs,
            (queries, keys, self.q, self.k, g, beta, alpha, self.beta, o, cu_seqlens, slots,
             written, fresh, checkpoints, self.cu_seqlens, self.slots, self.targets, self.starts,
             state, self.kept),
            (T, N, first),
            (*strides(queries, 3)[:2], *strides(keys, 3)[:2], *g.stride(), *beta.stride(),
             cu_seqlens.stride(0), slots.stride(0), *strides(written, 1), *strides(fresh, 1),
             *strides(checkpoints, 1), *state.stride()[:3], H, HV, K, V, pad, EVERY, tile.rows,
             power_of_two(HV // H), SEQUENCES, CLEARED),
        )  # fmt: skip


def _rows_beside(state: Tensor, count: int) -> tuple[Tensor, int]:
    """Return memory for ``count`` rows like the pool's, and the index the pool has for the first.

    An index is a distance in slots, so a row has to lie a whole number of them from the pool.
    """
    inner = zip(state.shape[1:], state.stride()[1:], strict=True)
    span = sum((size - 1) * stride for size, stride in inner) + 1
    pitch = state.stride(0) * state.element_size()
    if span > state.stride(0):
        raise InputError(f"slots lie {state.stride(0)} numbers apart, needs at least {span}")
    memory = torch.empty((count + 1) * pitch, dtype=torch.uint8, device=state.device)
    first = -((state.data_ptr() - memory.data_ptr()) // pitch)
    if not -(2**31) <= first < 2**31 - count:
        raise InputError(f"new memory is {first} slots from the pool, needs fewer than 2 ** 31")
    return memory, first
