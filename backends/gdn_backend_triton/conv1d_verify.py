# SPDX-License-Identifier: Apache-2.0
"""The convolution of draft tokens: chains and trees under the three protocols."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.launch import (
    STEP_SIZES,
    STEP_TENSORS,
    ceil_div,
    empty_like,
    refuse_gradients,
)
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import rounded
from gdn_backend_triton.overlap import begin
from gdn_backend_triton.taps import (
    convolve,
    load_bias,
    load_weight,
    store_window,
    strides,
    window_after,
)
from gdn_backend_triton.trees import make_fill_parents
from gdn_portable.interface import Conv1dVerify
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
    """What a program owns of a sequence."""

    channels: int
    warps: int


TILES = {"cuda": Tile(64, 2), "rocm": Tile(64, 1)}


@triton.jit
def _store_zeros(out, out_t, count, mask, P: tl.constexpr):
    """Store zeros at ``count`` rows, P at most."""
    for t in tl.static_range(P):
        zeros = tl.zeros(mask.shape, out.dtype.element_ty)
        tl.store(out + t * out_t, zeros, mask=mask & (t < count))


@triton.jit
def window_before(
    window, state_l, kept, kept_p, accepted, mask, W: tl.constexpr, L: tl.constexpr,
    PROTOCOL: tl.constexpr,
):  # fmt: skip
    """Return the columns of the window in front of the drafts, in float32.

    Args:
        window: pointers to column 0 of the slot's window.
        state_l: stride of a column.
        kept: pointers to the first pending input of the slot, where the protocol is replay.
        kept_p: stride of a pending input.
        accepted: how many drafts of the step before count; None where none does.
        mask: which channels are read.
        W: width of the convolution.
        L: columns of the pool.
        PROTOCOL: of the drafts.
    """
    if PROTOCOL == "replay" and accepted is not None:
        return window_after(accepted, kept, kept_p, window, state_l, mask, True, W)
    else:
        if PROTOCOL == "slot-table" and accepted is not None:
            window += tl.minimum(tl.maximum(accepted - 1, 0), L - (W - 1)) * state_l
        columns = tl.tuple([])
        for i in tl.static_range(W - 1):
            column = tl.load(window + i * state_l, mask=mask, other=0.0)
            columns = columns + (column.to(tl.float32),)
        return columns


@triton.jit
def ancestors(history, x, x_t, parents, parents_p, length, mask, P: tl.constexpr, W: tl.constexpr):
    """Return the W inputs of each of P drafts of a tree, oldest first: number t * W + i."""
    inputs = tl.tuple([])
    for t in tl.static_range(P):
        at = tl.full([], t, tl.int32)
        newest_first = tl.tuple([])
        for _ in tl.static_range(W):
            inside = mask & (at >= 0) & (at < length)
            value = tl.load(x + at.to(tl.int64) * x_t, mask=inside, other=0.0).to(tl.float32)
            for column in tl.static_range(W - 1):
                value = tl.where(at == column + 1 - W, history[column], value)
            newest_first = newest_first + (value,)
            linked = (at > 0) & (at < length)
            parent = tl.load(parents + at * parents_p, mask=linked, other=0).to(tl.int32)
            at = tl.where(at > 0, tl.minimum(tl.maximum(parent, 0), P - 1), at - 1)
        for i in tl.static_range(W):
            inputs = inputs + (newest_first[W - 1 - i],)
    return inputs


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _conv1d_verify(
    x, weight, bias, conv_state, kept, out, cu_seqlens, state_indices, num_accepted, rows, parents,
    B, T, room, x_t, x_d, weight_d, weight_w, bias_d, state_s, state_d, state_l, kept_s, kept_p,
    kept_d, kept_l, out_t, out_d, cu_n, indices_b, accepted_b, rows_b, parents_b, parents_p,
    D: tl.constexpr, W: tl.constexpr, L: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    PAD: tl.constexpr, SILU: tl.constexpr, PROTOCOL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    BLOCKS: tl.constexpr = (D + C - 1) // C
    program = tl.program_id(0)
    sequence = program // BLOCKS
    d = (program % BLOCKS) * C + tl.arange(0, C)
    mask = d < D
    out += d * out_d
    if cu_seqlens is None:
        start = sequence * P
        length = P
    else:
        if sequence >= B:
            nobody = tl.load(cu_seqlens + B * cu_n).to(tl.int32) + (sequence - B) * P
            _store_zeros(out + nobody.to(tl.int64) * out_t, out_t, T - nobody, mask, P)
            return
        start = tl.load(cu_seqlens + sequence * cu_n).to(tl.int32)
        length = tl.minimum(tl.load(cu_seqlens + (sequence + 1) * cu_n).to(tl.int32) - start, P)
    slot = tl.load(state_indices + sequence.to(tl.int64) * indices_b).to(tl.int64)
    accepted = None
    if num_accepted is not None:
        accepted = tl.load(num_accepted + sequence * accepted_b).to(tl.int32)
        if PROTOCOL == "replay":
            accepted = tl.minimum(tl.maximum(accepted, 0), room)
    x += start.to(tl.int64) * x_t + d * x_d
    out += start.to(tl.int64) * out_t
    if parents is None:
        drafted = tl.tuple([])
        for t in tl.static_range(P):
            value = tl.load(x + t * x_t, mask=mask & (t < length), other=0.0)
            drafted = drafted + (value.to(tl.float32),)
    columns = load_weight(weight, d, mask, weight_d, weight_w, W)
    offset = load_bias(bias, d, mask, bias_d)
    if slot <= PAD:
        _store_zeros(out, out_t, length, mask, P)
        return

    window = conv_state + slot * state_s + d * state_d
    if PROTOCOL == "replay":
        kept += slot * kept_s + d * kept_d
    history = window_before(window, state_l, kept, kept_p, accepted, mask, W, L, PROTOCOL)
    STEP: tl.constexpr = 1 if parents is None else W
    if parents is None:
        inputs = history + drafted
    else:
        branch = parents + sequence.to(tl.int64) * parents_b
        inputs = ancestors(history, x, x_t, branch, parents_p, length, mask, P, W)
    # other threads may store what a thread has yet to load: out may be x
    tl.debug_barrier()

    for t in tl.static_range(P):
        y = convolve(inputs, t * STEP, columns, offset, W, SILU)
        target = out + t * out_t
        tl.store(target, rounded(y, out.dtype.element_ty), mask=mask & (t < length))
    if PROTOCOL == "replay":
        if accepted is not None:
            store_window(window, state_l, history, mask & (accepted > 0), W)
        for t in tl.static_range(P):
            raw = inputs[t * STEP + W - 1].to(kept.dtype.element_ty)
            tl.store(kept + t * kept_p, raw, mask=mask & (t < length))
    elif PROTOCOL == "snapshot":
        row = sequence.to(tl.int64)
        if rows is not None:
            row = tl.load(rows + sequence * rows_b).to(tl.int64)
        kept += row * kept_s + d * kept_d
        for t in tl.static_range(P):
            for i in tl.static_range(W - 1):
                value = inputs[t * STEP + 1 + i].to(kept.dtype.element_ty)
                tl.store(kept + t * kept_p + i * kept_l, value, mask=mask & (t < length))
    else:
        for i in tl.static_range(min(W - 2 + P, L)):
            value = inputs[i + 1].to(conv_state.dtype.element_ty)
            keeps = mask & (length > 0) & (i < W - 2 + length)
            tl.store(window + i * state_l, value, mask=keeps)


def make_conv1d_verify(spec: GdnSpec, device: Device, *, deterministic: bool) -> Conv1dVerify:
    """Return the op: a program owns some channels of a sequence and walks its drafts."""
    D, W, PAD, SILU = spec.conv_dim, spec.conv_width, spec.pad_slot, spec.activation == "silu"
    tile = TILES.get(device.arch, TILES[device.kind])
    blocks = ceil_div(D, tile.channels)
    kernel = Launch(_conv1d_verify, device, num_warps=tile.warps)
    fill_parents = make_fill_parents(device)

    def conv1d_verify(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        *,
        metadata: VerifyMetadata,
        drafts: Drafts | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(x)
        if out is None:
            out = empty_like(x)
        T, P, cu_seqlens = x.shape[0], metadata.max_drafts, metadata.cu_seqlens
        B = T // P if cu_seqlens is None else cu_seqlens.shape[0] - 1
        fill_parents(metadata, B)
        kept, kept_strides = _kept(drafts)
        # with snapshots nothing is pending in the windows
        accepted = None if isinstance(drafts, SnapshotDrafts) else metadata.num_accepted
        sequences = B if cu_seqlens is None else B + ceil_div(T, P)
        if sequences:
            slots, rows, parents = metadata.state_indices, metadata.rows, metadata.parents
            kernel(
                sequences * blocks,
                (x, weight, bias, conv_state, kept, out, cu_seqlens, slots, accepted, rows,
                 parents),
                (B, T),
                (0 if kept is None else kept.shape[1], *x.stride(), *weight.stride(),
                 *strides(bias, 1), *conv_state.stride(), *kept_strides, *out.stride(),
                 *strides(cu_seqlens, 1), slots.stride(0), *strides(accepted, 1),
                 *strides(rows, 1), *strides(parents, 2), D, W, conv_state.shape[2], P,
                 tile.channels, PAD, SILU, draft_protocol(metadata, drafts).value),
            )  # fmt: skip
        return out

    return conv1d_verify


def _kept(drafts: Drafts | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """Return where the drafts' inputs or windows are kept, and its four strides."""
    if isinstance(drafts, ReplayDrafts):
        return drafts.conv_inputs, (*drafts.conv_inputs.stride(), 0)
    kept = None if drafts is None else given("drafts.conv_state", drafts.conv_state)
    return kept, strides(kept, 4)
