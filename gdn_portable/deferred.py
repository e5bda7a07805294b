# SPDX-License-Identifier: Apache-2.0
"""Write the states of sequences that decodes have deferred, without a token."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from gdn_portable.interface import GdnOps
from gdn_portable.metadata import DeferredUpdates


def write_deferred(
    ops: GdnOps,
    state: Tensor,
    deferred: DeferredUpdates,
    *,
    state_indices: Tensor,
    num_deferred: Tensor,
    out_state_indices: Tensor | None = None,
) -> None:
    """Write states with all that is deferred in their slots, of which then nothing is.

    It is a decode of tokens that change no state, and is served by what serves that.

    Args:
        ops: of the layer.
        state: [slots, HV, V, K] advanced in place.
        deferred: the layer's updates.
        state_indices: [B] slots; a padding slot is left alone.
        num_deferred: [B] updates deferred in the slot, up to R.
        out_state_indices: [B] other slots that are written; those that are read stay as they are,
            with what is deferred.

    Raises:
        InputError: as :class:`RecurrentDecode` does.
        UnsupportedCallError: the decode that was named defers nothing.
    """
    spec, B = ops.spec, len(state_indices)
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    zeros = partial(torch.zeros, dtype=spec.dtype, device=state.device)
    k, v, rates = zeros(B, H, K), zeros(B, HV, V), zeros(HV, dtype=spec.compute_dtype)
    # softplus(-inf) and sigmoid(-inf) are zero: neither a decay nor an update
    gates = zeros(B, HV).fill_(-math.inf)
    ops.recurrent_decode(
        k, k, v, gates, gates, rates, rates, state, state_indices=state_indices,
        out_state_indices=out_state_indices, deferred=deferred, num_deferred=num_deferred,
        flush=torch.ones(B, dtype=torch.bool, device=state.device),
    )  # fmt: skip
