# SPDX-License-Identifier: Apache-2.0
"""The ATOM shim serves ATOM's batches from the pools of each host, and touches nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    GdnSpec,
    InputError,
    SnapshotDrafts,
    StateLayout,
    StatePool,
    VerifyMetadata,
    bind,
)
from gdn_portable.engines.atom import PAD_SLOT, AtomGdn, AtomMetadata, Layout, atom_spec
from tests.cases import assert_identical, random
from tests.mixed_engine import (
    BF16,
    DOUBLE,
    NUM_SLOTS,
    Engine,
    Place,
    Row,
    metadata_fields,
    place,
    refusal,
)

__all__ = ["place"]

NUM_SPEC = 2
LAYERS = 3
LAYER = 1
layouts = pytest.mark.parametrize("layout", Layout)


@dataclass
class GDNAttentionMetadata:
    """The fields of ATOM's at ffdf3bb, in its order."""

    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_spec_decodes: int
    num_spec_decode_tokens: int
    num_actual_tokens: int
    has_initial_state: Tensor | None = None
    spec_query_start_loc: Tensor | None = None
    non_spec_query_start_loc: Tensor | None = None
    spec_state_indices_tensor: Tensor | None = None
    non_spec_state_indices_tensor: Tensor | None = None
    non_spec_state_indices_in_tensor: Tensor | None = None
    spec_sequence_masks: Tensor | None = None
    spec_token_indx: Tensor | None = None
    non_spec_token_indx: Tensor | None = None
    num_accepted_tokens: Tensor | None = None
    nums_dict: dict[int, Any] | None = None
    batch_ptr: Tensor | None = None
    token_chunk_offset_ptr: Tensor | None = None


def _caches(spec: GdnSpec, layout: Layout, device: str) -> tuple[Tensor, Tensor, StatePool]:
    """Return a host's caches of NaN, layers first, and the tested layer's in canonical order."""
    L, D, HV = spec.conv_state_len, spec.conv_dim, spec.num_v_heads
    K, V = spec.head_k_dim, spec.head_v_dim

    def nan(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full((LAYERS, NUM_SLOTS, *shape), torch.nan, dtype=dtype, device=device)

    if layout is Layout.SGLANG_PLUGIN:
        conv = nan(D, L, dtype=spec.conv_state_dtype)
    elif layout is Layout.RTP_LLM_PLUGIN:  # [slot, D, L] with strides (., 1, D)
        conv = nan(L, D, dtype=spec.conv_state_dtype).mT
    else:
        conv = nan(L, D, dtype=spec.conv_state_dtype)
    windows = conv if conv.shape[-1] == L else conv.mT
    state = nan(HV, V, K, dtype=spec.state_dtype)
    canonical = state
    if layout is Layout.MODEL_RUNNER_VIEW:
        state = state.mT
    if layout is Layout.MODEL_RUNNER_KV:
        canonical = state.view(LAYERS, NUM_SLOTS, HV, K, V).mT
    return conv, state, StatePool(windows[LAYER], canonical[LAYER])


def _engine(
    place: Place, layout: Layout = Layout.MODEL_RUNNER, *, num_spec: int = NUM_SPEC
) -> Engine:
    spec = atom_spec(place.spec, num_spec=num_spec, layout=layout)
    atom = AtomGdn(place.bind(spec), layout)
    k_cache, v_cache, pool = _caches(spec, layout, place.device)
    cache = SimpleNamespace(k_cache=k_cache[LAYER], v_cache=v_cache[LAYER])

    def metadata(rows: Sequence[Row], pad_to: int) -> GDNAttentionMetadata:
        fields = metadata_fields(rows, place.device, PAD_SLOT, pad_to)
        written = fields.get("non_spec_state_indices_tensor")
        if written is not None:  # a buffer of its own, even where nothing forks
            others = [row for row in rows if row.right is None]
            read = written.clone()
            for i, row in enumerate(others):
                read[i] = row.request.slots[0] if row.read is None else row.read
            fields["non_spec_state_indices_in_tensor"] = read
        return GDNAttentionMetadata(**fields)

    def forward(
        mixed_qkv: Tensor,
        b: Tensor,
        a: Tensor,
        gate: Tensor,
        out: Tensor,
        layer: Any,
        metadata: GDNAttentionMetadata,
    ) -> Tensor:
        return atom.forward(mixed_qkv, b, a, out, layer=layer, metadata=metadata, cache=cache)

    def relocate(source: int, target: int) -> None:
        atom.relocate_state_slots([(source, target)], k_cache, v_cache)

    return Engine(place, spec, pool, metadata, forward, relocate)


def _group(index: int) -> range:
    return range(3 * index, 3 * index + 3)


@layouts
def test_prefills_in_chunks_then_padded_decodes_then_drafts(place: Place, layout: Layout) -> None:
    engine = _engine(place, layout)
    one, two, idle = (engine.request(*_group(i)) for i in (0, 4, 2))

    engine.serve(Row(one, 5), Row(two, 2), Row(idle, 3))
    engine.serve(Row(one, 4), Row(two, 2))
    engine.serve(Row(two), Row(one), pad_to=4)
    engine.serve(Row(one, 3, right=2), Row(two, 3, right=3), pad_to=3)
    engine.serve(Row(one, 2, right=1), Row(two, 3, right=1))

    engine.check(one, two, idle)


def test_decodes_lead_prefills_in_one_batch(place: Place) -> None:
    engine = _engine(place)
    one, two, new = (engine.request(*_group(i)) for i in (0, 4, 2))
    engine.serve(Row(one, 3), Row(two, 4))

    engine.serve(Row(two), Row(one, 5), Row(new, 1), Row(engine.request(*_group(3)), 0))
    engine.serve(Row(two), Row(one), Row(new, 2))

    engine.check(one, two, new)


def test_drafts_lie_between_prefills(place: Place) -> None:
    engine = _engine(place)
    one, two, new = (engine.request(*_group(i)) for i in (0, 4, 2))
    engine.serve(Row(one, 3), Row(two, 4))

    engine.serve(Row(one, 3, right=2), Row(new, 5), Row(two, 2, right=2))
    engine.serve(Row(new, 2), Row(two, 3, right=1), Row(one, 3, right=3))

    engine.check(one, two, new)


@pytest.mark.parametrize("count", [1, 4], ids=["a decode", "a prefill"])
def test_a_fork_reads_one_slot_and_writes_another(place: Place, count: int) -> None:
    engine = _engine(place)
    one, two = (engine.request(*_group(i)) for i in (0, 4))
    engine.serve(Row(one, 5), Row(two, 2))
    fork = one.forked(5, *_group(2))

    engine.serve(Row(fork, count, read=one.slots[0]), Row(two, count))
    engine.serve(Row(one), Row(fork))
    engine.serve(Row(one, 3, right=1), Row(fork, 3, right=3))

    engine.check(one, two, fork)


def test_a_group_goes_on_where_it_was_moved_to(place: Place) -> None:
    engine = _engine(place)
    one, two = (engine.request(*_group(i)) for i in (0, 4))
    engine.serve(Row(one, 5), Row(two, 2))
    engine.serve(Row(one, 3, right=2), Row(two, 3, right=3))

    engine.copy(0, 3)
    one.slots = [*_group(3)]
    engine.serve(Row(one, 3, right=3), Row(two, 1, right=1))

    engine.check(one, two)


def test_drafts_of_sglang_are_kept_for_it_and_the_pool_is_only_read(place: Place) -> None:
    spec = atom_spec(place.spec, layout=Layout.SGLANG_PLUGIN)
    atom = AtomGdn(place.bind(spec), Layout.SGLANG_PLUGIN)
    engine = _engine(place, Layout.SGLANG_PLUGIN, num_spec=0)
    one, two = engine.request(0), engine.request(15)
    engine.serve(Row(one, 5), Row(two, 2))
    cache = SimpleNamespace(k_cache=engine.pool.conv_state, v_cache=engine.pool.state)
    P, D, device = 3, spec.conv_dim, place.device
    wide = torch.full((5, D, P + 2), torch.nan, dtype=spec.dtype, device=device)
    windows = wide.as_strided((5, P, D, 3), (D * (P + 2), 1, P + 2, 1))  # as SGLang keeps them
    states = torch.full((5, P, *cache.v_cache.shape[1:]), torch.nan, device=device)
    states = states.to(spec.state_dtype)
    slots = torch.tensor([15, 0, PAD_SLOT], device=device)
    before = engine.bits()

    def verify(
        mixed_qkv: Tensor, b: Tensor, a: Tensor, gate: Tensor, out: Tensor, layer: Any, _: Any
    ) -> Tensor:
        atom.target_verify(
            *(mixed_qkv, b, a, out[: 3 * P]),
            layer=layer,
            cache=cache,
            cache_indices=slots,
            draft_token_num=P,
            intermediate_conv_window=windows,
            intermediate_ssm=states,
        )
        assert_identical(engine.bits(), before)
        out[3 * P :] = 0
        last = torch.tensor([1, 2, 0], device=device)  # as SGLang scatters them
        batch, kept = VerifyMetadata(slots, P), SnapshotDrafts(windows, states)
        pool = StatePool(cache.k_cache, cache.v_cache)
        atom.ops.mtp_commit(pool, kept, metadata=batch, last_accepted=last)
        return out

    engine.forward, decode = verify, engine.forward
    batch = SimpleNamespace(num_actual_tokens=3 * P)
    engine.serve(Row(two, P, right=2), Row(one, P, right=3), metadata=batch)
    one.accepted = two.accepted = 1
    engine.forward = decode
    engine.serve(Row(one), Row(two))

    engine.check(one, two)
    assert states[3:].isnan().all()


def test_drafts_of_sglang_are_refused_elsewhere() -> None:
    atom = AtomGdn.bind(BF16, "cpu")
    none = torch.zeros(0)
    caches = {"intermediate_conv_window": none, "intermediate_ssm": none, "cache_indices": none}

    with pytest.raises(InputError, match="layout is ModelRunner, needs SGLang plugin"):
        atom.target_verify(
            *(none, none, none, none), layer=None, cache=None, draft_token_num=2, **caches
        )  # type: ignore[arg-type]


@layouts
def test_relocation_copies_groups_of_every_layer_and_nothing_else(layout: Layout) -> None:
    spec = atom_spec(BF16, num_spec=NUM_SPEC, layout=layout)
    atom = AtomGdn(bind(spec, "cpu"), layout)
    caches = _caches(spec, layout, "cpu")[:2]
    rng = torch.Generator().manual_seed(0)
    for cache in caches:
        cache.copy_(random(rng, *cache.shape))
    before = [cache.clone() for cache in caches]

    atom.relocate_state_slots([(0, 1), (1, 3)], *caches)

    for cache, old in zip(caches, before, strict=True):
        old[:, 9:12] = old[:, 3:6]
        old[:, 3:6] = old[:, 0:3]
        assert_identical([cache], [old])


def test_relocation_of_a_group_that_is_not_there_is_refused() -> None:
    atom = AtomGdn(bind(atom_spec(BF16, num_spec=NUM_SPEC), "cpu"), Layout.MODEL_RUNNER)
    k_cache, v_cache, _ = _caches(atom.ops.spec, atom.layout, "cpu")

    with pytest.raises(InputError, match="target names slot 16, needs 0 to 15"):
        atom.relocate_state_slots([(0, 5)], k_cache, v_cache)
    with pytest.raises(InputError, match="needs every slot once"):
        atom.relocate_state_slots([(0, 2), (1, 2)], k_cache, v_cache)


def test_memory_of_kv_is_declared_and_only_then_kept() -> None:
    specs = {layout: atom_spec(BF16, layout=layout) for layout in Layout}

    kept = {layout for layout, spec in specs.items() if spec.state_layout is StateLayout.KV}

    assert kept == {Layout.MODEL_RUNNER_KV}


CPU = Place("cpu", DOUBLE, lambda spec: bind(spec, "cpu"))
WRONG = {
    "no slots": ({"non_spec_state_indices_tensor": None}, "None, needs a tensor"),
    "few to read": (
        {"non_spec_state_indices_in_tensor": torch.tensor([0])},
        "read_slots has 1 entries, needs .* 2",
    ),
    "one to read that is not there": (
        {"non_spec_state_indices_in_tensor": torch.tensor([0, NUM_SLOTS])},
        "needs",
    ),
    "one to read that another writes": (
        {"non_spec_state_indices_in_tensor": torch.tensor([12, 12])},
        "slot 12 is written for one sequence and used for another, needs",
    ),
    "no flags": ({"has_initial_state": None}, "has_initial_state is None, needs"),
    "flags of prefills alone": ({"has_initial_state": torch.tensor([False])}, "1 entries, needs"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_batch_is_refused_before_its_first_part_runs(
    changes: dict[str, Any], message: str
) -> None:
    engine = _engine(CPU)
    one, new = (engine.request(*_group(i)) for i in (0, 4))
    engine.serve(Row(one, 4))

    refusal(engine, message, Row(one), Row(new, 3), **changes)


@pytest.mark.parametrize("layout", [Layout.MODEL_RUNNER_KV, Layout.MODEL_RUNNER_VIEW])
def test_a_state_that_is_not_what_the_layout_says_is_refused(layout: Layout) -> None:
    spec = replace(BF16, head_v_dim=32)
    atom = AtomGdn.bind(spec, "cpu", layout=layout)
    k_cache, v_cache, _ = _caches(atom.ops.spec, layout, "cpu")

    with pytest.raises(InputError, match=rf"v_cache is .* needs .*{layout_form(layout)}"):
        atom.pool(SimpleNamespace(k_cache=k_cache[0], v_cache=v_cache[0].mT))
    with pytest.raises(InputError, match=r"conv_state is .* needs \[slots, 3, 96\]"):
        atom.pool(SimpleNamespace(k_cache=k_cache[0].mT, v_cache=v_cache[0]))


def layout_form(layout: Layout) -> str:
    return {"MODEL_RUNNER_KV": "KV declared VK", "MODEL_RUNNER_VIEW": "VK seen as KV"}[layout.name]


def test_ops_of_another_layout_are_refused() -> None:
    ops = bind(atom_spec(BF16), "cpu")

    with pytest.raises(InputError, match="for SGLang plugin"):
        AtomGdn(ops, Layout.SGLANG_PLUGIN)


def test_metadata_that_cannot_keep_a_plan_is_refused() -> None:
    @dataclass(frozen=True)
    class Frozen:
        num_prefills: int = 0
        num_decodes: int = 0
        num_decode_tokens: int = 0
        num_spec_decodes: int = 0
        num_actual_tokens: int = 0
        non_spec_state_indices_tensor: Tensor | None = None
        non_spec_state_indices_in_tensor: Tensor | None = None

    atom = AtomGdn.bind(BF16, "cpu")

    with pytest.raises(InputError, match="a Frozen, needs room for"):
        atom.plan(Frozen())  # type: ignore[arg-type]


def test_what_is_read_of_metadata_is_there_in_atom() -> None:
    names = {name for kind in AtomMetadata.__mro__ for name in getattr(kind, "__annotations__", ())}

    assert names <= {field.name for field in fields(GDNAttentionMetadata)}
    assert len(names) == 14
