# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's verification of drafts: chains of P each, by snapshot or in a slot table.

It has no replay on this architecture, no trees, no chains of different lengths, and takes one
layout of snapshots: calls for these go to the Triton kernel.
"""

from __future__ import annotations

import torch
from gdn_backend_triton.launch import refuse_gradients
from gdn_backend_triton.mtp_verify import make_mtp_verify as make_triton_verify
from torch import Tensor

from gdn_backend_cuda.flashinfer_probe import VERIFY, VERIFY_BFLOAT16, load
from gdn_backend_cuda.slots import ALIGNMENT, Around, Placed, aligned, kernel_output
from gdn_portable.errors import InputError
from gdn_portable.interface import MtpVerify
from gdn_portable.metadata import Drafts, SnapshotDrafts, VerifyMetadata, draft_protocol
from gdn_portable.spec import Device, GdnSpec

# a sequence of this index is neither read nor written, nor are its snapshots
SKIPPED = -1
# snapshots are found by a 32-bit number of heads
MOST_SNAPSHOTS = 131072


def make_mtp_verify(spec: GdnSpec, device: Device, *, deterministic: bool) -> MtpVerify:
    """Return the op."""
    triton_verify = make_triton_verify(spec, device, deterministic=deterministic)
    is_float32 = spec.state_dtype is torch.float32
    launch, around = load(VERIFY if is_float32 else VERIFY_BFLOAT16), Around.of(device)
    absent = SKIPPED if is_float32 else spec.scratch_slot
    scratch = spec.scratch_slot
    if scratch is None or absent is None:
        raise InputError("scratch_slot is None, needs a slot that padding may write")
    if is_float32:
        pool, norm = "initial_state", "use_qk_l2norm"
    else:
        pool, norm = "initial_state_source", "use_qk_l2norm_in_kernel"

    def serves(state: Tensor, metadata: VerifyMetadata, drafts: Drafts | None, B: int) -> bool:
        links = (metadata.parents, metadata.next_token, metadata.cu_seqlens, metadata.rows)
        if any(link is not None for link in links) or metadata.max_drafts < 2:
            return False
        if drafts is None:
            return metadata.state_indices.shape[1] == metadata.max_drafts and state.is_contiguous()
        if not isinstance(drafts, SnapshotDrafts) or not is_float32 or drafts.state is None:
            return False  # in bfloat16 snapshots of padding would be written
        kept = drafts.state
        return (
            kept.shape[1] == metadata.max_drafts
            and kept.dtype is torch.float32
            and kept.is_contiguous()
            and kept.data_ptr() % ALIGNMENT == 0
            and B * metadata.max_drafts * spec.num_v_heads < MOST_SNAPSHOTS
        )

    def mtp_verify(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        *,
        metadata: VerifyMetadata,
        drafts: Drafts | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(v)
        draft_protocol(metadata, drafts)
        P = metadata.max_drafts
        B = len(v) // P
        if not B or not serves(state, metadata, drafts, B):
            return triton_verify(
                q, k, v, a, b, A_log, dt_bias, state, metadata=metadata, drafts=drafts, out=out
            )
        o = kernel_output(out, v, torch.bfloat16)
        result = o if out is None else out
        placed = Placed(
            a,
            dt_bias,
            metadata.state_indices,
            around,
            drafts=P,
            pad=spec.pad_slot,
            absent=absent,
            scratch=scratch,
            num_accepted=metadata.num_accepted if drafts is None else None,
            wide=is_float32,
        )

        def by_draft(rows: Tensor) -> Tensor:
            grouped: Tensor = rows.unflatten(0, (B, P))
            return grouped

        if isinstance(drafts, SnapshotDrafts):
            kept = {"intermediate_states_buffer": drafts.state, "disable_state_update": True}
        else:
            kept = {"ssm_state_indices": by_draft(placed.targets), "disable_state_update": False}
        launch(
            q=by_draft(aligned(q)),
            k=by_draft(aligned(k)),
            v=by_draft(aligned(v)),
            A_log=aligned(A_log.float()),
            a=by_draft(placed.a),
            dt_bias=aligned(dt_bias.float()),
            b=by_draft(aligned(b)),
            scale=spec.q_scale,
            output=by_draft(o),
            initial_state_indices=placed.read,
            **{pool: state, norm: spec.qk_l2norm},
            **kept,
        )
        placed.finish(o, result, P)
        return result

    return mtp_verify
