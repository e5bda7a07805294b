# SPDX-License-Identifier: Apache-2.0
"""flash-linear-attention: every part, but no pools: its states are in the order of the sequences.

Gathering them from a pool and putting them back is not in its times.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gdn_portable.bench.cases import Case
from gdn_portable.bench.inputs import Batch
from gdn_portable.bench.peers.part import Part
from gdn_portable.steps import split_qkv

RULE = "fla.ops.gated_delta_rule"
CONV = "fla.modules.causal_conv1d"
NORM = "fla.modules.norm.fused_norm_gate"
UNPOOLED = "states in the order of the sequences, no pool"


def _refuse_decode(case: Case) -> str | None:
    if case.spec.state_dtype is torch.float32:
        return None
    return f"state dtype is {case.spec.state_dtype}: it writes torch.float32 whatever it read"


def _states(batch: Batch) -> Tensor:
    return batch.state[batch.slots.read]


def _windows(batch: Batch) -> Tensor:
    """Return the windows [N, D, W] as it keeps them: one more input than is needed, in front."""
    slots, first, W = batch.slots, 0, batch.spec.conv_width
    slot = slots.slots
    if slots.table:  # the window of a sequence lives in its first slot
        slot, first = slots.by_draft[:, 0], slots.accepted - 1
    window = batch.conv_state[slot][..., first : first + W - 1]
    return functional.pad(window, (1, 0)).contiguous()


def _conv_update(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(CONV).causal_conv1d_update
    windows, spec = _windows(batch), batch.spec

    def update() -> Tensor:
        rows: Tensor = call(
            x=batch.mixed,
            cache=windows,
            weight=batch.params.conv_weight,
            activation=spec.activation,
        )[0]
        return rows

    return update


def _conv_prefill(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(CONV).causal_conv1d
    windows, spec = _windows(batch), batch.spec

    def prefill() -> Tensor:
        rows: Tensor = call(
            x=batch.mixed[None],
            weight=batch.params.conv_weight,
            initial_state=windows,
            output_final_state=True,
            activation=spec.activation,
            cu_seqlens=batch.slots.cu_seqlens,
        )[0]
        return rows[0]

    return prefill


def _decode(batch: Batch) -> Callable[[Tensor], Tensor]:
    call = importlib.import_module(RULE).fused_recurrent_gated_delta_rule
    states, spec, params = _states(batch), batch.spec, batch.params

    def decode(mixed: Tensor) -> Tensor:
        q, k, v = split_qkv(spec, mixed)
        o: Tensor = call(
            q=q[:, None],
            k=k[:, None],
            v=v[:, None],
            g=batch.a[:, None],
            beta=batch.b[:, None],
            scale=spec.q_scale,
            initial_state=states,
            output_final_state=True,
            use_qk_l2norm_in_kernel=spec.qk_l2norm,
            use_gate_in_kernel=True,
            A_log=params.A_log,
            dt_bias=params.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )[0]
        return o[:, 0]

    return decode


def _chunk_rule() -> Callable[..., tuple[Tensor, Tensor]]:
    # else it hands the call to flash_qla where that is installed, which is timed on its own
    os.environ["FLA_FLASH_QLA"] = "0"
    rule: Callable[..., tuple[Tensor, Tensor]] = importlib.import_module(
        RULE
    ).chunk_gated_delta_rule
    return rule


def _chunk(batch: Batch) -> Callable[[], Tensor]:
    call, states = _chunk_rule(), _states(batch)

    def chunk() -> Tensor:
        return call(
            q=batch.q[None],
            k=batch.k[None],
            v=batch.v[None],
            g=batch.g[None],
            beta=batch.beta[None],
            scale=batch.spec.q_scale,
            initial_state=states,
            output_final_state=True,
            use_qk_l2norm_in_kernel=batch.spec.qk_l2norm,
            state_v_first=True,
            cu_seqlens=batch.slots.cu_seqlens,
        )[0][0]

    return chunk


def _prefill(batch: Batch) -> Callable[[Tensor], Tensor]:
    call, states, params = _chunk_rule(), _states(batch), batch.params

    def prefill(mixed: Tensor) -> Tensor:
        q, k, v = split_qkv(batch.spec, mixed)
        return call(
            q=q[None],
            k=k[None],
            v=v[None],
            g=batch.a[None],
            beta=batch.b[None],
            scale=batch.spec.q_scale,
            initial_state=states,
            output_final_state=True,
            use_qk_l2norm_in_kernel=batch.spec.qk_l2norm,
            use_gate_in_kernel=True,
            A_log=params.A_log,
            dt_bias=params.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
            cu_seqlens=batch.slots.cu_seqlens,
        )[0][0]

    return prefill


def _norm(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(NORM).rms_norm_gated

    def norm() -> Tensor:
        y: Tensor = call(
            x=batch.x,
            g=batch.gate,
            weight=batch.params.norm_weight,
            bias=None,
            activation=batch.spec.gate_activation,
            eps=batch.params.norm_eps,
        )
        return y

    return norm


CONV_UPDATES = (
    Part(
        name="fla conv",
        modules=(CONV,),
        includes=f"conv; {UNPOOLED}, W columns a window",
        make=_conv_update,
    ),
)
CONV_PREFILLS = (
    Part(name="fla conv", modules=(CONV,), includes=f"conv; {UNPOOLED}", make=_conv_prefill),
)
CONV_VERIFIES = (
    Part(
        name="fla conv",
        modules=(CONV,),
        includes=f"conv, but no window per draft; {UNPOOLED}",
        make=_conv_prefill,
        tables=True,
    ),
)
DECODES = (
    Part(
        name="fla recurrent",
        modules=(RULE,),
        includes=f"copies of q, k and v, norms, gating, recurrence; {UNPOOLED}",
        make=_decode,
        refuse=_refuse_decode,
    ),
)
CHUNKS = (
    Part(
        name="fla chunk",
        modules=(RULE,),
        includes=f"recurrence; q and k are given as unit vectors, log decay; {UNPOOLED}",
        make=_chunk,
    ),
)
PREFILLS = (
    Part(
        name="fla chunk",
        modules=(RULE,),
        includes=f"copies of q, k and v, norms, gating, recurrence; {UNPOOLED}",
        make=_prefill,
    ),
)
NORMS = (Part(name="fla norm", modules=(NORM,), includes="norm and gate", make=_norm),)
