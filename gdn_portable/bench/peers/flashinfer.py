# SPDX-License-Identifier: Apache-2.0
"""FlashInfer: decode, verify and prefill on pools of states; it has no convolution.

It zeroes what it allocates for decode and verify, so it is given its output.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gdn_portable.bench.cases import Case
from gdn_portable.bench.inputs import Batch, gates_of
from gdn_portable.bench.peers.part import Part, refuse_other_than_128
from gdn_portable.steps import split_qkv
from gdn_portable.versions import version_of

DECODE = "flashinfer.gdn_decode"
PREFILL = "flashinfer.gdn_prefill"
NORMS_SINCE = (0, 7, 1)

UseCp = bool | Literal["auto"]
CONTEXT_PARALLEL: tuple[tuple[str, UseCp], ...] = (("auto", "auto"), ("on", True), ("off", False))


def _refuse(case: Case) -> str | None:
    if case.spec.state_dtype not in (torch.float32, torch.bfloat16):
        return f"state dtype is {case.spec.state_dtype}, needs torch.float32 or torch.bfloat16"
    return refuse_other_than_128(case)


def _refuse_table(case: Case) -> str | None:
    if case.spec.state_dtype is not torch.float32:
        return f"state dtype is {case.spec.state_dtype}, needs torch.float32"
    return _refuse(case)


def _refuse_prefill(case: Case) -> str | None:
    version = version_of("flashinfer-python")
    if version is not None and case.spec.qk_l2norm:
        release = tuple(map(int, re.findall(r"\d+", version)[:3]))
        if release < NORMS_SINCE:
            return f"flashinfer-python is {version}, needs 0.7.1: it ignored the flag for norms"
    return _refuse(case)


def _drafted(batch: Batch, x: Tensor) -> Tensor:
    """View packed rows as [B, P, ...]."""
    rows: Tensor = x.unflatten(0, (-1, batch.case.drafts))
    return rows


def _decode(batch: Batch) -> Callable[[Tensor], Tensor]:
    call = importlib.import_module(DECODE).gated_delta_rule_decode_pretranspose
    spec, params = batch.spec, batch.params
    shape = (batch.case.num_sequences, 1, spec.num_v_heads, spec.head_v_dim)
    out = torch.empty(shape, dtype=spec.dtype, device=batch.device)

    def decode(mixed: Tensor) -> Tensor:
        q, k, v = split_qkv(spec, mixed)
        call(
            q=q[:, None],
            k=k[:, None],
            v=v[:, None],
            state=None,
            A_log=params.A_log,
            a=batch.a[:, None],
            dt_bias=params.dt_bias,
            b=batch.b[:, None],
            scale=spec.q_scale,
            output=out,
            use_qk_l2norm=spec.qk_l2norm,
            initial_state=batch.state,
            initial_state_indices=batch.slots.slots,
            backend="flashinfer",
        )
        return out[:, 0]

    return decode


def _verify(batch: Batch) -> Callable[[Tensor], Tensor]:
    """Keep the state after every draft in a buffer; the pool is left as it is."""
    module = importlib.import_module(DECODE)
    spec, params = batch.spec, batch.params
    shape = (batch.case.num_sequences, batch.case.drafts, spec.num_v_heads, spec.head_v_dim)
    out = torch.empty(shape, dtype=spec.dtype, device=batch.device)
    call = module.gated_delta_rule_mtp
    if spec.state_dtype is torch.bfloat16:
        call = partial(
            module.gated_delta_rule_decode_pretranspose, state=None, backend="flashinfer"
        )

    def verify(mixed: Tensor) -> Tensor:
        q, k, v = (_drafted(batch, x) for x in split_qkv(spec, mixed))
        call(
            q=q,
            k=k,
            v=v,
            initial_state=batch.state,
            initial_state_indices=batch.slots.slots,
            A_log=params.A_log,
            a=_drafted(batch, batch.a),
            dt_bias=params.dt_bias,
            b=_drafted(batch, batch.b),
            scale=spec.q_scale,
            output=out,
            intermediate_states_buffer=batch.snapshots.state,
            disable_state_update=True,
            use_qk_l2norm=spec.qk_l2norm,
        )
        return out.flatten(0, 1)

    return verify


def _verify_table(batch: Batch) -> Callable[[Tensor], Tensor]:
    """Scatter the state after every draft to a slot of its own."""
    call = importlib.import_module(DECODE).gated_delta_rule_mtp
    spec, params, slots = batch.spec, batch.params, batch.slots
    shape = (batch.case.num_sequences, batch.case.drafts, spec.num_v_heads, spec.head_v_dim)
    out = torch.empty(shape, dtype=spec.dtype, device=batch.device)

    def verify(mixed: Tensor) -> Tensor:
        q, k, v = (_drafted(batch, x) for x in split_qkv(spec, mixed))
        call(
            q=q,
            k=k,
            v=v,
            initial_state=batch.state,
            initial_state_indices=slots.read,
            A_log=params.A_log,
            a=_drafted(batch, batch.a),
            dt_bias=params.dt_bias,
            b=_drafted(batch, batch.b),
            scale=spec.q_scale,
            output=out,
            ssm_state_indices=slots.by_draft,
            disable_state_update=False,
            use_qk_l2norm=spec.qk_l2norm,
        )
        return out.flatten(0, 1)

    return verify


def _chunk(batch: Batch, *, use_cp: UseCp) -> Callable[[], Tensor]:
    alpha = batch.g.exp()  # it takes linear decay
    return partial(_run_chunk, batch, batch.q, batch.k, batch.v, alpha, batch.beta, use_cp=use_cp)


def _run_chunk(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    use_cp: UseCp,
) -> Tensor:
    call = importlib.import_module(PREFILL).chunk_gated_delta_rule
    o: Tensor = call(
        q=q,
        k=k,
        v=v,
        g=alpha,
        beta=beta,
        scale=batch.spec.q_scale,
        initial_state=batch.state,
        output_final_state=True,
        cu_seqlens=batch.slots.cu_seqlens,
        use_qk_l2norm_in_kernel=batch.spec.qk_l2norm,
        output_state=batch.state,
        use_cp=use_cp,
        state_indices=batch.slots.slots,
        max_seqlen=max(batch.case.lengths),
        backend="flashinfer",
    )[0]
    return o


def _prefill(batch: Batch) -> Callable[[Tensor], Tensor]:
    def prefill(mixed: Tensor) -> Tensor:
        q, k, v = (x.contiguous() for x in split_qkv(batch.spec, mixed))
        g, beta = gates_of(batch.params, batch.a, batch.b)
        return _run_chunk(batch, q, k, v, g.exp(), beta, use_cp="auto")

    return prefill


DECODES = (
    Part(
        name="flashinfer decode",
        modules=(DECODE,),
        includes="norms, gating, recurrence",
        make=_decode,
        refuse=_refuse,
    ),
)
VERIFIES = (
    Part(
        name="flashinfer mtp",
        modules=(DECODE,),
        includes="norms, gating, recurrence, a state per draft",
        make=_verify,
        refuse=_refuse,
    ),
    Part(
        name="flashinfer mtp to slots",
        modules=(DECODE,),
        includes="norms, gating, recurrence, a state per draft",
        make=_verify_table,
        refuse=_refuse_table,
        tables=True,
    ),
)
CHUNKS = tuple(
    Part(
        name=f"flashinfer chunk, cp {label}",
        modules=(PREFILL,),
        includes="recurrence; q and k are given as unit vectors, decay linear; pooled states",
        make=partial(_chunk, use_cp=use_cp),
        refuse=_refuse_prefill,
    )
    for label, use_cp in CONTEXT_PARALLEL
)
PREFILLS = (
    Part(
        name="flashinfer chunk, cp auto",
        modules=(PREFILL,),
        includes="copies of q, k and v, norms, gating in eager torch, recurrence",
        make=_prefill,
        refuse=_refuse_prefill,
    ),
)
