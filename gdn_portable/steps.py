# SPDX-License-Identifier: Apache-2.0
"""The fused steps, composed from the ops of a backend that does not fuse them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from gdn_portable.backend import Kernel
from gdn_portable.errors import InputError
from gdn_portable.interface import (
    ChunkPrefill,
    Conv1dPrefill,
    Conv1dUpdate,
    Conv1dVerify,
    GatedRmsNorm,
    Gating,
    MtpVerify,
    RecurrentDecode,
)
from gdn_portable.metadata import (
    DeferredUpdates,
    Drafts,
    GdnParams,
    PrefillMetadata,
    VerifyMetadata,
    check_deferred,
)
from gdn_portable.spec import GdnSpec, Op
from gdn_portable.state import StatePool


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
    spec: GdnSpec,
    conv1d_prefill: Conv1dPrefill,
    gating: Gating,
    chunk_prefill: ChunkPrefill,
    gated_rms_norm: GatedRmsNorm,
) -> Tensor:
    """Run a layer's prefill."""
    conv_state, state = both_pools(pool)
    check_gate(gate, params)
    windows = metadata
    if checkpoint_state is not None:  # its rows are no slots: no window is kept
        windows = replace(metadata, checkpoint_offsets=None, checkpoint_indices=None)
    mixed = conv1d_prefill(
        mixed_qkv, params.conv_weight, params.conv_bias, conv_state, metadata=windows
    )
    q, k, v = split_qkv(spec, mixed)
    g, beta = gating(a, b, params.A_log, params.dt_bias)
    o = chunk_prefill(
        q,
        k,
        v,
        g,
        beta,
        state,
        metadata=metadata,
        checkpoint_state=checkpoint_state,
        out=out if gate is None else None,
    )
    return apply_gate(o, gate, params, gated_rms_norm, out)


def decode_step(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    params: GdnParams,
    pool: StatePool,
    *,
    state_indices: Tensor,
    out_state_indices: Tensor | None = None,
    deferred: DeferredUpdates | None = None,
    num_deferred: Tensor | None = None,
    flush: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    spec: GdnSpec,
    conv1d_update: Conv1dUpdate,
    recurrent_decode: RecurrentDecode,
    gated_rms_norm: GatedRmsNorm,
) -> Tensor:
    """Run a layer's decode."""
    conv_state, state = both_pools(pool)
    check_gate(gate, params)
    check_deferred(deferred, num_deferred, flush)
    mixed = conv1d_update(
        mixed_qkv,
        params.conv_weight,
        params.conv_bias,
        conv_state,
        state_indices=state_indices,
        out_state_indices=out_state_indices,
    )
    o = recurrent_decode(
        *split_qkv(spec, mixed),
        a,
        b,
        params.A_log,
        params.dt_bias,
        state,
        state_indices=state_indices,
        out_state_indices=out_state_indices,
        deferred=deferred,
        num_deferred=num_deferred,
        flush=flush,
        out=out if gate is None else None,
    )
    return apply_gate(o, gate, params, gated_rms_norm, out)


def verify_step(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    params: GdnParams,
    pool: StatePool,
    *,
    metadata: VerifyMetadata,
    drafts: Drafts | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    spec: GdnSpec,
    conv1d_verify: Conv1dVerify,
    mtp_verify: MtpVerify,
    gated_rms_norm: GatedRmsNorm,
) -> Tensor:
    """Run a layer's verification of drafts."""
    conv_state, state = both_pools(pool)
    check_gate(gate, params)
    mixed = conv1d_verify(
        mixed_qkv,
        params.conv_weight,
        params.conv_bias,
        conv_state,
        metadata=metadata,
        drafts=drafts,
    )
    o = mtp_verify(
        *split_qkv(spec, mixed),
        a,
        b,
        params.A_log,
        params.dt_bias,
        state,
        metadata=metadata,
        drafts=drafts,
        out=out if gate is None else None,
    )
    return apply_gate(o, gate, params, gated_rms_norm, out)


PARTS: Mapping[Op, tuple[Callable[..., Tensor], tuple[Op, ...]]] = {
    Op.PREFILL_STEP: (
        prefill_step,
        (Op.CONV1D_PREFILL, Op.GATING, Op.CHUNK_PREFILL, Op.GATED_RMS_NORM),
    ),
    Op.DECODE_STEP: (decode_step, (Op.CONV1D_UPDATE, Op.RECURRENT_DECODE, Op.GATED_RMS_NORM)),
    Op.VERIFY_STEP: (verify_step, (Op.CONV1D_VERIFY, Op.MTP_VERIFY, Op.GATED_RMS_NORM)),
}
# what every table ends with: a composed step is able wherever its parts are; bind joins them with
# compose, the target is for readers
COMPOSED = {
    op: Kernel(
        op=op,
        name=f"composed.{op.value}",
        target=f"gdn_portable.steps:{op.value}",
        probe=None,
        devices=None,
        archs=None,
        dtypes=None,
        state_dtypes=None,
        head_dims=None,
        state_layouts=None,
        conv_layouts=None,
    )
    for op in PARTS
}


def compose(op: Op, spec: GdnSpec, launchers: Mapping[Op, Callable[..., Any]]) -> Any:
    """Return the step ``op`` made of ``launchers``."""
    step, parts = PARTS[op]
    return partial(step, spec=spec, **{part.value: launchers[part] for part in parts})


def split_qkv(spec: GdnSpec, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View the conv's output [T, D] as q [T, H, K], k [T, H, K] and v [T, HV, V]."""
    q, k, v = mixed.split(spec.conv_groups, dim=-1)
    heads = (spec.num_k_heads, spec.head_k_dim)
    values = (spec.num_v_heads, spec.head_v_dim)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, values)


def both_pools(pool: StatePool) -> tuple[Tensor, Tensor]:
    """Return the pools of windows and of states; raise InputError where one is missing."""
    if pool.conv_state is None or pool.state is None:
        missing = "conv_state" if pool.conv_state is None else "state"
        raise InputError(f"pool.{missing} is None, needs both pools")
    return pool.conv_state, pool.state


def check_gate(gate: Tensor | None, params: GdnParams) -> None:
    """Raise InputError for a gate without the weight of its norm."""
    if gate is not None and params.norm_weight is None:
        raise InputError("gate is given and params.norm_weight is None, needs both or neither")


def apply_gate(
    o: Tensor, gate: Tensor | None, params: GdnParams, norm: GatedRmsNorm, out: Tensor | None
) -> Tensor:
    """Return ``o`` normalised and gated where there is a gate, in ``out``; else as it is."""
    if gate is None or params.norm_weight is None:
        return o
    return norm(o, gate, params.norm_weight, eps=params.norm_eps, out=out)
