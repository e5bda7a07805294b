# SPDX-License-Identifier: Apache-2.0
"""Keep the accepted drafts: one launch for both pools, and for all layers of snapshots.

A program owns some rows of one head's state, or some channels of one window. It reads nothing
that another program writes: a slot that is read is the one it writes, or written by nobody.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS, ceil_div
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.overlap import begin
from gdn_backend_triton.taps import strides
from gdn_backend_triton.trees import make_fill_parents
from gdn_portable.interface import MtpCommit
from gdn_portable.metadata import (
    Drafts,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
    commit_batch,
    draft_protocol,
    given,
)
from gdn_portable.spec import Device, GdnSpec
from gdn_portable.state import StatePool

BV = 16  # rows of V a program owns
LANES = 32  # of K that lie in a row's neighbouring threads; the rest is summed within a thread
CHANNELS = 256  # of a window


@triton.jit
def _slots(state_indices, out_state_indices, b, indices_b, out_indices_b, PAD: tl.constexpr):
    """Return the slot read and the slot written, PAD where nothing is."""
    source = tl.load(state_indices + b * indices_b).to(tl.int64)
    target = source
    if out_state_indices is not None:
        target = tl.load(out_state_indices + b * out_indices_b).to(tl.int64)
    return source, tl.where(source > PAD, target, PAD)


@triton.jit
def _copy_state(
    state, kept, head, o_v, o_k, source, target, last, state_s, state_h, state_v, state_k,
    kept_p, kept_h, kept_v, kept_k,
):  # fmt: skip
    state += head * state_h + o_v * state_v + o_k * state_k
    kept += head * kept_h + o_v * kept_v + o_k * kept_k
    if last >= 0:
        S = tl.load(kept + last * kept_p).to(state.dtype.element_ty)
    else:
        S = tl.load(state + source * state_s)
    tl.store(state + target * state_s, S)


@triton.jit
def _copy_window(
    window, kept, d, mask, source, target, last, window_s, window_d, window_l,
    kept_p, kept_d, kept_l, W: tl.constexpr,
):  # fmt: skip
    window += d * window_d
    kept += d * kept_d
    for column in tl.static_range(W - 1):
        if last >= 0:
            x = tl.load(kept + last * kept_p + column * kept_l, mask=mask)
            x = x.to(window.dtype.element_ty)
        else:
            x = tl.load(window + source * window_s + column * window_l, mask=mask)
        tl.store(window + target * window_s + column * window_l, x, mask=mask)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _commit_snapshots(
    state, window, kept, kept_window, state_indices, out_state_indices, rows, last_accepted,
    B, state_n, state_s, state_h, state_v, state_k, window_n, window_s, window_d, window_l,
    kept_n, kept_r, kept_p, kept_h, kept_v, kept_k, kept_window_n, kept_window_r, kept_window_p,
    kept_window_d, kept_window_l, indices_b, out_indices_b, rows_b, last_b,
    STATES: tl.constexpr, WINDOWS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BV: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    part = tl.program_id(0) % (STATES + WINDOWS)
    b = tl.program_id(0) // (STATES + WINDOWS) % B
    layer = (tl.program_id(0) // (STATES + WINDOWS) // B).to(tl.int64)
    source, target = _slots(state_indices, out_state_indices, b, indices_b, out_indices_b, PAD)
    last = tl.load(last_accepted + b * last_b).to(tl.int64)
    if target <= PAD or (last < 0 and target == source):
        return
    row = b.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + b * rows_b).to(tl.int64)
    if STATES > 0 and part < STATES:
        PARTS: tl.constexpr = V // BV
        o_v = part % PARTS * BV + tl.arange(0, BV)[:, None]
        _copy_state(
            state + layer * state_n, kept + layer * kept_n + row * kept_r, part // PARTS,
            o_v, tl.arange(0, K)[None, :], source, target, last,
            state_s, state_h, state_v, state_k, kept_p, kept_h, kept_v, kept_k,
        )  # fmt: skip
    if WINDOWS > 0 and part >= STATES:
        d = (part - STATES) * CHANNELS + tl.arange(0, CHANNELS)
        _copy_window(
            window + layer * window_n,
            kept_window + layer * kept_window_n + row * kept_window_r,
            d, d < D, source, target, last, window_s, window_d, window_l,
            kept_window_p, kept_window_d, kept_window_l, W,
        )  # fmt: skip


@triton.jit
def _path_to(last, parents, parents_p):
    """Return as bits which drafts lie between the root and ``last``, both included."""
    if parents is None:
        path = (tl.full([], 2, tl.int64) << last) - 1
    else:
        path = tl.full([], 0, tl.int64)
        at = last
        while at >= 0:
            path |= tl.full([], 1, tl.int64) << at
            at = _parent_of(at, parents, parents_p)
    return path


@triton.jit
def _parent_of(at, parents, parents_p):
    """Return the parent of a draft, -1 for the root and for none."""
    if parents is None:
        parent = at - 1
    else:
        parent = tl.load(parents + at * parents_p, mask=at > 0, other=0).to(tl.int32)
        parent = tl.where(at > 0, tl.minimum(tl.maximum(parent, 0), at - 1), -1)
    return parent


@triton.jit
def _replay_state(
    S, k, v, g, beta, last, path, k_p, v_p, g_p, beta_p, o_v, o_k, NORM: tl.constexpr
):  # fmt: skip
    """Return the state after the drafts on the path."""
    for t in range(last + 1):
        if (path >> t) & 1 == 1:
            key = tl.load(k + t * k_p + o_k).to(tl.float32)
            value = tl.load(v + t * v_p + o_v).to(tl.float32)
            if NORM:
                key *= tl.rsqrt(tl.sum(tl.sum(key * key, 0), 0) + 1e-6)
            S *= tl.exp(tl.load(g + t * g_p))
            predicted = tl.sum(tl.sum(S * key[:, None, :], 0), 1)
            delta = tl.load(beta + t * beta_p) * (value - predicted)
            S += delta[None, :, None] * key[:, None, :]
    return S


@triton.jit
def _replay_window(
    window, kept, parents, d, mask, source, target, last, window_s, window_d, window_l,
    kept_p, kept_d, parents_p, W: tl.constexpr,
):  # fmt: skip
    """Store the window after draft ``last``: newest first, the inputs up the path and older."""
    window += d * window_d
    kept += d * kept_d
    at = last
    older = last * 0 + W - 2
    columns = ()
    for _ in tl.static_range(W - 1):
        x = tl.load(kept + at * kept_p, mask=mask & (at >= 0), other=0.0).to(tl.float32)
        old = window + source * window_s + older * window_l
        old = tl.load(old, mask=mask & (at < 0), other=0.0).to(tl.float32)
        columns = columns + (tl.where(at < 0, old, x),)
        older = tl.where(at < 0, older - 1, older)
        at = _parent_of(at, parents, parents_p)
    # other threads may store what a thread has yet to load
    tl.debug_barrier()
    for i in tl.static_range(W - 1):
        x = columns[W - 2 - i].to(window.dtype.element_ty)
        tl.store(window + target * window_s + i * window_l, x, mask=mask)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _commit_replay(
    state, window, kept_k, kept_v, kept_g, kept_beta, kept_x, state_indices, out_state_indices,
    parents, last_accepted, state_s, state_h, state_v, state_k, window_s, window_d, window_l,
    kept_k_s, kept_k_p, kept_k_h, kept_k_k, kept_v_s, kept_v_p, kept_v_h, kept_v_v,
    kept_g_s, kept_g_p, kept_g_h, kept_beta_s, kept_beta_p, kept_beta_h, kept_x_s, kept_x_p,
    kept_x_d, indices_b, out_indices_b, parents_b, parents_p, last_b,
    STATES: tl.constexpr, WINDOWS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BV: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    part = tl.program_id(0) % (STATES + WINDOWS)
    b = tl.program_id(0) // (STATES + WINDOWS)
    source, target = _slots(state_indices, out_state_indices, b, indices_b, out_indices_b, PAD)
    last = tl.load(last_accepted + b * last_b).to(tl.int32)
    if target <= PAD or (last < 0 and target == source):
        return
    if parents is not None:
        parents += b.to(tl.int64) * parents_b
    if STATES > 0 and part < STATES:
        PARTS: tl.constexpr = V // BV
        head = part // PARTS
        o_v = part % PARTS * BV + tl.arange(0, BV)
        o_k = tl.arange(0, K // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        own = state + head * state_h + o_v[None, :, None] * state_v
        own += (o_k * state_k)[:, None, :]
        S = _replay_state(
            tl.load(own + source * state_s).to(tl.float32),
            kept_k + source * kept_k_s + head // GROUP * kept_k_h,
            kept_v + source * kept_v_s + head * kept_v_h,
            kept_g + source * kept_g_s + head * kept_g_h,
            kept_beta + source * kept_beta_s + head * kept_beta_h,
            last, _path_to(last, parents, parents_p), kept_k_p, kept_v_p, kept_g_p,
            kept_beta_p, o_v * kept_v_v, o_k * kept_k_k, NORM,
        )  # fmt: skip
        tl.store(own + target * state_s, S.to(state.dtype.element_ty))
    if WINDOWS > 0 and part >= STATES:
        d = (part - STATES) * CHANNELS + tl.arange(0, CHANNELS)
        _replay_window(
            window, kept_x + source * kept_x_s, parents, d, d < D, source, target, last,
            window_s, window_d, window_l, kept_x_p, kept_x_d, parents_p, W,
        )  # fmt: skip


def make_mtp_commit(spec: GdnSpec, device: Device, *, deterministic: bool) -> MtpCommit:
    """Return the op; every row has one tile whatever the batch."""
    HV, K, V, D, W = (
        spec.num_v_heads,
        spec.head_k_dim,
        spec.head_v_dim,
        spec.conv_dim,
        spec.conv_width,
    )
    snapshots = Launch(_commit_snapshots, device, num_warps=4)
    replay = Launch(_commit_replay, device, num_warps=1)
    fill_parents = make_fill_parents(device)
    rows_of_v = min(BV, V)
    states, windows = HV * (V // rows_of_v), ceil_div(D, CHANNELS)

    def commit_snapshots(
        pool: StatePool, drafts: SnapshotDrafts, metadata: VerifyMetadata, B: int,
        last_accepted: Tensor, targets: Tensor | None,
    ) -> None:  # fmt: skip
        state, window = pool.state, pool.conv_state
        layers = _layers(window, 4) if state is None else _layers(state, 5)
        kept_state = None if state is None else given("drafts.state", drafts.state)
        kept_window = None if window is None else given("drafts.conv_state", drafts.conv_state)
        parts = states * (state is not None), windows * (window is not None)
        snapshots(
            layers * B * sum(parts),
            (state, window, kept_state, kept_window, metadata.state_indices, targets,
             metadata.rows, last_accepted),
            (B,),
            (*_layered(state, 5), *_layered(window, 4), *_layered(kept_state, 6),
             *_layered(kept_window, 5), metadata.state_indices.stride(0), *strides(targets, 1),
             *strides(metadata.rows, 1), last_accepted.stride(0), *parts, K, V, D, W, rows_of_v,
             CHANNELS, spec.pad_slot),
        )  # fmt: skip

    def commit_replay(
        pool: StatePool, drafts: ReplayDrafts, metadata: VerifyMetadata, B: int,
        last_accepted: Tensor, targets: Tensor | None,
    ) -> None:  # fmt: skip
        state, window = pool.state, pool.conv_state
        fill_parents(metadata, B)
        parts = states * (state is not None), windows * (window is not None)
        replay(
            B * sum(parts),
            (state, window, drafts.k, drafts.v, drafts.g, drafts.beta, drafts.conv_inputs,
             metadata.state_indices, targets, metadata.parents, last_accepted),
            (),
            (*strides(state, 4), *strides(window, 3), *drafts.k.stride(), *drafts.v.stride(),
             *drafts.g.stride(), *drafts.beta.stride(), *drafts.conv_inputs.stride(),
             metadata.state_indices.stride(0), *strides(targets, 1),
             *strides(metadata.parents, 2), last_accepted.stride(0), *parts,
             HV // spec.num_k_heads, K, V, D, W, rows_of_v, min(LANES, K), CHANNELS,
             spec.pad_slot, spec.qk_l2norm),
        )  # fmt: skip

    def mtp_commit(
        pool: StatePool,
        drafts: Drafts,
        *,
        metadata: VerifyMetadata,
        last_accepted: Tensor,
        out_state_indices: Tensor | None = None,
    ) -> None:
        draft_protocol(metadata, drafts)
        B = commit_batch(metadata, last_accepted)
        if B == 0 or (pool.state is None and pool.conv_state is None):
            return
        if isinstance(drafts, ReplayDrafts):
            commit_replay(pool, drafts, metadata, B, last_accepted, out_state_indices)
        else:
            commit_snapshots(pool, drafts, metadata, B, last_accepted, out_state_indices)

    return mtp_commit


def _layered(pool: Tensor | None, axes: int) -> tuple[int, ...]:
    """Return the strides of a pool with a layer axis in front, 0 of one that it has not."""
    own = strides(pool, axes)
    return own if len(own) == axes else (0, *own)


def _layers(pool: Tensor | None, axes: int) -> int:
    """Return how many layers a pool holds."""
    return 1 if pool is None or pool.dim() < axes else pool.shape[0]
