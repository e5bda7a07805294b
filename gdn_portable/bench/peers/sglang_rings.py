# SPDX-License-Identifier: Apache-2.0
"""SGLang's kernels that keep tokens and not states, behind --enable-linear-replayssm*."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gdn_portable.bench.inputs import Batch
from gdn_portable.bench.peers.part import Part
from gdn_portable.bench.peers.sglang import FUSED, KERNELS, SCATTER, fused_rule

RING = f"{KERNELS}.attention.linear.fused_recurrent_linear_replayssm"
FOLD = f"{KERNELS}.attention.linear.gdn_replayssm_spec_fold"


def _ring_decode(batch: Batch) -> Callable[[Tensor], Tensor]:
    call = importlib.import_module(RING).fused_recurrent_linear_replayssm_decode
    spec, params, deferred = batch.spec, batch.params, batch.deferred
    assert deferred is not None
    shape = (batch.case.num_sequences, 1, spec.num_v_heads, spec.head_v_dim)
    out = torch.empty(shape, dtype=spec.dtype, device=batch.device)
    # it keeps normalised keys, and has a row more, which is never read
    norms = deferred.k.float().norm(dim=-1, keepdim=True)
    ratio = spec.num_v_heads // spec.num_k_heads
    u = deferred.u * norms.repeat_interleave(ratio, dim=2)
    k, d, g = (
        functional.pad(x.transpose(1, 2), (0, 0, 0, 1)).to(dtype)
        for x, dtype in (
            (deferred.k / norms, spec.dtype),
            (u, spec.dtype),
            (deferred.g[..., None], torch.float32),
        )
    )

    def decode(mixed: Tensor) -> Tensor:
        call(
            mixed_qkv=mixed,
            a=batch.a,
            b=batch.b,
            A_log=params.A_log,
            dt_bias=params.dt_bias,
            scale=spec.q_scale,
            initial_state=batch.state,
            d_cache=d,
            k_cache=k,
            g_cache=g[..., 0],
            out=out,
            ssm_state_indices=batch.slots.slots,
            write_pos=batch.slots.num_deferred,
            use_qk_l2norm_in_kernel=spec.qk_l2norm,
        )
        return out[:, 0]

    return decode


def _ring_verify(batch: Batch) -> Callable[[Tensor], Tensor]:
    ring = {f"replayssm_{name}": part for name, part in _draft_ring(batch).items()}
    return fused_rule(batch, disable_state_update=True, cache_ring=True, **ring)


def _draft_ring(batch: Batch) -> dict[str, Tensor]:
    """Return room for the drafts of every slot, which a verify and its commit share."""
    spec, slots, P = batch.spec, batch.slots.num_slots, batch.case.drafts
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    shapes = {"rawv": (HV, P, V), "rawk": (H, P, K), "g": (HV, P), "beta": (HV, P)}
    if not batch.shared:
        for name, shape in shapes.items():
            dtype = spec.dtype if name.startswith("raw") else torch.float32
            part = torch.zeros(slots, *shape, dtype=dtype, device=batch.device)
            batch.shared[name] = part
    return batch.shared


def _fold(batch: Batch) -> Callable[[], Tensor]:
    fold = importlib.import_module(FOLD).commit_gdn_replayssm_fold_all_layers
    scatter = importlib.import_module(SCATTER).fused_mamba_state_scatter_with_mask
    kept, slots, last = batch.snapshots, batch.slots.slots, batch.slots.last_accepted
    assert kept.conv_state is not None
    windows = kept.conv_state[None]
    ring = {name: part[None] for name, part in _draft_ring(batch).items()}

    def commit() -> Tensor:
        fold(
            checkpoint_state=batch.state[None],
            rawv_cache=ring["rawv"],
            rawk_cache=ring["rawk"],
            g_cache=ring["g"],
            beta_cache=ring["beta"],
            ssm_state_indices=slots,
            accept_lens=batch.slots.num_accepted,
            max_cache_len=batch.case.drafts,
            num_k_heads=batch.spec.num_k_heads,
            use_qk_l2norm_in_kernel=batch.spec.qk_l2norm,
        )
        scatter(
            dst=batch.conv_state[None], src=windows, dst_indices_raw=slots, step_indices_raw=last
        )
        return batch.state

    return commit


DEFERRING = (
    Part(
        name="sglang ring decode",
        modules=(RING,),
        includes="norms, gating, recurrence; updates in the activations' dtype",
        make=_ring_decode,
    ),
)
FOLDING = (
    Part(
        name="sglang ring verify",
        modules=(FUSED,),
        includes="norms, gating, recurrence; the drafts are kept",
        make=_ring_verify,
    ),
)
FOLDS = (
    Part(
        name="sglang fold",
        modules=(FOLD, SCATTER),
        includes="a commit that replays the drafts",
        make=_fold,
    ),
)
