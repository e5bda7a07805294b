# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA or AMD GPU: the cases pass, nothing synchronises, graphs replay, pools are large."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    ConvLayout,
    DeferredUpdates,
    DraftProtocol,
    GdnOps,
    GdnParams,
    GdnSpec,
    Op,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    StateLayout,
    StatePool,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import Case, cases
from tests.calls import leaves
from tests.cases import random_parents
from tests.cute_cases import replay_case
from tests.long_prefills import assert_remembered, of_growing_states, of_unit_keys

if not torch.cuda.is_available():
    pytest.skip("needs a GPU, torch sees none", allow_module_level=True)

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    conv_window=6,
)
FLOAT32 = replace(SPEC, dtype=torch.float32)
OTHER_LAYOUTS = {"state_layout": StateLayout.KV, "conv_layout": ConvLayout.LEN_FIRST}
SPECS = {
    "bf16": SPEC,
    "bf16, other layouts": replace(SPEC, num_v_heads=2, **OTHER_LAYOUTS),
    "fp16, fp16 state, ratio 3": replace(
        SPEC, num_v_heads=6, dtype=torch.float16, state_dtype=torch.float16
    ),
    "bf16 state, V = 64, width 3": replace(
        SPEC, state_dtype=torch.bfloat16, head_v_dim=64, conv_width=3, activation=None
    ),
    "bf16 state, KV, ratio 8, null block": replace(
        SPEC,
        num_k_heads=1,
        num_v_heads=8,
        state_dtype=torch.bfloat16,
        state_layout=StateLayout.KV,
        pad_slot=0,
    ),
    "fp32": FLOAT32,
    "fp32, K = 64, other layouts": replace(
        FLOAT32, head_k_dim=64, conv_dtype=torch.bfloat16, **OTHER_LAYOUTS
    ),
    "fp32, K = 256, V = 32": replace(FLOAT32, num_v_heads=2, head_k_dim=256, head_v_dim=32),
    "K = 64, V = 256": replace(SPEC, num_k_heads=1, num_v_heads=3, head_k_dim=64, head_v_dim=256),
    "K = V = 256": replace(SPEC, num_k_heads=1, num_v_heads=2, head_k_dim=256, head_v_dim=256),
    "K = 16, V = 32, width 2": replace(
        SPEC, head_k_dim=16, head_v_dim=32, conv_width=2, gate_activation="sigmoid"
    ),
    "fp16, K = 32, V = 16, KV": replace(
        SPEC, head_k_dim=32, head_v_dim=16, dtype=torch.float16, state_layout=StateLayout.KV
    ),
}
NAMES = [case.name for case in cases(SPECS["fp16, K = 32, V = 16, KV"])]


@cache
def _cases(spec: str) -> dict[str, Case]:
    return {case.name: case for case in cases(SPECS[spec])}


@cache
def _bound(spec: GdnSpec, backend: str | None) -> GdnOps:
    return bind(spec, "cuda", backend=backend)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", [None, "triton"])
def test_the_bound_ops_pass_every_case(backend: str | None, spec: str, name: str) -> None:
    case = _cases(spec)[name]

    case.check(_bound(case.spec, backend))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("protocol", ["replay", "snapshot"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("P", [9, 16])
def test_the_most_drafts_are_verified_by_the_shared_kernels(
    P: int, shape: str, protocol: str, name: str
) -> None:
    spec = replace(SPECS[name], conv_window=None)
    case, B = replay_case(spec, 6, P=P, bias=True, gate=True), 6
    given = case.arguments
    if shape == "tree":
        parents = random_parents(torch.Generator().manual_seed(P), B, P)
        given["metadata"] = replace(given["metadata"], parents=parents.int())
    if protocol == "snapshot":
        given["drafts"] = SnapshotDrafts.allocate(spec, B, P, "cpu")
        given["metadata"] = replace(given["metadata"], num_accepted=None)

    case.check(_bound(spec, "triton"))


@pytest.mark.parametrize("spec", SPECS)
def test_every_op_of_the_shared_backend_is_a_triton_kernel(spec: str) -> None:
    ops = bind(SPECS[spec], "cuda", backend="triton")

    assert {op.value: kernel for op, kernel in ops.kernels.items()} == {
        op.value: f"triton.{op.value}" for op in ops.kernels
    }


UNIT_KEYS = replace(SPEC, num_k_heads=1, qk_l2norm=False)


@pytest.mark.parametrize(
    "spec",
    [UNIT_KEYS, replace(UNIT_KEYS, dtype=torch.float16), replace(UNIT_KEYS, dtype=torch.float32)],
    ids=["bf16", "fp16", "fp32"],
)
def test_a_long_prefill_of_unit_keys_remembers_what_it_should(spec: GdnSpec) -> None:
    case = Case("unit keys", Op.CHUNK_PREFILL, spec, of_unit_keys(spec))

    case.check(_bound(spec, "triton"))


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("keeps", [True, False], ids=["checkpoints", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_deterministic_prefill_has_the_same_bits_in_half_heads_and_in_whole_ones(
    dtype: torch.dtype, keeps: bool, norms: bool
) -> None:
    spec = replace(SPEC, num_k_heads=16, num_v_heads=32, dtype=dtype, qk_l2norm=norms)
    ops = bind(spec, "cuda", backend="triton", deterministic=True)
    lengths, generator = (1000, 64, 700), torch.Generator("cuda").manual_seed(0)
    T = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    q, k = (torch.nn.functional.normalize(normal(T, 16, 128), dim=-1).to(dtype) for _ in range(2))
    v, g = normal(T, 32, 128).to(dtype), -normal(T, 32).abs()
    beta, state = normal(T, 32).sigmoid(), normal(8, 32, 128, 128)
    results = []
    for count in (1, 3):
        rows, pool = sum(lengths[:count]), state.clone()
        metadata = PrefillMetadata(
            cu_seqlens=torch.tensor((0, *lengths[:count]), device="cuda").cumsum(0),
            state_indices=torch.arange(count, device="cuda"),
            checkpoint_offsets=torch.full((count,), 64, device="cuda") if keeps else None,
            checkpoint_indices=torch.arange(5, 5 + count, device="cuda") if keeps else None,
            seq_lens_cpu=lengths[:count],
        )
        out = ops.chunk_prefill(*(x[:rows] for x in (q, k, v, g, beta)), pool, metadata=metadata)
        results.append((out[:1000], pool[0], pool[5]))

    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)


def test_a_state_that_keys_made_grow_is_not_forgotten() -> None:
    spec = replace(UNIT_KEYS, dtype=torch.float32)
    call = of_growing_states(spec)
    there = {name: x.cuda() for name, x in call.items() if isinstance(x, Tensor)}
    given = call["metadata"]
    metadata = PrefillMetadata(given.cu_seqlens.cuda(), given.state_indices.cuda())

    out = _bound(spec, "triton").chunk_prefill(**there, metadata=metadata)
    expected = bind(spec, "cpu").chunk_prefill(**call)

    assert_remembered(out.cpu(), expected)


P, ROOM = 4, 3
Slots = Sequence[int]


@dataclass
class Work:
    """A call of an op on a pool, and what to change in place before it is repeated."""

    op: str
    arguments: dict[str, Any]
    changes: dict[str, Tensor]

    def run(self, ops: GdnOps, pool: StatePool, arguments: dict[str, Any] | None = None) -> Any:
        return getattr(ops, self.op)(pool=pool, **(arguments or self.arguments))


def _index(*values: Any) -> Tensor:
    return torch.tensor(values, device="cuda")


def _rng() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def _normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=rng, device="cuda").to(dtype)


def _rows(spec: GdnSpec, tokens: int, *, gated: bool = False) -> dict[str, Any]:
    """Return what every step takes."""
    rng, HV, V = _rng(), spec.num_v_heads, spec.head_v_dim
    a, b = _normal(rng, 2, tokens, HV, dtype=spec.dtype)
    gate = _normal(rng, tokens, HV, V, dtype=spec.dtype)
    params = GdnParams(
        conv_weight=_normal(rng, spec.conv_dim, spec.conv_width, dtype=spec.dtype),
        A_log=_normal(rng, HV),
        dt_bias=_normal(rng, HV),
        norm_weight=_normal(rng, V, dtype=spec.dtype),
    )
    mixed = _normal(rng, tokens, spec.conv_dim, dtype=spec.dtype)
    rows = {"mixed_qkv": mixed, "a": a, "b": b, "params": params}
    return {**rows, "gate": gate} if gated else rows


def _prefill(spec: GdnSpec, s: Slots, *, kept: bool = False) -> Work:
    metadata = PrefillMetadata(_index(0, 70, 95, 100), _index(s[0], s[4], -1))
    changes = {"cu_seqlens": _index(0, 64, 84, 100), "state_indices": _index(s[0], -1, s[4])}
    if kept:
        metadata.has_initial_state = _index(True, False, True)
        metadata.out_state_indices = _index(s[1], s[5], -1)
        metadata.checkpoint_offsets = _index(64, 10, 3)
        metadata.checkpoint_indices = _index(s[2], -1, s[6])
        changes["out_state_indices"] = _index(s[3], -1, s[7])
    return Work(
        "prefill_step",
        {**_rows(spec, 100, gated=kept), "metadata": metadata},
        {f"metadata__{name}": value for name, value in changes.items()},
    )


def _decode(spec: GdnSpec, s: Slots, *, gated: bool = False, defers: bool = False) -> Work:
    arguments = {**_rows(spec, 3, gated=gated), "state_indices": _index(s[0], s[4], -1)}
    changes = {"state_indices": _index(s[1], -1, s[5])}
    if defers:
        updates = _filled(DeferredUpdates.allocate(spec, max(s) + 1, ROOM, "cuda"), _index(*s))
        arguments |= {"deferred": updates, "num_deferred": _index(ROOM, 2, 0)}
        changes["num_deferred"] = _index(1, 0, ROOM)
    if defers and gated:
        arguments["flush"] = _index(False, True, False)
        changes["flush"] = _index(True, False, False)
    return Work("decode_step", arguments, changes)


Kept = TypeVar("Kept", ReplayDrafts, SnapshotDrafts, DeferredUpdates)


def _filled(kept: Kept, used: Tensor) -> Kept:
    """Return what is kept with numbers where the slots, or any rows, have theirs."""
    rng = _rng()
    for field in dataclasses.fields(kept):
        tensor = getattr(kept, field.name)
        tensor[used] = _normal(rng, len(used), *tensor.shape[1:], dtype=tensor.dtype)
    if not isinstance(kept, SnapshotDrafts):
        kept.g.abs_().neg_()
    if isinstance(kept, ReplayDrafts):
        kept.beta.sigmoid_()
    return kept


def _drafts(spec: GdnSpec, s: Slots, protocol: str) -> ReplayDrafts | SnapshotDrafts | None:
    """Return drafts that a step before may have left."""
    if protocol == "slot table":
        return None
    if protocol == "snapshot":
        return _filled(SnapshotDrafts.allocate(spec, 3, P, "cuda"), _index(0, 1, 2))
    return _filled(ReplayDrafts.allocate(spec, max(s) + 1, P, "cuda"), _index(*s))


def _batch(s: Slots, protocol: str, *, ragged: bool) -> tuple[VerifyMetadata, dict[str, Tensor]]:
    """Return three sequences of drafts, the last one padding, and other slots and lengths."""
    slots, other = _index(s[0], s[4], -1), _index(s[1], -1, s[5])
    if protocol == "slot table":
        nobody = [-1] * P
        slots, other = _index(s[:P], s[P:], nobody), _index(s[P:], nobody, s[:P])
    offsets = _index(0, 4, 7, 9) if ragged else None
    metadata = VerifyMetadata(slots, P, cu_seqlens=offsets, num_accepted=_index(2, 1, 0))
    changes = {"metadata__state_indices": other}
    return metadata, {**changes, "metadata__cu_seqlens": _index(0, 1, 5, 9)} if ragged else changes


def _verify(spec: GdnSpec, s: Slots, *, protocol: str, ragged: bool = False) -> Work:
    metadata, changes = _batch(s, protocol, ragged=ragged)
    arguments = {"metadata": metadata, "drafts": _drafts(spec, s, protocol)}
    return Work("verify_step", {**_rows(spec, 9 if ragged else 3 * P), **arguments}, changes)


def _commit(spec: GdnSpec, s: Slots, *, protocol: str) -> Work:
    metadata, changes = _batch(s, protocol, ragged=False)
    arguments = {"drafts": _drafts(spec, s, protocol), "metadata": metadata}
    return Work(
        "mtp_commit",
        {**arguments, "last_accepted": _index(2, -1, 1)},
        {**changes, "last_accepted": _index(0, 1, 3)},
    )


Make = Callable[..., Work]
# calls as warmup makes them
WARM: dict[str, tuple[Make, dict[str, Any]]] = {
    "prefill": (_prefill, {}),
    "decode": (_decode, {}),
    "decode with a gate": (_decode, {"gated": True}),
    "decode that defers": (_decode, {"defers": True}),
    "decode that defers and flushes with a gate": (_decode, {"defers": True, "gated": True}),
    **{
        f"verify by {name}": (_verify, {"protocol": name})
        for name in ("replay", "snapshot", "slot table")
    },
    "commit of replay": (_commit, {"protocol": "replay"}),
    "commit of snapshot": (_commit, {"protocol": "snapshot"}),
}
WORKS = {
    **WARM,
    "prefill with a gate and checkpoints": (_prefill, {"kept": True}),
    **{
        f"ragged verify by {name}": (_verify, {"protocol": name, "ragged": True})
        for name in ("replay", "snapshot", "slot table")
    },
}


def _work(name: str, spec: GdnSpec, s: Slots) -> Work:
    make, options = WORKS[name]
    return make(spec, s, **options)


def _pool(spec: GdnSpec, num_slots: int, used: Slots) -> StatePool:
    """Return a pool of pages, zero but for the slots that are used."""
    pool, rng = StatePool.allocate(spec, num_slots, "cuda", paged=True), _rng()
    for tensor in _both(pool):
        tensor[_index(*used)] = _normal(rng, len(used), *tensor.shape[1:], dtype=tensor.dtype)
    return pool


def _both(pool: StatePool) -> tuple[Tensor, Tensor]:
    assert pool.conv_state is not None and pool.state is not None
    return pool.conv_state, pool.state


def _assert_same(one: StatePool, other: StatePool) -> None:
    for first, second in zip(_both(one), _both(other), strict=True):
        assert torch.equal(first, second)


def _assert_equal(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is expected is None or torch.equal(got, expected)


def _check_graph(ops: GdnOps, work: Work) -> None:
    """Capture a call; change slots and lengths, then compare a replay with an eager call."""
    pool, other = _pool(ops.spec, 11, range(11)), _pool(ops.spec, 11, range(11))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work.run(ops, pool)
    for name, value in work.changes.items():
        leaves(work.arguments)[name].copy_(value)
    apart = copy.deepcopy(work.arguments)

    graph.replay()
    expected = work.run(ops, other, apart)

    torch.cuda.synchronize()
    _assert_equal(out, expected)
    _assert_same(pool, other)
    for name, value in leaves(work.arguments).items():
        assert torch.equal(value, leaves(apart)[name]), name


@pytest.mark.parametrize("name", WORKS)
def test_a_call_does_not_synchronise(name: str) -> None:
    pool, work, ops = (
        _pool(SPEC, 11, range(11)),
        _work(name, SPEC, range(3, 11)),
        bind(SPEC, "cuda"),
    )
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        work.run(ops, pool)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", WORKS)
def test_a_graph_replays_with_other_slots_and_lengths(name: str) -> None:
    ops, work = bind(SPEC, "cuda"), _work(name, SPEC, range(3, 11))
    work.run(ops, _pool(SPEC, 11, range(11)))
    torch.cuda.synchronize()

    _check_graph(ops, work)


# a layer that no other test has compiled anything for
FRESH = replace(SPEC, num_k_heads=3, num_v_heads=3)


@pytest.mark.parametrize("name", WARM)
def test_after_warmup_a_graph_is_captured_and_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    knobs = pytest.importorskip("triton").knobs
    ops, compiled = bind(FRESH, "cuda"), []
    work = _work(name, FRESH, range(3, 11))
    ops.warmup(batch_sizes=(3,), prefill_tokens=(100,), max_drafts=P, max_deferred=ROOM)
    torch.cuda.synchronize()

    def note(*, fn: Any, **_: Any) -> None:
        compiled.append(fn.name)

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    _check_graph(ops, work)

    assert compiled == []


# a page is 1 MiB of state, with a window: the last slots are 5 GiB and 2 ** 31 elements away
LARGE = replace(SPEC, num_k_heads=16, num_v_heads=32, state_dtype=torch.bfloat16)
MANY = 5000


@pytest.mark.parametrize("name", WORKS)
def test_a_pool_may_be_larger_than_four_gibibytes(name: str) -> None:
    ops = bind(LARGE, "cuda")
    ends = [0, 1, 2, 3, MANY - 4, MANY - 3, MANY - 2, MANY - 1]
    near, far = _pool(LARGE, 8, range(8)), _pool(LARGE, MANY, ends)

    expected = _work(name, LARGE, range(8)).run(ops, near)
    got = _work(name, LARGE, ends).run(ops, far)

    _assert_equal(got, expected)
    for one, other in zip(_both(near), _both(far), strict=True):
        assert torch.equal(one, other[_index(*ends)])
        assert not other[4:-4].any()


def test_heads_may_lie_further_apart_than_an_int32_holds() -> None:
    ops, rng, T = bind(SPEC, "cuda", backend="triton"), _rng(), 70

    def far(near: Tensor) -> Tensor:
        others, V = near.shape[1] - 1, near.shape[2]
        stride = 2**31 // others + 1024
        memory = torch.empty(others * stride + T * V, dtype=near.dtype, device="cuda")
        return memory.as_strided(near.shape, (V, stride, 1)).copy_(near)

    q, k = (_normal(rng, T, 2, 128, dtype=SPEC.dtype) for _ in range(2))
    v = _normal(rng, T, 4, 128, dtype=SPEC.dtype)
    g, beta = -_normal(rng, T, 4).abs(), _normal(rng, T, 4).sigmoid()
    weight = torch.ones(128, device="cuda")
    outputs = []
    for apart in (lambda x: x, far):
        pool = _pool(SPEC, 2, range(2))
        assert pool.state is not None
        metadata = PrefillMetadata(_index(0, T), _index(1))
        o = ops.chunk_prefill(
            apart(q), apart(k), apart(v), g, beta, pool.state, metadata=metadata,
            out=apart(torch.empty_like(v)),
        )  # fmt: skip
        y = ops.gated_rms_norm(apart(o), apart(v), weight, out=apart(torch.empty_like(v)))
        outputs.append((pool.state, o.contiguous(), y.contiguous()))

    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


def test_a_prefill_and_a_decode_may_run_at_once_on_other_slots() -> None:
    ops = bind(SPEC, "cuda")
    one, other = _pool(SPEC, 11, range(11)), _pool(SPEC, 11, range(11))
    prefill = _work("prefill", SPEC, (1, 1, 1, 1, 2, 2, 2, 2))
    decode = _work("decode with a gate", SPEC, (3, 3, 3, 3, 4, 4, 4, 4))
    expected = [work.run(ops, one) for work in (prefill, decode) for _ in range(20)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()

    got: dict[str, list[Tensor]] = {prefill.op: [], decode.op: []}
    for _ in range(20):
        for stream, work in zip(streams, (prefill, decode), strict=True):
            with torch.cuda.stream(stream):
                got[work.op].append(work.run(ops, other))
    torch.cuda.synchronize()

    for mine, alone in zip(got[prefill.op] + got[decode.op], expected, strict=True):
        assert torch.equal(mine, alone)
    _assert_same(one, other)


ROWS = 1024
Reader = Callable[[GdnOps, StatePool], Tensor]


def _readers(spec: GdnSpec, mixed: Tensor) -> dict[str, Reader]:
    """Return a call of every op that reads rows of activations, on what the convolution wrote."""
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    q, k, v = mixed.split([H * K, H * K, HV * V], 1)
    qkv = q.unflatten(1, (H, K)), k.unflatten(1, (H, K)), v.unflatten(1, (HV, V))
    a, b = mixed[:, :HV], mixed[:, HV : 2 * HV]
    params, slots = _rows(spec, 1)["params"], torch.arange(ROWS, device="cuda")
    weight, rates, norm = params.conv_weight, (params.A_log, params.dt_bias), params.norm_weight
    rng = _rng()
    g, beta = -_normal(rng, ROWS, HV).abs(), _normal(rng, ROWS, HV).sigmoid()
    packed = PrefillMetadata(_index(0, ROWS), _index(0))
    updates = {"deferred": DeferredUpdates.allocate(spec, ROWS, ROOM, "cuda")}
    drafted = {
        "metadata": VerifyMetadata(slots[: ROWS // P], P),
        "drafts": SnapshotDrafts.allocate(spec, ROWS // P, P, "cuda"),
    }
    return {
        "conv1d_update": lambda ops, pool: ops.conv1d_update(
            mixed, weight, None, pool.conv_state, state_indices=slots
        ),
        "conv1d_prefill": lambda ops, pool: ops.conv1d_prefill(
            mixed, weight, None, pool.conv_state, metadata=packed
        ),
        "conv1d_verify": lambda ops, pool: ops.conv1d_verify(
            mixed, weight, None, pool.conv_state, **drafted
        ),
        "recurrent_decode": lambda ops, pool: ops.recurrent_decode(
            *qkv, a, b, *rates, pool.state, state_indices=slots
        ),
        "recurrent_decode that defers": lambda ops, pool: ops.recurrent_decode(
            *qkv, a, b, *rates, pool.state, state_indices=slots, **updates
        ),
        "decode_step that defers": lambda ops, pool: ops.decode_step(
            mixed, a, b, params, pool, state_indices=slots, **updates
        ),
        "chunk_prefill": lambda ops, pool: ops.chunk_prefill(
            *qkv, g, beta, pool.state, metadata=packed
        ),
        "mtp_verify": lambda ops, pool: ops.mtp_verify(*qkv, a, b, *rates, pool.state, **drafted),
        "gating": lambda ops, pool: torch.stack(ops.gating(a, b, *rates)),
        "gated_rms_norm": lambda ops, pool: ops.gated_rms_norm(qkv[2], qkv[2], norm),
        "decode_step": lambda ops, pool: ops.decode_step(
            mixed, a, b, params, pool, state_indices=slots
        ),
        "prefill_step": lambda ops, pool: ops.prefill_step(
            mixed, a, b, params, pool, metadata=packed
        ),
        "verify_step": lambda ops, pool: ops.verify_step(mixed, a, b, params, pool, **drafted),
    }


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize(
    "op",
    [
        *(op.value for op in Op if op not in (Op.PLAN_PREFILL, Op.MTP_COMMIT)),
        *("recurrent_decode that defers", "decode_step that defers"),
    ],
)
@pytest.mark.parametrize("joins", [False, True], ids=["one stream", "two that join"])
def test_an_op_waits_for_the_kernels_that_let_it_start_early(
    joins: bool, op: str, backend: str | None
) -> None:
    ops, beside = _bound(SPEC, backend), torch.cuda.Stream()
    x = _normal(_rng(), ROWS, SPEC.conv_dim, dtype=SPEC.dtype)
    mixed = torch.empty_like(x)
    read = _readers(SPEC, mixed)[op]
    weight = _rows(SPEC, 1)["params"].conv_weight
    windows = StatePool.allocate(SPEC, ROWS, "cuda").conv_state
    slots = torch.arange(ROWS, device="cuda")

    def convolve_rows(rows: slice) -> None:
        ops.conv1d_update(
            x[rows], weight, None, windows, state_indices=slots[rows], out=mixed[rows]
        )

    def convolve() -> None:
        if not joins:
            convolve_rows(slice(ROWS))
            return
        here = torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            convolve_rows(slice(ROWS // 2, ROWS))
        convolve_rows(slice(ROWS // 2))
        here.wait_stream(beside)

    convolve()
    torch.cuda.synchronize()
    expected = read(ops, _pool(SPEC, ROWS, range(8)))
    pool, graph = _pool(SPEC, ROWS, range(8)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        convolve()
        out = read(ops, pool)
    mixed.zero_()
    windows.zero_()
    torch.cuda.synchronize()

    graph.replay()

    torch.cuda.synchronize()
    assert torch.equal(out, expected)


PROMPTS = (
    b"ROMEO\tBut, soft! what light",
    b"O",
    b"to be or not to be, to be or not to be, to be or ",
)
PLANS = {
    "plain": None,
    "replay chain": (DraftProtocol.REPLAY, 5, 1),
    "replay tree": (DraftProtocol.REPLAY, 5, 2),
    "snapshot tree": (DraftProtocol.SNAPSHOT, 5, 3),
    "slot table": (DraftProtocol.SLOT_TABLE, 5, 1),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_demo_writes_the_bytes_of_the_reference(
    plan: tuple[DraftProtocol, int, int] | None,
) -> None:
    pytest.importorskip("safetensors")
    from gdn_portable.demo.generate import Generator, Sampling, Speculation
    from gdn_portable.demo.model import WEIGHTS, load_model

    def written(device: str, speculation: Speculation | None) -> list[bytes]:
        model = load_model(WEIGHTS, torch.device(device), torch.float32, max_drafts=5)
        ops = bind(model.spec, device)
        return Generator(model, ops, 2, Sampling(), speculation).run(PROMPTS, new_bytes=48).texts

    assert written("cuda", plan and Speculation(*plan)) == written("cpu", None)
