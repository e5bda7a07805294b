# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for the functions that SGLang's GDN layers call around the recurrence.

They have SGLang's parameters, in its order, and differ in this: a padded row gives zeros, where
SGLang leaves memory as it was; ``beta`` is not rounded; and the window of a verified sequence stays
as it is until SGLang commits one of the intermediate windows, where SGLang overwrites it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_portable.engines.sglang.bound import PAD_SLOT, Bind, conv_ops, gate_ops
from gdn_portable.errors import InputError, UnsupportedCallError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import PrefillMetadata, SnapshotDrafts, VerifyMetadata


class Functions(NamedTuple):
    """Drop-ins that share what they bound.

    Attributes:
        causal_conv1d_fn: of packed sequences.
        causal_conv1d_update: of one token, or of the drafts, of every sequence.
        fused_gdn_gating: log decay and write strength.
    """

    causal_conv1d_fn: Callable[..., Tensor]
    causal_conv1d_update: Callable[..., Tensor]
    fused_gdn_gating: Callable[..., tuple[Tensor, Tensor]]


def make_functions(bind: Bind) -> Functions:
    """Return the drop-ins on what ``bind`` binds."""
    conv, gates = conv_ops(bind), gate_ops(bind)

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        conv_states: Tensor | None = None,
        query_start_loc: Tensor | None = None,
        seq_lens_cpu: Sequence[int] | None = None,
        cache_indices: Tensor | None = None,
        has_initial_state: Tensor | None = None,
        activation: bool | str | None = "silu",
        pad_slot_id: int | None = PAD_SLOT,
        validate_data: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        """Convolve packed sequences, and advance their windows in place.

        Args:
            x: [D, T] inputs, any strides: a transposed projection costs no copy.
            weight: [D, W].
            bias: [D], or None.
            conv_states: [slots, D, L] windows, any strides.
            query_start_loc: [N + 1] offsets of the sequences.
            seq_lens_cpu: not needed.
            cache_indices: [N] slots; None is one after the other.
            has_initial_state: [N] bool, whether a window is read; None reads none.
            activation: "silu", "swish" or None.
            pad_slot_id: what stands for padding in ``cache_indices``.
            validate_data: of no effect: arguments are checked where ``bind`` was asked to.
            block_table: not needed.

        Returns:
            [D, T], a view of rows that are contiguous.

        Raises:
            InputError: there are no windows or no offsets, or shapes do not go together.
        """
        if conv_states is None or query_start_loc is None:
            missing = "conv_states" if conv_states is None else "query_start_loc"
            raise InputError(f"{missing} is None, needs a tensor: sequences are packed, with slots")
        rows, N = x.transpose(0, 1), len(query_start_loc) - 1
        ops = conv(rows, weight, conv_states, activation, pad_slot_id)
        metadata = PrefillMetadata(
            cu_seqlens=query_start_loc,
            state_indices=_slots(cache_indices, N, x.device),
            has_initial_state=has_initial_state,
        )
        if has_initial_state is None:
            metadata.has_initial_state = torch.zeros(N, dtype=torch.bool, device=x.device)
        return ops.conv1d_prefill(rows, weight, bias, conv_states, metadata=metadata).T

    def causal_conv1d_update(
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: bool | str | None = None,
        cache_seqlens: Tensor | None = None,
        conv_state_indices: Tensor | None = None,
        num_accept_tokens: Tensor | None = None,
        intermediate_conv_window: Tensor | None = None,
        intermediate_state_indices: Tensor | None = None,
        retrieve_next_token: Tensor | None = None,
        retrieve_next_sibling: Tensor | None = None,
        retrieve_parent_token: Tensor | None = None,
        pad_slot_id: int | None = PAD_SLOT,
        metadata: None = None,
        validate_data: bool = False,
    ) -> Tensor:
        """Convolve the next token, or the drafts, of every sequence with its window.

        Without ``intermediate_conv_window`` the windows advance in place. With it, the window after
        every draft goes there, and the sequences' own windows are left as they are.

        Args:
            x: [B, D] or [B, D, P], any strides; drafts of which [B * P, D] is no view are copied.
            conv_state: [slots, D, L] windows, any strides.
            weight: [D, W].
            bias: [D], or None.
            activation: "silu", "swish" or None.
            cache_seqlens: None.
            conv_state_indices: [B] slots; None is one after the other.
            num_accept_tokens: None.
            intermediate_conv_window: [rows, P, D, W - 1], which may overlap in a chain.
            intermediate_state_indices: [B] rows of it; None is one after the other.
            retrieve_next_token: [B, P] first child of each draft; None is a chain.
            retrieve_next_sibling: [B, P] next child of the same parent.
            retrieve_parent_token: [B, P] filled with the parents where the other two are given.
            pad_slot_id: what stands for padding in ``conv_state_indices``.
            metadata: None.
            validate_data: of no effect: arguments are checked where ``bind`` was asked to.

        Returns:
            [B, D] or [B, D, P], a view of rows that are contiguous.

        Raises:
            UnsupportedCallError: an argument is given that no GDN layer of SGLang gives.
            InputError: shapes or arguments do not go together.
        """
        _refuse(
            cache_seqlens=("windows are no ring", cache_seqlens),
            num_accept_tokens=("SGLang commits a window after it verified", num_accept_tokens),
            metadata=("nothing is read from it", metadata),
        )
        is_tree = retrieve_next_token is not None
        if is_tree is not (retrieve_next_sibling is not None):
            raise InputError("retrieve_next_token and retrieve_next_sibling: needs both or neither")
        if is_tree and (intermediate_conv_window is None or retrieve_parent_token is None):
            raise InputError(
                "retrieve_next_token is given: needs intermediate_conv_window and "
                "retrieve_parent_token as well, both are written"
            )
        slots = _slots(conv_state_indices, len(x), x.device)
        if x.dim() == 2:
            if intermediate_conv_window is not None:
                raise InputError("intermediate_conv_window is given: needs x [B, D, P], got [B, D]")
            ops = conv(x, weight, conv_state, activation, pad_slot_id)
            return ops.conv1d_update(x, weight, bias, conv_state, state_indices=slots)
        rows = x.transpose(1, 2).flatten(0, 1)  # [B * P, D]
        B, D, P = x.shape
        ops = conv(rows, weight, conv_state, activation, pad_slot_id)
        if intermediate_conv_window is None:
            y = _advance(ops, rows, weight, bias, conv_state, slots, P)
        else:
            batch = VerifyMetadata(
                state_indices=slots,
                max_drafts=P,
                rows=intermediate_state_indices,
                parents=retrieve_parent_token if is_tree else None,
                next_token=retrieve_next_token,
                next_sibling=retrieve_next_sibling,
            )
            drafts = SnapshotDrafts(_windows(intermediate_conv_window, weight, conv_state, P), None)
            y = ops.conv1d_verify(rows, weight, bias, conv_state, metadata=batch, drafts=drafts)
        return y.view(B, P, D).transpose(1, 2)

    def fused_gdn_gating(
        A_log: Tensor,
        a: Tensor,
        b: Tensor,
        dt_bias: Tensor,
        beta: float = 1.0,
        threshold: float = 20.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log decay and write strength, [1, T, HV] float32 both.

        Args:
            A_log: [HV].
            a: [T, HV] decay input, any strides.
            b: [T, HV] write-strength input, any strides.
            dt_bias: [HV].
            beta: 1, of the softplus.
            threshold: 20, of the softplus.

        Raises:
            UnsupportedCallError: another softplus is asked for.
        """
        if (beta, threshold) != (1.0, 20.0):
            raise UnsupportedCallError(
                f"softplus has beta {beta} and threshold {threshold}, needs 1 and 20"
            )
        g, strength = gates(a).gating(a, b, A_log, dt_bias)
        return g[None], strength[None]

    return Functions(causal_conv1d_fn, causal_conv1d_update, fused_gdn_gating)


def _slots(given: Tensor | None, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) if given is None else given


def _advance(
    ops: GdnOps,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    slots: Tensor,
    tokens: int,
) -> Tensor:
    """Convolve ``tokens`` tokens of every sequence, and advance the windows by as many."""
    cu_seqlens = torch.arange(0, len(rows) + 1, tokens, device=rows.device)
    metadata = PrefillMetadata(cu_seqlens=cu_seqlens, state_indices=slots)
    return ops.conv1d_prefill(rows, weight, bias, conv_state, metadata=metadata)


def _windows(kept: Tensor, weight: Tensor, conv_state: Tensor, drafts: int) -> Tensor:
    """Return the intermediate windows, if they can hold what is written."""
    D, W = weight.shape
    fits = kept.dim() == 4 and kept.shape[1] >= drafts and tuple(kept.shape[2:]) == (D, W - 1)
    if not fits or kept.dtype != conv_state.dtype:
        raise InputError(
            f"intermediate_conv_window is {tuple(kept.shape)} of {kept.dtype}, needs "
            f"[rows, {drafts}, {D}, {W - 1}] of {conv_state.dtype}"
        )
    return kept


def _refuse(**given: tuple[str, object]) -> None:
    reasons = [
        f"{name} is given: {why}" for name, (why, value) in given.items() if value is not None
    ]
    if reasons:
        raise UnsupportedCallError("; ".join([*reasons, "needs None"]))
