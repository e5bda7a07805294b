# SPDX-License-Identifier: Apache-2.0
"""A layer's verification of drafts: the convolution, then the recurrence, which starts early."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_backend_triton.conv1d_verify import make_conv1d_verify
from gdn_backend_triton.gated_rms_norm import make_gated_rms_norm
from gdn_backend_triton.launch import empty_like, refuse_gradients
from gdn_backend_triton.mtp_verify import make_recurrence
from gdn_backend_triton.replay import Convolution, make_replay, refuse_large_trees
from gdn_backend_triton.trees import make_fill_parents
from gdn_portable.interface import VerifyStep
from gdn_portable.metadata import (
    Drafts,
    GdnParams,
    ReplayDrafts,
    VerifyMetadata,
    draft_protocol,
)
from gdn_portable.spec import Device, GdnSpec
from gdn_portable.state import StatePool
from gdn_portable.steps import apply_gate, both_pools, check_gate


def make_verify_step(spec: GdnSpec, device: Device, *, deterministic: bool) -> VerifyStep:
    """Return the op: on Hopper and later, states are on their way while the convolution runs."""
    HV, V = spec.num_v_heads, spec.head_v_dim
    options = {"deterministic": deterministic}
    conv1d_verify = make_conv1d_verify(spec, device, **options)
    recurrence = make_recurrence(spec, device, packed=True)
    replay = make_replay(spec, device, **options)
    gated_rms_norm = make_gated_rms_norm(spec, device, **options)

    fill_parents = make_fill_parents(device)

    def verify_step(
        mixed_qkv: Tensor, a: Tensor, b: Tensor, params: GdnParams, pool: StatePool, *,
        metadata: VerifyMetadata, drafts: Drafts | None = None, gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        refuse_gradients(mixed_qkv)
        refuse_large_trees(metadata, drafts)
        conv_state, state = both_pools(pool)
        check_gate(gate, params)
        rates = params.A_log, params.dt_bias
        T, P, cu_seqlens = mixed_qkv.shape[0], metadata.max_drafts, metadata.cu_seqlens
        if out is None:
            out = torch.empty(T, HV, V, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
        if gate is not None and gate.dim() == 2:
            gate = gate.unflatten(-1, (HV, V))
        if isinstance(drafts, ReplayDrafts):
            draft_protocol(metadata, drafts)
            fill_parents(metadata, T // P if cu_seqlens is None else cu_seqlens.shape[0] - 1)
            convolution = Convolution(params.conv_weight, params.conv_bias, conv_state)
            replay(
                mixed_qkv, mixed_qkv, mixed_qkv, a, b, *rates, state, metadata=metadata,
                drafts=drafts, out=out, convolution=convolution,
            )  # fmt: skip
        else:
            mixed = conv1d_verify(
                mixed_qkv, params.conv_weight, params.conv_bias, conv_state,
                metadata=metadata, drafts=drafts, out=empty_like(mixed_qkv),
            )  # fmt: skip
            recurrence(
                mixed, mixed, mixed, a, b, *rates, state, metadata=metadata, drafts=drafts,
                out=out,
            )  # fmt: skip
        return apply_gate(out, gate, params, gated_rms_norm, out=out)

    return verify_step
