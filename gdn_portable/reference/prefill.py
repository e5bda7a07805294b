# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule over packed sequences, in chunks of matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_portable.metadata import PrefillMetadata, plan_of
from gdn_portable.reference.math import normalise
from gdn_portable.reference.slots import (
    checkpoints,
    finish,
    like,
    pack,
    prefill_slots,
    read,
    write,
)
from gdn_portable.spec import GdnSpec

CHUNK = 64


@dataclass(slots=True)
class ChunkPlan:
    """Which token stands where in the chunks, for lengths that the host knows."""

    cu_seqlens: Tensor  # [N + 1], what the plan was made from
    tokens: Tensor  # [chunks, N, CHUNK], -1 for none


def plan_prefill(spec: GdnSpec, metadata: PrefillMetadata) -> None:
    """Lay the tokens out in chunks; on a GPU that needs ``seq_lens_cpu``, else there is no plan."""
    chunks = _most_chunks(metadata)
    if chunks is None:
        metadata.plan = None
        return
    tokens, old = _chunk_tokens(metadata.cu_seqlens, chunks), plan_of(metadata, ChunkPlan)
    if old is not None and old.tokens.shape == tokens.shape:
        old.cu_seqlens.copy_(metadata.cu_seqlens)
        old.tokens.copy_(tokens)
    else:
        metadata.plan = ChunkPlan(metadata.cu_seqlens.clone(), tokens)


def _most_chunks(metadata: PrefillMetadata) -> int | None:
    """Return the chunks of the longest sequence, where the host can know them."""
    if len(metadata.cu_seqlens) < 2:
        return 0
    if metadata.cu_seqlens.device.type == "cpu":
        longest = int(metadata.cu_seqlens.diff().max())
    elif metadata.seq_lens_cpu is not None:
        longest = max(int(length) for length in metadata.seq_lens_cpu)
    else:
        return None
    return -(-longest // CHUNK)


def _chunk_tokens(cu_seqlens: Tensor, chunks: int) -> Tensor:
    cu = cu_seqlens.to(torch.int64)
    offset = torch.arange(chunks * CHUNK, device=cu.device).reshape(chunks, 1, CHUNK)
    tokens = cu[:-1, None] + offset
    return torch.where(tokens < cu[1:, None], tokens, -1)


def _planned_tokens(metadata: PrefillMetadata, num_tokens: int) -> Tensor:
    plan = plan_of(metadata, ChunkPlan)
    if plan is not None:
        return plan.tokens
    chunks = _most_chunks(metadata)
    # a GPU's lengths are not asked for: any sequence may be as long as the batch
    chunks = -(-num_tokens // CHUNK) if chunks is None else chunks
    return _chunk_tokens(metadata.cu_seqlens, chunks)


class _Chunks(NamedTuple):
    """What a chunk does to any state; every field is [chunks, N, HV, ...]."""

    q: Tensor  # [C, K] times e^G
    k: Tensor  # [C, K]
    G: Tensor  # [C] cumulative log decay, float64
    attention: Tensor  # [C, C] (q k^T) decayed, causal
    u: Tensor  # [C, V] update values from a zero state
    w: Tensor  # [C, K] what to subtract from u per state


def chunk_prefill(
    spec: GdnSpec,
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
    """Run packed sequences in chunks of 64 tokens."""
    source, target, live, fresh = prefill_slots(spec, metadata)
    packed = pack(metadata.cu_seqlens, live, len(v))
    if len(live) == 0:
        return finish(v, packed.owned, v.dtype, out)
    tokens = _planned_tokens(metadata, len(v))
    chunks = _chunks(spec, q, k, v, g, beta, tokens)
    pad = spec.pad_slot if checkpoint_state is None else -1
    offsets, rows, wanted = checkpoints(metadata, packed.lengths, live, pad)

    S = read(state, source, live & ~fresh, spec.compute_dtype)
    before, outputs = S, []  # before: the state in front of the chunk that holds the checkpoint
    for i, chunk in enumerate(map(_Chunks._make, zip(*chunks, strict=True))):
        if metadata.checkpoint_offsets is not None:
            before = torch.where(like(offsets // CHUNK == i, S), S, before)
        u = chunk.u - chunk.w @ S.mT
        outputs.append(chunk.q @ S.mT + chunk.attention @ u)
        S = _advance(S, chunk, u, chunk.G[..., -1:])
    if outputs:
        values = torch.stack(outputs)  # [chunks, N, HV, C, V]
        at = packed.position.clamp(0, len(values) * CHUNK - 1)
        values = values[at // CHUNK, packed.sequence, :, at % CHUNK]
    else:
        values = v.to(spec.compute_dtype)  # no sequence has a token: nothing is kept of it
    result = finish(values, packed.owned, v.dtype, out)

    write(state, target, S, live & (target > spec.pad_slot))
    if metadata.checkpoint_offsets is not None:
        mid = _partial_state(before, chunks, offsets)
        S = torch.where(like(offsets == packed.lengths, S), S, mid)
        write(state if checkpoint_state is None else checkpoint_state, rows, S, wanted)
    return result


def _chunks(
    spec: GdnSpec, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, tokens: Tensor
) -> _Chunks:
    """Compute all that needs no state; a place without a token changes nothing."""

    def gather(x: Tensor) -> Tensor:
        x = x.to(spec.compute_dtype)[tokens.clamp(min=0)]
        return torch.where(like(tokens >= 0, x), x, 0).transpose(2, 3)  # [chunks, N, HV, C, ...]

    q, k = normalise(spec, q, k)
    q, k, v, g, beta = (gather(x) for x in (q, k, v, g, beta))
    # sums and their differences in float64: one strong decay must not blur the weak ones beside it
    G = g.double().clamp(min=-1e4).cumsum(-1)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=G.device).tril()
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~causal, -torch.inf)
    decay, decayed = decay.exp().to(k.dtype), G.exp().to(k.dtype)[..., None]
    overlap = beta[..., None] * (k @ k.mT) * decay
    right = beta[..., None] * torch.cat([v, decayed * k], dim=-1)
    # u_i + sum over j < i of overlap_ij u_j = right_i: exact substitution, safe where keys repeat
    u, w = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], dim=-1
    )
    return _Chunks(decayed * q, k, G, (q @ k.mT) * decay, u, w)


def _advance(S: Tensor, chunk: _Chunks, u: Tensor, last: Tensor) -> Tensor:
    """Return S after the tokens of a chunk whose u is not zero, ``last`` their log decay [., 1]."""
    weight = (last - chunk.G).clamp(max=0).exp().to(S.dtype)[..., None]
    return last.exp().to(S.dtype)[..., None] * S + u.mT @ (weight * chunk.k)


def _partial_state(before: Tensor, chunks: _Chunks, offsets: Tensor) -> Tensor:
    """Return the states after ``offsets % CHUNK`` tokens of the chunk that follows ``before``."""
    if len(chunks.G) == 0:
        return before
    which = (offsets // CHUNK).clamp(0, len(chunks.G) - 1)
    sequences = torch.arange(len(offsets), device=offsets.device)
    chunk = _Chunks._make(field[which, sequences] for field in chunks)
    inside = torch.arange(CHUNK, device=offsets.device) < (offsets % CHUNK)[:, None]  # [N, C]
    u = torch.where(inside[:, None, :, None], chunk.u - chunk.w @ before.mT, 0)
    G = torch.cat([torch.zeros_like(chunk.G[..., :1]), chunk.G], dim=-1)
    last = G.gather(-1, (offsets % CHUNK)[:, None, None].expand(*G.shape[:-1], 1))
    return _advance(before, chunk, u, last)
