# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule, one token per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_portable.metadata import DeferredUpdates, check_deferred
from gdn_portable.reference.math import gating, norm, normalise, read_out, update
from gdn_portable.reference.slots import decode_slots, finish, like, most, read, write
from gdn_portable.spec import GdnSpec


def recurrent_decode(
    spec: GdnSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    state_indices: Tensor,
    out_state_indices: Tensor | None = None,
    deferred: DeferredUpdates | None = None,
    num_deferred: Tensor | None = None,
    flush: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Advance every sequence by one token."""
    check_deferred(deferred, num_deferred, flush)
    source, target, live = decode_slots(spec, len(v), state_indices, out_state_indices)
    g, beta = gating(spec, a, b, A_log, dt_bias)
    key, (q, k) = k, normalise(spec, q, k)
    S = read(state, source, live, spec.compute_dtype)
    count = torch.zeros_like(source)
    if deferred is not None:
        if num_deferred is not None:
            count = num_deferred[: len(v)].to(torch.int64)
        S = _carried_out(spec, S, deferred, source, live, count)
    S, u = update(S, k, v.to(spec.compute_dtype), g, beta)
    result = finish(read_out(S, q), live, v.dtype, out)
    writes = live & (target > spec.pad_slot)
    if deferred is not None and out_state_indices is None:
        flushes = count >= deferred.k.shape[1]
        if flush is not None:
            flushes = flushes | (flush[: len(v)] != 0)
        u = u / _per_value_head(spec, norm(spec, key))
        for kept, values in ((deferred.k, key), (deferred.u, u), (deferred.g, g)):
            for row in range(kept.shape[1]):
                write(kept[:, row], source, values, live & ~flushes & (count == row))
        writes = writes & flushes
    write(state, target, S, writes)
    return result


def _carried_out(
    spec: GdnSpec,
    S: Tensor,
    deferred: DeferredUpdates,
    slots: Tensor,
    live: Tensor,
    count: Tensor,
) -> Tensor:
    """Return the states after the first ``count`` [B] updates that are kept."""
    k, u, g = (
        read(kept, slots, live, spec.compute_dtype) for kept in (deferred.k, deferred.u, deferred.g)
    )
    k = _per_value_head(spec, k)
    for row in range(most(count, k.shape[1])):
        after = g[:, row].exp()[..., None, None] * S + u[:, row, :, :, None] * k[:, row, :, None, :]
        S = torch.where(like(count > row, S), after, S)
    return S


def _per_value_head(spec: GdnSpec, x: Tensor) -> Tensor:
    """Repeat rows [..., H, K] of key heads for their value heads."""
    return x.repeat_interleave(spec.num_v_heads // spec.num_k_heads, dim=-2)
