# SPDX-License-Identifier: Apache-2.0
"""The ops, called by way of SGLang's signatures, so that the conformance cases try the shim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from gdn_portable import GdnOps, GdnSpec, SnapshotDrafts
from gdn_portable.engines.sglang import GdnKernel
from gdn_portable.engines.sglang.bound import Bind
from gdn_portable.engines.sglang.functions import make_functions
from gdn_portable.testing import Case
from tests.cases import first_child_next_sibling


@cache
def simulated(spec: GdnSpec, device: object, *, deterministic: bool = False) -> GdnOps:
    """Bind for a simulated AMD GPU."""
    from ci.amdgcn import bind_simulated

    return bind_simulated(spec, "gfx942", deterministic=deterministic)


def is_sglangs(case: Case) -> bool:
    """Say whether SGLang's signatures can express a case."""
    arguments = case.arguments
    metadata, drafts = arguments.get("metadata"), arguments.get("drafts")
    return (
        case.name.startswith(("conv of ", "rule of ", "gating"))
        and arguments.get("out_state_indices") is None
        and getattr(metadata, "out_state_indices", None) is None
        and ("drafts" not in arguments or isinstance(drafts, SnapshotDrafts))
        and not (case.name.startswith("conv of ") and "ragged" in case.name)
    )


def by_way_of_sglang(ops: GdnOps, bind: Bind) -> GdnOps:
    """Return ops that are called as SGLang calls its kernels, which ``bind`` binds."""
    functions, kernel = make_functions(bind), GdnKernel(bind)

    def conv1d_prefill(x, weight, bias, conv_state, *, metadata, out=None):
        given = metadata.has_initial_state
        reads = torch.ones(len(metadata.cu_seqlens) - 1, dtype=torch.bool, device=x.device)
        return functions.causal_conv1d_fn(
            x.transpose(0, 1),
            weight,
            bias,
            activation=ops.spec.activation,
            conv_states=conv_state,
            has_initial_state=reads if given is None else given,
            cache_indices=metadata.state_indices,
            query_start_loc=metadata.cu_seqlens,
            seq_lens_cpu=metadata.cu_seqlens.diff().tolist(),
            block_table=torch.zeros(1, 2, dtype=torch.int32, device=x.device),
        ).transpose(0, 1)

    def conv1d_update(x, weight, bias, conv_state, *, state_indices, out=None):
        return functions.causal_conv1d_update(
            x, conv_state, weight, bias, ops.spec.activation, conv_state_indices=state_indices
        )

    def conv1d_verify(x, weight, bias, conv_state, *, metadata, drafts, out=None):
        P, links = metadata.max_drafts, {}
        if metadata.parents is not None:
            next_token, next_sibling = first_child_next_sibling(metadata.parents.cpu())
            links = {
                "retrieve_next_token": next_token.to(x.device),
                "retrieve_next_sibling": next_sibling.to(x.device),
                "retrieve_parent_token": torch.full_like(metadata.parents, -9),
            }
        y = functions.causal_conv1d_update(
            x.unflatten(0, (-1, P)).transpose(1, 2),
            conv_state,
            weight,
            bias,
            ops.spec.activation,
            conv_state_indices=metadata.state_indices,
            intermediate_conv_window=drafts.conv_state,
            intermediate_state_indices=metadata.rows,
            **links,
        ).transpose(1, 2)
        for written in links and [links["retrieve_parent_token"]]:
            live = metadata.state_indices[: len(written)] >= 0
            assert torch.equal(written[live][:, 1:], metadata.parents[live][:, 1:])
        return y.reshape(-1, y.shape[-1])

    def gating(a, b, A_log, dt_bias):
        g, beta = functions.fused_gdn_gating(A_log, a, b, dt_bias)
        return g[0], beta[0]

    def recurrent_decode(
        q, k, v, a, b, A_log, dt_bias, state, *, state_indices, deferred=None, out=None, **counts
    ):
        pool = {"ssm_states": state, "cache_indices": state_indices}
        if deferred is None:
            offsets = torch.arange(len(q) + 1, device=q.device)
            rows = (x[None] for x in (q, k, v))
            rates = {"A_log": A_log, "dt_bias": dt_bias}
            return kernel.decode(*rows, a, b, **rates, **pool, query_start_loc=offsets)[0]
        kept = deferred.u, deferred.k, deferred.g
        # a ring has a row more, which is never used
        ring = [
            torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1).transpose(1, 2) for x in kept
        ]
        y = kernel.packed_decode(
            torch.cat([x.flatten(1) for x in (q, k, v)], 1),
            a,
            b,
            A_log=A_log,
            dt_bias=dt_bias,
            scale=ops.spec.q_scale,
            **pool,
            num_v_heads=v.shape[1],
            head_v_dim=v.shape[2],
            **dict(zip(("replayssm_d", "replayssm_k", "replayssm_g"), ring, strict=True)),
            replayssm_write_pos=counts["num_deferred"],
            replayssm_force_flush=counts.get("flush"),
        )[0]
        for x, row in zip(kept, ring, strict=True):
            x.copy_(row.transpose(1, 2)[:, :-1])
        return y

    def chunk_prefill(q, k, v, g, beta, state, *, metadata, out=None):
        given = metadata.has_initial_state
        o, last, chunks = kernel.extend(
            q[None],
            k[None],
            v[None],
            g[None],
            beta[None],
            ssm_states=state,
            cache_indices=metadata.state_indices,
            query_start_loc=metadata.cu_seqlens,
            extend_prefix_lens=None if given is None else given.int() * 9,
            output=out[None],
            layer_id=0,
        )
        assert last is None and chunks is None and o.data_ptr() == out.data_ptr()
        return o[0]

    def mtp_verify(q, k, v, a, b, A_log, dt_bias, state, *, metadata, drafts, out=None):
        P, cu_seqlens = metadata.max_drafts, metadata.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, len(q) + 1, P, device=q.device)
        return kernel.target_verify(
            A_log,
            dt_bias,
            q[None],
            k[None],
            v[None],
            a,
            b,
            ssm_states=state,
            cache_indices=metadata.state_indices,
            query_start_loc=cu_seqlens,
            intermediate_states_buffer=drafts.state,
            intermediate_state_indices=metadata.rows,
            cache_steps=P,
            retrieve_parent_token=metadata.parents,
        )[0]

    named: dict[str, Callable[..., Any]] = {
        "conv1d_prefill": conv1d_prefill,
        "conv1d_update": conv1d_update,
        "conv1d_verify": conv1d_verify,
        "gating": gating,
        "recurrent_decode": recurrent_decode,
        "chunk_prefill": chunk_prefill,
        "mtp_verify": mtp_verify,
    }
    return dataclasses.replace(ops, **named)
