# SPDX-License-Identifier: Apache-2.0
"""Pools by slot, and packed tokens by sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_portable.metadata import PrefillMetadata
from gdn_portable.spec import GdnSpec


def read(pool: Tensor, indices: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pool[indices] where ``keep``, else zeros."""
    rows = pool[torch.where(keep, indices, 0)].to(dtype).contiguous()
    return torch.where(like(keep, rows), rows, 0)


@torch.no_grad()
def write(pool: Tensor, indices: Tensor, rows: Tensor, keep: Tensor) -> None:
    """Store rows[i] at pool[indices[i]] where keep[i].

    A GPU is not asked how many rows are kept: there, a row that is not is written as a second copy
    of the first that is; and where none is, slot 0 is given what it holds.
    """
    if keep.device.type == "cpu":
        pool[indices[keep]] = rows[keep].to(pool.dtype)
        return
    if len(rows) == 0:
        return
    first = keep.to(torch.uint8).argmax()
    source = torch.where(keep, torch.arange(len(keep), device=keep.device), first)
    target = torch.where(keep, indices, 0)[source]
    kept = rows[source].to(pool.dtype)
    pool[target] = torch.where(keep.any(), kept, pool[target])


def most(counts: Tensor, bound: int) -> int:
    """Return the largest of ``counts`` on a CPU; a GPU is not asked, its answer is ``bound``."""
    if counts.device.type != "cpu":
        return bound
    return min(int(counts.max()), bound) if len(counts) else 0


def like(mask: Tensor, rows: Tensor) -> Tensor:
    """View a mask [B] so that it broadcasts over rows [B, ...]."""
    return mask.reshape(mask.shape + (1,) * (rows.dim() - mask.dim()))


def finish(values: Tensor, keep: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Return ``values`` with zeros where not ``keep``, in ``out`` or a tensor of ``dtype``."""
    values = torch.where(like(keep, values), values, 0)
    return values.to(dtype) if out is None else out.copy_(values)


class Packed(NamedTuple):
    """Where the tokens of a packed batch belong; ``live`` [B] says which sequences are padding."""

    live: Tensor  # [B]
    starts: Tensor  # [B]
    lengths: Tensor  # [B]
    sequence: Tensor  # [T]
    position: Tensor  # [T] within the sequence
    owned: Tensor  # [T] whether the token belongs to a live sequence


def pack(cu_seqlens: Tensor, live: Tensor, num_tokens: int) -> Packed:
    """Find the sequence and position of every token."""
    cu = cu_seqlens.to(torch.int64).contiguous()
    token = torch.arange(num_tokens, device=cu.device)
    if len(live) == 0:
        return Packed(live, cu[:-1], cu.diff(), token, token, torch.zeros_like(token).bool())
    sequence = torch.searchsorted(cu[1:], token, right=True).clamp(max=len(live) - 1)
    owned = (token < cu[-1]) & live[sequence]
    return Packed(live, cu[:-1], cu.diff(), sequence, token - cu[sequence], owned)


def prefill_slots(
    spec: GdnSpec, metadata: PrefillMetadata
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return slots read, slots written, which sequences are live, and which start afresh."""
    N = len(metadata.cu_seqlens) - 1
    source = metadata.state_indices[:N].to(torch.int64)
    target = source
    if metadata.out_state_indices is not None:
        target = metadata.out_state_indices[:N].to(torch.int64)
    live = source > spec.pad_slot
    fresh = torch.zeros_like(live)
    if metadata.has_initial_state is not None:
        fresh = ~metadata.has_initial_state[:N].to(torch.bool)
    return source, target, live, fresh


def checkpoints(
    metadata: PrefillMetadata, lengths: Tensor, live: Tensor, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return offsets, where their states go, and which of them are wanted."""
    if metadata.checkpoint_offsets is None or metadata.checkpoint_indices is None:
        nowhere = torch.full_like(lengths, -1)
        return nowhere, nowhere, torch.zeros_like(live)
    offsets = metadata.checkpoint_offsets[: len(live)].to(torch.int64)
    rows = metadata.checkpoint_indices[: len(live)].to(torch.int64)
    return offsets, rows, live & (offsets >= 0) & (offsets <= lengths) & (rows > pad)


def decode_slots(
    spec: GdnSpec, batch: int, state_indices: Tensor, out_state_indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return slots read, slots written, and which rows are live."""
    source = state_indices[:batch].to(torch.int64)
    target = source if out_state_indices is None else out_state_indices[:batch].to(torch.int64)
    return source, target, source > spec.pad_slot
