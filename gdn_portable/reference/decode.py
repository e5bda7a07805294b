# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule, one token per sequence."""

from __future__ import annotations

from torch import Tensor

from gdn_portable.reference.math import gating, normalise, read_out, update
from gdn_portable.reference.slots import decode_slots, finish, read, write
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
    out: Tensor | None = None,
) -> Tensor:
    """Advance every sequence by one token."""
    source, target, live = decode_slots(spec, len(v), state_indices, out_state_indices)
    g, beta = gating(spec, a, b, A_log, dt_bias)
    q, k = normalise(spec, q, k)
    S = read(state, source, live, spec.compute_dtype)
    S = update(S, k, v.to(spec.compute_dtype), g, beta)
    result = finish(read_out(S, q), live, v.dtype, out)
    write(state, target, S, live & (target > spec.pad_slot))
    return result
