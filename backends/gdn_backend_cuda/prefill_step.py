# SPDX-License-Identifier: Apache-2.0
"""A layer's prefill around a chunk kernel that takes unit vectors: the front end makes them."""

from __future__ import annotations

from dataclasses import replace

from gdn_backend_triton.conv1d import make_front_end
from gdn_backend_triton.gated_rms_norm import make_gated_rms_norm
from torch import Tensor

from gdn_backend_cuda.flashinfer_prefill import Rule, make_rule
from gdn_portable.errors import InputError
from gdn_portable.interface import PrefillStep
from gdn_portable.metadata import GdnParams, PrefillMetadata
from gdn_portable.spec import Device, GdnSpec
from gdn_portable.state import StatePool


def make_prefill_step(spec: GdnSpec, device: Device, *, deterministic: bool) -> PrefillStep:
    """Return the step on FlashInfer's kernel without context parallelism."""
    rule = make_rule(spec, use_cp=False)
    return _step_of(rule, spec, device, deterministic=deterministic)


def make_prefill_step_cp(spec: GdnSpec, device: Device, *, deterministic: bool) -> PrefillStep:
    """Return the step on FlashInfer's kernel that cuts sequences, unless ``deterministic``."""
    rule = make_rule(spec, use_cp=not deterministic)
    return _step_of(rule, spec, device, deterministic=deterministic)


def _step_of(rule: Rule, spec: GdnSpec, device: Device, *, deterministic: bool) -> PrefillStep:
    """Return the step: front end with the norms of q and k, chunks, norm and gate."""
    front_end = make_front_end(replace(spec, scale=1.0), device, clears=True)
    gated_rms_norm = make_gated_rms_norm(spec, device, deterministic=deterministic)

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
        weight, conv_state, state = params.norm_weight, pool.conv_state, pool.state
        if conv_state is None or state is None or (gate is not None and weight is None):
            raise InputError("needs both pools, and params.norm_weight where gate is given")
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
        o = rule(
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
        if gate is None or weight is None:
            return o
        return gated_rms_norm(o, gate, weight, eps=params.norm_eps, out=o)

    return prefill_step
