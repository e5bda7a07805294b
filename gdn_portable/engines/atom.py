# SPDX-License-Identifier: Apache-2.0
"""ATOM: what its Gated DeltaNet layer does between projections, on the bound ops.

Read in ROCm/ATOM at ffdf3bb (2026-08-22): ``GatedDeltaNet`` of ``model_ops/attention_gdn.py``,
``GDNAttentionMetadata`` and ``GDNStateMixin`` of ``model_ops/attentions/gdn_attn.py``, and
``SGLangGatedDeltaNet`` of its SGLang plugin. Nothing of ATOM is imported: layer, metadata and
caches are taken as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from torch import Tensor

from gdn_portable.engines.mixed import MixedOps, Plan
from gdn_portable.engines.protocols import MixedLayer, MixedMetadata, layer_params
from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import SnapshotDrafts, VerifyMetadata
from gdn_portable.select import AnyDevice, bind
from gdn_portable.spec import ConvLayout, GdnSpec, StateLayout
from gdn_portable.state import StatePool

PAD_SLOT = -1


class StateForm(str, Enum):
    """What a recurrent state's tensor says, and what its memory holds."""

    VK = "VK"  # [slot, HV, V, K], and so in memory
    VK_SEEN_AS_KV = "VK seen as KV"  # [slot, HV, K, V], a transposed view of VK memory
    KV_DECLARED_VK = "KV declared VK"  # [slot, HV, V, K], though the kernels keep [K, V] there


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """How a host keeps the states of one layer.

    Attributes:
        conv: axis order of the conv state.
        state: of the recurrent state.
    """

    conv: ConvLayout
    state: StateForm


class Layout(str, Enum):
    """A host of ATOM's layer, and for ATOM by itself which kernels share its pools."""

    MODEL_RUNNER = "ModelRunner"  # no other kernels
    MODEL_RUNNER_KV = "ModelRunner, shared with ATOM's Triton kernels"
    MODEL_RUNNER_VIEW = "ModelRunner, VK seen as KV"  # as since ROCm/ATOM#2242
    SGLANG_PLUGIN = "SGLang plugin"
    RTP_LLM_PLUGIN = "RTP-LLM plugin"


LAYOUTS = {
    Layout.MODEL_RUNNER: PoolLayout(ConvLayout.LEN_FIRST, StateForm.VK),
    Layout.MODEL_RUNNER_KV: PoolLayout(ConvLayout.LEN_FIRST, StateForm.KV_DECLARED_VK),
    Layout.MODEL_RUNNER_VIEW: PoolLayout(ConvLayout.LEN_FIRST, StateForm.VK_SEEN_AS_KV),
    Layout.SGLANG_PLUGIN: PoolLayout(ConvLayout.DIM_FIRST, StateForm.VK),
    Layout.RTP_LLM_PLUGIN: PoolLayout(ConvLayout.DIM_FIRST, StateForm.VK),
}


class AtomMetadata(MixedMetadata, Protocol):
    """What is read of a GDNAttentionMetadata.

    Attributes:
        non_spec_state_indices_in_tensor: [non-spec] slots read in a fork; None, or the very tensor
            that names the slots written, where nothing forks.
    """

    non_spec_state_indices_in_tensor: Tensor | None


class LayerCache(Protocol):
    """What is read of a KVCacheTensor: ``k_cache`` is the conv state, ``v_cache`` the state."""

    k_cache: Tensor
    v_cache: Tensor


def atom_spec(spec: GdnSpec, *, num_spec: int = 0, layout: Layout = Layout.MODEL_RUNNER) -> GdnSpec:
    """Return a rank's spec with a host's pools, windows wide enough for drafts.

    Args:
        spec: the layer, with the dtypes of ATOM's caches: ModelRunner keeps both in the model's.
        num_spec: ``drafter.mtp_k``.
        layout: of the host.
    """
    kept = LAYOUTS[layout]
    keeps_kv = kept.state is StateForm.KV_DECLARED_VK
    return replace(
        spec,
        conv_window=spec.conv_width - 1 + num_spec,
        conv_layout=kept.conv,
        state_layout=StateLayout.KV if keeps_kv else StateLayout.VK,
        pad_slot=PAD_SLOT,
    )


class AtomGdn:
    """The Gated DeltaNet of an ATOM runner: made once, called by every layer.

    Attributes:
        ops: what serves the layers.
        layout: of the host.
        group: consecutive slots of a sequence, one for every draft, the root included.
    """

    def __init__(self, ops: GdnOps, layout: Layout, *, check: bool | None = None) -> None:
        """Take ops that were bound for a spec of :func:`atom_spec`; ``check`` as ``bind`` has it.

        Raises:
            InputError: the spec is not of that layout.
        """
        self.ops = ops
        self.layout = layout
        self.group = ops.spec.conv_state_len - ops.spec.conv_width + 2
        needed = atom_spec(ops.spec, num_spec=self.group - 1, layout=layout)
        if ops.spec != needed:
            raise InputError(f"ops were bound for {ops.spec}, need {needed} for {layout.value}")
        self._mixed = MixedOps.of(ops, check=check)

    @classmethod
    def bind(
        cls,
        spec: GdnSpec,
        device: AnyDevice,
        *,
        num_spec: int = 0,
        layout: Layout = Layout.MODEL_RUNNER,
    ) -> AtomGdn:
        """Bind the ops for a rank's spec with a host's pools, see :func:`atom_spec`."""
        return cls(bind(atom_spec(spec, num_spec=num_spec, layout=layout), device), layout)

    def pool(self, cache: LayerCache) -> StatePool:
        """Wrap a layer's caches as they are, the state turned to what its memory holds.

        Raises:
            InputError: they are not as the layout and the spec declare.
        """
        return self._mixed.pool(cache.k_cache, self._state(cache.v_cache))

    def plan(self, metadata: AtomMetadata, *, seq_lens_cpu: Sequence[int] | None = None) -> Plan:
        """Prepare a forward for all layers; without it, the first layer's call does.

        The plan is kept on ``metadata``. Call it again where that is refilled in place.

        Args:
            metadata: of the forward.
            seq_lens_cpu: lengths of the prefills where they are known on the host: a hint.

        Raises:
            InputError: fields are missing, too short, or do not fit the spec.
        """
        read = metadata.non_spec_state_indices_in_tensor
        if read is metadata.non_spec_state_indices_tensor:
            read = None
        return self._mixed.plan(metadata, read_slots=read, seq_lens_cpu=seq_lens_cpu)

    def forward(
        self,
        mixed_qkv: Tensor,
        b: Tensor,
        a: Tensor,
        core_attn_out: Tensor,
        *,
        layer: MixedLayer,
        metadata: AtomMetadata,
        cache: LayerCache,
    ) -> Tensor:
        """Run convolution and recurrence of one layer; see ``GatedDeltaNet.forward``.

        Args:
            mixed_qkv: [T, D] projection.
            b: [T, HV] write-strength input.
            a: [T, HV] decay input.
            core_attn_out: [T, HV, V] is written; zeros for padding and past the batch.
            layer: holds the weights.
            metadata: of the forward.
            cache: of the layer.

        Returns:
            ``core_attn_out``.

        Raises:
            InputError: an argument does not fit; no cache was touched.
        """
        plan = self._mixed.kept(metadata) or self.plan(metadata)
        return plan.run(
            mixed_qkv, b, a, core_attn_out, params=layer_params(layer), pool=self.pool(cache)
        )

    def target_verify(
        self,
        mixed_qkv: Tensor,
        b: Tensor,
        a: Tensor,
        core_attn_out: Tensor,
        *,
        layer: MixedLayer,
        cache: LayerCache,
        cache_indices: Tensor,
        draft_token_num: int,
        intermediate_conv_window: Tensor,
        intermediate_ssm: Tensor,
    ) -> Tensor:
        """Verify chains of drafts for SGLang, which commits; see ``SGLangGatedDeltaNet.forward``.

        Args:
            mixed_qkv: [B * P, D] projection of the drafts, the root included.
            b: [B * P, HV] write-strength input.
            a: [B * P, HV] decay input.
            core_attn_out: [B * P, HV, V] is written; zeros for padding.
            layer: holds the weights.
            cache: of the layer; is read.
            cache_indices: [B] slots.
            draft_token_num: P.
            intermediate_conv_window: [rows, P, D, W - 1] is written by position in the batch; the
                windows of a row may overlap.
            intermediate_ssm: [rows, P, HV, V, K] is written, likewise.

        Returns:
            ``core_attn_out``.

        Raises:
            InputError: an argument does not fit, or the host is not SGLang.
        """
        if self.layout is not Layout.SGLANG_PLUGIN:
            raise InputError(f"layout is {self.layout.value}, needs {Layout.SGLANG_PLUGIN.value}")
        return self.ops.verify_step(
            mixed_qkv,
            a,
            b,
            layer_params(layer),
            self.pool(cache),
            metadata=VerifyMetadata(cache_indices, draft_token_num),
            drafts=SnapshotDrafts(intermediate_conv_window, intermediate_ssm),
            out=core_attn_out,
        )

    def relocate_state_slots(
        self, pairs: Sequence[tuple[int, int]], mamba_k_cache: Tensor, mamba_v_cache: Tensor
    ) -> None:
        """Copy sequences' groups of slots, of all layers, to other groups.

        Args:
            pairs: source and target, counted in groups; all are read before any is written.
            mamba_k_cache: [layers, slots, ...] conv states.
            mamba_v_cache: [layers, slots, ...] recurrent states.

        Raises:
            InputError: a group does not exist, or a target is named twice.
        """
        spans = [
            (source * self.group + slot, target * self.group + slot)
            for source, target in pairs
            for slot in range(self.group)
        ]
        pool = StatePool(mamba_k_cache, mamba_v_cache)
        pool.copy([source for source, _ in spans], [target for _, target in spans])

    def _state(self, state: Tensor) -> Tensor:
        """Return a recurrent state as [slots, HV, V, K], or [slots, HV, K, V] in KV memory."""
        spec, form = self.ops.spec, LAYOUTS[self.layout].state
        if form is StateForm.VK:
            return state
        K, V = spec.head_k_dim, spec.head_v_dim
        shape, strides = ((K, V), (1, K)) if form is StateForm.VK_SEEN_AS_KV else ((V, K), (K, 1))
        if state.dim() != 4 or state.shape[-2:] != shape or state.stride()[-2:] != strides:
            raise InputError(
                f"v_cache is {list(state.shape)} with strides {state.stride()}, needs "
                f"[slots, HV, {shape[0]}, {shape[1]}] with inner strides {strides}: {form.value}"
            )
        return state.mT if form is StateForm.VK_SEEN_AS_KV else state.view(*state.shape[:2], K, V)
