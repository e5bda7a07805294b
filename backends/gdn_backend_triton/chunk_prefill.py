# SPDX-License-Identifier: Apache-2.0
"""Chunk prefill: what needs no state for all chunks at once, then a scan along every sequence.

1. ``attend`` and ``invert`` fill what every chunk needs that depends on no state.
2. Where sequences are too few to fill the device they are cut into segments that run side by side.
   ``_bridge`` gives every segment what it needs to start: where a head has decayed to below
   float32's rounding since some chunk, nothing, the segment warms up from there; else the map
   S -> S M + N of the segments before it.
3. ``_scan`` runs every sequence, or segment, with the state in registers and writes the outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.chunk_prepare import CHUNK, attend, invert
from gdn_backend_triton.launch import (
    FP_FUSION,
    STEP_SIZES,
    STEP_TENSORS,
    ceil_div,
    refuse_gradients,
)
from gdn_backend_triton.sequences import locate, num_programs
from gdn_backend_triton.taps import strides
from gdn_portable.interface import ChunkPrefill
from gdn_portable.metadata import PrefillMetadata
from gdn_portable.spec import Device, GdnSpec

# log2 of what a state may still weigh where it is dropped: below half a unit of float32
DROPPED = tl.constexpr(-32.0)


class Tile(NamedTuple):
    """How the scan is cut; ``programs`` is how many fill the device."""

    BV: int
    warps: int
    stages: int
    programs: int


TILES = {
    "sm90": Tile(BV=64, warps=4, stages=1, programs=264),
    "sm100": Tile(BV=64, warps=4, stages=1, programs=296),
    "sm103": Tile(BV=64, warps=4, stages=1, programs=296),
    "sm120": Tile(BV=32, warps=4, stages=1, programs=340),
    "gfx942": Tile(BV=32, warps=4, stages=1, programs=608),
    "gfx950": Tile(BV=32, warps=4, stages=1, programs=512),
}
SHORTEST = 4  # chunks of a segment
WIDEST_MAP = 256  # bytes of a row


@triton.jit
def _updates(
    S, kt, v, inverse, read, token, left, o_v, v_t: tl.constexpr, v_v: tl.constexpr,
    HV: tl.constexpr, HAS_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the updates u [C, BV] of the chunk at ``token``."""
    r = tl.arange(0, CHUNK)
    inside = r < left
    base = token.to(tl.int64)
    # blocks above the diagonal were never written
    below = (r[:, None] // 16 >= r[None, :] // 16) & inside[:, None]
    at = inverse + base * (HV * CHUNK) + r[:, None] * (HV * CHUNK) + r[None, :]
    solve = tl.load(at, mask=below, other=0.0)
    factor = tl.load(read + token + r, mask=inside, other=0.0)
    wanted = -tl.dot(kt, S.to(kt.dtype), input_precision=PRECISION) * factor[:, None]
    if HAS_V:
        at = v + base * v_t + r[:, None] * v_t + o_v[None, :] * v_v
        wanted += tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.dot(solve, wanted.to(kt.dtype), input_precision=PRECISION)


@triton.jit
def _after(S, kt, u, factor, total, PRECISION: tl.constexpr):
    """Return the state that decayed by 2^total and got the updates u with ``factor`` k."""
    written = u * factor[:, None]
    if kt.dtype == tl.float16:
        # the norm of a zero key is 1e-3: its inverse would overflow, and infinity times 0 is NaN
        written = tl.minimum(tl.maximum(written, -65504.0), 65504.0)
    written = written.to(kt.dtype)
    return S * tl.exp2(total) + tl.dot(tl.trans(kt), written, input_precision=PRECISION)


@triton.jit
def _run(
    S, k, v, inverse, decay, read, write, first, chunks, end, o_v, k_t: tl.constexpr,
    k_k: tl.constexpr, v_t: tl.constexpr, v_v: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    HAS_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the state after ``chunks`` chunks from ``first``; no outputs."""
    r = tl.arange(0, CHUNK)
    o_k = tl.arange(0, K)
    for i in range(chunks):
        token = first + i * CHUNK
        left = end - token
        at = k + token.to(tl.int64) * k_t + r[:, None] * k_t + o_k[None, :] * k_k
        kt = tl.load(at, mask=(r < left)[:, None], other=0.0)
        u = _updates(S, kt, v, inverse, read, token, left, o_v, v_t, v_v, HV, HAS_V, PRECISION)
        factor = tl.load(write + token + r, mask=r < left, other=0.0)
        total = tl.load(decay + token + tl.minimum(left, CHUNK) - 1)
        S = _after(S, kt, u, factor, total, PRECISION)
    return S


@triton.jit
def _chunks_to_warm_up(decay, boundary, LIMIT, DECAYS: tl.constexpr):
    """Find how many chunks before ``boundary`` leave nothing of what was before them.

    Returns:
        Their number, and whether LIMIT of them leave something: then a map is needed.
    """
    total = 0.0
    chunks = 0
    if DECAYS:
        while (chunks < LIMIT) & (total > DROPPED):
            total += tl.load(decay + boundary - chunks * CHUNK - 1)
            chunks += 1
    return chunks, total > DROPPED


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _bridge(
    k, v, state, inverse, decay, initial, add, multiply_high, multiply_low,
    cu_seqlens, state_indices, has_initial_state, N, T, segment_tokens, warm_up_limit,
    state_s, state_h, state_v, state_k, cu_s, state_indices_s, has_initial_s,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    v_t: tl.constexpr, v_h: tl.constexpr, v_v: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BK: tl.constexpr, L2NORM: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keep initial states [., HV, V, K]; where a head remembers, N likewise and M [., HV, K, K].

    Segment 0 of a sequence sets its slot's state aside: the last segment may write the slot before
    the first has read it.
    """
    TILES_V: tl.constexpr = V // BV
    PROGRAMS: tl.constexpr = TILES_V + K // BK
    program = tl.program_id(0)
    i_tile = program % PROGRAMS
    head = (program // PROGRAMS) % HV
    place = program // (PROGRAMS * HV)
    sequence, start, end, first = locate(cu_seqlens, cu_s, N, T, place, segment_tokens)
    last = first + segment_tokens
    if (sequence == N) | (last >= end):
        return
    slot = tl.load(state_indices + sequence * state_indices_s).to(tl.int64)
    if slot <= PAD:
        return
    k += head // (HV // H) * k_h
    v += head * v_h
    inverse += head * CHUNK
    decay += head * T
    read = decay + HV * T
    write = decay + 3 * HV * T
    o_k = tl.arange(0, K)
    chunks = segment_tokens // CHUNK
    _, remembers = _chunks_to_warm_up(decay, last, warm_up_limit, L2NORM)
    warm_up, slow = 0, False
    if first != start:
        warm_up, slow = _chunks_to_warm_up(decay, first, warm_up_limit, L2NORM)
        if slow:
            warm_up = 0
    at = place.to(tl.int64) * HV + head
    if i_tile < TILES_V:
        o_v = i_tile * BV + tl.arange(0, BV)
        kept = at * (V * K) + o_k[:, None] + o_v[None, :] * K
        S = tl.zeros([K, BV], tl.float32)
        if first == start:
            is_read = True
            if has_initial_state is not None:
                is_read = tl.load(has_initial_state + sequence * has_initial_s) != 0
            if is_read:
                own = o_k[:, None] * state_k + o_v[None, :] * state_v + head * state_h
                S = tl.load(state + slot * state_s + own).to(tl.float32)
            tl.store(initial + kept, S)
        if remembers:
            S = _run(
                S, k, v, inverse, decay, read, write, first - warm_up * CHUNK, chunks + warm_up,
                end, o_v, k_t, k_k, v_t, v_v, HV, K, True, PRECISION,
            )  # fmt: skip
            tl.store(add + kept, S)
    elif remembers & slow:
        row = (i_tile - TILES_V) * BK + tl.arange(0, BK)
        S = tl.where(o_k[:, None] == row[None, :], 1.0, 0.0)
        S = _run(
            S, k, v, inverse, decay, read, write, first, chunks, end, row,
            k_t, k_k, v_t, v_v, HV, K, False, PRECISION,
        )  # fmt: skip
        kept = at * (K * K) + o_k[:, None] + row[None, :] * K
        high = S.to(multiply_high.dtype.element_ty)
        low = S - high.to(tl.float32)
        tl.store(multiply_high + kept, high)
        tl.store(multiply_low + kept, low.to(multiply_low.dtype.element_ty))


@triton.jit
def _fold(
    add, multiply_high, multiply_low, decay, place, first, start, head, segment_tokens,
    warm_up_limit, o_v, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L2NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the state [K, BV] before a segment: through those since one that starts on its own."""
    boundary = first - segment_tokens
    back = 1
    slow = True
    while slow & (boundary > start):
        _, slow = _chunks_to_warm_up(decay, boundary, warm_up_limit, L2NORM)
        if slow:
            boundary -= segment_tokens
            back += 1
    o_k = tl.arange(0, K)
    kept = o_k[:, None] + o_v[None, :] * K
    at = (place - back).to(tl.int64) * HV + head
    S = tl.load(add + at * (V * K) + kept)
    # more stages would hold more maps than fit beside the scan's tiles
    for i in tl.range(1, back, num_stages=1):
        at = (place - back + i).to(tl.int64) * HV + head
        # M is kept as the sum of two and S is cut likewise: three products are exact enough
        row = at * (K * K) + o_k[:, None] + o_k[None, :] * K
        high = tl.load(multiply_high + row)
        low = tl.load(multiply_low + row)
        S_high = S.to(high.dtype)
        S_low = (S - S_high.to(tl.float32)).to(high.dtype)
        S = tl.load(add + at * (V * K) + kept)
        S = tl.dot(high, S_high, S, input_precision=PRECISION)
        S = tl.dot(high, S_low, S, input_precision=PRECISION)
        S = tl.dot(low, S_high, S, input_precision=PRECISION)
    return S


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _scan(
    q, k, v, state, attention, inverse, decay, decay_low, k_factor,
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
    PAD: tl.constexpr, PRECISION: tl.constexpr,
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
        return
    q += k_head * q_h
    k += k_head * k_h
    v += head * v_h
    out += head * out_h
    attention += head * CHUNK
    inverse += head * CHUNK
    decay += head * T
    read = decay + HV * T
    reach = decay + 2 * HV * T
    write = decay + 3 * HV * T
    r = tl.arange(0, CHUNK)
    o_k = tl.arange(0, K)
    last = tl.minimum(first + segment_tokens, end)
    slot = tl.full([], PAD, tl.int64)
    if sequence < N:
        slot = tl.load(state_indices + sequence * state_indices_s).to(tl.int64)
    if slot <= PAD:
        zero = tl.zeros([CHUNK, BV], out.dtype.element_ty)
        for token in range(first, last, CHUNK):
            at = out + token.to(tl.int64) * out_t + r[:, None] * out_t + o_v[None, :] * out_v
            tl.store(at, zero, mask=(r < last - token)[:, None])
        return

    own = o_k[:, None] * state_k + o_v[None, :] * state_v + head * state_h
    S = tl.zeros([K, BV], tl.float32)
    if first == start:
        is_read = True
        if has_initial_state is not None:
            is_read = tl.load(has_initial_state + sequence * has_initial_s) != 0
        if SEGMENTS:
            if last < end:
                is_read = False
                kept = (place.to(tl.int64) * HV + head) * (V * K)
                S = tl.load(initial + kept + o_k[:, None] + o_v[None, :] * K)
        if is_read:
            S = tl.load(state + slot * state_s + own).to(tl.float32)
    elif SEGMENTS:
        warm_up, slow = _chunks_to_warm_up(decay, first, warm_up_limit, L2NORM)
        if slow:
            S = _fold(
                add, multiply_high, multiply_low, decay, place, first, start, head,
                segment_tokens, warm_up_limit, o_v, HV, K, V, L2NORM, PRECISION,
            )  # fmt: skip
        else:
            S = _run(
                S, k, v, inverse, decay, read, write, first - warm_up * CHUNK, warm_up, end,
                o_v, k_t, k_k, v_t, v_v, HV, K, True, PRECISION,
            )  # fmt: skip

    if checkpoint_offsets is not None:
        offset = tl.load(checkpoint_offsets + sequence * offsets_s).to(tl.int32)
        kept_slot = tl.load(checkpoint_indices + sequence * indices_s).to(tl.int64)
        keep = start + offset
        if (offset < 0) | (kept_slot <= CHECKPOINT_PAD):
            keep = start - 1
        to_checkpoint = checkpoint_state + kept_slot * checkpoint_s + head * checkpoint_h
        to_checkpoint += o_k[:, None] * checkpoint_k + o_v[None, :] * checkpoint_v
        if (keep == start) & (first == start):
            tl.store(to_checkpoint, S.to(checkpoint_state.dtype.element_ty))

    for token in range(first, last, CHUNK):
        left = end - token
        inside = r < left
        base = token.to(tl.int64)
        at = k + base * k_t + r[:, None] * k_t + o_k[None, :] * k_k
        kt = tl.load(at, mask=inside[:, None], other=0.0)
        at = q + base * q_t + r[:, None] * q_t + o_k[None, :] * q_k
        qt = tl.load(at, mask=inside[:, None], other=0.0)
        below = (r[:, None] // 16 >= r[None, :] // 16) & inside[:, None]
        at = attention + base * (HV * CHUNK) + r[:, None] * (HV * CHUNK) + r[None, :]
        seen = tl.load(at, mask=below, other=0.0)
        reached = tl.load(reach + token + r, mask=inside, other=0.0)
        written = tl.load(write + token + r, mask=inside, other=0.0)
        total = tl.load(decay + token + tl.minimum(left, CHUNK) - 1)
        o = tl.dot(qt, S.to(kt.dtype), input_precision=PRECISION) * reached[:, None]
        u = _updates(S, kt, v, inverse, read, token, left, o_v, v_t, v_v, HV, True, PRECISION)
        o += tl.dot(seen, u.to(kt.dtype), input_precision=PRECISION)
        at = out + base * out_t + r[:, None] * out_t + o_v[None, :] * out_v
        tl.store(at, o.to(out.dtype.element_ty), mask=inside[:, None])
        if checkpoint_offsets is not None:
            if (keep > token) & (keep <= token + CHUNK) & (keep <= end):
                kept_total = tl.load(decay + keep - 1)
                G = tl.load(decay + token + r, mask=inside, other=0.0)
                apart = kept_total - G
                if decay_low is not None:
                    low = decay_low + head * T
                    apart += tl.load(low + keep - 1)
                    apart -= tl.load(low + token + r, mask=inside, other=0.0)
                part = tl.exp2(tl.minimum(apart, 0.0))
                if L2NORM:
                    part *= tl.load(k_factor + k_head * T + token + r, mask=inside, other=0.0)
                part = tl.where(r < keep - token, part, 0.0)
                kept_state = _after(S, kt, u, part, kept_total, PRECISION)
                tl.store(to_checkpoint, kept_state.to(checkpoint_state.dtype.element_ty))
        S = _after(S, kt, u, written, total, PRECISION)

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


def make_chunk_prefill(spec: GdnSpec, device: Device, *, deterministic: bool) -> ChunkPrefill:
    """Return the op; ``deterministic`` never cuts sequences, as where depends on the batch."""
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    L2NORM, PAD = spec.qk_l2norm, spec.pad_slot
    tile = TILES[device.arch]
    row = K * spec.dtype.itemsize
    BV = min(max(tile.BV * 256 // max(row, 256), 16), V)
    BK = min(BV, K)
    # wgmma reads past the end of shared memory where a tile is narrower than 64 (Triton 3.6, seen
    # with memcheck on an H200); two warps use mma instead
    narrow = device.kind == "cuda" and min(BV, K) < 64
    launch_scan = {"num_warps": 2 if narrow else tile.warps, "num_stages": tile.stages}
    launch_scan["enable_fp_fusion"] = FP_FUSION
    LOW = spec.dtype is not torch.float32
    PRECISION = "ieee" if device.kind == "rocm" or LOW else "tf32x3"
    # the maps of wider heads do not fit into shared memory
    never_cut = deterministic or row > WIDEST_MAP

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
        T, N = len(v), len(metadata.cu_seqlens) - 1
        if out is None:
            out = torch.empty((T, HV, V), dtype=v.dtype, device=v.device)
        if T == 0 and N == 0:
            return out

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=v.device)

        attention = scratch(T, HV, CHUNK.value, dtype=v.dtype)
        inverse = scratch(T, HV, CHUNK.value, dtype=v.dtype)
        decay = scratch(4, HV, T)  # and what a token reads, reaches and writes with
        decay_low = None if LOW else scratch(HV, T)
        k_factor = scratch(H, T) if L2NORM else None
        cu_seqlens, slots = metadata.cu_seqlens, metadata.state_indices
        fresh, targets = metadata.has_initial_state, metadata.out_state_indices
        offsets, rows = metadata.checkpoint_offsets, metadata.checkpoint_indices
        kept, kept_pad = (state, PAD) if checkpoint_state is None else (checkpoint_state, -1)
        cu_s, slots_s = cu_seqlens.stride(0), slots.stride(0)
        places = num_programs(T, N, CHUNK.value)
        attend[(places * H,)](
            q, k, g, attention, decay, decay_low, k_factor, cu_seqlens, slots,
            N, T, spec.q_scale, *g.stride(), cu_s, slots_s, *q.stride(), *k.stride(),
            H, HV, K, min(K, 128), L2NORM, PAD, PRECISION,
            num_warps=2 if narrow else 4, num_stages=1, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        invert[(places * HV,)](
            k, beta, inverse, decay, decay_low, k_factor, cu_seqlens, slots, N, T,
            *beta.stride(), cu_s, slots_s, *k.stride(),
            H, HV, K, min(K, 128), L2NORM, PAD, LOW, PRECISION,
            num_warps=1, num_stages=1, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        segment = 0 if never_cut else _segment(T, N, HV * (V // BV), tile)
        initial = add = high = low = None
        pieces, warm_up = N + 1, 0
        if segment:
            pieces, warm_up = num_programs(T, N, segment), max(segment // CHUNK.value // 2, 2)
            initial, add = scratch(pieces, HV, V, K), scratch(pieces, HV, V, K)
            high = scratch(pieces, HV, K, K, dtype=v.dtype)
            low = scratch(pieces, HV, K, K, dtype=v.dtype)
            _bridge[(pieces * HV * (V // BV + K // BK),)](
                k, v, state, inverse, decay, initial, add, high, low,
                cu_seqlens, slots, fresh, N, T, segment, warm_up,
                *state.stride(), cu_s, slots_s, *strides(fresh, 1), *k.stride(), *v.stride(),
                H, HV, K, V, BV, BK, L2NORM, PAD, PRECISION, **launch_scan,
            )  # fmt: skip
        _scan[(pieces * HV * (V // BV),)](
            q, k, v, state, attention, inverse, decay, decay_low, k_factor,
            initial, add, high, low, out, kept, cu_seqlens, slots, fresh, targets, offsets, rows,
            N, T, segment or T + CHUNK.value, warm_up,
            *state.stride(), *kept.stride(),
            cu_s, slots_s, *strides(fresh, 1), *strides(targets, 1),
            *strides(offsets, 1), *strides(rows, 1),
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            H, HV, K, V, BV, bool(segment), kept_pad, L2NORM, PAD, PRECISION,
            **launch_scan,
        )  # fmt: skip
        return out

    return chunk_prefill
