# SPDX-License-Identifier: Apache-2.0
"""Run every op once on private memory, so that nothing compiles or allocates later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdn_portable.metadata import (
    Drafts,
    GdnParams,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
)
from gdn_portable.spec import Device, GdnSpec, Op, torch_device
from gdn_portable.state import StatePool
from gdn_portable.steps import split_qkv


def warmup(
    spec: GdnSpec,
    device: Device,
    launchers: Mapping[Op, Callable[..., Any]],
    *,
    batch_sizes: Sequence[int] = (1,),
    prefill_tokens: Sequence[int] = (64,),
    max_drafts: int = 4,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Run the ops and the steps, with and without a gate, for every size and protocol."""
    say = progress or (lambda _: None)
    target = torch_device(device)
    with torch.device(target), torch.no_grad():
        for tokens in filter(None, prefill_tokens):
            say(f"prefill of {tokens} tokens")
            metadata = PrefillMetadata(torch.tensor([0, tokens]), torch.tensor([_slot(spec, 0)]))
            launchers[Op.PLAN_PREFILL](metadata)
            pool = StatePool.allocate(spec, _slot(spec, 1), target)
            prefill = (Op.CONV1D_PREFILL, Op.CHUNK_PREFILL, Op.PREFILL_STEP)
            _run(spec, launchers, prefill, tokens, pool, metadata=metadata)
        for batch in filter(None, batch_sizes):
            say(f"decode of {batch} sequences")
            slots = torch.arange(batch) + _slot(spec, 0)
            pool = StatePool.allocate(spec, _slot(spec, batch), target)
            decode = (Op.CONV1D_UPDATE, Op.RECURRENT_DECODE, Op.DECODE_STEP)
            _run(spec, launchers, decode, batch, pool, state_indices=slots)
            if max_drafts:
                say(f"verify of {batch} sequences with {max_drafts} drafts")
                _verify(spec, launchers, batch, max_drafts, target)


def _verify(
    spec: GdnSpec,
    launchers: Mapping[Op, Callable[..., Any]],
    batch: int,
    max_drafts: int,
    target: torch.device,
) -> None:
    first = _slot(spec, 0)
    slots = torch.arange(batch) + first
    kept: list[tuple[Drafts | None, Tensor]] = [
        (ReplayDrafts.allocate(spec, first + batch, max_drafts, target), slots),
        (SnapshotDrafts.allocate(spec, batch, max_drafts, target), slots),
    ]
    if spec.conv_state_len >= spec.conv_width - 2 + max_drafts:
        kept.append((None, first + torch.arange(batch * max_drafts).view(batch, max_drafts)))
    verify = (Op.CONV1D_VERIFY, Op.MTP_VERIFY, Op.VERIFY_STEP)
    for drafts, indices in kept:
        metadata = VerifyMetadata(indices, max_drafts, num_accepted=torch.ones_like(slots))
        pool = StatePool.allocate(spec, first + indices.numel(), target)
        tokens = batch * max_drafts
        _run(spec, launchers, verify, tokens, pool, metadata=metadata, drafts=drafts)
        if drafts is not None:
            last = torch.zeros_like(slots)
            launchers[Op.MTP_COMMIT](pool, drafts, metadata=metadata, last_accepted=last)


def _slot(spec: GdnSpec, index: int) -> int:
    """Return the ``index``-th slot that is not padding."""
    return max(spec.pad_slot + 1, 0) + index


def _run(
    spec: GdnSpec,
    launchers: Mapping[Op, Callable[..., Any]],
    ops: tuple[Op, Op, Op],
    tokens: int,
    pool: StatePool,
    **batch: Any,
) -> None:
    """Run a convolution, a recurrence, their step, and what stands between them, on ones."""
    conv, rule, step = ops
    HV, V = spec.num_v_heads, spec.head_v_dim
    mixed = torch.ones(tokens, spec.conv_dim, dtype=spec.dtype)
    a = torch.ones(tokens, HV, dtype=spec.dtype)
    gate = torch.ones(tokens, HV, V, dtype=spec.dtype)
    params = GdnParams(
        conv_weight=torch.ones(spec.conv_dim, spec.conv_width, dtype=spec.dtype),
        A_log=torch.zeros(HV),
        dt_bias=torch.zeros(HV),
        norm_weight=torch.ones(V, dtype=spec.dtype),
    )
    launchers[conv](mixed, params.conv_weight, None, pool.conv_state, **batch)
    g, beta = launchers[Op.GATING](a, a, params.A_log, params.dt_bias)
    gates = (g, beta) if rule is Op.CHUNK_PREFILL else (a, a, params.A_log, params.dt_bias)
    o = launchers[rule](*split_qkv(spec, mixed), *gates, pool.state, **batch)
    launchers[Op.GATED_RMS_NORM](o, gate, params.norm_weight, eps=params.norm_eps)
    for given in (None, gate):
        launchers[step](mixed, a, a, params, pool, gate=given, **batch)
