# SPDX-License-Identifier: Apache-2.0
"""A layer's verification of drafts by replay in one kernel, the states read and written once.

It takes chains of up to 16 drafts with room for up to 16 that are pending, everything in the 16
bits of activations but the state, the gates that are kept and the rates. Calls for anything else
go to the Triton kernels: other protocols, trees, chains of different lengths, other dtypes and
strides, and batches so small that those are faster. Calls that are wrong go there too, to be
refused.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from gdn_backend_triton.gated_rms_norm import make_gated_rms_norm
from gdn_backend_triton.launch import refuse_gradients
from gdn_backend_triton.verify_step import make_verify_step as make_triton_step
from torch import Tensor

from gdn_backend_cuda.cute_replay.kernel import Start, start_of
from gdn_backend_cuda.cute_replay.plan import (
    Kind,
    is_served,
    kind_of,
    layout_of,
    least_items,
    numbers_of,
    shapes_of,
    strides_of,
    tensors_of,
)
from gdn_portable.interface import VerifyStep
from gdn_portable.metadata import Drafts, GdnParams, ReplayDrafts, VerifyMetadata, draft_protocol
from gdn_portable.spec import Device, GdnSpec
from gdn_portable.state import StatePool
from gdn_portable.steps import apply_gate

LAYOUTS = 64  # of a step's tensors that are remembered


def make_verify_step(spec: GdnSpec, device: Device, *, deterministic: bool) -> VerifyStep:
    """Return the op; ``deterministic`` sends small batches to the kernel as well."""
    H, HV, V = spec.num_k_heads, spec.num_v_heads, spec.head_v_dim
    triton_step = make_triton_step(spec, device, deterministic=deterministic)
    gated_rms_norm = make_gated_rms_norm(spec, device, deterministic=deterministic)
    strides = lru_cache(LAYOUTS)(strides_of)
    starts: dict[Kind, list[tuple[int, Start]]] = {}

    def started(
        mixed_qkv: Tensor, a: Tensor, b: Tensor, params: GdnParams, pool: StatePool,
        metadata: VerifyMetadata, drafts: ReplayDrafts, out: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """Start the kernel and return the outputs; None where it does not serve the call."""
        if pool.conv_state is None or pool.state is None or not is_served(metadata, drafts):
            return None
        kind = kind_of(params, metadata, drafts)
        if kind not in starts:
            # whatever the batch: a warm-up with a small one compiles for all
            starts[kind] = [
                (most, start_of(shape, device.arch)) for most, shape in shapes_of(spec, kind)
            ]
        T = mixed_qkv.shape[0]
        items = T // metadata.max_drafts * H
        # a grid of no blocks would be refused
        if items < (1 if deterministic else least_items(spec, metadata.max_drafts)):
            return None
        if out is None:
            out = torch.empty(T, HV, V, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
        given = tensors_of(mixed_qkv, a, b, params, pool.conv_state, pool.state, drafts, out)
        steps = strides(layout_of(given), spec.dtype)
        numbers = None if steps is None else numbers_of(given, steps, metadata, items)
        if numbers is None:
            return None
        start = next(start for most, start in starts[kind] if items <= most)
        start(numbers)
        return out

    def verify_step(
        mixed_qkv: Tensor, a: Tensor, b: Tensor, params: GdnParams, pool: StatePool, *,
        metadata: VerifyMetadata, drafts: Drafts | None = None, gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        refuse_gradients(mixed_qkv)
        draft_protocol(metadata, drafts)
        o = None
        if isinstance(drafts, ReplayDrafts) and (gate is None or params.norm_weight is not None):
            o = started(mixed_qkv, a, b, params, pool, metadata, drafts, out)
        if o is None:
            return triton_step(
                mixed_qkv, a, b, params, pool, metadata=metadata, drafts=drafts, gate=gate, out=out
            )
        if gate is not None and gate.dim() == 2:
            gate = gate.unflatten(-1, (HV, V))
        return apply_gate(o, gate, params, gated_rms_norm, out=o)

    return verify_step
