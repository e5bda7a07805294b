# SPDX-License-Identifier: Apache-2.0
"""What is read of the metadata and the layers of vLLM and ATOM, by the names that both use."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gdn_portable.metadata import GdnParams


class MixedMetadata(Protocol):
    """What is read of a GDNAttentionMetadata, vLLM's or ATOM's; index tensors are on the device.

    Sequences with drafts ("spec") and others ("non-spec") have lists of their own. Of the others,
    decodes come before prefills.

    Attributes:
        num_prefills: sequences to prefill; 0 where ``has_initial_state`` is None.
        num_decodes: sequences of one token and no drafts.
        num_decode_tokens: the same number.
        num_spec_decodes: sequences with drafts.
        num_actual_tokens: rows of the batch, those that pad it for a graph included.
        has_initial_state: [non-spec] bool.
        spec_query_start_loc: [spec + 1] offsets of the drafts, the root included.
        non_spec_query_start_loc: [non-spec + 1] offsets.
        spec_state_indices_tensor: [spec, 1 + drafts] a slot for every draft.
        non_spec_state_indices_tensor: [non-spec] slots.
        spec_token_indx: rows of the drafts, where the batch has others as well.
        non_spec_token_indx: rows of the others, where the batch has drafts as well.
        num_accepted_tokens: [spec] of the step before, the root included.
    """

    num_prefills: int
    num_decodes: int
    num_decode_tokens: int
    num_spec_decodes: int
    num_actual_tokens: int
    has_initial_state: Tensor | None
    spec_query_start_loc: Tensor | None
    non_spec_query_start_loc: Tensor | None
    spec_state_indices_tensor: Tensor | None
    non_spec_state_indices_tensor: Tensor | None
    spec_token_indx: Tensor | None
    non_spec_token_indx: Tensor | None
    num_accepted_tokens: Tensor | None


class Conv1d(Protocol):
    """A layer's convolution: weight [D, 1, W], bias [D] or None."""

    weight: Tensor
    bias: Tensor | None


class MixedLayer(Protocol):
    """What is read of a layer that holds the weights of one rank."""

    conv1d: Conv1d
    A_log: Tensor
    dt_bias: Tensor


def layer_params(layer: MixedLayer) -> GdnParams:
    """Return a layer's weights as the steps take them, without those of its norm."""
    return GdnParams(
        conv_weight=layer.conv1d.weight.squeeze(1),
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        conv_bias=layer.conv1d.bias,
    )
