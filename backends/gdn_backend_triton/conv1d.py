# SPDX-License-Identifier: Apache-2.0
"""The convolution of packed sequences and of one token each, and the front end of a prefill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from gdn_backend_triton.launch import (
    STEP_SIZES,
    STEP_TENSORS,
    ceil_div,
    empty_like,
    power_of_two,
    refuse_gradients,
)
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import correction, gates, rounded, squares_of
from gdn_backend_triton.overlap import begin
from gdn_backend_triton.sequences import locate, num_programs
from gdn_backend_triton.taps import (
    VECTOR,
    convolve,
    load_bias,
    load_columns,
    load_weight,
    store_columns,
    store_window,
    strides,
    window_after,
)
from gdn_portable.interface import Conv1dPrefill, Conv1dUpdate
from gdn_portable.metadata import GdnParams, PrefillMetadata
from gdn_portable.spec import Device, GdnSpec


class Tile(NamedTuple):
    """What a program of a packed batch owns, of as many channels as it is told."""

    elements: int  # channels times tokens
    run: int  # consecutive tokens of a thread, each loaded 1 + (W - 1) / run times
    warps: int

    def runs(self, channels: int) -> int:
        """Return how many runs of that many channels a program owns."""
        return max(self.elements // (channels * self.run), 1)


CHANNELS = 128  # of a program of conv1d_prefill
CONV_TILES = {
    # H200, D = 8192: T = 512, 2048 and 16384 take 7.2, 19.9 and 135 us, with the front end's tile
    # 8.0, 23.0 and 157
    "cuda": Tile(2048, 8, 2),
    "rocm": Tile(8192, 8, 4),
}
FRONT_END_TILES = {
    # H200, D = 8192: T = 2048 and 16384 take 21.7 and 143 us; with half as many elements 22.5 and
    # 147, with runs of 16 tokens 23.5 and 153
    "cuda": Tile(8192, 8, 4),
    "rocm": Tile(8192, 8, 4),
}


def _front_end_options(device: Device, K: int, warps: int, *, keeps: bool) -> Mapping[str, int]:
    """Return those of the launch: 128 registers on NVIDIA, so that four blocks share an SM.

    Registers are not capped where that makes them spill: of 256 channels with checkpoints, what
    Triton 3.6 then compiled for Hopper gave NaN.
    """
    if device.kind == "rocm" or keeps or K > 128:
        return {"num_warps": warps}
    return {"num_warps": warps, "maxnreg": 128}


class UpdateTile(NamedTuple):
    """What a program of a batch of single tokens owns, up to a batch size."""

    batch: int
    rows: int
    channels: int
    warps: int


UPDATE_TILES = {
    # H200, D = 8192, B = 128 and 512: 6.8 and 23 us, 7.4 and 26 with 4 rows, 7.2 and 25 with 16
    "cuda": (UpdateTile(32, 1, 128, 2), UpdateTile(64, 4, 128, 4), UpdateTile(0, 8, 128, 4)),
    "rocm": (UpdateTile(32, 1, 64, 1), UpdateTile(128, 2, 128, 2), UpdateTile(0, 4, 128, 2)),
}
# where windows and weights can be loaded as vectors: eight channels for each lane, no more and no
# fewer, or numbers would have to change lanes
VECTOR_TILES = {
    # H200, D = 8192, B = 8, 32, 128 and 512: 1.8, 2.6, 6.1 and 21.6 us with one row, 2.4, 3.0, 7.3
    # and 20.3 with two, 3.0, 3.5, 7.0 and 22.2 with four
    "cuda": (UpdateTile(256, 1, 256, 1), UpdateTile(0, 2, 256, 1)),
    "rocm": (UpdateTile(0, 1, 512, 1),),
}


@triton.jit
def _slot_of(sequence, N, state_indices, indices_n, PAD: tl.constexpr):
    """Return the slot that a sequence is read from; padding for the rows of nobody."""
    slot = tl.load(state_indices + sequence * indices_n, mask=sequence < N, other=PAD)
    return slot.to(tl.int64)


@triton.jit
def _load_rows(
    x, x_t, x_d, before, left, mask, row, channel, W: tl.constexpr, RUN: tl.constexpr,
    SAME_DTYPE: tl.constexpr,
):  # fmt: skip
    """Load the inputs of every run, and the W - 1 in front of it: row i holds input i + 1 - W.

    Args:
        x: points to the program's first token and channel.
        x_t: stride of a token.
        x_d: stride of a channel.
        before: tokens of the sequence in front of the program's first.
        left: tokens of the sequence from the program's first on.
        mask: which channels there are.
        row: [RUNS, 1] first token of every run.
        channel: [1, C].
        W: width of the convolution.
        RUN: tokens of a run.
        SAME_DTYPE: whether windows hold what x holds; else the first rows are float32.
    """
    rows = tl.tuple([])
    for i in tl.static_range(W - 1 + RUN):
        token = row + (i + 1 - W)
        inside = (token < left) & mask
        if i < W - 1:
            inside = inside & (token + before >= 0)
        values = tl.load(x + token * x_t + channel * x_d, mask=inside, other=0.0)
        if i < W - 1 and not SAME_DTYPE:
            values = values.to(tl.float32)
        rows = rows + (values,)
    return rows


@triton.jit
def _turn_window(
    rows, row, x, x_t, length, sequence, slot, d, mask, conv_state, out_state_indices,
    has_initial_state, checkpoint_offsets, checkpoint_indices, state_s, state_d, state_l,
    out_indices_n, initial_n, offsets_n, checkpoints_n, W: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Put a sequence's window in front of its first run, and store the windows that follow.

    One program does both: another could store the new window before this one reads the old.

    Returns:
        The rows, those in front of the first run filled in.
    """
    has_window = True
    if has_initial_state is not None:
        has_window = tl.load(has_initial_state + sequence * initial_n) != 0
    pool = conv_state + d * state_d
    window = pool + slot * state_s
    filled = tl.tuple([])
    for i in tl.static_range(len(rows)):
        if i < W - 1:
            # a vector: a tile of strided channels would impose its layout on the rows
            old = tl.load(window + i * state_l, mask=mask & has_window, other=0.0)
            old = tl.where(row == 0, old.to(rows[i].dtype)[None, :], rows[i])
            filled = filled + (old,)
        else:
            filled = filled + (rows[i],)
    after = window_after(length, x, x_t, window, state_l, mask, has_window, W)
    if checkpoint_offsets is not None:
        offset = tl.load(checkpoint_offsets + sequence * offsets_n).to(tl.int32)
        kept = tl.load(checkpoint_indices + sequence * checkpoints_n).to(tl.int64)
        keeps = mask & (offset >= 0) & (offset <= length) & (kept > PAD)
        midway = window_after(offset, x, x_t, window, state_l, keeps, has_window, W)
    target = slot
    if out_state_indices is not None:
        target = tl.load(out_state_indices + sequence * out_indices_n).to(tl.int64)
    # other threads may store what a thread has yet to load
    tl.debug_barrier()
    store_window(pool + target * state_s, state_l, after, mask & (target > PAD), W)
    if checkpoint_offsets is not None:
        store_window(pool + kept * state_s, state_l, midway, keeps, W)
    return filled


@triton.jit
def _store_rows(
    rows, out, out_t, out_d, left, mask, row, channel, weight, bias, scale, W: tl.constexpr,
    RUN: tl.constexpr, SILU: tl.constexpr, NORMALISE: tl.constexpr, MEASURE: tl.constexpr = False,
):  # fmt: skip
    """Convolve the runs and store what comes out times ``scale``, normalised where asked for.

    Returns:
        [RUNS, RUN] the squares of what was stored; zeros where they are not to be measured.
    """
    squares = tl.zeros([row.shape[0], RUN], tl.float32)
    for i in tl.static_range(RUN):
        y = convolve(rows, i, weight, bias, W, SILU)
        if NORMALISE:
            y *= tl.rsqrt(squares_of(y) + 1e-6)[:, None]
        y *= scale
        target = out + (row + i) * out_t + channel * out_d
        y = rounded(y, out.dtype.element_ty)
        tl.store(target, y, mask=(row + i < left) & mask)
        if MEASURE:
            squares = tl.where(tl.arange(0, RUN)[None, :] == i, squares_of(y)[:, None], squares)
    return squares


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _conv1d_prefill(
    x, weight, bias, conv_state, out, cu_seqlens, state_indices, out_state_indices,
    has_initial_state, checkpoint_offsets, checkpoint_indices, N, T, x_t, x_d, weight_d, weight_w,
    bias_d, state_s, state_d, state_l, out_t, out_d, cu_n, indices_n, out_indices_n, initial_n,
    offsets_n, checkpoints_n, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    RUNS: tl.constexpr, RUN: tl.constexpr, PAD: tl.constexpr, SILU: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    BLOCKS: tl.constexpr = (D + C - 1) // C
    program = tl.program_id(0)
    block = program % BLOCKS
    sequence, start, end, first = locate(cu_seqlens, cu_n, N, T, program // BLOCKS, RUNS * RUN)
    if (first >= end) & (first > start):
        return
    slot = _slot_of(sequence, N, state_indices, indices_n, PAD)
    row = tl.arange(0, RUNS)[:, None] * RUN
    channel = tl.arange(0, C)[None, :]
    within = block * C + channel < D
    x += block.to(tl.int64) * C * x_d
    out += first.to(tl.int64) * out_t + block.to(tl.int64) * C * out_d
    # ptxas 12.8 gets halves of registers wrong where it spills them, so windows are none on NVIDIA
    rows = _load_rows(
        x + first.to(tl.int64) * x_t, x_t, x_d, first - start, end - first, within, row, channel,
        W, RUN, not is_cuda() and x.dtype == conv_state.dtype,
    )  # fmt: skip
    d = block * C + tl.arange(0, C)
    mask = d < D
    columns = load_weight(weight, d, mask, weight_d, weight_w, W)
    offset = load_bias(bias, d, mask, bias_d)
    if slot <= PAD:
        for i in tl.static_range(RUN):
            target = out + (row + i) * out_t + channel * out_d
            zeros = tl.zeros([RUNS, C], out.dtype.element_ty)
            tl.store(target, zeros, mask=(row + i < end - first) & within)
        return
    if first == start:
        rows = _turn_window(
            rows, row, x + start.to(tl.int64) * x_t + tl.arange(0, C) * x_d, x_t, end - start,
            sequence, slot, d, mask, conv_state, out_state_indices, has_initial_state,
            checkpoint_offsets, checkpoint_indices, state_s, state_d, state_l, out_indices_n,
            initial_n, offsets_n, checkpoints_n, W, PAD,
        )  # fmt: skip
    _store_rows(
        rows, out, out_t, out_d, end - first, within, row, channel, columns, offset, 1.0, W, RUN,
        SILU, False,
    )  # fmt: skip


def make_conv1d_prefill(spec: GdnSpec, device: Device, *, deterministic: bool) -> Conv1dPrefill:
    """Return the op: a program owns a block of tokens of one sequence by a block of channels."""
    D, W, PAD, SILU = spec.conv_dim, spec.conv_width, spec.pad_slot, spec.activation == "silu"
    tile = CONV_TILES.get(device.arch, CONV_TILES[device.kind])
    C, RUN = CHANNELS, tile.run
    RUNS = tile.runs(C)
    blocks = ceil_div(D, C)
    launch = Launch(_conv1d_prefill, device, num_warps=tile.warps)

    def conv1d_prefill(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        *,
        metadata: PrefillMetadata,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(x)
        if out is None:
            out = empty_like(x)
        T, N = x.shape[0], metadata.cu_seqlens.shape[0] - 1
        cu_seqlens, slots = metadata.cu_seqlens, metadata.state_indices
        fresh, targets = metadata.has_initial_state, metadata.out_state_indices
        offsets, indices = metadata.checkpoint_offsets, metadata.checkpoint_indices
        launch(
            num_programs(T, N, RUNS * RUN) * blocks,
            (x, weight, bias, conv_state, out, cu_seqlens, slots, targets, fresh, offsets, indices),
            (N, T),
            (*x.stride(), *weight.stride(), *strides(bias, 1), *conv_state.stride(), *out.stride(),
             cu_seqlens.stride(0), slots.stride(0), *strides(targets, 1), *strides(fresh, 1),
             *strides(offsets, 1), *strides(indices, 1), D, W, C, RUNS, RUN, PAD, SILU),
        )  # fmt: skip
        return out

    return conv1d_prefill


@triton.jit
def _store_gates(
    a, b, A_log, dt_bias, g, beta, first, end, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h,
    live, HV: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, FINISHED: tl.constexpr,
    WITH_BETA: tl.constexpr,
):  # fmt: skip
    """Store the gates of a block of tokens, some of them at a time.

    Where FINISHED, decay is e^g, and those of padding leave a state as it is. Without WITH_BETA
    beta is stored for padding alone.
    """
    # H200, HV = 64, T = 8192: the front end takes 113 us, by 512 gates at a time 116, by 2048 132
    STEP: tl.constexpr = min(TOKENS, max(1024 // HEADS, 1))
    h = tl.arange(0, HEADS)[None, :]
    decay = tl.load(A_log + h * A_log_h, mask=h < HV, other=0.0)
    shift = tl.load(dt_bias + h * dt_bias_h, mask=h < HV, other=0.0)
    for i in tl.range(0, TOKENS, STEP, num_stages=1):
        t = first.to(tl.int64) + i + tl.arange(0, STEP)[:, None]
        mask = (t < end) & (h < HV)
        a_now = tl.load(a + t * a_t + h * a_h, mask=mask, other=0.0)
        b_now = tl.load(b + t * b_t + h * b_h, mask=mask, other=0.0)
        g_t, beta_t = gates(a_now, b_now, decay, shift)
        if FINISHED:
            g_t = tl.where(live, tl.exp(g_t), 1.0)
            beta_t = tl.where(live, beta_t, 0.0)
        tl.store(g + t * HV + h, g_t, mask=mask)
        tl.store(beta + t * HV + h, beta_t, mask=mask if WITH_BETA else mask & (not live))


@triton.jit
def _clear_rows(target, pitch, left, within, row, channel, RUN: tl.constexpr):
    """Store zeros in rows of padding."""
    for i in tl.static_range(RUN):
        at = target + (row + i) * pitch + channel
        zeros = tl.zeros(at.shape, target.dtype.element_ty)
        tl.store(at, zeros, mask=(row + i < left) & within)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _front_end(
    x, a, b, weight, bias, A_log, dt_bias, conv_state, qk, v, g, beta, cu_seqlens, state_indices,
    out_state_indices, has_initial_state, checkpoint_offsets, checkpoint_indices, N, T, x_t, x_d,
    a_t, a_h, b_t, b_h, weight_d, weight_w, bias_d, A_log_h, dt_bias_h, state_s, state_d, state_l,
    cu_n, indices_n, out_indices_n, initial_n, offsets_n, checkpoints_n, SCALE: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    RUNS: tl.constexpr, RUN: tl.constexpr, HEADS: tl.constexpr, PAD: tl.constexpr,
    SILU: tl.constexpr, NORMALISE: tl.constexpr, FINISHED: tl.constexpr, KEY_HEADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    D: tl.constexpr = 2 * H * K + HV * V
    BLOCKS: tl.constexpr = (D + K - 1) // K
    program = tl.program_id(0)
    block = program % (BLOCKS + 1)
    sequence, start, end, first = locate(
        cu_seqlens, cu_n, N, T, program // (BLOCKS + 1), RUNS * RUN
    )
    if (first >= end) & (first > start):
        return
    slot = _slot_of(sequence, N, state_indices, indices_n, PAD)
    # the program that has a key rounded can tell by how much
    CORRECTS: tl.constexpr = FINISHED and NORMALISE
    if block == BLOCKS:
        if FINISHED or slot > PAD:
            _store_gates(
                a, b, A_log, dt_bias, g, beta, first, end, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h,
                slot > PAD, HV, HEADS, RUNS * RUN, FINISHED, not CORRECTS,
            )  # fmt: skip
        return
    row = tl.arange(0, RUNS)[:, None] * RUN
    channel = tl.arange(0, K)[None, :]
    within = block * K + channel < D
    x += block.to(tl.int64) * K * x_d
    rows = _load_rows(
        x + first.to(tl.int64) * x_t, x_t, x_d, first - start, end - first, within, row, channel,
        W, RUN, x.dtype == conv_state.dtype,
    )  # fmt: skip
    d = block * K + tl.arange(0, K)
    mask = d < D
    columns = load_weight(weight, d, mask, weight_d, weight_w, W)
    offset = load_bias(bias, d, mask, bias_d)
    # a pointer chosen by an if is more than Triton 3.6 can lower for AMD
    of_qk = qk + (block // H * T + first).to(tl.int64) * (H * K) + block % H * K
    of_v = v + first.to(tl.int64) * (HV * V) + (block - 2 * H) * K
    if slot <= PAD:
        if FINISHED:
            if block < 2 * H:
                _clear_rows(of_qk, H * K, end - first, within, row, channel, RUN)
            else:
                _clear_rows(of_v, HV * V, end - first, within, row, channel, RUN)
        return
    if first == start:
        rows = _turn_window(
            rows, row, x + start.to(tl.int64) * x_t + tl.arange(0, K) * x_d, x_t, end - start,
            sequence, slot, d, mask, conv_state, out_state_indices, has_initial_state,
            checkpoint_offsets, checkpoint_indices, state_s, state_d, state_l, out_indices_n,
            initial_n, offsets_n, checkpoints_n, W, PAD,
        )  # fmt: skip
    if block < 2 * H:
        scale = tl.where(block < H, SCALE, 1.0)
        if CORRECTS:
            RATIO: tl.constexpr = HV // H
            h = tl.arange(0, KEY_HEADS)[None, :]
            head = (block - H) * RATIO + h
            token = first.to(tl.int64) + tl.arange(0, RUNS * RUN)[:, None]
            own = (token < end) & (block >= H) & (h < RATIO)
            # long before it is used
            logit = tl.load(b + token * b_t + head * b_h, mask=own, other=0.0)
        squares = _store_rows(
            rows, of_qk, H * K, 1, end - first, within, row, channel, columns, offset, scale, W,
            RUN, SILU, NORMALISE, CORRECTS,
        )  # fmt: skip
        if CORRECTS:
            by = correction(tl.reshape(squares, [RUNS * RUN]))[:, None]
            tl.store(beta + token * HV + head, tl.sigmoid(logit.to(tl.float32)) * by, mask=own)
    else:
        _store_rows(
            rows, of_v, HV * V, 1, end - first, within, row, channel, columns, offset, 1.0, W,
            RUN, SILU, False,
        )  # fmt: skip


class FrontEnd(Protocol):
    """All of a prefill that comes before the recurrence, in one launch."""

    def __call__(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        params: GdnParams,
        conv_state: Tensor,
        *,
        metadata: PrefillMetadata,
        keeps_checkpoints: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Convolve, split, normalise and gate.

        Args:
            mixed_qkv: [T, D], any strides.
            a: [T, HV], any strides.
            b: [T, HV], any strides.
            params: the layer's.
            conv_state: [slots, D, L] pool, advanced in place.
            metadata: the batch.
            keeps_checkpoints: whether windows go to the slots in ``checkpoint_indices``.

        Returns:
            q [T, H, K], normalised and scaled; k [T, H, K], normalised; v [T, HV, V]; g [T, HV] and
            beta [T, HV] as ``gating`` gives them. All contiguous. Where the spec has no
            ``qk_l2norm``, q is scaled and k as it is. Rows of padding and of nobody are not
            written. A finished one gives e^g in place of g; beta divided by the square of what
            rounding left of a key's norm; and in rows of padding and of nobody q, k, v and beta of
            0, and a decay of 1.
        """
        ...


def make_front_end(spec: GdnSpec, device: Device, *, finished: bool = False) -> FrontEnd:
    """Return it: a program owns a block of tokens of one sequence by K channels, or its gates.

    Args:
        spec: the layer.
        device: where.
        finished: for a rule that knows no padding and no keys that rounding made longer.
    """
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    W, PAD, SILU = spec.conv_width, spec.pad_slot, spec.activation == "silu"
    tile = FRONT_END_TILES.get(device.arch, FRONT_END_TILES[device.kind])
    RUNS, RUN, HEADS = tile.runs(K), tile.run, power_of_two(HV)
    blocks = ceil_div(spec.conv_dim, K) + 1
    kernel, keeping = (
        Launch(_front_end, device, **_front_end_options(device, K, tile.warps, keeps=keeps))
        for keeps in (False, True)
    )
    constants = (
        spec.q_scale, H, HV, K, V, W, RUNS, RUN, HEADS, PAD, SILU, spec.qk_l2norm, finished,
        power_of_two(HV // H),
    )  # fmt: skip

    def front_end(
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        params: GdnParams,
        conv_state: Tensor,
        *,
        metadata: PrefillMetadata,
        keeps_checkpoints: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        refuse_gradients(mixed_qkv)
        T, N = mixed_qkv.shape[0], metadata.cu_seqlens.shape[0] - 1
        dtype, where = mixed_qkv.dtype, mixed_qkv.device
        qk = torch.empty(2, T, H, K, dtype=dtype, device=where)
        v = torch.empty(T, HV, V, dtype=dtype, device=where)
        g, beta = empty_like(a, torch.float32), empty_like(a, torch.float32)
        offsets, indices = metadata.checkpoint_offsets, metadata.checkpoint_indices
        if not keeps_checkpoints:
            offsets = indices = None
        cu_seqlens, slots = metadata.cu_seqlens, metadata.state_indices
        fresh, targets = metadata.has_initial_state, metadata.out_state_indices
        weight, bias, A_log, dt_bias = (
            params.conv_weight, params.conv_bias, params.A_log, params.dt_bias,
        )  # fmt: skip
        launch = kernel if offsets is None else keeping
        launch(
            num_programs(T, N, RUNS * RUN) * blocks,
            (mixed_qkv, a, b, weight, bias, A_log, dt_bias, conv_state, qk, v, g, beta, cu_seqlens,
             slots, targets, fresh, offsets, indices),
            (N, T),
            (*mixed_qkv.stride(), *a.stride(), *b.stride(), *weight.stride(), *strides(bias, 1),
             A_log.stride(0), dt_bias.stride(0), *conv_state.stride(), cu_seqlens.stride(0),
             slots.stride(0), *strides(targets, 1), *strides(fresh, 1), *strides(offsets, 1),
             *strides(indices, 1), *constants),
        )  # fmt: skip
        return qk[0], qk[1], v, g, beta

    return front_end


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _conv1d_update(
    x, weight, bias, conv_state, out, state_indices, out_state_indices, B, x_b, x_d, weight_d,
    weight_w, bias_d, state_s, state_d, state_l, out_b, out_d, indices_b, out_indices_b,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, PAD: tl.constexpr,
    SILU: tl.constexpr, DENSE_WEIGHT: tl.constexpr, DENSE_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    BLOCKS: tl.constexpr = (D + C - 1) // C
    COUNT: tl.constexpr = C // VECTOR
    program = tl.program_id(0)
    base = (program % BLOCKS) * C
    d = base + tl.arange(0, C)
    first = program // BLOCKS * ROWS
    mask = d < D
    vectors = base + tl.arange(0, COUNT)[:, None] * VECTOR < D
    slots = tl.tuple([])
    inputs = tl.tuple([])
    for i in tl.static_range(ROWS):
        b = (first + i).to(tl.int64)
        slot = tl.load(state_indices + b * indices_b, mask=b < B, other=PAD).to(tl.int64)
        slots = slots + (slot,)
        inputs = inputs + (tl.load(x + b * x_b + d * x_d, mask=mask & (b < B), other=0.0),)
    if DENSE_WEIGHT:
        columns = load_columns(weight + base * W, vectors, COUNT, W)
    else:
        columns = load_weight(weight, d, mask, weight_d, weight_w, W)
    offset = load_bias(bias, d, mask, bias_d)
    taps = tl.tuple([])
    for i in tl.static_range(ROWS):
        window = conv_state + slots[i] * state_s
        if DENSE_WINDOW:
            window += base * (W - 1)
            taps = taps + load_columns(window, vectors & (slots[i] > PAD), COUNT, W - 1)
        else:
            window += d * state_d
            for column in tl.static_range(W - 1):
                live = mask & (slots[i] > PAD)
                taps = taps + (tl.load(window + column * state_l, mask=live, other=0.0),)
        taps = taps + (inputs[i],)
    # other threads may store what a thread has yet to load: out may be x
    tl.debug_barrier()
    for i in tl.static_range(ROWS):
        b = (first + i).to(tl.int64)
        y = tl.where(slots[i] > PAD, convolve(taps, i * W, columns, offset, W, SILU), 0.0)
        target = out + b * out_b + d * out_d
        tl.store(target, rounded(y, out.dtype.element_ty), mask=mask & (b < B))
        slot = slots[i]
        if out_state_indices is not None:
            live = slot > PAD
            slot = tl.load(out_state_indices + b * out_indices_b, mask=live, other=PAD)
            slot = slot.to(tl.int64)
        window = conv_state + slot * state_s
        after = tl.tuple([])
        for column in tl.static_range(W - 1):
            value = taps[i * W + column + 1].to(tl.float32).to(conv_state.dtype.element_ty)
            after = after + (value,)
        if DENSE_WINDOW:
            live = vectors & (slot > PAD)
            store_columns(window + base * (W - 1), after, live, COUNT, W - 1)
        else:
            store_window(window + d * state_d, state_l, after, mask & (slot > PAD), W)


def make_conv1d_update(spec: GdnSpec, device: Device, *, deterministic: bool) -> Conv1dUpdate:
    """Return the op: a program owns some channels of a few rows."""
    D, W, PAD, SILU = spec.conv_dim, spec.conv_width, spec.pad_slot, spec.activation == "silu"
    by_number, by_vector = (
        [
            (tile, Launch(_conv1d_update, device, num_warps=tile.warps))
            for tile in tiles.get(device.arch, tiles[device.kind])
        ]
        for tiles in (UPDATE_TILES, VECTOR_TILES)
    )
    in_vectors = D % VECTOR.value == 0 and spec.conv_state_dtype.itemsize == 2

    def conv1d_update(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(x)
        if out is None:
            out = empty_like(x)
        B, (state_s, state_d, state_l) = x.shape[0], conv_state.stride()
        if B:
            dense_window = (state_d, state_l) == (W - 1, 1)
            wide = in_vectors and weight.stride() == (W, 1) and (dense_window or state_d == 1)
            kernels = by_vector if wide else by_number
            tile, launch = next((each for each in kernels if each[0].batch >= B), kernels[-1])
            launch(
                ceil_div(B, tile.rows) * ceil_div(D, tile.channels),
                (x, weight, bias, conv_state, out, state_indices, out_state_indices),
                (B,),
                (*x.stride(), *weight.stride(), *strides(bias, 1), state_s, state_d, state_l,
                 *out.stride(), state_indices.stride(0), *strides(out_state_indices, 1), D, W,
                 tile.rows, tile.channels, PAD, SILU, wide, wide and dense_window),
            )  # fmt: skip
        return out

    return conv1d_update
