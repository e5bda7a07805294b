# SPDX-License-Identifier: Apache-2.0
"""SGLang's Triton kernels: every part, on pools of states and windows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn_portable.bench.inputs import Batch
from gdn_portable.bench.peers.part import Part
from gdn_portable.steps import split_qkv

KERNELS = "sglang.kernels.ops"
CONV = f"{KERNELS}.mamba.causal_conv1d_triton"
SCATTER = f"{KERNELS}.mamba.mamba_state_scatter_triton"
FUSED = f"{KERNELS}.attention.linear.fused_sigmoid_gating_recurrent"
GATING = f"{KERNELS}.attention.linear.fused_gdn_gating"
PACKED = f"{KERNELS}.attention.fla.fused_recurrent"
CHUNK = f"{KERNELS}.attention.fla.chunk"
NORM = f"{KERNELS}.attention.fla.layernorm_gated"


def _conv_update(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(CONV).causal_conv1d_update

    def update() -> Tensor:
        rows: Tensor = call(
            x=batch.mixed,
            conv_state=batch.conv_state,
            weight=batch.params.conv_weight,
            activation=batch.spec.activation,
            conv_state_indices=batch.slots.slots,
        )
        return rows

    return update


def _conv_verify(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(CONV).causal_conv1d_update

    def verify() -> Tensor:
        rows: Tensor = call(
            x=batch.mixed.unflatten(0, (-1, batch.case.drafts)).transpose(1, 2),  # [B, D, P]
            conv_state=batch.conv_state,
            weight=batch.params.conv_weight,
            activation=batch.spec.activation,
            conv_state_indices=batch.slots.slots,
            intermediate_conv_window=batch.snapshots.conv_state,
            intermediate_state_indices=batch.slots.rows,
        )
        return rows.transpose(1, 2).flatten(0, 1)

    return verify


def _conv_prefill(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(CONV).causal_conv1d_fn

    def prefill() -> Tensor:
        rows: Tensor = call(
            x=batch.mixed.transpose(0, 1),
            weight=batch.params.conv_weight,
            bias=None,
            conv_states=batch.conv_state,
            query_start_loc=batch.slots.cu_seqlens_int32,
            seq_lens_cpu=list(batch.case.lengths),
            cache_indices=batch.slots.slots,
            has_initial_state=batch.slots.has_initial_state,
            activation=batch.spec.activation,
        )
        return rows.transpose(0, 1)

    return prefill


def _packed_decode(batch: Batch) -> Callable[[Tensor], Tensor]:
    call = importlib.import_module(PACKED).fused_recurrent_gated_delta_rule_packed_decode
    spec, params = batch.spec, batch.params
    shape = (batch.case.num_sequences, 1, spec.num_v_heads, spec.head_v_dim)
    out = torch.empty(shape, dtype=spec.dtype, device=batch.device)

    def decode(mixed: Tensor) -> Tensor:
        call(
            mixed_qkv=mixed,
            a=batch.a,
            b=batch.b,
            A_log=params.A_log,
            dt_bias=params.dt_bias,
            scale=spec.q_scale,
            initial_state=batch.state,
            out=out,
            ssm_state_indices=batch.slots.slots,
            use_qk_l2norm_in_kernel=spec.qk_l2norm,
        )
        return out[:, 0]

    return decode


def fused_rule(batch: Batch, **kept: Any) -> Callable[[Tensor], Tensor]:
    """Return norms, gating and recurrence in one, and with ``kept`` what becomes of the states."""
    call = importlib.import_module(FUSED).fused_sigmoid_gating_delta_rule_update
    spec, params = batch.spec, batch.params

    def rule(mixed: Tensor) -> Tensor:
        q, k, v = split_qkv(spec, mixed)
        o: Tensor = call(
            A_log=params.A_log,
            a=batch.a,
            dt_bias=params.dt_bias,
            softplus_beta=1.0,
            softplus_threshold=20.0,
            q=q[None],
            k=k[None],
            v=v[None],
            b=batch.b,
            initial_state_source=batch.state,
            initial_state_indices=batch.slots.slots,
            scale=spec.q_scale,
            use_qk_l2norm_in_kernel=spec.qk_l2norm,
            cu_seqlens=batch.slots.cu_seqlens_int32,
            **kept,
        )
        return o.flatten(0, -3)

    return rule


def _verify(batch: Batch) -> Callable[[Tensor], Tensor]:
    return fused_rule(
        batch,
        disable_state_update=True,
        intermediate_states_buffer=batch.snapshots.state,
        intermediate_state_indices=batch.slots.rows,
        cache_steps=batch.case.drafts,
    )


def _chunk(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(CHUNK).chunk_gated_delta_rule

    def chunk() -> Tensor:
        o: Tensor = call(
            q=batch.q[None],
            k=batch.k[None],
            v=batch.v[None],
            g=batch.g[None],
            beta=batch.beta[None],
            scale=batch.spec.q_scale,
            initial_state=batch.state,
            initial_state_indices=batch.slots.slots,
            cu_seqlens=batch.slots.cu_seqlens,
            use_qk_l2norm_in_kernel=batch.spec.qk_l2norm,
        )[0]
        return o[0]

    return chunk


def _prefill(batch: Batch) -> Callable[[Tensor], Tensor]:
    call = importlib.import_module(CHUNK).chunk_gated_delta_rule
    gate = importlib.import_module(GATING).fused_gdn_gating
    params = batch.params

    def prefill(mixed: Tensor) -> Tensor:
        q, k, v = split_qkv(batch.spec, mixed)
        g, beta = gate(A_log=params.A_log, a=batch.a, b=batch.b, dt_bias=params.dt_bias)
        o: Tensor = call(
            q=q[None],
            k=k[None],
            v=v[None],
            g=g,
            beta=beta,
            scale=batch.spec.q_scale,
            initial_state=batch.state,
            initial_state_indices=batch.slots.slots,
            cu_seqlens=batch.slots.cu_seqlens,
            use_qk_l2norm_in_kernel=batch.spec.qk_l2norm,
        )[0]
        return o[0]

    return prefill


def _commit(batch: Batch) -> Callable[[], Tensor]:
    module = importlib.import_module(SCATTER)
    kept, slots, last = batch.snapshots, batch.slots.slots, batch.slots.last_accepted
    assert kept.state is not None and kept.conv_state is not None
    states, windows = kept.state[None], kept.conv_state[None]

    def commit() -> Tensor:
        for dst, src in ((batch.state[None], states), (batch.conv_state[None], windows)):
            module.fused_mamba_state_scatter_with_mask(
                dst=dst, src=src, dst_indices_raw=slots, step_indices_raw=last
            )
        return batch.state

    return commit


def _norm(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(NORM).rms_norm_gated

    def norm() -> Tensor:
        y: Tensor = call(
            x=batch.x,
            z=batch.gate,
            weight=batch.params.norm_weight,
            bias=None,
            activation=batch.spec.gate_activation,
            eps=batch.params.norm_eps,
            is_rms_norm=True,
        )
        return y

    return norm


CONV_UPDATES = (Part(name="sglang conv", modules=(CONV,), includes="conv", make=_conv_update),)
CONV_VERIFIES = (
    Part(
        name="sglang conv",
        modules=(CONV,),
        includes="conv, a window per draft",
        make=_conv_verify,
    ),
)
CONV_PREFILLS = (Part(name="sglang conv", modules=(CONV,), includes="conv", make=_conv_prefill),)
DECODES = (
    Part(
        name="sglang packed decode",
        modules=(PACKED,),
        includes="norms, gating, recurrence",
        make=_packed_decode,
    ),
    Part(
        name="sglang fused decode",
        modules=(FUSED,),
        includes="norms, gating, recurrence",
        make=fused_rule,
    ),
)
VERIFIES = (
    Part(
        name="sglang verify",
        modules=(FUSED,),
        includes="norms, gating, recurrence, a state per draft",
        make=_verify,
    ),
)
CHUNKS = (
    Part(
        name="sglang chunk",
        modules=(CHUNK,),
        includes="recurrence; q and k are given as unit vectors, log decay; pooled states",
        make=_chunk,
    ),
)
PREFILLS = (
    Part(
        name="sglang chunk",
        modules=(CHUNK, GATING),
        includes="copies of q, k and v, norms, gating, recurrence",
        make=_prefill,
    ),
)
COMMITS = (
    Part(
        name="sglang commit",
        modules=(SCATTER,),
        includes="commit",
        make=_commit,
    ),
)
NORMS = (Part(name="sglang norm", modules=(NORM,), includes="norm and gate", make=_norm),)
