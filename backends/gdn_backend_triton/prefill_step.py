# SPDX-License-Identifier: Apache-2.0
"""A layer's prefill: the front end in one launch, the chunks, and the norm."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gdn_backend_triton.chunk_prefill import make_chunk_prefill
from gdn_backend_triton.conv1d import FrontEnd, make_front_end
from gdn_backend_triton.gated_rms_norm import make_gated_rms_norm
from gdn_portable.interface import ChunkPrefill, GatedRmsNorm, PlanPrefill, PrefillStep
from gdn_portable.metadata import GdnParams, PrefillMetadata
from gdn_portable.spec import Device, GdnSpec
from gdn_portable.state import StatePool
from gdn_portable.steps import apply_gate, both_pools, check_gate


def make_plan_prefill(spec: GdnSpec, device: Device, *, deterministic: bool) -> PlanPrefill:
    """Return the op: there is nothing to plan, every program finds its tokens by itself."""

    def plan_prefill(metadata: PrefillMetadata) -> None:
        metadata.plan = None

    return plan_prefill


def make_prefill_step(spec: GdnSpec, device: Device, *, deterministic: bool) -> PrefillStep:
    """Return the step: q and k are normalised by the chunks, from what the convolution rounded.

    Rounded after they are normalised, q and k would no longer be unit vectors.
    """
    front_end = make_front_end(replace(spec, qk_l2norm=False, scale=1.0), device)
    chunk_prefill = make_chunk_prefill(spec, device, deterministic=deterministic)
    gated_rms_norm = make_gated_rms_norm(spec, device, deterministic=deterministic)
    return join_prefill(front_end, chunk_prefill, gated_rms_norm)


def join_prefill(
    front_end: FrontEnd, chunk_prefill: ChunkPrefill, gated_rms_norm: GatedRmsNorm
) -> PrefillStep:
    """Return the step that these three make up."""

    def prefill_step(
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        params: GdnParams,
        pool: StatePool,
        *,
        metadata: PrefillMetadata,
        checkpoint_state: Tensor | None = None,
        gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        conv_state, state = both_pools(pool)
        check_gate(gate, params)
        # rows of checkpoint_state are no slots: no window is kept beside them
        q, k, v, g, beta = front_end(
            mixed_qkv,
            a,
            b,
            params,
            conv_state,
            metadata=metadata,
            keeps_checkpoints=checkpoint_state is None,
        )
        o = chunk_prefill(
            q,
            k,
            v,
            g,
            beta,
            state,
            metadata=metadata,
            checkpoint_state=checkpoint_state,
            out=out,
        )
        return apply_gate(o, gate, params, gated_rms_norm, out=o)

    return prefill_step
