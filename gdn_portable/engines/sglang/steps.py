# SPDX-License-Identifier: Apache-2.0
"""SGLang's GDN backend with one call of a step for every layer; imported as ``backend`` is."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.linear.utils import select_verify_intermediate_state_indices
from torch import Tensor

from gdn_portable.engines.sglang.backend import Backend
from gdn_portable.engines.sglang.bound import Layer, step_ops, updates_of
from gdn_portable.errors import UnsupportedCallError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import GdnParams, PrefillMetadata, SnapshotDrafts, VerifyMetadata
from gdn_portable.state import StatePool


class StepBackend(Backend):
    """Runs convolution and recurrence of a layer together, in the launches of the bound steps.

    SGLang's own methods run multi-item scoring.
    """

    def __init__(self, model_runner: Any):
        """Prepare as SGLang's backend does."""
        super().__init__(model_runner)
        self._ops = step_ops(self.kernel_dispatcher.bound)

    def forward_decode(
        self,
        layer: Layer,
        forward_batch: Any,
        mixed_qkv: Tensor | tuple[Tensor, ...],
        a: Tensor,
        b: Tensor,
        **kwargs: Any,
    ) -> Any:
        """Advance every sequence by one token, then track what SGLang asks for.

        Given the projections [q | k | v | z] and [b | a] in place of ``mixed_qkv``, return ``z``
        as well: views of them are passed on, where SGLang splits them by a kernel.
        """
        z = None
        if isinstance(mixed_qkv, tuple):
            mixed_qkv, z, b, a = _split(layer, *mixed_qkv)
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        pool = StatePool(cache.conv[0], cache.temporal)
        metadata, slots = self.forward_metadata, self.forward_metadata.mamba_cache_indices
        updates = updates_of(
            cache.replayssm_d,
            cache.replayssm_k,
            cache.replayssm_g,
            metadata.replayssm_write_pos,
            metadata.replayssm_force_flush,
        )
        ops = self._ops(layer, cache.conv[0], cache.temporal, mixed_qkv.dtype)
        o = ops.decode_step(mixed_qkv, a, b, _params(layer), pool, state_indices=slots, **updates)
        self._track_mamba_state_decode(
            forward_batch, cache.conv[0], cache.temporal, slots, layer.layer_id
        )
        return o[None] if z is None else (o[None], z)

    def forward_extend(
        self,
        layer: Layer,
        forward_batch: Any,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        **kwargs: Any,
    ) -> Any:
        """Run a prefill, or verify drafts."""
        if self.mis_metadata is not None:
            return super().forward_extend(layer, forward_batch, mixed_qkv, a, b, **kwargs)
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        ops = self._ops(layer, cache.conv[0], cache.temporal, mixed_qkv.dtype)
        rows = (mixed_qkv, a, b, _params(layer), StatePool(cache.conv[0], cache.temporal))
        if forward_batch.forward_mode.is_target_verify():
            batch, drafts = self._drafts(forward_batch, cache)
            return ops.verify_step(*rows, metadata=batch, drafts=drafts)[None]
        metadata, shared = self.forward_metadata, self._planned(ops)
        if metadata.has_mamba_track_mask:
            windows = mixed_qkv[metadata.track_conv_indices].transpose(1, 2)
            cache.conv[0][metadata.conv_states_mask_indices] = windows
        tracked, output = None, kwargs.get("linear_attn_output")
        if shared.checkpoint_offsets is not None:
            shape = (len(shared.checkpoint_offsets), *cache.temporal.shape[1:])
            tracked = torch.empty(shape, dtype=torch.float32, device=cache.temporal.device)
        o = ops.prefill_step(
            *rows,
            metadata=shared,
            checkpoint_state=tracked,
            out=None if output is None else output[0],
        )
        if metadata.has_mamba_track_mask:
            self._track_mamba_state_extend(
                forward_batch, None, cache.temporal, metadata, h_track_buf=tracked
            )
        return o[None]

    def _planned(self, ops: GdnOps) -> PrefillMetadata:
        """Return the batch that the layers share, planned.

        Raises:
            UnsupportedCallError: SGLang did not announce a prefill.
        """
        if self._shared is None:
            raise UnsupportedCallError("a prefill is run, needs init_forward_metadata before it")
        return self._shared.planned(ops)

    def _drafts(self, forward_batch: Any, cache: Any) -> tuple[VerifyMetadata, SnapshotDrafts]:
        """Return a batch of drafts, and the buffers that keep a state and a window after each."""
        metadata, P = self.forward_metadata, forward_batch.spec_info.draft_token_num
        slots, cu_seqlens = metadata.mamba_cache_indices, metadata.query_start_loc
        B = len(cu_seqlens) - 1
        batch = VerifyMetadata(
            state_indices=slots,
            max_drafts=P,
            cu_seqlens=cu_seqlens,
            rows=select_verify_intermediate_state_indices(
                self.verify_intermediate_state_indices,
                forward_batch.req_pool_indices,
                slots[:B] >= 0,
                self.req_to_token_pool.size,
            ),
            parents=metadata.retrieve_parent_token,
            next_token=metadata.retrieve_next_token,
            next_sibling=metadata.retrieve_next_sibling,
        )
        return batch, SnapshotDrafts(cache.intermediate_conv_window[0], cache.intermediate_ssm)


def _split(layer: Layer, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """View projections as ``mixed_qkv`` [B, D], z [B, HV, V], b [B, HV] and a [B, HV]."""
    HV, V = layer.num_v_heads, layer.head_v_dim
    mixed_qkv, z = qkvz.tensor_split((qkvz.shape[-1] - HV * V,), dim=-1)
    b, a = ba.split(HV, dim=-1)
    return mixed_qkv, z.unflatten(-1, (HV, V)), b, a


def _params(layer: Layer) -> GdnParams:
    return GdnParams(layer.conv_weights, layer.A_log, layer.dt_bias, layer.bias)
