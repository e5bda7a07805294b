# SPDX-License-Identifier: Apache-2.0
"""Causal depthwise convolution: prefill and update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdn_portable.metadata import PrefillMetadata
from gdn_portable.reference.math import silu
from gdn_portable.reference.slots import (
    Packed,
    checkpoints,
    decode_slots,
    finish,
    pack,
    prefill_slots,
    read,
    write,
)
from gdn_portable.spec import GdnSpec


def convolve(spec: GdnSpec, taps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the activated convolution of W inputs, oldest first."""
    weight = weight.to(spec.compute_dtype)
    total = torch.zeros_like(taps[0]) if bias is None else bias.to(spec.compute_dtype)
    for column, tap in enumerate(taps):
        total = total + tap * weight[:, column]
    return silu(total) if spec.activation == "silu" else total


def conv1d_prefill(
    spec: GdnSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    *,
    metadata: PrefillMetadata,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve packed sequences."""
    source, target, live, fresh = prefill_slots(spec, metadata)
    packed = pack(metadata.cu_seqlens, live, len(x))
    if len(live) == 0:
        return finish(x, packed.owned, x.dtype, out)
    columns = spec.conv_width - 1
    pool = conv_state[..., :columns]
    window = read(pool, source, live & ~fresh, spec.compute_dtype)
    inputs, firsts, rows = _with_windows(x, window, packed)
    taps = [inputs[i : len(inputs) - columns + i] for i in range(spec.conv_width)]
    values = convolve(spec, taps, weight, bias)[rows - columns]
    result = finish(values, packed.owned, x.dtype, out)

    def window_after(length: Tensor) -> Tensor:
        column = torch.arange(columns, device=x.device)
        length = length.clamp(min=0).minimum(packed.lengths)
        return inputs[(firsts + length)[:, None] + column].transpose(1, 2)

    write(pool, target, window_after(packed.lengths), live & (target > spec.pad_slot))
    if metadata.checkpoint_offsets is not None:
        offsets, slots, wanted = checkpoints(metadata, packed.lengths, live, spec.pad_slot)
        write(pool, slots, window_after(offsets), wanted)
    return result


def _with_windows(x: Tensor, window: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Put every sequence's window in front of its inputs.

    Returns:
        [T + N * (W - 1), D] inputs, the row [N] where each sequence's window begins, and the row
        [T] of each token.
    """
    N, D, columns = window.shape
    sequence = torch.arange(N, device=x.device)
    firsts = packed.starts + sequence * columns
    rows = torch.arange(len(x), device=x.device) + (packed.sequence + 1) * columns
    inputs = torch.zeros(len(x) + N * columns, D, dtype=window.dtype, device=x.device)
    history = (firsts[:, None] + torch.arange(columns, device=x.device)).flatten()
    inputs.index_copy_(0, history, window.transpose(1, 2).flatten(0, 1))
    inputs.index_copy_(0, rows, x.to(window.dtype))
    return inputs, firsts, rows


def conv1d_update(
    spec: GdnSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    *,
    state_indices: Tensor,
    out_state_indices: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve one token per sequence."""
    source, target, live = decode_slots(spec, len(x), state_indices, out_state_indices)
    pool = conv_state[..., : spec.conv_width - 1]
    window = read(pool, source, live, spec.compute_dtype)
    taps = [*window.unbind(-1), x.to(spec.compute_dtype)]
    values = convolve(spec, taps, weight, bias)
    window = torch.stack(taps[1:], dim=-1)
    result = finish(values, live, x.dtype, out)
    write(pool, target, window, live & (target > spec.pad_slot))
    return result
