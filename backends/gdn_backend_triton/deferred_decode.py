# SPDX-License-Identifier: Apache-2.0
"""One token per sequence where states are written every few tokens alone.

Between two writes a state is the one in the pool and the updates u_j k_j^T that are kept since
then. With G the sum of their g, and G_j of those behind update j::

    S   = exp(G) S_pool + sum_j exp(G_j) u_j k_j^T
    S k = exp(G) (S_pool k) + sum_j exp(G_j) (k_j . k) u_j        and S q likewise

so that a token reads its state, and writes what it adds to those that are kept. The first kernel
finds what the rows of a head's state share, its factors, and keeps k and g; the second one reads
the state and keeps u, or carries all out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.decode_tiles import DEFERRED_TILES, DOT_TILES, only_choice_of
from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS, power_of_two
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import add_pairs, add_triples, gates, rounded, upper_half
from gdn_backend_triton.overlap import begin
from gdn_portable.metadata import DeferredUpdates
from gdn_portable.spec import Device, GdnSpec

# a head's factors: of v and of S k in u; of S q and of u in o; of S in the new state; then of every
# kept u those in u, in o, and in the new state
SINGLE = tl.constexpr(8)
FACTORS = 3
SOME = 4  # updates that are carried out at a time: their loads do not wait for each other
PART = 32  # columns of a state that are carried out at a time by tensor cores
LEAST = tl.constexpr(16)  # that a product of matrices sums over


@triton.jit
def _kept_updates(
    state_indices, out_state_indices, num_deferred, flush, source_t, target_t, count_t, flush_t, t,
    ROOM: tl.constexpr,
):  # fmt: skip
    """Return the slots read and written, how many updates are kept, and whether to carry out."""
    source = tl.load(state_indices + t * source_t).to(tl.int64)
    target = source
    count = t.to(tl.int32) * 0
    if num_deferred is not None:
        count = tl.load(num_deferred + t * count_t).to(tl.int32)
        count = tl.minimum(tl.maximum(count, 0), ROOM)
    carries_out = count == ROOM
    if flush is not None:
        carries_out |= tl.load(flush + t * flush_t) != 0
    if out_state_indices is not None:
        target = tl.load(out_state_indices + t * target_t).to(tl.int64)
        carries_out = count >= 0
    return source, target, count, carries_out


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _find_factors(
    q, k, a, b, A_log, dt_bias, kept_k, kept_g, state_indices, out_state_indices, num_deferred,
    flush, factors, q_t, q_h, q_k, k_t, k_h, k_k, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h, kept_k_s,
    kept_k_r, kept_k_h, kept_k_k, kept_g_s, kept_g_r, kept_g_h, source_t, target_t, count_t,
    flush_t, K_START: tl.constexpr, H: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr,
    ROOM: tl.constexpr, BR: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, LATE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    # a program has a key head and the value heads that share it
    if not LATE:
        begin(OVERLAPS)
    elif OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) % H
    t = (tl.program_id(0) // H).to(tl.int64)
    r = tl.arange(0, BR)
    o_k = tl.arange(0, K)
    source, _, count, carries_out = _kept_updates(
        state_indices, out_state_indices, num_deferred, flush, source_t, target_t, count_t,
        flush_t, t, ROOM,
    )  # fmt: skip
    is_kept = (r < count) & (source > PAD)
    kept_k += source * kept_k_s + head * kept_k_h + o_k * kept_k_k
    kept_g += source * kept_g_s + head * RATIO * kept_g_h
    keys = tl.load(kept_k[None, :] + r[:, None] * kept_k_r, mask=is_kept[:, None], other=0.0)
    if LATE:
        if OVERLAPS:
            # q and k are the convolution's, which has waited for all before it
            tl.extra.cuda.gdc_wait()
    if source <= PAD:
        return
    key = tl.load(k + t * k_t + K_START + head * k_h + o_k * k_k)
    query = tl.load(q + t * q_t + head * q_h + o_k * q_k).to(tl.float32)
    raw, key, keys = key, key.to(tl.float32), keys.to(tl.float32)
    qq, kk, qk = tl.reduce((query * query, key * key, query * key), 0, add_triples)
    q_scale, k_scale = SCALE, 1.0
    if L2NORM:
        q_scale, k_scale = tl.rsqrt(qq + 1e-6) * SCALE, tl.rsqrt(kk + 1e-6)
    by_key, by_query = tl.reduce((keys * key[None, :], keys * query[None, :]), 1, add_pairs)
    factors += (t * H + head) * (RATIO * SIZE)
    for n in tl.static_range(RATIO):
        h = head * RATIO + n
        g, beta = gates(
            tl.load(a + t * a_t + h * a_h), tl.load(b + t * b_t + h * b_h),
            tl.load(A_log + h * A_log_h), tl.load(dt_bias + h * dt_bias_h),
        )  # fmt: skip
        g_kept = tl.load(kept_g + r * kept_g_r, mask=is_kept, other=0.0)
        # sums of what comes behind, and not differences: a strong decay does not blur them
        behind = tl.sum(tl.where(r[None, :] > r[:, None], g_kept[None, :], 0.0), 1)
        left = tl.exp(behind + g)
        left_of_S = tl.exp(tl.sum(g_kept, 0) + g)
        writes = beta * k_scale
        tl.store(factors, writes)
        tl.store(factors + 1, writes * k_scale * left_of_S)
        tl.store(factors + 2, q_scale * left_of_S)
        tl.store(factors + 3, q_scale * qk)
        tl.store(factors + 4, left_of_S)
        tl.store(factors + SINGLE + r, writes * k_scale * left * by_key)
        tl.store(factors + SINGLE + BR + r, q_scale * left * by_query)
        tl.store(factors + SINGLE + 2 * BR + r, left)
        if not carries_out:
            tl.store(kept_g + count * kept_g_r, g)
        kept_g += kept_g_h
        factors += SIZE
    if not carries_out:
        tl.store(kept_k + count * kept_k_r, raw.to(kept_k.dtype.element_ty))


@triton.jit
def _carry_out(
    old, new, kept_k, kept_u, left, count, left_of_S, u, k, state_k, kept_k_r, kept_k_k, kept_u_r,
    k_k, K: tl.constexpr, BR: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store rows of a state with all that is kept and one update more, by tensor cores."""
    ROWS: tl.constexpr = max(BR, LEAST)
    r = tl.arange(0, ROWS)
    is_kept = r < count
    updates = tl.load(kept_u[:, None] + r[None, :] * kept_u_r, mask=is_kept[None, :], other=0.0)
    left = tl.load(left + r, mask=is_kept, other=0.0)
    high, rest = upper_half(updates.to(tl.float32) * left[None, :])
    middle, rest = upper_half(rest)
    low, rest = upper_half(rest)
    # rows are loaded once more: not to hold them is what lets more programs read states
    columns = tl.arange(0, PART)
    old, new = old[:, None] + columns[None, :] * state_k, new[:, None] + columns[None, :] * state_k
    kept_k += r[:, None] * kept_k_r + columns[None, :] * kept_k_k
    k += columns * k_k
    S, key = tl.load(old), tl.load(k)
    keys = tl.load(kept_k, mask=is_kept[:, None], other=0.0)
    for part in tl.range(0, K, PART, num_stages=1):
        next_part = tl.minimum(part + PART, K - PART)
        next_S, next_key = tl.load(old + next_part * state_k), tl.load(k + next_part * k_k)
        next_keys = tl.load(kept_k + next_part * kept_k_k, mask=is_kept[:, None], other=0.0)
        sums = left_of_S * S.to(tl.float32) + u[:, None] * key.to(tl.float32)[None, :]
        sums = tl.dot(high, keys, tl.dot(middle, keys, tl.dot(low, keys, sums)))
        tl.store(new + part * state_k, rounded(sums, new.dtype.element_ty))
        S, key, keys = next_S, next_key, next_keys


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _decode_deferred(
    q, k, v, state, kept_k, kept_u, state_indices, out_state_indices, num_deferred, flush, factors,
    out, q_t, q_h, q_k, k_t, k_h, k_k, v_t, v_h, v_v, state_s, kept_k_s, kept_k_r, kept_k_h,
    kept_k_k, kept_u_s, kept_u_r, kept_u_h, kept_u_v, source_t, target_t, count_t, flush_t, out_t,
    out_h, out_v, state_h: tl.constexpr, state_v: tl.constexpr, state_k: tl.constexpr,
    K_START: tl.constexpr, V_START: tl.constexpr, HV: tl.constexpr, RATIO: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    ROOM: tl.constexpr, BR: tl.constexpr, SIZE: tl.constexpr, SOME: tl.constexpr,
    PART: tl.constexpr, DOTS: tl.constexpr, PAD: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    # programs and panels are those of the kernel in ``decode``
    SPLIT: tl.constexpr = K // BK
    PANELS: tl.constexpr = BV // BP
    program = tl.program_id(0)
    first = program % (V // BV) * BV
    h = program // (V // BV) % HV
    t = (program // (V // BV * HV)).to(tl.int64)
    rows = first + tl.arange(0, BV)
    panel_rows = first + tl.arange(0, BP)
    columns = tl.arange(0, SPLIT)[:, None] * BK + tl.arange(0, BK)[None, :]
    out += t * out_t + h * out_h + rows * out_v
    source, target, count, carries_out = _kept_updates(
        state_indices, out_state_indices, num_deferred, flush, source_t, target_t, count_t,
        flush_t, t, ROOM,
    )  # fmt: skip
    if source <= PAD:
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        tl.store(out, tl.zeros([BV], out.dtype.element_ty))
        return
    i = tl.arange(0, SPLIT * BP)[:, None]
    tile = (i // BP * BK + tl.arange(0, BK)[None, :]) * state_k + (first + i % BP) * state_v
    tile += h * state_h
    old = state + source * state_s + tile
    new = state + target * state_s + tile
    S = tl.load(old)
    r = tl.arange(0, BR)
    is_kept = (r < count)[:, None]
    kept_u += source * kept_u_s + h * kept_u_h + panel_rows * kept_u_v
    updates_at = kept_u[None, :] + r[:, None] * kept_u_r
    updates = tl.load(updates_at, mask=is_kept, other=0.0)
    if OVERLAPS:
        # states and updates are of the step before, which has ended; nothing is stored before this
        tl.extra.cuda.gdc_wait()
    q += t * q_t + h // RATIO * q_h
    k += t * k_t + K_START + h // RATIO * k_h
    kept_k += source * kept_k_s + h // RATIO * kept_k_h
    if DOTS:
        both = tl.join(tl.load(k + tl.arange(0, K) * k_k), tl.load(q + tl.arange(0, K) * q_k))
    else:
        query = tl.load(q + columns * q_k).to(tl.float32)[:, None, :]
        key = tl.load(k + columns * k_k).to(tl.float32)[:, None, :]
    v += t * v_t + V_START + h * v_h + panel_rows * v_v
    value = tl.load(v)
    factors += (t * HV + h) * SIZE
    u_by_v, u_by_S = tl.load(factors), tl.load(factors + 1)
    o_by_S, o_by_u = tl.load(factors + 2), tl.load(factors + 3)
    left_of_S = tl.load(factors + 4)
    u_by_kept = tl.broadcast_to(tl.load(factors + SINGLE + r)[:, None], [BR, BP])
    o_by_kept = tl.broadcast_to(tl.load(factors + SINGLE + BR + r)[:, None], [BR, BP])
    y = tl.zeros([BP, PANELS], tl.float32)
    for panel in tl.static_range(PANELS):
        if panel + 1 < PANELS:
            next_S = tl.load(old + (panel + 1) * BP * state_v)
            next_value = tl.load(v + (panel + 1) * BP * v_v)
            next_at = updates_at + (panel + 1) * BP * kept_u_v
            next_updates = tl.load(next_at, mask=is_kept, other=0.0)
        if DOTS:
            seen, read = tl.split(tl.dot(S, both))
        else:
            S = tl.reshape(S.to(tl.float32), [SPLIT, BP, BK])
            seen, read = tl.reduce(tl.reduce((S * key, S * query), 0, add_pairs), 1, add_pairs)
        updates = updates.to(tl.float32)
        # products are rounded before they are added: fused with the first sum of two threads, each
        # thread would round the other's product and not its own
        shares = tl.fma(updates, u_by_kept, 0.0), tl.fma(updates, o_by_kept, 0.0)
        kept_in_u, kept_in_o = tl.reduce(shares, 0, add_pairs)
        u = u_by_v * value.to(tl.float32) - u_by_S * seen - kept_in_u
        o = o_by_S * read + kept_in_o + o_by_u * u
        y = tl.where(tl.arange(0, PANELS)[None, :] == panel, o[:, None], y)
        if carries_out:
            if target > PAD:
                u_j = kept_u + panel * BP * kept_u_v
                left = factors + SINGLE + 2 * BR
                if DOTS:
                    down = h * state_h + (panel * BP + panel_rows) * state_v
                    _carry_out(
                        state + source * state_s + down, state + target * state_s + down, kept_k,
                        u_j, left, count, left_of_S, u, k, state_k, kept_k_r, kept_k_k, kept_u_r,
                        k_k, K, BR, PART,
                    )  # fmt: skip
                else:
                    changed = left_of_S * S
                    k_j = kept_k + columns * kept_k_k
                    for first_of_some in range(0, count, SOME):
                        for n in tl.static_range(SOME):
                            j = first_of_some + n
                            is_there = j < count
                            u_kept = tl.load(u_j + j * kept_u_r, mask=is_there, other=0.0)
                            u_kept = u_kept.to(tl.float32)
                            u_kept *= tl.load(left + j, mask=is_there, other=0.0)
                            key_kept = tl.load(k_j + j * kept_k_r, mask=is_there, other=0.0)
                            changed += u_kept[None, :, None] * key_kept.to(tl.float32)[:, None, :]
                    changed = tl.reshape(changed + u[None, :, None] * key, [SPLIT * BP, BK])
                    to = new + panel * BP * state_v
                    tl.store(to, rounded(changed, state.dtype.element_ty))
        else:
            to = kept_u + count * kept_u_r + panel * BP * kept_u_v
            tl.store(to, rounded(u, kept_u.dtype.element_ty))
        if panel + 1 < PANELS:
            S, value, updates = next_S, next_value, next_updates
    tl.store(out, tl.reshape(tl.trans(y), [BV]).to(out.dtype.element_ty))


def make_deferred(
    spec: GdnSpec, device: Device, *, starts: tuple[int, int] | None
) -> Callable[..., None]:
    """Return what launches the kernels.

    Args:
        spec: the layer.
        device: where.
        starts: first columns of k and v in what the convolution in front writes; None without one.
    """
    dots = device.kind == "cuda" and spec.dtype is spec.state_dtype is torch.bfloat16
    BV, BP, BK, num_warps = only_choice_of(DOT_TILES if dots else DEFERRED_TILES, spec, device)
    find_factors = Launch(_find_factors, device, num_warps=1)
    decode = Launch(_decode_deferred, device, num_warps=num_warps)
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    k_start, v_start = starts or (0, 0)
    rules = (spec.q_scale, spec.qk_l2norm, starts is not None)

    def launch(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
        state: Tensor, deferred: DeferredUpdates, source: Tensor, target: Tensor | None,
        count: Tensor | None, flush: Tensor | None, out: Tensor, qkv_strides: tuple[int, ...],
    ) -> None:  # fmt: skip
        B, room = out.shape[0], deferred.k.shape[1]
        BR = power_of_two(room)
        size = SINGLE.value + FACTORS * BR
        factors = torch.empty(B * HV * size, dtype=torch.float32, device=out.device)
        indices = source, target, count, flush
        batch = [0 if x is None else x.stride(0) for x in indices]
        kept_k, kept_u, kept_g = (x.stride() for x in (deferred.k, deferred.u, deferred.g))
        find_factors(
            B * H,
            (q, k, a, b, A_log, dt_bias, deferred.k, deferred.g, *indices, factors),
            (),
            (*qkv_strides[:6], *a.stride(), *b.stride(), *A_log.stride(), *dt_bias.stride(),
             *kept_k, *kept_g, *batch, k_start, H, HV // H, K, room, BR, size, spec.pad_slot,
             *rules),
        )  # fmt: skip
        state_s, *state_strides = state.stride()
        decode(
            B * HV * (V // BV),
            (q, k, v, state, deferred.k, deferred.u, *indices, factors, out),
            (),
            (*qkv_strides, state_s, *kept_k, *kept_u, *batch, *out.stride(), *state_strides,
             k_start, v_start, HV, HV // H, K, V, BV, BP, BK, room, BR, size, min(SOME, BR),
             min(PART, K), dots, spec.pad_slot),
        )  # fmt: skip

    return launch
