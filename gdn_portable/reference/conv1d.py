# SPDX-License-Identifier: Apache-2.0
"""Causal depthwise convolution: prefill and update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gdn_portable.metadata import PrefillMetadata
from gdn_portable.reference.math import silu
from gdn_portable.reference.slots import (
    checkpoints,
    decode_slots,
    dim_first,
    finish,
    pack,
    prefill_slots,
    read,
    write,
)
from gdn_portable.spec import GdnSpec


def inputs_at(
    x: Tensor, window: Tensor, starts: Tensor, sequence: Tensor, position: Tensor
) -> Tensor:
    """Return the conv inputs at a position of a sequence; -1 is the last column of its window."""
    columns = window.shape[-1]
    old = window[sequence, :, (position + columns).clamp(0, columns - 1)]
    if len(x) == 0:
        return old
    new = x[(starts[sequence] + position).clamp(0, len(x) - 1)].to(window.dtype)
    return torch.where((position < 0)[:, None], old, new)


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
    pool = dim_first(spec, conv_state)[..., :columns]
    window = read(pool, source, live & ~fresh, spec.compute_dtype)
    inputs = partial(inputs_at, x, window, packed.starts)
    taps = [inputs(packed.sequence, packed.position - i) for i in range(columns, -1, -1)]
    values = convolve(spec, taps, weight, bias)
    offsets, rows, wanted = checkpoints(metadata, packed.lengths, live, spec.pad_slot)
    sequences = torch.arange(len(live), device=x.device)
    after, midway = (
        torch.stack([inputs(sequences, length - i) for i in range(columns, 0, -1)], dim=-1)
        for length in (packed.lengths, offsets)
    )
    result = finish(values, packed.owned, x.dtype, out)
    write(pool, target, after, live & (target > spec.pad_slot))
    if metadata.checkpoint_offsets is not None:
        write(pool, rows, midway, wanted)
    return result


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
    pool = dim_first(spec, conv_state)[..., : spec.conv_width - 1]
    window = read(pool, source, live, spec.compute_dtype)
    taps = [*window.unbind(-1), x.to(spec.compute_dtype)]
    values = convolve(spec, taps, weight, bias)
    window = torch.stack(taps[1:], dim=-1)
    result = finish(values, live, x.dtype, out)
    write(pool, target, window, live & (target > spec.pad_slot))
    return result
