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
    """Run the steps, with and without a gate, for every size and protocol."""
    say = progress or (lambda _: None)
    target = torch_device(device)
    with torch.device(target), torch.no_grad():
        params = _params(spec)
        for tokens in prefill_tokens:
            say(f"prefill of {tokens} tokens")
            metadata = PrefillMetadata(
                cu_seqlens=torch.tensor([0, tokens]), state_indices=torch.tensor([_slot(spec, 0)])
            )
            launchers[Op.PLAN_PREFILL](metadata)
            pool = StatePool.allocate(spec, _slot(spec, 1), target)
            for gate, step in _steps(spec, tokens, launchers[Op.PREFILL_STEP], params, pool):
                step(metadata=metadata, gate=gate)
        for batch in batch_sizes:
            say(f"decode of {batch} sequences")
            slots = torch.arange(batch) + _slot(spec, 0)
            pool = StatePool.allocate(spec, _slot(spec, batch), target)
            for gate, step in _steps(spec, batch, launchers[Op.DECODE_STEP], params, pool):
                step(state_indices=slots, gate=gate)
            if max_drafts:
                say(f"verify of {batch} sequences with {max_drafts} drafts")
                _verify(spec, batch, max_drafts, launchers, params, target)


def _verify(
    spec: GdnSpec,
    batch: int,
    max_drafts: int,
    launchers: Mapping[Op, Callable[..., Any]],
    params: GdnParams,
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
    for drafts, indices in kept:
        metadata = VerifyMetadata(indices, max_drafts, num_accepted=torch.ones_like(slots))
        pool = StatePool.allocate(spec, first + indices.numel(), target)
        verify = launchers[Op.VERIFY_STEP]
        for gate, step in _steps(spec, batch * max_drafts, verify, params, pool):
            step(metadata=metadata, drafts=drafts, gate=gate)
        if drafts is not None:
            last = torch.zeros_like(slots)
            launchers[Op.MTP_COMMIT](pool, drafts, metadata=metadata, last_accepted=last)


def _slot(spec: GdnSpec, index: int) -> int:
    """Return the ``index``-th slot that is not padding."""
    return max(spec.pad_slot + 1, 0) + index


def _params(spec: GdnSpec) -> GdnParams:
    return GdnParams(
        conv_weight=torch.randn(spec.conv_dim, spec.conv_width, dtype=spec.dtype),
        A_log=torch.zeros(spec.num_v_heads),
        dt_bias=torch.zeros(spec.num_v_heads),
        norm_weight=torch.ones(spec.head_v_dim, dtype=spec.dtype),
    )


def _steps(
    spec: GdnSpec, tokens: int, launch: Callable[..., Any], params: GdnParams, pool: StatePool
) -> list[tuple[Tensor | None, Callable[..., Any]]]:
    """Return the step with its inputs filled in, without and with a gate."""
    mixed = torch.randn(tokens, spec.conv_dim, dtype=spec.dtype)
    a, b = torch.randn(2, tokens, spec.num_v_heads, dtype=spec.dtype)
    gate = torch.randn(tokens, spec.num_v_heads, spec.head_v_dim, dtype=spec.dtype)

    def step(**kwargs: Any) -> Any:
        return launch(mixed, a, b, params, pool, **kwargs)

    return [(None, step), (gate, step)]
