# SPDX-License-Identifier: Apache-2.0
"""Checkpoints at any token from FlashInfer's, which keep a state every so many tokens.

The tokens between the last such state and the checkpoint are run once more, by themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS, power_of_two
from gdn_backend_triton.launches import Launch
from torch import Tensor

from gdn_backend_cuda.prefill_slots import EVERY, FILLED, Placed, first_row
from gdn_portable.metadata import PrefillMetadata
from gdn_portable.spec import Device

TOKENS = 16  # that a program gathers
BEHIND = 64  # rows behind the last token that a chunk's products take, times zero
BLOCKS = (EVERY + BEHIND) // TOKENS
SEQUENCES = 128


@triton.jit
def _left(
    n, N, cu_seqlens, state_indices, checkpoint_offsets, checkpoint_indices, cu_s, indices_s,
    offsets_s, rows_s, PAD: tl.constexpr, KEPT_PAD: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Return a sequence's checkpoint, -1 where it wants none, and the tokens left to it."""
    mask = n < N
    slot = tl.load(state_indices + n * indices_s, mask=mask, other=PAD)
    row = tl.load(checkpoint_indices + n * rows_s, mask=mask, other=KEPT_PAD)
    offset = tl.load(checkpoint_offsets + n * offsets_s, mask=mask, other=-1).to(tl.int32)
    start = tl.load(cu_seqlens + n * cu_s, mask=mask, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + (n + 1) * cu_s, mask=mask, other=0).to(tl.int32)
    wanted = (slot > PAD) & (row > KEPT_PAD) & (offset >= 0) & (offset <= end - start)
    return tl.where(wanted, offset, -1), tl.where(wanted, offset % EVERY, 0)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _gather(
    k, v, alpha, beta, left_k, left_v, left_alpha, left_beta, offsets, slots, cu_seqlens,
    state_indices, checkpoint_offsets, checkpoint_indices, N, num_rows, cu_s, indices_s, offsets_s,
    rows_s, HK: tl.constexpr, HVV: tl.constexpr, HV: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, PAD: tl.constexpr, KEPT_PAD: tl.constexpr, EVERY: tl.constexpr,
    TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCKS: tl.constexpr,
    BEHIND: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % BLOCKS
    n = tl.program_id(0) // BLOCKS
    checkpoint, count = _left(
        n, N, cu_seqlens, state_indices, checkpoint_offsets, checkpoint_indices, cu_s, indices_s,
        offsets_s, rows_s, PAD, KEPT_PAD, EVERY,
    )  # fmt: skip
    end = count
    if n == N - 1:
        end += BEHIND
    if (block > 0) & (block * TOKENS >= end):
        return
    before = 0
    for first in range(0, n, SEQUENCES):
        m = first + tl.arange(0, SEQUENCES)
        _, counts = _left(
            m, n, cu_seqlens, state_indices, checkpoint_offsets, checkpoint_indices, cu_s,
            indices_s, offsets_s, rows_s, PAD, KEPT_PAD, EVERY,
        )  # fmt: skip
        before += tl.sum(counts)
    start = tl.load(cu_seqlens + n * cu_s).to(tl.int32)
    if block == 0:
        tl.store(offsets + n, before)
        tl.store(slots + n, first_row(start, n, EVERY) + tl.maximum(checkpoint, 0) // EVERY)
        if n == N - 1:
            tl.store(offsets + N, before + count)
    t = block * TOKENS + tl.arange(0, TOKENS)[:, None]
    live = t < count
    room = (t < end) & (before + t < num_rows)
    source = (start + tl.maximum(checkpoint, 0) // EVERY * EVERY + t).to(tl.int64)
    target = (before + t).to(tl.int64)
    for first in range(0, HK, WIDTH):
        i = first + tl.arange(0, WIDTH)[None, :]
        value = tl.load(k + source * HK + i, mask=live & (i < HK), other=0.0)
        tl.store(left_k + target * HK + i, value, mask=room & (i < HK))
    for first in range(0, HVV, WIDTH):
        i = first + tl.arange(0, WIDTH)[None, :]
        value = tl.load(v + source * HVV + i, mask=live & (i < HVV), other=0.0)
        tl.store(left_v + target * HVV + i, value, mask=room & (i < HVV))
    h = tl.arange(0, HEADS)[None, :]
    mask = live & (h < HV)
    decay = tl.load(alpha + source * HV + h, mask=mask)
    tl.store(left_alpha + target * HV + h, decay, mask=mask)
    strength = tl.load(beta + source * HV + h, mask=mask)
    tl.store(left_beta + target * HV + h, strength, mask=mask)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _keep(
    kept, out, slots, cu_seqlens, state_indices, checkpoint_offsets, checkpoint_indices, N, cu_s,
    indices_s, offsets_s, rows_s, out_s, out_h, out_v, out_k, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, PAD: tl.constexpr, KEPT_PAD: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = program % (V // FILLED)
    head = program // (V // FILLED) % HV
    n = program // (V // FILLED * HV)
    checkpoint, _ = _left(
        n, N, cu_seqlens, state_indices, checkpoint_offsets, checkpoint_indices, cu_s, indices_s,
        offsets_s, rows_s, PAD, KEPT_PAD, EVERY,
    )  # fmt: skip
    if checkpoint < 0:
        return
    o_v = part * FILLED + tl.arange(0, FILLED)[:, None]
    o_k = tl.arange(0, K)[None, :]
    source = tl.load(slots + n).to(tl.int64) * HV + head
    value = tl.load(kept + source * (V * K) + o_v * K + o_k)
    target = tl.load(checkpoint_indices + n * rows_s).to(tl.int64)
    at = out + target * out_s + head * out_h + o_v * out_v + o_k * out_k
    tl.store(at, value.to(out.dtype.element_ty))


class Left(NamedTuple):
    """Tokens that are left to the checkpoints of a batch, packed, and the rows of their states."""

    k: Tensor
    v: Tensor
    alpha: Tensor
    beta: Tensor
    cu_seqlens: Tensor
    slots: Tensor


class Keeping(NamedTuple):
    """The launches that keep checkpoints."""

    gather_left: Launch
    keep_states: Launch

    @classmethod
    def of(cls, device: Device) -> Keeping:
        """Make them for a device."""
        return cls(Launch(_gather, device, num_warps=4), Launch(_keep, device, num_warps=4))

    def gather(
        self, v: Tensor, placed: Placed, metadata: PrefillMetadata, pads: tuple[int, int]
    ) -> Left:
        """Return the tokens that are left. A chunk of k and v behind the last is zeros.

        Args:
            v: [T, HV, V] contiguous.
            placed: the batch that was run.
            metadata: of that batch.
            pads: padding among slots, and among the rows that checkpoints go to.
        """
        k, N = placed.k, len(metadata.cu_seqlens) - 1
        (T, HV, V), (H, K) = v.shape, k.shape[1:]
        rows = min(N * EVERY, T)

        def like(x: Tensor) -> Tensor:
            return torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)

        offsets, slots = (placed.slots.new_empty(count) for count in (N + 1, N))
        left = Left(like(k), like(v), like(placed.beta), like(placed.beta), offsets, slots)
        tensors, strides = _batch(metadata)
        self.gather_left(
            N * BLOCKS,
            (k, v, placed.alpha, placed.beta, *left, *tensors),
            (N, rows),
            (*strides, H * K, HV * V, HV, 256, power_of_two(HV), *pads, EVERY, TOKENS, SEQUENCES,
             BLOCKS, BEHIND),
        )  # fmt: skip
        return left

    def keep(
        self,
        kept: Tensor,
        slots: Tensor,
        out: Tensor,
        metadata: PrefillMetadata,
        pads: tuple[int, int],
    ) -> None:
        """Copy the states at the checkpoints to their rows of ``out``."""
        N, (HV, V, K) = len(metadata.cu_seqlens) - 1, kept.shape[1:]
        tensors, strides = _batch(metadata)
        self.keep_states(
            N * HV * (V // FILLED.value),
            (kept, out, slots, *tensors),
            (N,),
            (*strides, *out.stride(), HV, K, V, *pads, EVERY),
        )


def _batch(metadata: PrefillMetadata) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Return what tells where checkpoints are, and the strides."""
    tensors = (
        metadata.cu_seqlens,
        metadata.state_indices,
        metadata.checkpoint_offsets,
        metadata.checkpoint_indices,
    )
    return tensors, tuple(x.stride(0) for x in tensors if x is not None)
