# SPDX-License-Identifier: Apache-2.0
"""The vLLM shim serves vLLM's batches from vLLM's caches, and touches nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import GdnSpec, PrefillMetadata, StatePool, bind
from gdn_portable.engines.vllm import NULL_BLOCK, VllmGdn, VllmMetadata, vllm_spec
from tests.cases import assert_identical
from tests.mixed_engine import (
    BF16,
    DOUBLE,
    NUM_SLOTS,
    Engine,
    Place,
    Row,
    metadata_fields,
    place,
)

__all__ = ["place"]

NUM_SPEC = 2
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])


@dataclass
class GDNAttentionMetadata:
    """The fields of vLLM 0.33.0's, in its order."""

    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_spec_decodes: int
    num_spec_decode_tokens: int
    num_actual_tokens: int
    checkpoint: Any = None
    flashinfer_checkpoint_plan: Any = None
    has_initial_state: Tensor | None = None
    spec_query_start_loc: Tensor | None = None
    non_spec_query_start_loc: Tensor | None = None
    spec_state_indices_tensor: Tensor | None = None
    non_spec_state_indices_tensor: Tensor | None = None
    spec_sequence_masks: Tensor | None = None
    spec_sequence_masks_cpu: Tensor | None = None
    spec_token_indx: Tensor | None = None
    non_spec_token_indx: Tensor | None = None
    num_accepted_tokens: Tensor | None = None
    uniform_spec_sequence_length: int | None = None
    chunk_indices: Tensor | None = None
    chunk_offsets: Tensor | None = None
    prefill_query_start_loc: Tensor | None = None
    prefill_state_indices: Tensor | None = None
    prefill_has_initial_state: Tensor | None = None
    aiter_prefill_metadata: Any = None
    nums_dict: dict[int, Any] | None = None
    batch_ptr: Tensor | None = None
    token_chunk_offset_ptr: Tensor | None = None


def caches(spec: GdnSpec, device: str) -> tuple[Tensor, Tensor]:
    """Return a layer's caches of NaN, both in one page of every block."""
    pool = StatePool.allocate(spec, NUM_SLOTS, device, paged=True)
    assert pool.conv_state is not None and pool.state is not None
    return pool.conv_state.fill_(torch.nan), pool.state.fill_(torch.nan)


def build(rows: Sequence[Row], device: str, pad_to: int) -> Any:
    """Return the metadata of a batch as vLLM's builder makes it."""
    named = metadata_fields(rows, device, NULL_BLOCK, pad_to)
    kept = [row.keeps or (0, NULL_BLOCK) for row in rows if row.right is None]
    if any(row.keeps for row in rows):
        offsets, slots = torch.tensor(kept, dtype=torch.int32, device=device).T
        named["checkpoint"] = SimpleNamespace(checkpoint_offsets=offsets, state_indices=slots)
    return GDNAttentionMetadata(**named)


def engine_of(place: Place, layout: Any = "SD", *, gated: bool = False) -> Engine:
    spec = vllm_spec(place.spec, num_spec=NUM_SPEC, conv_state_layout=layout)
    vllm = VllmGdn(place.bind(spec))
    conv_state, state = caches(spec, place.device)

    def metadata(rows: Sequence[Row], pad_to: int) -> Any:
        return build(rows, place.device, pad_to)

    def forward(
        mixed_qkv: Tensor,
        b: Tensor,
        a: Tensor,
        gate: Tensor,
        out: Tensor,
        layer: Any,
        metadata: Any,
    ) -> Tensor:
        layer.kv_cache = (conv_state, state)
        named = {"layer": layer, "metadata": metadata}
        if gated:
            return vllm.forward_core_fused_norm(mixed_qkv, b, a, gate, out, **named)
        return vllm.forward_core(mixed_qkv, b, a, out, **named)

    windows = conv_state if layout == "DS" else conv_state.mT
    pool, copy = StatePool(windows, state), vllm.pool((conv_state, state)).copy
    return Engine(place, spec, pool, metadata, forward, copy, gated)


@layouts
def test_prefills_in_chunks_then_padded_decodes(place: Place, layout: str) -> None:
    engine = engine_of(place, layout)
    one, two, idle = engine.request(1, 2, 3), engine.request(15, 14, 13), engine.request(4, 5, 6)

    engine.serve(Row(one, 5), Row(two, 2), Row(idle, 3))
    engine.serve(Row(one, 4), Row(two, 2))
    engine.serve(Row(two), Row(one), pad_to=4)
    engine.serve(Row(one))

    engine.check(one, two, idle)


def test_decodes_lead_prefills_in_one_batch(place: Place) -> None:
    engine = engine_of(place)
    one, two, new = engine.request(1, 2, 3), engine.request(15, 14, 13), engine.request(4, 5, 6)
    engine.serve(Row(one, 3), Row(two, 4))

    engine.serve(Row(two), Row(one, 5), Row(new, 1), Row(engine.request(7, 8, 9), 0))
    engine.serve(Row(two), Row(one), Row(new, 2))

    engine.check(one, two, new)


@layouts
def test_drafts_are_accepted_in_part_and_padded(place: Place, layout: str) -> None:
    engine = engine_of(place, layout)
    one, two = engine.request(1, 2, 3), engine.request(15, 14, 13)
    engine.serve(Row(one, 4), Row(two, 3))

    engine.serve(Row(one, 3, right=2), Row(two, 3, right=3), pad_to=3)
    engine.serve(Row(one, 2, right=1), Row(two, 3, right=1))
    engine.serve(Row(one, 1, right=1), Row(two, 2, right=2), pad_to=4)
    engine.serve(Row(two, 3, right=3))

    engine.check(one, two)


def test_drafts_lie_between_prefills_and_decodes(place: Place) -> None:
    engine = engine_of(place)
    one, two = engine.request(1, 2, 3), engine.request(15, 14, 13)
    decoding, new = engine.request(4, 5, 6), engine.request(7, 8, 9)
    engine.serve(Row(one, 4), Row(two, 3), Row(decoding, 2))

    engine.serve(Row(one, 3, right=2), Row(decoding), Row(two, 2, right=2), Row(new, 5))
    engine.serve(Row(new, 2), Row(two, 3, right=1), Row(one, 3, right=3))

    engine.check(one, two, decoding, new)


def test_a_checkpoint_of_a_prefill_starts_another_request(place: Place) -> None:
    engine = engine_of(place)
    one, two = engine.request(1, 2, 3), engine.request(15, 14, 13)
    engine.serve(Row(one, 3), Row(two, 2))

    engine.serve(Row(two), Row(one, 6, keeps=(4, 10)))
    fork = one.forked(7, 10, 11, 12)
    engine.serve(Row(one), Row(fork, 3))
    engine.serve(Row(fork, 3, right=2))

    engine.check(one, two, fork)


def test_copied_blocks_go_on_where_their_source_stood(place: Place) -> None:
    engine = engine_of(place)
    one = engine.request(1, 2, 3)
    engine.serve(Row(one, 4))

    engine.copy([1], [15])
    moved, fork = one.forked(4, 15, 14, 13), one.forked(4, 1, 2, 3)
    engine.serve(Row(moved), Row(fork))
    engine.serve(Row(moved, 3, right=3), Row(fork, 3, right=1))

    engine.check(moved, fork)


def test_the_norm_is_applied_to_every_part(place: Place) -> None:
    engine = engine_of(place, gated=True)
    one, two, new = engine.request(1, 2, 3), engine.request(15, 14, 13), engine.request(4, 5, 6)
    engine.serve(Row(one, 4), Row(two, 3))

    engine.serve(Row(two), Row(new, 3))
    engine.serve(Row(one, 3, right=2), Row(two, 2), Row(new, 2, right=1))

    engine.check(one, two, new)


CPU = Place("cpu", DOUBLE, lambda spec: bind(spec, "cpu"))


def _counted(planned: list[PrefillMetadata]) -> Place:
    ops = bind(vllm_spec(DOUBLE, num_spec=NUM_SPEC), "cpu")
    return Place("cpu", DOUBLE, lambda _: replace(ops, plan_prefill=planned.append))


def test_prefills_are_planned_once_for_all_layers_of_a_forward() -> None:
    planned: list[PrefillMetadata] = []
    engine = engine_of(_counted(planned))
    rows = (Row(engine.request(1, 2, 3), 3), Row(engine.request(15, 14, 13), 2))
    metadata = engine.metadata(rows, 0)

    for _ in range(3):
        engine.run(rows, metadata)
    engine.run(rows, replace(metadata))  # as another group of caches gets it

    assert len(planned) == 2


def test_a_plan_may_be_made_ahead_and_serves_the_ops_that_it_was_made_for() -> None:
    planned: list[PrefillMetadata] = []
    place = _counted(planned)
    engine, other = engine_of(place), VllmGdn(place.bind(DOUBLE))
    rows = (Row(engine.request(1, 2, 3), 3),)
    metadata = engine.metadata(rows, 0)

    other.plan(metadata, seq_lens_cpu=[3])
    engine.run(rows, metadata)
    engine.run(rows, metadata)

    assert [batch.seq_lens_cpu for batch in planned] == [[3], None]


def test_rows_and_slots_that_pad_decodes_need_not_be_as_many(place: Place) -> None:
    engine = engine_of(place)
    one, two = engine.request(1, 2, 3), engine.request(15, 14, 13)
    engine.serve(Row(one, 3), Row(two, 2))

    for tokens in (2, 3, 6):
        rows = (Row(two), Row(one))
        metadata = engine.metadata(rows, 4)
        metadata.num_decodes = metadata.num_decode_tokens = 2
        metadata.num_actual_tokens = tokens
        engine.serve(*rows, metadata=metadata)

    engine.check(one, two)


@pytest.mark.parametrize(("tokens", "served"), [(2, 2), (3, 3), (6, 4)])
def test_rows_of_padding_with_slots_are_served_as_a_graph_may_fill_them_later(
    tokens: int, served: int
) -> None:
    metadata = GDNAttentionMetadata(
        0, 0, 2, 2, 0, 0, tokens, non_spec_state_indices_tensor=torch.tensor([1, 2, 0, 0])
    )

    assert VllmGdn.bind(BF16, "cpu").plan(metadata).num_tokens == served


@pytest.mark.parametrize("num_spec", [0, 3])
def test_pools_are_those_that_vllm_allocates(num_spec: int) -> None:
    spec = vllm_spec(BF16, num_spec=num_spec)
    caches = torch.zeros(4, 3 + num_spec, BF16.conv_dim).bfloat16(), torch.zeros(4, 2, 16, 16)

    pool = VllmGdn(bind(spec, "cpu")).pool(caches)

    assert pool.conv_state is caches[0]
    assert pool.state is caches[1]


def test_what_is_read_of_metadata_is_there_in_vllm() -> None:
    names = {name for kind in VllmMetadata.__mro__ for name in getattr(kind, "__annotations__", ())}

    assert names <= {field.name for field in fields(GDNAttentionMetadata)}
    assert len(names) == 14


CUDA = Place("cuda", BF16, lambda spec: bind(spec, "cuda"))
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, torch sees none")


def _started(*, drafts: bool) -> tuple[Engine, tuple[Row, Row]]:
    """Return an engine on the GPU after two prefills, and the batch that comes next."""
    engine = engine_of(CUDA)
    one, two = engine.request(1, 2, 3), engine.request(15, 14, 13)
    engine.serve(Row(one, 5), Row(two, 2))
    return engine, (Row(one, 3, right=2), Row(two, 2, right=2)) if drafts else (Row(one), Row(two))


@on_a_gpu
@pytest.mark.parametrize("drafts", [False, True])
def test_a_graph_replays_a_padded_batch_with_other_slots(drafts: bool) -> None:
    (engine, rows), (other, other_rows) = (_started(drafts=drafts) for _ in range(2))
    metadata = engine.metadata(rows, 4)
    table = metadata.spec_state_indices_tensor if drafts else metadata.non_spec_state_indices_tensor
    slots, call = table.clone(), engine.call(rows, metadata)
    table.fill_(NULL_BLOCK)
    call()
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    table.copy_(slots)
    graph.replay()

    assert_identical([out], [other.run(other_rows, other.metadata(other_rows, 4))])
    assert_identical(engine.bits(), other.bits())


@on_a_gpu
@pytest.mark.parametrize("drafts", [False, True])
def test_a_forward_does_not_synchronise(drafts: bool) -> None:
    engine, rows = _started(drafts=drafts)
    rows = (*rows, Row(engine.request(4, 5, 6), 3))
    engine.run(rows, engine.metadata(rows, 0))
    call = engine.call(rows, engine.metadata(rows, 0))
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
