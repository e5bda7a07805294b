# SPDX-License-Identifier: Apache-2.0
"""The vLLM shim takes what vLLM's own builder makes, and shares its caches with vLLM's kernels.

Runs where vLLM can be imported, see ``tests/vllm_source.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from gdn_portable.engines.vllm import VllmGdn, vllm_spec
from tests import test_engine_vllm as double
from tests.mixed_engine import BF16, Place, Row, simulated_ops
from tests.vllm_source import (
    attention,
    checkpoint,
    custom_op,
    forward_context,
    gdn_attn,
    layers,
)

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

PAGE = Path(__file__).parent.parent / "docs" / "engines" / "vllm.md"
MOST = 8


def _builder(*, graph: bool, kept: object) -> Any:
    """Return vLLM's builder for ``NUM_SPEC`` drafts, without the configuration of a model."""
    builder = gdn_attn.GDNAttentionMetadataBuilder.__new__(gdn_attn.GDNAttentionMetadataBuilder)
    columns = 1 + double.NUM_SPEC

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    vars(builder).update(
        num_spec=double.NUM_SPEC,
        use_spec_decode=True,
        use_full_cuda_graph=graph,
        decode_cudagraph_max_bs=MOST * columns,
        gdn_prefill_backend="triton",
        plan_flashinfer_checkpoints=False,
        kv_cache_spec=None,
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode="none")),
        checkpoint_builder=SimpleNamespace(build=lambda *_: kept),
        spec_state_indices_tensor=ints(MOST * columns, columns),
        non_spec_state_indices_tensor=ints(MOST * columns),
        spec_sequence_masks=torch.zeros(MOST * columns, dtype=torch.bool),
        spec_token_indx=ints(MOST * columns * columns),
        non_spec_token_indx=ints(MOST * columns * columns),
        spec_query_start_loc=ints(MOST * columns + 1),
        non_spec_query_start_loc=ints(MOST * columns + 1),
        num_accepted_tokens=ints(MOST * columns),
    )
    return builder


def _build(rows: Sequence[Row], device: str, pad_to: int) -> Any:
    """Return vLLM's metadata for a batch, padded to ``pad_to`` requests."""
    assert device == "cpu"
    padding = max(pad_to - len(rows), 0)
    drafted = any(row.right is not None for row in rows)
    lengths = torch.tensor([row.count for row in rows] + [0] * padding, dtype=torch.int32)
    served = torch.tensor([row.request.served for row in rows] + [0] * padding)
    blocks = [row.request.slots for row in rows] + [[0] * (1 + double.NUM_SPEC)] * padding
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    kept = [row.keeps or (0, 0) for row in rows if row.right is None]
    states = None
    if any(row.keeps for row in rows):
        places = torch.tensor(kept, dtype=torch.int32).T
        states = checkpoint.MambaPrefillCheckpointMetadata(*places)
    common = attention.CommonAttentionMetadata(
        query_start_loc=offsets,
        query_start_loc_cpu=offsets,
        seq_lens=(served + lengths).int(),
        seq_lens_cpu_upper_bound=(served + lengths).int(),
        num_reqs=len(lengths),
        num_actual_tokens=int(lengths.sum()) + padding * (1 + double.NUM_SPEC * drafted),
        max_query_len=int(lengths.max()),
        max_seq_len=int((served + lengths).max()),
        block_table_tensor=torch.tensor(blocks, dtype=torch.int32),
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        is_prefilling=served == 0,
    )
    drafts = [-1 if row.right is None else row.count - 1 for row in rows] + [-1] * padding
    accepted = [row.request.accepted for row in rows] + [1] * padding
    return _builder(graph=bool(pad_to), kept=states).build(
        common_prefix_len=0,
        common_attn_metadata=common,
        num_accepted_tokens=torch.tensor(accepted, dtype=torch.int32) if drafted else None,
        num_decode_draft_tokens_cpu=torch.tensor(drafts) if drafted else None,
    )


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        double.test_decodes_lead_prefills_in_one_batch,
        double.test_drafts_lie_between_prefills_and_decodes,
        double.test_a_checkpoint_of_a_prefill_starts_another_request,
        double.test_the_norm_is_applied_to_every_part,
    )
}
IN_BOTH_LAYOUTS = {
    scenario.__name__: scenario
    for scenario in (
        double.test_prefills_in_chunks_then_padded_decodes,
        double.test_drafts_are_accepted_in_part_and_padded,
    )
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_metadata_of_vllms_builder_is_served(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Place], None]
) -> None:
    monkeypatch.setattr(double, "build", _build)

    scenario(double.CPU)


@pytest.mark.parametrize("layout", ["SD", "DS"])
@pytest.mark.parametrize("scenario", IN_BOTH_LAYOUTS.values(), ids=IN_BOTH_LAYOUTS)
def test_metadata_of_vllms_builder_is_served_in_either_layout(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Place, str], None], layout: str
) -> None:
    monkeypatch.setattr(double, "build", _build)

    scenario(double.CPU, layout)


def test_the_double_has_the_fields_of_vllms_metadata() -> None:
    ours, theirs = (
        [field.name for field in fields(kind)]
        for kind in (double.GDNAttentionMetadata, gdn_attn.GDNAttentionMetadata)
    )

    assert ours == theirs


def test_the_layer_of_the_docs_takes_the_place_of_vllms() -> None:
    spec = vllm_spec(double.BF16)
    HV, V, D = spec.num_v_heads, spec.head_v_dim, spec.conv_dim
    [block] = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"vllm": VllmGdn(double.CPU.bind(spec))}
    exec(compile(block, "<docs>", "exec"), names)
    layer = names["PortableAttention"].__new__(names["QwenGatedDeltaNetAttention"])
    torch.nn.Module.__init__(layer)
    layer.prefix = "model.layers.0"
    conv1d = SimpleNamespace(weight=torch.ones(D, 1, 4, dtype=spec.dtype), bias=None)
    object.__setattr__(layer, "conv1d", conv1d)
    layer.A_log, layer.dt_bias = torch.zeros(HV), torch.zeros(HV)
    layer.kv_cache = [
        torch.zeros(4, 3, D, dtype=spec.dtype),
        torch.zeros(4, HV, V, spec.head_k_dim),
    ]
    metadata = gdn_attn.GDNAttentionMetadata(
        0, 0, 2, 2, 0, 0, 2, non_spec_state_indices_tensor=torch.tensor([2, 0])
    )
    out = torch.full((2, HV, V), torch.nan, dtype=spec.dtype)
    inputs = torch.ones(2, D, dtype=spec.dtype), *torch.ones(2, 2, HV)

    with forward_context.override_forward_context(
        SimpleNamespace(attn_metadata={layer.prefix: metadata})
    ):
        layer._forward_core(*inputs, out)

    assert type(layer) is names["PortableAttention"]
    assert custom_op.op_registry_oot["QwenGatedDeltaNetAttention"] is type(layer)
    assert out[0].all() and not out[1].any()
    assert [bool(slot.any()) for slot in layer.kv_cache[1]] == [False, False, True, False]


def _vllms(
    vllm: VllmGdn,
    mixed_qkv: Tensor,
    b: Tensor,
    a: Tensor,
    core_attn_out: Tensor,
    *,
    layer: Any,
    metadata: Any,
) -> Tensor:
    """Run a layer by vLLM's own ``_forward_core``, as the shim's method of that name does."""
    kind, spec = layers.QwenGatedDeltaNetAttention, vllm.ops.spec
    own = object.__new__(kind)
    torch.nn.Module.__init__(own)
    vars(own).update(
        prefix="layer",
        tp_size=1,
        num_k_heads=spec.num_k_heads,
        num_v_heads=spec.num_v_heads,
        head_k_dim=spec.head_k_dim,
        head_v_dim=spec.head_v_dim,
        key_dim=spec.num_k_heads * spec.head_k_dim,
        value_dim=spec.num_v_heads * spec.head_v_dim,
        activation=spec.activation,
        enable_packed_recurrent_decode=True,
        chunk_gated_delta_rule=lambda **call: layers.ChunkGatedDeltaRule.forward_native(
            None, **call
        ),
        conv1d=layer.conv1d,
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        kv_cache=layer.kv_cache,
    )
    core_attn_out.zero_()  # vLLM allocates zeros
    context = SimpleNamespace(attn_metadata={"layer": metadata})
    with forward_context.override_forward_context(context):
        kind._forward_core(own, mixed_qkv, b, a, core_attn_out[: metadata.num_actual_tokens])
    if metadata.num_spec_decodes and not metadata.num_prefills:
        # vLLM copies what was never written to rows that pad drafts
        core_attn_out[int(metadata.spec_query_start_loc[-1]) :] = 0
    return core_attn_out


SHARED = {
    scenario.__name__: scenario
    for scenario in (
        double.test_prefills_in_chunks_then_padded_decodes,
        double.test_decodes_lead_prefills_in_one_batch,
        double.test_drafts_are_accepted_in_part_and_padded,
        double.test_drafts_lie_between_prefills_and_decodes,
    )
}


@pytest.mark.parametrize("first", ["vLLM", "the shim"])
@pytest.mark.parametrize("scenario", SHARED.values(), ids=SHARED)
def test_vllms_kernels_and_the_shim_take_turns_on_the_same_caches(
    amd_gpu: Simulator, monkeypatch: pytest.MonkeyPatch, scenario: Callable[..., None], first: str
) -> None:
    tune, turns = Autotuner.run, [_vllms, VllmGdn.forward_core]
    taken = cycle(turns if first == "vLLM" else reversed(turns))

    def run_the_first(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        self.configs = self.configs[:1]
        return tune(self, *args, **kwargs)

    def take_turns(vllm: VllmGdn, *rows: Tensor, **named: Any) -> Tensor:
        return next(taken)(vllm, *rows, **named)

    monkeypatch.setattr(Autotuner, "run", run_the_first)
    monkeypatch.setattr(double, "build", _build)
    monkeypatch.setattr(VllmGdn, "forward_core", take_turns)
    place = Place("cpu", BF16, simulated_ops)

    scenario(place, "SD") if "layout" in scenario.__annotations__ else scenario(place)

    assert any(launch.kernel.startswith("_causal_conv1d") for launch in amd_gpu.launches)
