# SPDX-License-Identifier: Apache-2.0
"""Verification that keeps the state after every draft: by snapshots, or in a slot table.

A program owns a few rows of one head's state, holds them in registers and walks the drafts. Both
sums over K of a draft are taken at once, before its update: o = exp(g) S q + delta (k . q).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.launch import (
    STEP_SIZES,
    STEP_TENSORS,
    empty_like,
    refuse_gradients,
)
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import gates, rounded
from gdn_backend_triton.overlap import begin
from gdn_backend_triton.replay import make_replay, refuse_large_trees
from gdn_backend_triton.taps import strides
from gdn_backend_triton.trees import make_fill_parents
from gdn_portable.interface import MtpVerify
from gdn_portable.metadata import (
    Drafts,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
    draft_protocol,
    given,
)
from gdn_portable.spec import Device, GdnSpec


class Tile(NamedTuple):
    """The rows of V that a program owns."""

    rows: int
    warps: int


# H200, H16/HV32, K = V = 128, P = 4, slot table, with the conv: 26 / 375 us at B = 8 / 128 with a
# float32 state, 20 / 246 with bfloat16
TILES = {"cuda": Tile(8, 1), "rocm": Tile(16, 1)}


@triton.jit
def _product(x, y):
    """Return the sum over K of x * y, the same bits in every thread.

    Products are rounded before they are added: fused with the first sum of two threads, each
    thread would round the other's product and not its own.
    """
    return tl.sum(tl.sum(tl.fma(x, y, 0.0), 1), 0)


@triton.jit
def _read(S, x, K: tl.constexpr):
    """Return S x; a row has the same bits in every thread, as ``_product`` does."""
    # sums of longer rows begin within a thread
    products = tl.fma(S, tl.broadcast_to(x, S.shape), 0.0) if K <= 64 else S * x
    return tl.sum(products, 1)


@triton.jit
def _load_draft(q, k, v, a, b, targets, t, end, q_t, k_t, v_t, a_t, b_t, targets_p, o_v, o_k):
    mask = t < end
    query = tl.load(q + t * q_t + o_k, mask=mask & (o_k >= 0), other=0.0).to(tl.float32)
    key = tl.load(k + t * k_t + o_k, mask=mask & (o_k >= 0), other=0.0).to(tl.float32)
    value = tl.load(v + t * v_t + o_v, mask=mask & (o_v >= 0), other=0.0).to(tl.float32)
    a_raw = tl.load(a + t * a_t, mask=mask, other=0.0)
    b_raw = tl.load(b + t * b_t, mask=mask, other=0.0)
    target = tl.load(targets + t * targets_p, mask=mask, other=0).to(tl.int64)
    return query, key, value, a_raw, b_raw, target


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _recurrent(
    q, k, v, a, b, A_log, dt_bias, state, state_indices, num_accepted, cu_seqlens, parents, kept,
    rows, out, B, T, COLUMNS, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h,
    state_s, state_h, state_v, state_k, indices_b, indices_p, accepted_b, cu_b,
    parents_b, parents_p, kept_r, kept_p, kept_h, kept_v, kept_k, rows_b, out_t, out_h, out_v,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    BV: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, LATE: tl.constexpr,
    K_START: tl.constexpr, V_START: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    # for q, k and v of the kernel in front, behind the state's loads
    WAITS: tl.constexpr = OVERLAPS and LATE
    if not WAITS:
        begin(OVERLAPS)
    PARTS: tl.constexpr = V // BV
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HV
    sequence = tl.program_id(0) // (PARTS * HV)
    key_head = head // (HV // H)
    in_batch = sequence < B
    o_v = part * BV + tl.arange(0, BV)
    o_k = tl.arange(0, K)[None, :]

    state_indices += sequence.to(tl.int64) * indices_b
    column = 0
    if kept is None and num_accepted is not None:
        column = tl.load(num_accepted + sequence * accepted_b, mask=in_batch, other=0)
        column = tl.minimum(tl.maximum(column.to(tl.int32) - 1, 0), COLUMNS - 1)
    slot = tl.load(state_indices + column * indices_p, mask=in_batch, other=PAD).to(tl.int64)
    start = sequence * P
    end = start + P
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence * cu_b).to(tl.int32)
        end = tl.load(cu_seqlens + (sequence + 1) * cu_b, mask=in_batch, other=T).to(tl.int32)
    row = start.to(tl.int64)
    count = end - start
    out += row * out_t + head * out_h + o_v * out_v
    if WAITS:
        if (slot <= PAD) | (count <= 0):
            # or a batch without drafts would end before the convolution does
            tl.extra.cuda.gdc_wait()
    if slot <= PAD:
        for t in range(count):
            tl.store(out + t.to(tl.int64) * out_t, tl.zeros([BV], out.dtype.element_ty))
        return

    in_state = o_v[:, None] * state_v + o_k * state_k
    if count <= 0:
        return
    state += head * state_h
    S = tl.load(state + slot * state_s + in_state).to(tl.float32)
    if kept is not None:
        kept_row = sequence.to(tl.int64)
        if rows is not None:
            kept_row = tl.load(rows + sequence * rows_b).to(tl.int64)
        kept += kept_row * kept_r + head * kept_h
        in_kept = o_v[:, None] * kept_v + o_k * kept_k
    if parents is not None:
        parents += sequence.to(tl.int64) * parents_b
    decay_rate = tl.load(A_log + head * A_log_h)
    bias = tl.load(dt_bias + head * dt_bias_h)
    a += row * a_t + head * a_h
    b += row * b_t + head * b_h
    q += row * q_t + key_head * q_h
    k += row * k_t + K_START + key_head * k_h
    v += row * v_t + V_START + head * v_h
    if WAITS:
        # q, k and v are the convolution's; nothing before was
        tl.extra.cuda.gdc_wait()
    query, key, value, a_raw, b_raw, target = _load_draft(
        q, k, v, a, b, state_indices, 0, count, q_t, k_t, v_t, a_t, b_t, indices_p, o_v, o_k
    )
    for t in range(count):
        # the loads of the next draft do not wait for this one's stores
        query_next, key_next, value_next, a_next, b_next, target_next = _load_draft(
            q, k, v, a, b, state_indices, t + 1, count, q_t, k_t, v_t, a_t, b_t, indices_p, o_v, o_k
        )
        if parents is not None:
            parent = tl.load(parents + t * parents_p, mask=t > 0, other=-1).to(tl.int32)
            parent = tl.minimum(tl.maximum(parent, 0), t - 1)
            if parent != t - 1:
                S = tl.load(kept + parent.to(tl.int64) * kept_p + in_kept).to(tl.float32)
        g, beta = gates(a_raw, b_raw, decay_rate, bias)
        decay = tl.exp(g)
        key_norm = 1.0
        query_norm = scale
        if NORM:
            key_norm = tl.rsqrt(_product(key, key) + 1e-6)
            query_norm = tl.rsqrt(_product(query, query) + 1e-6) * scale
        key *= key_norm
        query *= query_norm
        predicted = _read(S, key, K)
        prior = _read(S, query, K)
        delta = beta * (value - decay * predicted)
        o = decay * prior + delta * _product(key, query)
        S = S * decay + delta[:, None] * key
        tl.store(out + t.to(tl.int64) * out_t, o.to(out.dtype.element_ty))
        if kept is None:
            if target > PAD:
                tl.store(state + target * state_s + in_state, rounded(S, state.dtype.element_ty))
        else:
            tl.store(kept + t.to(tl.int64) * kept_p + in_kept, rounded(S, kept.dtype.element_ty))
            if parents is not None:
                tl.debug_barrier()
        query, key, value = query_next, key_next, value_next
        a_raw, b_raw, target = a_next, b_next, target_next


class Recurrence(Protocol):
    """What both the op and the step launch where states are kept."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor,
        dt_bias: Tensor, state: Tensor, *, metadata: VerifyMetadata,
        drafts: SnapshotDrafts | None, out: Tensor,
    ) -> None:  # fmt: skip
        """Launch on tensors that are there, links filled."""
        ...


def make_recurrence(spec: GdnSpec, device: Device, *, packed: bool) -> Recurrence:
    """Return what launches the kernel of snapshots and slot tables.

    Args:
        spec: the layer.
        device: where.
        packed: q, k and v are each passed as all that the convolution wrote, [T, D]; the kernel
            in front is the convolution, and may not have ended where kernels can overlap.
    """
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    D = spec.conv_dim
    starts = (H * K, 2 * H * K) if packed else (0, 0)
    rows, warps = TILES.get(device.arch, TILES[device.kind])
    rows = min(max(rows * 128 // max(K, 128), 1), V)
    kernel = Launch(_recurrent, device, num_warps=warps, num_stages=1)

    def recurrence(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
        state: Tensor, *, metadata: VerifyMetadata, drafts: SnapshotDrafts | None,
        out: Tensor,
    ) -> None:  # fmt: skip
        draft_protocol(metadata, drafts)
        P, cu, B = metadata.max_drafts, metadata.cu_seqlens, _batch(v, metadata)
        sequences = B if cu is None else B + 1
        if sequences == 0:
            return
        qkv = D, K, D, K, D, V
        if not packed:
            qkv = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
        indices, parents = metadata.state_indices, metadata.parents
        kept = None if drafts is None else given("drafts.state", drafts.state)
        kept_rows = None if kept is None else metadata.rows
        accepted = metadata.num_accepted if kept is None else None
        kernel(
            sequences * HV * (V // rows),
            (q, k, v, a, b, A_log, dt_bias, state, indices, accepted, cu, parents, kept, kept_rows,
             out),
            (B, v.shape[0], indices.shape[-1]),
            (spec.q_scale, *qkv, *a.stride(), *b.stride(), A_log.stride(0), dt_bias.stride(0),
             *state.stride(), indices.stride(0), 0 if kept is not None else indices.stride(1),
             *strides(accepted, 1), *strides(cu, 1), *strides(parents, 2), *strides(kept, 5),
             *strides(kept_rows, 1), *out.stride(), H, HV, K, V, P, rows, spec.pad_slot,
             spec.qk_l2norm, packed, *starts),
        )  # fmt: skip

    return recurrence


def make_mtp_verify(spec: GdnSpec, device: Device, *, deterministic: bool) -> MtpVerify:
    """Return the op."""
    recurrence = make_recurrence(spec, device, packed=False)
    replay = make_replay(spec, device, deterministic=deterministic)
    fill_parents = make_fill_parents(device)

    def mtp_verify(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
        state: Tensor, *, metadata: VerifyMetadata, drafts: Drafts | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        refuse_gradients(v)
        refuse_large_trees(metadata, drafts)
        fill_parents(metadata, _batch(v, metadata))
        if out is None:
            out = empty_like(v)
        inputs = q, k, v, a, b, A_log, dt_bias, state
        if isinstance(drafts, ReplayDrafts):
            draft_protocol(metadata, drafts)
            replay(*inputs, metadata=metadata, drafts=drafts, out=out)
        else:
            recurrence(*inputs, metadata=metadata, drafts=drafts, out=out)
        return out

    return mtp_verify


def _batch(v: Tensor, metadata: VerifyMetadata) -> int:
    """Return how many sequences there are."""
    cu_seqlens = metadata.cu_seqlens
    return v.shape[0] // metadata.max_drafts if cu_seqlens is None else cu_seqlens.shape[0] - 1
