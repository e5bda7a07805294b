# SPDX-License-Identifier: Apache-2.0
"""One step of the gated delta rule, as products of torch.

It indexes by a mask, which waits for the device: on a GPU that would break the contract, so the
table declares CPUs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gdn_portable import DeferredUpdates, Device, GdnSpec, UnsupportedCallError
from gdn_portable.interface import RecurrentDecode


def make_recurrent_decode(spec: GdnSpec, device: Device, *, deterministic: bool) -> RecurrentDecode:
    """Return the op for ``spec``; it is the same for every batch, so always deterministic."""
    ratio = spec.num_v_heads // spec.num_k_heads

    def recurrent_decode(
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
        if deferred is not None:
            raise UnsupportedCallError("deferred is given: the kernel writes every state")
        B = len(v)
        # index tensors may be longer than the batch
        source = state_indices[:B]
        target = source if out_state_indices is None else out_state_indices[:B]
        g = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
        beta = torch.sigmoid(b.float())
        q, k = (_unit(x.float()).repeat_interleave(ratio, dim=1) for x in (q, k))

        S = state[source.clamp(min=0)].float() * g.exp()[..., None, None]
        u = beta[..., None] * (v.float() - torch.einsum("bhvk,bhk->bhv", S, k))
        S = S + torch.einsum("bhv,bhk->bhvk", u, k)
        o = torch.einsum("bhvk,bhk->bhv", S, q * spec.q_scale)

        is_live = source > spec.pad_slot
        is_kept = is_live & (target > spec.pad_slot)
        state[target[is_kept]] = S[is_kept].to(state.dtype)
        if out is None:
            out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        # not a product with 0: what padding computes may be NaN
        return out.copy_(o.where(is_live[:, None, None], 0))

    def _unit(x: Tensor) -> Tensor:
        if not spec.qk_l2norm:
            return x
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)

    return recurrent_decode
