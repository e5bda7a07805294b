# SPDX-License-Identifier: Apache-2.0
"""The kernel class behind SGLang's dispatcher: its method signatures, on the bound ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_portable.engines.sglang.bound import Bind, rule_ops, updates_of
from gdn_portable.errors import InputError, UnsupportedCallError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import PrefillMetadata, SnapshotDrafts, VerifyMetadata

CHUNK_SIZE = 64  # tokens, in which SGLang counts where a state is tracked


@dataclass(slots=True, eq=False)
class SharedPrefill:
    """A batch that every layer of a step runs; the first of them plans it for all.

    Attributes:
        metadata: the batch.
        planned_by: the ops whose plan it has.
    """

    metadata: PrefillMetadata
    planned_by: GdnOps | None = None

    def planned(self, ops: GdnOps) -> PrefillMetadata:
        """Return the metadata, with a plan of ``ops``."""
        if self.planned_by is not ops:
            ops.plan_prefill(self.metadata)
            self.planned_by = ops
        return self.metadata


class GdnKernel:
    """SGLang's ``LinearAttnKernelBase`` for GDN layers, by its methods and capabilities.

    States are read and written in place in SGLang's pool [slots, HV, V, K], through its strides.
    A negative slot is padding: it touches no state and gives zeros. Activations come as one packed
    sequence, [1, T, heads, dim], of any token stride; an axis of ones is never copied.
    """

    uses_state_checkpoints = False
    supports_fused_chain_verify = False
    supports_strided_target_verify_qkv = True
    supports_track_state_snapshot = True
    supports_packed_decode = True

    def __init__(self, bind: Bind) -> None:
        """Take what binds the ops for the layers that are met."""
        self._ops = rule_ops(bind)
        self._shared: SharedPrefill | None = None

    def bind(self, conv_state: Tensor, state: Tensor, dtype: torch.dtype) -> GdnOps:
        """Bind for a layer's pools, before it is called.

        Args:
            conv_state: [slots, D, L] windows.
            state: [slots, HV, V, K] states.
            dtype: of the activations.

        Raises:
            UnsupportedError: an op has no kernel that is able; every kernel's reasons are given.
        """
        HV, V, K = state.shape[1:]
        H = (conv_state.shape[1] - HV * V) // (2 * K)
        return self._ops(torch.Size((H, K)), torch.Size((HV, V)), state, dtype, None)

    def begin_prefill(self, shared: SharedPrefill | None) -> None:
        """Take the batch of the next calls of ``extend``, with the very tensors they are given."""
        self._shared = shared

    def packed_decode(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        scale: float,
        ssm_states: Tensor,
        cache_indices: Tensor,
        num_v_heads: int,
        head_v_dim: int,
        replayssm_d: Tensor | None = None,
        replayssm_k: Tensor | None = None,
        replayssm_g: Tensor | None = None,
        replayssm_write_pos: Tensor | None = None,
        replayssm_force_flush: Tensor | None = None,
    ) -> Tensor:
        """Advance every sequence by one token, from the convolution's output.

        Args:
            mixed_qkv: [B, D] rows [q | k | v], any row stride.
            a: [B, HV] decay input.
            b: [B, HV] write-strength input, before sigmoid.
            A_log: [HV].
            dt_bias: [HV].
            scale: multiplies q.
            ssm_states: [slots, HV, V, K].
            cache_indices: [B] slots.
            num_v_heads: HV.
            head_v_dim: V.
            replayssm_d: [slots, HV, L, V] ring of updates, or None: states are then written every
                L tokens alone.
            replayssm_k: [slots, H, L, K] their keys.
            replayssm_g: [slots, HV, L] their log decay.
            replayssm_write_pos: [B] updates that are in the ring.
            replayssm_force_flush: [B] rows whose states are written now, or None.

        Returns:
            [1, B, HV, V] outputs.

        Raises:
            InputError: a part of the ring is missing.
        """
        updates = updates_of(
            replayssm_d, replayssm_k, replayssm_g, replayssm_write_pos, replayssm_force_flush
        )
        K = ssm_states.shape[-1]
        key_dim = (mixed_qkv.shape[-1] - num_v_heads * head_v_dim) // 2
        q, k, v = mixed_qkv.split((key_dim, key_dim, num_v_heads * head_v_dim), dim=-1)
        q, k = q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K))
        v = v.unflatten(-1, (num_v_heads, head_v_dim))
        ops = self._ops(k.shape[-2:], v.shape[-2:], ssm_states, k.dtype, scale)
        return ops.recurrent_decode(
            q, k, v, a, b, A_log, dt_bias, ssm_states, state_indices=cache_indices, **updates
        )[None]

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
    ) -> Tensor:
        """Advance every sequence by one token.

        Args:
            q: [1, B, H, K] queries.
            k: [1, B, H, K] keys.
            v: [1, B, HV, V] values.
            a: [B, HV] decay input.
            b: [B, HV] write-strength input, before sigmoid.
            A_log: [HV].
            dt_bias: [HV].
            ssm_states: [slots, HV, V, K].
            cache_indices: [B] slots.
            query_start_loc: [B + 1] offsets; of sequences of one token each, or padding.

        Returns:
            [1, B, HV, V] outputs.

        Raises:
            InputError: there are more tokens than sequences.
        """
        if len(query_start_loc) - 1 != q.shape[1]:
            raise InputError(
                f"query_start_loc names {len(query_start_loc) - 1} sequences, needs "
                f"{q.shape[1]}, one for each token"
            )
        ops = self._ops(k.shape[-2:], v.shape[-2:], ssm_states, k.dtype, None)
        q, k, v = _packed(q=q, k=k, v=v)
        return ops.recurrent_decode(
            q, k, v, a, b, A_log, dt_bias, ssm_states, state_indices=cache_indices
        )[None]

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        inplace_update: bool = True,
        extend_prefix_lens: Tensor | None = None,
        track_state: Tensor | None = None,
        track_chunk_idx: Tensor | None = None,
        output: Tensor | None = None,
        layer_id: int | None = None,
        state_checkpoint_cu_starts: Tensor | None = None,
        num_state_checkpoints: int = 0,
        state_checkpoint_every_n_tokens: int = 0,
    ) -> tuple[Tensor, None, None]:
        """Run packed sequences from their slots' states, and store the states after them.

        Args:
            q: [1, T, H, K] queries.
            k: [1, T, H, K] keys.
            v: [1, T, HV, V] values.
            g: [1, T, HV] float32 log decay.
            beta: [1, T, HV] float32 write strength, after sigmoid.
            ssm_states: [slots, HV, V, K].
            cache_indices: [N] slots; without ``inplace_update`` one may be named again.
            query_start_loc: [N + 1] offsets.
            inplace_update: whether states are stored.
            extend_prefix_lens: [N] tokens before these; a sequence of 0 does not read its slot.
                None: all are read.
            track_state: [N, HV, V, K] float32, filled with the states asked for.
            track_chunk_idx: [N] chunks of 64 tokens before the tracked state; negative: none.
            output: [1, T, HV, V] to write, or None.
            layer_id: not needed.
            state_checkpoint_cu_starts: None.
            num_state_checkpoints: 0.
            state_checkpoint_every_n_tokens: 0.

        Returns:
            [1, T, HV, V] outputs, and twice None: states are in the pool and in ``track_state``.

        Raises:
            UnsupportedCallError: states are to be kept in FlashInfer's packed form.
            InputError: arguments do not go together.
        """
        if state_checkpoint_cu_starts is not None or num_state_checkpoints:
            raise UnsupportedCallError(
                "packed state checkpoints are asked for, needs track_state and track_chunk_idx"
            )
        if (track_state is None) is not (track_chunk_idx is None):
            raise InputError("track_state and track_chunk_idx: needs both or neither")
        ops = self._ops(k.shape[-2:], v.shape[-2:], ssm_states, k.dtype, None)
        metadata = self._planned(ops, query_start_loc, cache_indices, inplace_update, track_state)
        if metadata is None:
            metadata = PrefillMetadata(query_start_loc, cache_indices)
            if not inplace_update:
                metadata.out_state_indices = torch.full_like(cache_indices, -1)
            if extend_prefix_lens is not None:
                metadata.has_initial_state = extend_prefix_lens > 0
            if track_chunk_idx is not None:
                metadata.checkpoint_offsets = track_chunk_idx * CHUNK_SIZE
                metadata.checkpoint_indices = torch.arange(len(track_chunk_idx), device=q.device)
            ops.plan_prefill(metadata)
        q, k, v, g, beta = _packed(q=q, k=k, v=v, g=g, beta=beta)
        o = ops.chunk_prefill(
            q,
            k,
            v,
            g,
            beta,
            ssm_states,
            metadata=metadata,
            checkpoint_state=track_state,
            out=None if output is None else output[0],
        )
        return o[None], None, None

    def target_verify(
        self,
        A_log: Tensor,
        dt_bias: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        intermediate_states_buffer: Tensor,
        intermediate_state_indices: Tensor,
        cache_steps: int,
        retrieve_parent_token: Tensor | None,
        stable_rows: bool = False,
    ) -> Tensor:
        """Run the drafts of every sequence; the state after each goes to the intermediate buffer.

        Args:
            A_log: [HV].
            dt_bias: [HV].
            q: [1, T, H, K] queries.
            k: [1, T, H, K] keys.
            v: [1, T, HV, V] values.
            a: [T, HV] decay input.
            b: [T, HV] write-strength input, before sigmoid.
            ssm_states: [slots, HV, V, K], read and left as it is.
            cache_indices: [B] slots, or more.
            query_start_loc: [B + 1] offsets of the drafts; empty sequences are padding.
            intermediate_states_buffer: [rows, steps, HV, V, K], of at least ``cache_steps`` steps.
            intermediate_state_indices: [B] rows of it, or more.
            cache_steps: P, the most drafts of a sequence.
            retrieve_parent_token: [B, P] parent of each draft; None is a chain.
            stable_rows: of no effect: rows are those of ``intermediate_state_indices`` in any case.

        Returns:
            [1, T, HV, V] outputs.

        Raises:
            InputError: the buffer cannot hold the states.
        """
        kept = intermediate_states_buffer
        fits = kept.dim() == 5 and kept.shape[1] >= cache_steps
        if not fits or kept.shape[2:] != ssm_states.shape[1:] or kept.dtype != ssm_states.dtype:
            needed = ("rows", cache_steps, *ssm_states.shape[1:])
            raise InputError(
                f"intermediate_states_buffer is {tuple(kept.shape)} of {kept.dtype}, needs "
                f"({', '.join(map(str, needed))}) of {ssm_states.dtype}"
            )
        ops = self._ops(k.shape[-2:], v.shape[-2:], ssm_states, k.dtype, None)
        batch = VerifyMetadata(
            state_indices=cache_indices,
            max_drafts=cache_steps,
            cu_seqlens=query_start_loc,
            rows=intermediate_state_indices,
            parents=retrieve_parent_token,
        )
        q, k, v = _packed(q=q, k=k, v=v)
        return ops.mtp_verify(
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            ssm_states,
            metadata=batch,
            drafts=SnapshotDrafts(None, kept),
        )[None]

    def _planned(
        self,
        ops: GdnOps,
        query_start_loc: Tensor,
        cache_indices: Tensor,
        inplace_update: bool,
        track_state: Tensor | None,
    ) -> PrefillMetadata | None:
        """Return the step's metadata, planned, where this call belongs to it."""
        shared = self._shared
        if shared is None or query_start_loc is not shared.metadata.cu_seqlens:
            return None
        tracks = shared.metadata.checkpoint_offsets is not None
        if cache_indices is not shared.metadata.state_indices or not inplace_update:
            return None
        return shared.planned(ops) if tracks is (track_state is not None) else None


def _packed(**given: Tensor) -> tuple[Tensor, ...]:
    """Return the packed sequence of each tensor [1, T, ...]."""
    for name, x in given.items():
        if x.shape[0] != 1:
            raise InputError(f"{name} has shape {tuple(x.shape)}, needs 1 first: it is packed")
    return tuple(x[0] for x in given.values())
