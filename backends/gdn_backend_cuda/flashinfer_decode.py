# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's decode on a pool of states, with the padding law around it."""

from __future__ import annotations

import torch
from gdn_backend_triton.launch import refuse_deferred, refuse_gradients
from torch import Tensor

from gdn_backend_cuda.flashinfer_probe import DECODE, load
from gdn_backend_cuda.slots import Around, Placed, aligned, kernel_output
from gdn_portable.errors import InputError
from gdn_portable.interface import RecurrentDecode
from gdn_portable.metadata import DeferredUpdates
from gdn_portable.spec import Device, GdnSpec


def make_recurrent_decode(spec: GdnSpec, device: Device, *, deterministic: bool) -> RecurrentDecode:
    """Return the op: slots and gates made fit, FlashInfer's kernel, zeros for padding."""
    launch, around = load(DECODE), Around.of(device)
    scratch = spec.scratch_slot
    if scratch is None:
        raise InputError("scratch_slot is None, needs a slot that padding may write")

    def recurrent_decode(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(q)
        refuse_deferred(deferred)
        o = kernel_output(out, v, torch.bfloat16)
        result = o if out is None else out
        if not len(v):
            return result
        placed = Placed(
            a,
            dt_bias,
            state_indices,
            around,
            drafts=1,
            pad=spec.pad_slot,
            absent=scratch,
            scratch=scratch,
            out_state_indices=out_state_indices,
        )
        launch(
            q=aligned(q)[:, None],
            k=aligned(k)[:, None],
            v=aligned(v)[:, None],
            state=None,
            A_log=aligned(A_log.float()),
            a=placed.a[:, None],
            dt_bias=aligned(dt_bias.float()),
            b=aligned(b)[:, None],
            scale=spec.q_scale,
            output=o[:, None],
            use_qk_l2norm=spec.qk_l2norm,
            initial_state=state,
            initial_state_indices=placed.read,
            output_state_indices=placed.write,
        )
        placed.finish(o, result, 1)
        return result

    return recurrent_decode
