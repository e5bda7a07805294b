# SPDX-License-Identifier: Apache-2.0
"""aiter's chunked prefill, held to the contract of ``chunk_prefill``.

It checks no slot: states are gathered for it and put back by our commit kernel, which skips
padding. Lengths it reads on the host: from ``seq_lens_cpu``, else it waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gdn_backend_triton import installed_triton, is_before
from gdn_backend_triton.launch import empty_like, lazily, refuse_gradients
from torch import Tensor

from gdn_backend_rocm.aiter_source import Function
from gdn_portable.errors import UnsupportedCallError
from gdn_portable.interface import ChunkPrefill, PlanPrefill
from gdn_portable.metadata import PrefillMetadata, SnapshotDrafts, VerifyMetadata, plan_of
from gdn_portable.spec import Device, GdnSpec
from gdn_portable.state import StatePool

CHUNK_GATED_DELTA_RULE_OPT_VK = Function(
    module="ops.triton.gated_delta_net.gated_delta_rule",
    name="chunk_gated_delta_rule_opt_vk",
    parameters=(
        "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state",
        "use_qk_l2norm_in_kernel", "cu_seqlens", "state_dtype", "prefill_metadata",
    ),
    since="v0.1.19.post2",
)  # fmt: skip
BUILD_PREFILL_METADATA = Function(
    module="ops.prefill_batch_metadata",
    name="build_gated_delta_rule_prefill_metadata",
    parameters=("seq_lens_cpu", "cu_seqlens"),
    since="v0.1.19.post2",
)
COMMIT = lazily("gdn_backend_triton.mtp_commit:make_mtp_commit")
WITHOUT_BLOCK_POINTERS = (3, 9)  # the Triton that does not compile aiter's kernels


@dataclass(frozen=True, slots=True)
class AiterPlan:
    """aiter's own schedule of a batch."""

    made: Any


def prefill_is_missing() -> str | None:
    """Return why either function cannot be called."""
    missing = CHUNK_GATED_DELTA_RULE_OPT_VK.missing() or BUILD_PREFILL_METADATA.missing()
    triton = installed_triton()
    if missing is None and triton and not is_before(triton[1], WITHOUT_BLOCK_POINTERS):
        return f"{triton[0]} is {triton[1]}, without the block pointers of aiter's kernels"
    return missing


def make_plan_prefill(spec: GdnSpec, device: Device, *, deterministic: bool) -> PlanPrefill:
    """Return the op: aiter's schedule, made of lengths on the host, of tensors that are new."""
    make_plan = _planner()

    def plan_prefill(metadata: PrefillMetadata) -> None:
        metadata.plan = make_plan(metadata)

    return plan_prefill


def _planner() -> Callable[[PrefillMetadata], AiterPlan]:
    build = BUILD_PREFILL_METADATA.load()

    def make_plan(metadata: PrefillMetadata) -> AiterPlan:
        lengths = metadata.seq_lens_cpu
        if lengths is None:
            lengths = metadata.cu_seqlens.diff().tolist()
        return AiterPlan(build(seq_lens_cpu=lengths, cu_seqlens=metadata.cu_seqlens))

    return make_plan


def make_chunk_prefill(spec: GdnSpec, device: Device, *, deterministic: bool) -> ChunkPrefill:
    """Return the op, without checkpoints; a graph cannot capture it."""
    prefill = CHUNK_GATED_DELTA_RULE_OPT_VK.load(deterministic=deterministic)
    make_plan = _planner()
    commit = COMMIT(spec, device, deterministic=deterministic)

    def chunk_prefill(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        *,
        metadata: PrefillMetadata,
        checkpoint_state: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(q)
        if metadata.checkpoint_offsets is not None:
            raise UnsupportedCallError("checkpoint_offsets is given: the kernel keeps no states")
        plan = plan_of(metadata, AiterPlan) or make_plan(metadata)
        if out is None:
            out = empty_like(v)
        cu_seqlens, slots = metadata.cu_seqlens, metadata.state_indices
        N = cu_seqlens.shape[0] - 1
        slots = slots[:N]
        if not N:
            return out.zero_()
        padded = slots <= spec.pad_slot
        is_read = ~padded
        if metadata.has_initial_state is not None:
            is_read &= metadata.has_initial_state[:N]
        initial = state.index_select(0, slots.clamp(min=0)).contiguous()
        initial.masked_fill_(~is_read[:, None, None, None], 0)
        T = plan.made.schedule.total_prefill_tokens
        y, final = prefill(
            q=q[:T].contiguous()[None], k=k[:T].contiguous()[None], v=v[:T].contiguous()[None],
            g=g[:T].contiguous()[None], beta=beta[:T].contiguous()[None], scale=spec.q_scale,
            initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=spec.qk_l2norm,
            cu_seqlens=cu_seqlens, state_dtype=state.dtype, prefill_metadata=plan.made,
        )  # fmt: skip
        commit(
            StatePool(None, state),
            SnapshotDrafts(None, final[:, None]),
            metadata=VerifyMetadata(slots, max_drafts=1),
            last_accepted=torch.zeros_like(slots),
            out_state_indices=metadata.out_state_indices,
        )
        nobodys = padded.repeat_interleave(cu_seqlens.diff(), output_size=T)
        out[:T] = y[0].masked_fill_(nobodys[:, None, None], 0)
        out[T:] = 0
        return out

    return chunk_prefill
