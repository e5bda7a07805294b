# SPDX-License-Identifier: Apache-2.0
"""Chunk prefill: what needs no state for all chunks at once, then a scan along every sequence.

1. ``attend`` and ``invert`` fill what every chunk needs that depends on no state.
2. Where sequences are too few to fill the device they are cut into segments that run side by side.
   ``_bridge`` gives every segment what it needs to start: where a head has decayed to below
   float32's rounding since some chunk, and no key made a state grow, nothing, the segment warms up
   from there; else the map S -> S M + N of the segments before it.
3. ``_scan`` runs every sequence, or segment, with the state in registers and writes the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton import is_before
from gdn_backend_triton.chunk_prepare import CHUNK, attend, head_offset, invert
from gdn_backend_triton.launch import (
    STEP_SIZES,
    STEP_TENSORS,
    ceil_div,
    empty_like,
    longest,
    refuse_gradients,
)
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import halves, rounded
from gdn_backend_triton.sequences import locate, num_programs
from gdn_backend_triton.taps import strides
from gdn_portable.interface import ChunkPrefill
from gdn_portable.metadata import PrefillMetadata
from gdn_portable.spec import Device, GdnSpec

# log2 of what a state may still weigh where it is dropped: below half a unit of float32
DROPPED = tl.constexpr(-32.0)


class Tile(NamedTuple):
    """How the scan is cut."""

    BV: int
    warps: int
    stages: int
    programs: int  # that fill the device
    options: Mapping[str, int] = {}  # that one vendor's compiler knows


# in a tile of 32 columns MFMAs of 32 x 32 are too few for four waves: two and two do the same, for
# 1.7 times the FLOPs, and on gfx942 two programs of a unit would not find registers
NARROW_MFMA = {"matrix_instr_nonkdim": 16}
# of a scan of 16-bit heads up to K = 128, which needs no more registers than that leaves
TWO_PROGRAMS = {"waves_per_eu": 2}
TILES = {
    "sm90": Tile(BV=64, warps=4, stages=1, programs=264),
    "sm100": Tile(BV=64, warps=4, stages=1, programs=296),
    "sm103": Tile(BV=64, warps=4, stages=1, programs=296),
    "sm120": Tile(BV=32, warps=4, stages=1, programs=340),
    "gfx942": Tile(BV=32, warps=4, stages=1, programs=608, options=NARROW_MFMA),
    "gfx950": Tile(BV=32, warps=4, stages=1, programs=512, options=NARROW_MFMA),
}
# of a state held as [BV, K]: what one product leaves in registers is an operand of the next there,
# and only there: elsewhere registers spill (an H200 takes 3.3 us per chunk, 5.1 as [K, BV])
V_FIRST_TILES = {"sm90": Tile(BV=128, warps=8, stages=3, programs=132)}
# of short sequences, where half heads do not fill the device
HALF_TILES = {"sm90": Tile(BV=64, warps=4, stages=3, programs=132)}
LONGEST = 24  # chunks of such a sequence
# of wide rows of 16-bit numbers: a tile of 64 columns takes wgmma, and eight warps hold its state;
# chosen by what spills, 280 bytes a thread where 32 columns and two warps spill 1600, not by time
WIDE_TILES = {
    "sm90": Tile(BV=64, warps=8, stages=1, programs=132),
    "sm100": Tile(BV=64, warps=8, stages=1, programs=148),
    "sm103": Tile(BV=64, warps=8, stages=1, programs=148),
}
# of float32 rows of K = 128 and more, V first: no product has the 64 rows that a warp group takes.
# 4x2048 tokens of H16/HV32 take an H200 1.73 ms, as [128, 32] by two warps, which spills 16 KB a
# thread, 29. Rows of K = 64 a warp group takes, in two thirds of the time that V first takes
FLOAT32_TILES = {
    "sm90": Tile(BV=32, warps=8, stages=1, programs=132),
    "sm100": Tile(BV=32, warps=8, stages=1, programs=148),
    "sm103": Tile(BV=32, warps=8, stages=1, programs=148),
    "sm120": Tile(BV=32, warps=8, stages=1, programs=170),
}
# of 16-bit heads up to K = 128, with Triton before 3.9: two programs would spill up to 26 registers
ONE_PROGRAM_TILES: dict[str, Tile] = {}
if is_before(triton.__version__, (3, 9)):
    ONE_PROGRAM_TILES["gfx942"] = Tile(BV=64, warps=8, stages=1, programs=304, options=NARROW_MFMA)
SHORTEST = 4  # chunks of a segment
AT_ONCE = tl.constexpr(8)  # chunks whose decay is asked for before the first is waited for
WIDEST_MAP = 256  # bytes of a row


@triton.jit
def _left(X, Y, V_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Return X Y, where Y and the product are held transposed if V_FIRST."""
    if V_FIRST:
        product = tl.dot(Y, tl.trans(X), input_precision=PRECISION)
    else:
        product = tl.dot(X, Y, input_precision=PRECISION)
    return product


@triton.jit
def _by_token(x, V_FIRST: tl.constexpr):
    """Let x [C] multiply what has a column for each token if V_FIRST, else a row."""
    return x[None, :] if V_FIRST else x[:, None]


@triton.jit
def _tile(rows, row_s, columns, column_s, V_FIRST: tl.constexpr):
    """Return the offsets of a matrix, transposed if V_FIRST."""
    if V_FIRST:
        at = columns[:, None] * column_s + rows[None, :] * row_s
    else:
        at = rows[:, None] * row_s + columns[None, :] * column_s
    return at


@triton.jit
def _updates(
    S, kt, v, inverse, factors, i, left, o_v, v_t: tl.constexpr, v_v: tl.constexpr,
    HV: tl.constexpr, HAS_V: tl.constexpr, V_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the updates u of chunk ``i``, whose first row ``v`` points to."""
    r = tl.arange(0, CHUNK)
    # blocks above the diagonal were never written
    below = r[:, None] // 16 >= r[None, :] // 16
    at = inverse + i.to(tl.int64) * (HV * CHUNK * CHUNK) + r[:, None] * CHUNK + r[None, :]
    solve = tl.load(at, mask=below, other=0.0)
    read = tl.load(factors + i.to(tl.int64) * (HV * 4 * CHUNK) + CHUNK + r)
    wanted = _left(kt, rounded(S, kt.dtype), V_FIRST, PRECISION) * _by_token(read, V_FIRST)
    if HAS_V:
        at = v + r[:, None] * v_t + o_v[None, :] * v_v
        vt = tl.load(at, mask=(r < left)[:, None], other=0.0)
        if V_FIRST:
            # v^T would have to move between threads to be added, but not to be multiplied
            solve = tl.trans(solve)
            u = tl.dot(tl.trans(vt), solve, input_precision=PRECISION)
            u = tl.dot(rounded(wanted, kt.dtype), solve, u, input_precision=PRECISION)
        else:
            wanted += vt.to(tl.float32)
            u = tl.dot(solve, rounded(wanted, kt.dtype), input_precision=PRECISION)
    else:
        u = _left(solve, rounded(wanted, kt.dtype), V_FIRST, PRECISION)
    return u


@triton.jit
def _after(S, kt, u, factor, total, V_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Return the state that decayed by 2^total and got the updates u with ``factor`` k."""
    written = u * _by_token(factor, V_FIRST)
    if kt.dtype == tl.float16:
        # of a short key it may be more: a zero key's norm is 1e-3, and infinity times 0 is NaN
        written = tl.minimum(tl.maximum(written, -65504.0), 65504.0)
    written = rounded(written, kt.dtype)
    S = S * tl.exp2(total)
    if V_FIRST:
        S = tl.dot(written, kt, S, input_precision=PRECISION)
    else:
        S = tl.dot(tl.trans(kt), written, S, input_precision=PRECISION)
    return S


@triton.jit
def _run(
    S, k, v, inverse, factors, i, chunks, left, o_v, k_t: tl.constexpr, k_k: tl.constexpr,
    v_t: tl.constexpr, v_v: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    HAS_V: tl.constexpr, V_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the state after ``chunks`` from the ``i``-th, at ``k`` and ``v``; no outputs."""
    r = tl.arange(0, CHUNK)
    o_k = tl.arange(0, K)
    for _ in range(chunks):
        at = k + r[:, None] * k_t + o_k[None, :] * k_k
        kt = tl.load(at, mask=(r < left)[:, None], other=0.0)
        weights = factors + i.to(tl.int64) * (HV * 4 * CHUNK)
        write = tl.load(weights + 3 * CHUNK + r)
        total = tl.load(weights + CHUNK - 1)
        u = _updates(
            S, kt, v, inverse, factors, i, left, o_v, v_t, v_v, HV, HAS_V, V_FIRST, PRECISION
        )
        S = _after(S, kt, u, write, total, V_FIRST, PRECISION)
        i += 1
        left -= CHUNK
        k += CHUNK * k_t
        v += CHUNK * v_t
    return S


@triton.jit
def _chunks_to_warm_up(factors, bounds, i, LIMIT, HV: tl.constexpr):
    """Find how many chunks before the ``i``-th leave nothing of what was before them.

    Unit keys leave what decay leaves; others at most what ``bounds`` say.

    Returns:
        Their number, and whether LIMIT of them leave something: then a map is needed.
    """
    total = 0.0
    chunks = 0
    while (chunks < LIMIT) & (total > DROPPED):
        before = chunks
        for j in tl.static_range(AT_ONCE):
            inside = before + j < LIMIT
            at = (i - before - j - 1).to(tl.int64) * HV
            if bounds is None:
                left = tl.load(factors + at * (4 * CHUNK) + CHUNK - 1, mask=inside, other=0.0)
            else:
                left = tl.load(bounds + at, mask=inside, other=0.0)
            goes_on = inside & (total > DROPPED)
            total += tl.where(goes_on, left, 0.0)
            chunks += goes_on.to(tl.int32)
    return chunks, total > DROPPED


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _bridge(
    k, v, state, inverse, factors, bounds, initial, add, multiply_high, multiply_low,
    cu_seqlens, state_indices, has_initial_state, N, T, segment_tokens, warm_up_limit,
    state_s, state_h, state_v, state_k, cu_s, state_indices_s, has_initial_s,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    v_t: tl.constexpr, v_h: tl.constexpr, v_v: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BK: tl.constexpr, PAD: tl.constexpr, V_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Keep initial states [., HV, V, K]; where a head remembers, N likewise and M [., HV, K, K].

    Segment 0 of a sequence sets its slot's state aside: the last segment may write the slot before
    the first has read it.
    """
    TILES_V: tl.constexpr = V // BV
    PROGRAMS: tl.constexpr = TILES_V + K // BK
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    i_tile = program % PROGRAMS
    head = (program // PROGRAMS) % HV
    place = program // (PROGRAMS * HV)
    sequence, start, end, first = locate(cu_seqlens, cu_s, N, T, place, segment_tokens)
    last = first + segment_tokens
    slot = tl.full([], PAD, tl.int64)
    if (sequence < N) & (last < end):
        slot = tl.load(state_indices + sequence * state_indices_s).to(tl.int64)
    if slot <= PAD:
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        return
    o_k = tl.arange(0, K)
    o_v = i_tile * BV + tl.arange(0, BV)
    at = place.to(tl.int64) * HV + head
    kept = at * (V * K) + _tile(o_k, 1, o_v, K, V_FIRST)
    S = tl.zeros([BV, K] if V_FIRST else [K, BV], tl.float32)
    if (first == start) & (i_tile < TILES_V):
        is_read = True
        if has_initial_state is not None:
            is_read = tl.load(has_initial_state + sequence * has_initial_s) != 0
        if is_read:
            own = _tile(o_k, state_k, o_v, state_v, V_FIRST) + head * state_h
            S = tl.load(state + slot * state_s + own).to(tl.float32)
        tl.store(initial + kept, S)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    inverse += head * (CHUNK * CHUNK)
    factors += head * (4 * CHUNK)
    if bounds is not None:
        bounds += head
    chunks = segment_tokens // CHUNK
    i = sequence + start // CHUNK + (first - start) // CHUNK
    _, remembers = _chunks_to_warm_up(factors, bounds, i + chunks, warm_up_limit, HV)
    warm_up, slow = 0, False
    if first != start:
        warm_up, slow = _chunks_to_warm_up(factors, bounds, i, warm_up_limit, HV)
        if slow:
            warm_up = 0
    first -= warm_up * CHUNK
    k += head_offset(head // (HV // H), k_h, H) + first.to(tl.int64) * k_t
    v += head_offset(head, v_h, HV) + first.to(tl.int64) * v_t
    i -= warm_up
    left = end - first
    if i_tile < TILES_V:
        if remembers:
            S = _run(
                S, k, v, inverse, factors, i, chunks + warm_up, left, o_v,
                k_t, k_k, v_t, v_v, HV, K, True, V_FIRST, PRECISION,
            )  # fmt: skip
            tl.store(add + kept, S)
    elif remembers & slow:
        row = (i_tile - TILES_V) * BK + tl.arange(0, BK)
        M = tl.where(_by_token(o_k, V_FIRST) == _by_token(row, not V_FIRST), 1.0, 0.0)
        M = _run(
            M, k, v, inverse, factors, i, chunks, left, row,
            k_t, k_k, v_t, v_v, HV, K, False, V_FIRST, PRECISION,
        )  # fmt: skip
        of_map = at * (K * K) + _tile(o_k, 1, row, K, V_FIRST)
        high, low = halves(M, multiply_high.dtype.element_ty)
        tl.store(multiply_high + of_map, high)
        tl.store(multiply_low + of_map, low)


@triton.jit
def _fold(
    add, multiply_high, multiply_low, factors, bounds, place, i, i_start, head, segment_tokens,
    warm_up_limit, o_v, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the state before a segment: through those since one that starts on its own."""
    chunks = segment_tokens // CHUNK
    boundary = i - chunks
    back = 1
    slow = True
    while slow & (boundary > i_start):
        _, slow = _chunks_to_warm_up(factors, bounds, boundary, warm_up_limit, HV)
        if slow:
            boundary -= chunks
            back += 1
    o_k = tl.arange(0, K)
    kept = _tile(o_k, 1, o_v, K, V_FIRST)
    at = (place - back).to(tl.int64) * HV + head
    S = tl.load(add + at * (V * K) + kept)
    # more stages would hold more maps than the scan's tiles take
    for step in tl.range(1, back, num_stages=2 if V_FIRST else 1):
        at = (place - back + step).to(tl.int64) * HV + head
        # M is kept as the sum of two and S is cut likewise: three products are exact enough
        row = at * (K * K) + o_k[:, None] + o_k[None, :] * K
        high = tl.load(multiply_high + row)
        low = tl.load(multiply_low + row)
        S_high, S_low = halves(S, high.dtype)
        S = tl.load(add + at * (V * K) + kept)
        S += _left(high, S_high, V_FIRST, PRECISION)
        S += _left(high, S_low, V_FIRST, PRECISION)
        S += _left(low, S_high, V_FIRST, PRECISION)
    return S


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _scan(
    q, k, v, state, attention, inverse, factors, decay_low, k_factor, bounds,
    initial, add, multiply_high, multiply_low, out, checkpoint_state, cu_seqlens, state_indices,
    has_initial_state, out_state_indices, checkpoint_offsets, checkpoint_indices,
    N, T, segment_tokens, warm_up_limit,
    state_s, state_h, state_v, state_k, checkpoint_s, checkpoint_h, checkpoint_v, checkpoint_k,
    cu_s, state_indices_s, has_initial_s, out_indices_s, offsets_s, indices_s,
    q_t: tl.constexpr, q_h: tl.constexpr, q_k: tl.constexpr,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    v_t: tl.constexpr, v_h: tl.constexpr, v_v: tl.constexpr,
    out_t: tl.constexpr, out_h: tl.constexpr, out_v: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SEGMENTS: tl.constexpr, CHECKPOINT_PAD: tl.constexpr, L2NORM: tl.constexpr,
    PAD: tl.constexpr, V_FIRST: tl.constexpr, Q_LAST: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Write outputs and final states; a program owns BV rows of one head of one segment."""
    program = tl.program_id(0)
    o_v = program % (V // BV) * BV + tl.arange(0, BV)
    head = (program // (V // BV)) % HV
    place = program // (V // BV * HV)
    k_head = head // (HV // H)
    sequence, start, end, first = locate(cu_seqlens, cu_s, N, T, place, segment_tokens)
    # an empty sequence has a state to move all the same
    if (first >= end) & ((first != start) | (sequence == N)):
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        return
    base = first.to(tl.int64)
    q += head_offset(k_head, q_h, H) + base * q_t
    k += head_offset(k_head, k_h, H) + base * k_t
    v += head_offset(head, v_h, HV) + base * v_t
    out += head_offset(head, out_h, HV) + base * out_t
    attention += head * (CHUNK * CHUNK)
    inverse += head * (CHUNK * CHUNK)
    factors += head * (4 * CHUNK)
    if bounds is not None:
        bounds += head
    i = sequence + start // CHUNK + (first - start) // CHUNK
    r = tl.arange(0, CHUNK)
    o_k = tl.arange(0, K)
    last = tl.minimum(first + segment_tokens, end)
    slot = tl.full([], PAD, tl.int64)
    if sequence < N:
        slot = tl.load(state_indices + sequence * state_indices_s).to(tl.int64)
    if slot <= PAD:
        zero = tl.zeros([CHUNK, BV], out.dtype.element_ty)
        for token in range(first, last, CHUNK):
            at = out + r[:, None] * out_t + o_v[None, :] * out_v
            tl.store(at, zero, mask=(r < last - token)[:, None])
            out += CHUNK * out_t
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        return

    own = _tile(o_k, state_k, o_v, state_v, V_FIRST) + head * state_h
    S = tl.zeros([BV, K] if V_FIRST else [K, BV], tl.float32)
    if first == start:
        is_read = True
        if has_initial_state is not None:
            is_read = tl.load(has_initial_state + sequence * has_initial_s) != 0
        if SEGMENTS:
            if last < end:
                is_read = False
                if OVERLAPS:
                    tl.extra.cuda.gdc_wait()
                kept = (place.to(tl.int64) * HV + head) * (V * K)
                S = tl.load(initial + kept + _tile(o_k, 1, o_v, K, V_FIRST))
        if is_read:
            S = tl.load(state + slot * state_s + own).to(tl.float32)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    if SEGMENTS and first != start:
        warm_up, slow = _chunks_to_warm_up(factors, bounds, i, warm_up_limit, HV)
        if slow:
            S = _fold(
                add, multiply_high, multiply_low, factors, bounds, place, i,
                sequence + start // CHUNK, head, segment_tokens, warm_up_limit, o_v,
                HV, K, V, V_FIRST, PRECISION,
            )  # fmt: skip
        else:
            S = _run(
                S, k - (warm_up * CHUNK).to(tl.int64) * k_t,
                v - (warm_up * CHUNK).to(tl.int64) * v_t, inverse, factors, i - warm_up, warm_up,
                end - first + warm_up * CHUNK, o_v,
                k_t, k_k, v_t, v_v, HV, K, True, V_FIRST, PRECISION,
            )  # fmt: skip

    if checkpoint_offsets is not None:
        offset = tl.load(checkpoint_offsets + sequence * offsets_s).to(tl.int32)
        kept_slot = tl.load(checkpoint_indices + sequence * indices_s).to(tl.int64)
        keep = start + offset
        if (offset < 0) | (kept_slot <= CHECKPOINT_PAD):
            keep = start - 1
        to_checkpoint = checkpoint_state + kept_slot * checkpoint_s + head * checkpoint_h
        to_checkpoint += _tile(o_k, checkpoint_k, o_v, checkpoint_v, V_FIRST)
        if (keep == start) & (first == start):
            tl.store(to_checkpoint, S.to(checkpoint_state.dtype.element_ty))

    below = r[:, None] // 16 >= r[None, :] // 16
    weights = factors + i.to(tl.int64) * (HV * 4 * CHUNK)
    reach = tl.load(weights + 2 * CHUNK + r)
    total = tl.load(weights + CHUNK - 1)
    for token in range(first, last, CHUNK):
        left = end - token
        inside = r < left
        at = k + r[:, None] * k_t + o_k[None, :] * k_k
        kt = tl.load(at, mask=inside[:, None], other=0.0)
        of_q = q + r[:, None] * q_t + o_k[None, :] * q_k
        if not Q_LAST:
            qt = tl.load(of_q, mask=inside[:, None], other=0.0)
        at = attention + i.to(tl.int64) * (HV * CHUNK * CHUNK) + r[:, None] * CHUNK + r[None, :]
        seen = tl.load(at, mask=below, other=0.0)
        write = tl.load(weights + 3 * CHUNK + r)
        if not Q_LAST:
            o = _left(qt, rounded(S, kt.dtype), V_FIRST, PRECISION) * _by_token(reach, V_FIRST)
        u = _updates(
            S, kt, v, inverse, factors, i, left, o_v, v_t, v_v, HV, True, V_FIRST, PRECISION
        )
        if Q_LAST:
            qt = tl.load(of_q, mask=inside[:, None], other=0.0)
            o = _left(qt, rounded(S, kt.dtype), V_FIRST, PRECISION) * _by_token(reach, V_FIRST)
        if V_FIRST:
            o = tl.dot(rounded(u, kt.dtype), tl.trans(seen), o, input_precision=PRECISION)
        else:
            o = tl.dot(seen, rounded(u, kt.dtype), o, input_precision=PRECISION)
        at = out + _tile(r, out_t, o_v, out_v, V_FIRST)
        tl.store(at, rounded(o, out.dtype.element_ty), mask=_by_token(inside, V_FIRST))
        if checkpoint_offsets is not None:
            if (keep > token) & (keep <= token + CHUNK) & (keep <= end):
                row = keep - token - 1
                kept_total = tl.load(weights + row)
                apart = kept_total - tl.load(weights + r)
                if decay_low is not None:
                    low = decay_low + (i.to(tl.int64) * HV + head) * CHUNK
                    apart += tl.load(low + row) - tl.load(low + r)
                part = tl.exp2(tl.minimum(apart, 0.0))
                if L2NORM:
                    part *= tl.load(k_factor + (i.to(tl.int64) * H + k_head) * CHUNK + r)
                part = tl.where(r <= row, part, 0.0)
                kept_state = _after(S, kt, u, part, kept_total, V_FIRST, PRECISION)
                tl.store(to_checkpoint, kept_state.to(checkpoint_state.dtype.element_ty))
        S = _after(S, kt, u, write, total, V_FIRST, PRECISION)
        i += 1
        # of the next chunk, long before they are used; there is always memory behind the last
        weights += HV * 4 * CHUNK
        reach = tl.load(weights + 2 * CHUNK + r)
        total = tl.load(weights + CHUNK - 1)
        q += CHUNK * q_t
        k += CHUNK * k_t
        v += CHUNK * v_t
        out += CHUNK * out_t

    if last == end:
        target = slot
        if out_state_indices is not None:
            target = tl.load(out_state_indices + sequence * out_indices_s).to(tl.int64)
        if target > PAD:
            tl.store(state + target * state_s + own, S.to(state.dtype.element_ty))


def _segment(tokens: int, sequences: int, programs: int, tile: Tile) -> int:
    """Return how many tokens a segment has, 0 where sequences need not be cut.

    Args:
        tokens: T.
        sequences: N.
        programs: of one sequence.
        tile: says how many programs fill the device.
    """
    if 4 * sequences * programs >= 3 * tile.programs:
        return 0
    chunks = ceil_div(ceil_div(tokens * programs, tile.programs), CHUNK.value)
    segment = max(chunks, SHORTEST) * CHUNK.value
    return segment if segment < tokens else 0


def _is_short(metadata: PrefillMetadata, tokens: int, segment: int) -> bool:
    """Return whether walking the longest sequence uncut takes less than making maps and segments.

    Args:
        metadata: the batch.
        tokens: T.
        segment: tokens of a segment, 0 where sequences would not be cut either.
    """
    # an H200 takes 5.2 us for each chunk of a segment, bridge included, where it takes 2.3 for one
    # of a half head
    most = min(segment * 9 // 4, LONGEST * int(CHUNK.value)) if segment else tokens
    return longest(metadata, tokens) <= most


def _pick_tile(spec: GdnSpec, device: Device) -> tuple[Tile, bool]:
    """Return the tile, its BV and warps cut to the heads, and whether the state is held V first."""
    K, V = spec.head_k_dim, spec.head_v_dim
    if spec.dtype.itemsize == 4 and K >= 128:
        tile = FLOAT32_TILES.get(device.arch)
        if tile:
            return tile._replace(BV=min(max(tile.BV * 128 // K, 16), V)), True
    if spec.dtype.itemsize == 2 and min(K, V) >= 64:
        tile = V_FIRST_TILES.get(device.arch)
        if tile and K <= 128:
            BV = min(tile.BV, V)
            return tile._replace(BV=BV, warps=tile.warps * BV // tile.BV), True
        tile = WIDE_TILES.get(device.arch)
        if tile and K > 128:
            return tile, False
        tile = ONE_PROGRAM_TILES.get(device.arch)
        if tile and K <= 128:
            return tile, False
    tile = TILES[device.arch]
    BV = min(max(tile.BV * 256 // max(K * spec.dtype.itemsize, 256), 16), V)
    # wgmma reads past the end of shared memory where a tile is narrower than 64 (Triton 3.6, seen
    # with memcheck on an H200); two warps use mma instead
    narrow = device.kind == "cuda" and min(BV, K) < 64
    return tile._replace(BV=BV, warps=2 if narrow else tile.warps), False


class Scan(NamedTuple):
    """The scan with one tile."""

    BV: int
    programs: int  # that fill the device
    plain: Launch
    keeping: Launch  # checkpoints

    def fits(self, rows: int) -> bool:
        """Return whether programs that own that many rows of states run at once."""
        return rows <= self.BV * self.programs

    @classmethod
    def make(cls, device: Device, tile: Tile, options: Mapping[str, int]) -> Scan:
        """Make it, with options beside the tile's."""
        given = {**options, "num_warps": tile.warps}
        plain = Launch(_scan, device, **given, num_stages=tile.stages)
        # beside what a checkpoint passes through there is room for two stages
        keeping = Launch(_scan, device, **given, num_stages=min(tile.stages, 2))
        return cls(tile.BV, tile.programs, plain, keeping)


def make_chunk_prefill(spec: GdnSpec, device: Device, *, deterministic: bool) -> ChunkPrefill:
    """Return the op; ``deterministic`` never cuts sequences, as where depends on the batch."""
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    L2NORM, PAD, C = spec.qk_l2norm, spec.pad_slot, CHUNK.value
    LOW = spec.dtype is not torch.float32
    tile, V_FIRST = _pick_tile(spec, device)
    BV, BK = tile.BV, min(tile.BV, K)
    # of q and k in attend
    COLUMNS = PART = min(K, 128)
    if device.kind == "cuda" and not LOW:
        # more would spill
        COLUMNS, PART = K, min(K, 32)
    alone = {"num_stages": 1, **tile.options}
    launch_attend = Launch(attend, device, **alone, num_warps=min(tile.warps, 4))
    launch_invert = Launch(invert, device, **alone, num_warps=1)
    options = {**tile.options}
    if device.kind == "rocm" and LOW and K <= 128 and not V_FIRST:
        options |= TWO_PROGRAMS
    launch_bridge = Launch(_bridge, device, **options, num_warps=tile.warps, num_stages=tile.stages)
    whole = Scan.make(device, tile, options)
    half, half_tile = None, HALF_TILES.get(device.arch)
    # rows of a state have the same bits whoever owns them
    if V_FIRST and half_tile is not None and half_tile.BV < BV:
        half = Scan.make(device, half_tile, {})
    # while updates are computed, queries of wide float32 heads would take registers that spill then
    Q_LAST = device.kind == "rocm" and not LOW and K > 128
    PRECISION = "ieee" if device.kind == "rocm" or LOW else "tf32x3"
    q_scale = spec.q_scale
    # the maps of wider heads do not fit into shared memory
    never_cut = deterministic or K * spec.dtype.itemsize > WIDEST_MAP

    def chunk_prefill(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        *,
        metadata: PrefillMetadata,
        checkpoint_state: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(v)
        T, N = v.shape[0], metadata.cu_seqlens.shape[0] - 1
        if out is None:
            out = empty_like(v)
        if T == 0 and N == 0:
            return out

        own, where = v.dtype, v.device

        def scratch(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # with more than one axis torch takes half as long again
            return torch.empty(count, dtype=dtype, device=where)

        places = num_programs(T, N, C)
        attention = scratch(places * (HV * C * C), own)
        inverse = scratch(places * (HV * C * C), own)
        factors = scratch(places * (HV * 4 * C))
        decay_low = None if LOW else scratch(places * (HV * C))
        # of normalised keys float16 holds more than bfloat16
        alike = torch.float16 if LOW and L2NORM else torch.float32
        keys = scratch(places * (H * C * C), alike)
        k_factor = scratch(places * (H * C)) if L2NORM else None
        cu_seqlens, slots = metadata.cu_seqlens, metadata.state_indices
        fresh, targets = metadata.has_initial_state, metadata.out_state_indices
        offsets, rows = metadata.checkpoint_offsets, metadata.checkpoint_indices
        kept, kept_pad = (state, PAD) if checkpoint_state is None else (checkpoint_state, -1)
        q_s, k_s, v_s = q.stride(), k.stride(), v.stride()
        beta_s, state_s = beta.stride(), state.stride()
        cu_s, slots_s, fresh_s = cu_seqlens.stride(0), slots.stride(0), strides(fresh, 1)
        scan, segment = whole, 0 if never_cut else _segment(T, N, HV * (V // BV), tile)
        if half and half.fits(N * HV * V) and _is_short(metadata, T, segment):
            scan, segment = half, 0
        bounds = scratch(places * HV) if segment and not L2NORM else None
        launch_attend(
            places * H,
            (q, k, g, beta, attention, keys, factors, decay_low, k_factor, bounds, cu_seqlens,
             slots),
            (N, T),
            (q_scale, *g.stride(), *beta_s, cu_s, slots_s, *q_s, *k_s, H, HV, K,
             COLUMNS, PART, L2NORM, PAD, PRECISION),
        )  # fmt: skip
        launch_invert(
            places * HV,
            (beta, keys, inverse, factors, decay_low, cu_seqlens, slots),
            (N, T),
            (*beta_s, cu_s, slots_s, H, HV, PAD, LOW, PRECISION),
        )
        initial = add = high = low = None
        pieces, warm_up = N + 1, 0
        if segment:
            pieces, warm_up = num_programs(T, N, segment), max(segment // C // 2, 2)
            initial = scratch(pieces * (HV * V * K))
            add = scratch(pieces * (HV * V * K))
            high = scratch(pieces * (HV * K * K), own)
            low = scratch(pieces * (HV * K * K), own)
            launch_bridge(
                pieces * HV * (V // BV + K // BK),
                (k, v, state, inverse, factors, bounds, initial, add, high, low, cu_seqlens, slots,
                 fresh),
                (N, T, segment, warm_up),
                (*state_s, cu_s, slots_s, *fresh_s, *k_s, *v_s, H, HV, K, V, BV, BK, PAD, V_FIRST,
                 PRECISION),
            )  # fmt: skip
        launch = scan.plain if offsets is None else scan.keeping
        launch(
            pieces * HV * (V // scan.BV),
            (q, k, v, state, attention, inverse, factors, decay_low, k_factor, bounds, initial,
             add, high, low, out, kept, cu_seqlens, slots, fresh, targets, offsets, rows),
            (N, T, segment or T + C, warm_up),
            (*state_s, *kept.stride(), cu_s, slots_s, *fresh_s, *strides(targets, 1),
             *strides(offsets, 1), *strides(rows, 1), *q_s, *k_s, *v_s, *out.stride(), H, HV, K, V,
             scan.BV, bool(segment), kept_pad, L2NORM, PAD, V_FIRST, Q_LAST, PRECISION),
        )  # fmt: skip
        return out

    return chunk_prefill
