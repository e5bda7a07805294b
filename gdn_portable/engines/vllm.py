# SPDX-License-Identifier: Apache-2.0
"""vLLM: what its Gated DeltaNet layer does between projections, on the bound ops.

Read in vLLM 0.33.0: ``v1/attention/backends/gdn_attn.py`` and ``_forward_core`` of
``model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py``, whose two calls are the methods here.
Nothing of vLLM is imported: layer and metadata are taken as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

from torch import Tensor

from gdn_portable.engines.mixed import MixedOps, Plan
from gdn_portable.engines.protocols import MixedLayer, MixedMetadata, layer_params
from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps
from gdn_portable.select import AnyDevice, bind
from gdn_portable.spec import ConvLayout, GdnSpec, activation_named
from gdn_portable.state import StatePool

NULL_BLOCK = 0
# the names of VLLM_SSM_CONV_STATE_LAYOUT
CONV_LAYOUTS = {"SD": ConvLayout.LEN_FIRST, "DS": ConvLayout.DIM_FIRST}


class Checkpoint(Protocol):
    """What is read of a MambaPrefillCheckpointMetadata.

    Attributes:
        checkpoint_offsets: [non-spec] tokens from the sequence's first in this forward.
        state_indices: [non-spec] blocks; the null block where there is no checkpoint.
    """

    checkpoint_offsets: Tensor
    state_indices: Tensor


class VllmMetadata(MixedMetadata, Protocol):
    """What is read of a GDNAttentionMetadata.

    Attributes:
        checkpoint: states to keep while prefilling, or None; missing in versions that keep none.
    """

    checkpoint: Checkpoint | None


class Norm(Protocol):
    """A layer's gated RMSNorm: weight [V], and the activation of its gate."""

    weight: Tensor
    eps: float
    activation: str


class VllmLayer(MixedLayer, Protocol):
    """What is read of a GatedDeltaNetAttention.

    Attributes:
        kv_cache: the layer's conv state and recurrent state.
        norm: the gated RMSNorm.
    """

    kv_cache: Sequence[Tensor]
    norm: Norm


def vllm_spec(
    spec: GdnSpec, *, num_spec: int = 0, conv_state_layout: Literal["SD", "DS"] = "SD"
) -> GdnSpec:
    """Return a rank's spec with vLLM's pools: null block 0, and windows wide enough for drafts.

    Args:
        spec: the layer, with the dtypes of vLLM's caches.
        num_spec: ``num_speculative_tokens``.
        conv_state_layout: as ``VLLM_SSM_CONV_STATE_LAYOUT`` names it.

    Raises:
        InputError: there is no such layout.
    """
    if conv_state_layout not in CONV_LAYOUTS:
        raise InputError(f"conv_state_layout is {conv_state_layout!r}, needs 'SD' or 'DS'")
    return replace(
        spec,
        conv_window=spec.conv_width - 1 + num_spec,
        conv_layout=CONV_LAYOUTS[conv_state_layout],
        pad_slot=NULL_BLOCK,
    )


class VllmGdn:
    """The Gated DeltaNet of a vLLM worker: made once, called by every layer."""

    def __init__(self, ops: GdnOps, *, check: bool | None = None) -> None:
        """Take ops that were bound for a spec of :func:`vllm_spec`; ``check`` as ``bind`` has it.

        Raises:
            InputError: the spec takes the null block for a slot.
        """
        if ops.spec.pad_slot != NULL_BLOCK:
            raise InputError(f"pad_slot is {ops.spec.pad_slot}, needs the null block, {NULL_BLOCK}")
        self.ops = ops
        self._mixed = MixedOps.of(ops, check=check)

    @classmethod
    def bind(
        cls,
        spec: GdnSpec,
        device: AnyDevice,
        *,
        num_spec: int = 0,
        conv_state_layout: Literal["SD", "DS"] = "SD",
    ) -> VllmGdn:
        """Bind the ops for a rank's spec with vLLM's pools, see :func:`vllm_spec`."""
        own = vllm_spec(spec, num_spec=num_spec, conv_state_layout=conv_state_layout)
        return cls(bind(own, device))

    def pool(self, kv_cache: Sequence[Tensor]) -> StatePool:
        """Wrap a layer's caches as they are; ``copy`` of the result forks and moves blocks.

        Raises:
            InputError: they are not as the spec declares.
        """
        conv_state, state = kv_cache[:2]
        return self._mixed.pool(conv_state, state)

    def plan(self, metadata: VllmMetadata, *, seq_lens_cpu: Sequence[int] | None = None) -> Plan:
        """Prepare a forward for all layers; without it, the first layer's call does.

        The plan is kept on ``metadata``. Call it again where that is refilled in place.

        Args:
            metadata: of the forward.
            seq_lens_cpu: lengths of the prefills where they are known on the host: a hint.

        Raises:
            InputError: fields are missing, too short, or do not fit the spec.
        """
        kept: Checkpoint | None = getattr(metadata, "checkpoint", None)
        return self._mixed.plan(
            metadata,
            checkpoint_offsets=None if kept is None else kept.checkpoint_offsets,
            checkpoint_slots=None if kept is None else kept.state_indices,
            seq_lens_cpu=seq_lens_cpu,
        )

    def forward_core(
        self,
        mixed_qkv: Tensor,
        b: Tensor,
        a: Tensor,
        core_attn_out: Tensor,
        *,
        layer: VllmLayer,
        metadata: VllmMetadata,
    ) -> Tensor:
        """Run convolution and recurrence of one layer; see ``_forward_core``.

        Args:
            mixed_qkv: [T, D] projection.
            b: [T, HV] write-strength input.
            a: [T, HV] decay input.
            core_attn_out: [T, HV, V] is written; zeros for padding.
            layer: holds weights and caches.
            metadata: of the forward.

        Returns:
            ``core_attn_out``.

        Raises:
            InputError: an argument does not fit; no cache was touched.
        """
        return self._planned(metadata).run(
            mixed_qkv,
            b,
            a,
            core_attn_out,
            params=layer_params(layer),
            pool=self.pool(layer.kv_cache),
        )

    def forward_core_fused_norm(
        self,
        mixed_qkv: Tensor,
        b: Tensor,
        a: Tensor,
        output_gate: Tensor,
        core_attn_out: Tensor,
        *,
        layer: VllmLayer,
        metadata: VllmMetadata,
    ) -> Tensor:
        """Run the same and the gated RMSNorm; see ``_forward_core_fused_norm``.

        Args:
            mixed_qkv: [T, D] projection.
            b: [T, HV] write-strength input.
            a: [T, HV] decay input.
            output_gate: [T, HV, V] before its activation.
            core_attn_out: [T, HV, V] is written; zeros for padding.
            layer: holds weights and caches.
            metadata: of the forward.

        Returns:
            ``core_attn_out``.

        Raises:
            InputError: an argument does not fit; no cache was touched.
        """
        activation = self.ops.spec.gate_activation
        if activation_named(layer.norm.activation) != activation:
            raise InputError(
                f"the layer's norm has activation {layer.norm.activation!r}, needs the spec's "
                f"gate_activation, {activation!r}"
            )
        params = replace(
            layer_params(layer), norm_weight=layer.norm.weight, norm_eps=layer.norm.eps
        )
        return self._planned(metadata).run(
            mixed_qkv,
            b,
            a,
            core_attn_out,
            params=params,
            pool=self.pool(layer.kv_cache),
            gate=output_gate,
        )

    def _planned(self, metadata: VllmMetadata) -> Plan:
        return self._mixed.kept(metadata) or self.plan(metadata)
