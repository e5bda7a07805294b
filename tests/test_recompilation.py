# SPDX-License-Identifier: Apache-2.0
"""Serving compiles nothing: kernels are as many as tiles, whatever the sizes of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.runtime.jit import JITFunction  # noqa: E402

from ci.amdgcn import Simulator, bind_simulated, driver, simulated  # noqa: E402
from gdn_portable import (  # noqa: E402
    DeferredUpdates,
    DraftProtocol,
    GdnOps,
    GdnParams,
    GdnSpec,
    Op,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    StatePool,
    VerifyMetadata,
)
from gdn_portable.metadata import Drafts  # noqa: E402
from gdn_portable.warmup import warmup  # noqa: E402

P, R = 3, 2
SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=64,
    head_v_dim=64,
    conv_window=3 + P,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
SIZES = (1, 2, 3, 16, 17)
SLOTS = 800
# no other device has this number, so nothing was compiled for it by another test
DEVICE = 4242


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[GdnOps]:
    """Return the ops on a device that compiles and launches nothing."""
    monkeypatch.setitem(driver.DEVICES, "gfx942", DEVICE)
    monkeypatch.setattr(Simulator, "launch", lambda *_: None)
    with simulated("gfx942"):
        yield bind_simulated(SPEC, "gfx942")
    for kernel in _kernels():
        kernel.device_caches.pop(DEVICE, None)


def _kernels() -> list[JITFunction]:
    return [thing for thing in gc.get_objects() if type(thing) is JITFunction]


def _variants() -> dict[str, int]:
    """Return how often each kernel was compiled."""
    return {
        kernel.__name__: len(kernel.device_caches[DEVICE][0])
        for kernel in _kernels()
        if DEVICE in kernel.device_caches
    }


def _index(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return slots as an engine passes them: part of a longer tensor, aligned to an element."""
    return torch.arange(SLOTS, dtype=dtype)[size % 5 + 1 :][:size]


def _offsets(size: int, step: int) -> Tensor:
    """Return where ``size`` sequences of ``step`` tokens begin, likewise."""
    return torch.cat((torch.zeros(size % 5, dtype=torch.int32), _index(size + 1) * step))[
        size % 5 :
    ]


def _layer(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's activations, ``a`` and ``b`` as halves of one projection of more tokens."""
    a, b = torch.zeros(tokens + 1, 2 * SPEC.num_v_heads, dtype=SPEC.dtype)[1:].chunk(2, -1)
    return torch.zeros(tokens, SPEC.conv_dim, dtype=SPEC.dtype), a, b


def _gate(tokens: int) -> Tensor:
    return torch.zeros(tokens, SPEC.num_v_heads * SPEC.head_v_dim, dtype=SPEC.dtype)


PARAMS = GdnParams(
    conv_weight=torch.zeros(SPEC.conv_dim, SPEC.conv_width, dtype=SPEC.dtype),
    A_log=torch.zeros(SPEC.num_v_heads),
    dt_bias=torch.zeros(SPEC.num_v_heads),
    norm_weight=torch.zeros(SPEC.head_v_dim, dtype=SPEC.dtype),
)


def _prefill(ops: GdnOps, size: int, pool: StatePool) -> None:
    for tokens in SIZES:
        metadata = PrefillMetadata(
            _offsets(size, 1),
            _index(size),
            has_initial_state=torch.zeros(size + 1, dtype=torch.bool)[1:],
            out_state_indices=_index(size),
            checkpoint_offsets=_index(size),
            checkpoint_indices=_index(size),
        )
        ops.prefill_step(*_layer(tokens), PARAMS, pool, metadata=metadata, gate=_gate(tokens))


def _prefill_of_a_prefix_cache(ops: GdnOps, size: int, pool: StatePool) -> None:
    flags = torch.zeros(size + 1, dtype=torch.bool)[1:]
    for fresh, target, kept in (
        (None, None, None),
        (flags, None, None),
        (flags, _index(size), None),
        (flags, None, _index(size)),
    ):
        metadata = PrefillMetadata(_offsets(size, 1), _index(size), fresh, target, kept, kept)
        ops.prefill_step(*_layer(16), PARAMS, pool, metadata=metadata, gate=_gate(16))


def _decode(ops: GdnOps, size: int, pool: StatePool) -> None:
    slots = {"state_indices": _index(size), "out_state_indices": _index(size)}
    ops.decode_step(*_layer(size), PARAMS, pool, **slots, gate=_gate(size))


def _decode_that_defers(ops: GdnOps, size: int, pool: StatePool, **changes: Tensor | None) -> None:
    flags = torch.zeros(size + 1, dtype=torch.bool)[1:]
    updates = {"num_deferred": _index(size), "flush": flags, **changes}
    kept = DeferredUpdates.allocate(SPEC, SLOTS, R, "cpu")
    slots = {"state_indices": _index(size), "deferred": kept}
    ops.decode_step(*_layer(size), PARAMS, pool, **slots, **updates, gate=_gate(size))


def _decodes_that_defer(ops: GdnOps, size: int, pool: StatePool) -> None:
    _decode_that_defers(ops, size, pool)
    _decode_that_defers(ops, size, pool, flush=None)
    _decode_that_defers(ops, size, pool, flush=None, out_state_indices=_index(size))


def _verify(
    ops: GdnOps,
    size: int,
    pool: StatePool,
    drafts: Drafts | None,
    *,
    pending: bool = True,
    **tree: Tensor,
) -> None:
    slots = _index(size * P).view(size, P) if drafts is None else _index(size)
    metadata = VerifyMetadata(
        slots,
        P,
        cu_seqlens=_offsets(size, P),
        num_accepted=_index(size) if pending else None,
        rows=_index(size) if isinstance(drafts, SnapshotDrafts) else None,
        **tree,
    )
    tokens = size * P
    ops.verify_step(
        *_layer(tokens), PARAMS, pool, metadata=metadata, drafts=drafts, gate=_gate(tokens)
    )
    if drafts is not None:
        last = {"last_accepted": _index(size), "out_state_indices": _index(size)}
        ops.mtp_commit(pool, drafts, metadata=metadata, **last)


def _links(size: int) -> dict[str, Tensor]:
    return {
        name: torch.zeros(size * P + size % 4, dtype=torch.int32)[size % 4 :].view(size, P)
        for name in ("parents", "next_token", "next_sibling")
    }


def _replay(ops: GdnOps, size: int, pool: StatePool) -> None:
    _verify(ops, size, pool, ReplayDrafts.allocate(SPEC, SLOTS, P, "cpu"))


def _replay_of_a_tree(ops: GdnOps, size: int, pool: StatePool) -> None:
    _verify(ops, size, pool, ReplayDrafts.allocate(SPEC, SLOTS, P, "cpu"), **_links(size))


def _first_replay(ops: GdnOps, size: int, pool: StatePool) -> None:
    _verify(ops, size, pool, ReplayDrafts.allocate(SPEC, SLOTS, P, "cpu"), pending=False)


def _snapshots(ops: GdnOps, size: int, pool: StatePool) -> None:
    _verify(ops, size, pool, SnapshotDrafts.allocate(SPEC, SLOTS, P, "cpu"))


def _snapshots_of_a_tree(ops: GdnOps, size: int, pool: StatePool) -> None:
    _verify(ops, size, pool, SnapshotDrafts.allocate(SPEC, SLOTS, P, "cpu"), **_links(size))


def _slot_table(ops: GdnOps, size: int, pool: StatePool) -> None:
    _verify(ops, size, pool, None)


def _first_slot_table(ops: GdnOps, size: int, pool: StatePool) -> None:
    _verify(ops, size, pool, None, pending=False)


REPLAY = {"prepare", "_replay", "_gated_rms_norm", "_commit_replay"}
DEFERRED = {"_conv1d_update", "_find_factors", "_decode_deferred", "_gated_rms_norm"}
VERIFY = {"_conv1d_verify", "_gated_rms_norm"}


@pytest.mark.parametrize(
    ("step", "kernels"),
    [
        (_prefill, {"_front_end", "attend", "invert", "_scan", "_gated_rms_norm"}),
        (_decode, {"_conv1d_update", "_decode"}),
        (_decode_that_defers, DEFERRED),
        (_replay, REPLAY),
        (_replay_of_a_tree, REPLAY | {"_fill_parents"}),
        (_snapshots, VERIFY | {"_recurrent", "_commit_snapshots"}),
        (_snapshots_of_a_tree, VERIFY | {"_recurrent", "_commit_snapshots", "_fill_parents"}),
        (_slot_table, VERIFY | {"_recurrent"}),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else "",
)
def test_a_kernel_is_compiled_once_whatever_a_step_s_sizes_and_slices(
    ops: GdnOps, step: Callable[[GdnOps, int, StatePool], None], kernels: set[str]
) -> None:
    pool = StatePool.allocate(SPEC, SLOTS, "cpu")

    for size in SIZES:
        step(ops, size, pool)

    assert _variants() == dict.fromkeys(kernels, 1)


def test_the_ops_alone_are_compiled_once_whatever_the_sizes(ops: GdnOps) -> None:
    pool = StatePool.allocate(SPEC, SLOTS, "cpu")
    state, conv_state = pool.state, pool.conv_state
    assert state is not None and conv_state is not None

    for size in SIZES:
        x, a, b = _layer(size)
        q, k = torch.zeros(2, size, SPEC.num_k_heads, SPEC.head_k_dim, dtype=SPEC.dtype)
        v = torch.zeros(size, SPEC.num_v_heads, SPEC.head_v_dim, dtype=SPEC.dtype)
        gates = a, b, PARAMS.A_log, PARAMS.dt_bias
        metadata = PrefillMetadata(_offsets(size, 1), _index(size))
        ops.conv1d_prefill(x, PARAMS.conv_weight, None, conv_state, metadata=metadata)
        ops.chunk_prefill(q, k, v, *ops.gating(*gates), state, metadata=metadata)
        ops.recurrent_decode(q, k, v, *gates, state, state_indices=_index(size))

    kernels = {"_conv1d_prefill", "_gating", "attend", "invert", "_scan", "_decode"}
    assert _variants() == dict.fromkeys(kernels, 1)


def test_a_decode_is_compiled_once_for_every_tile(ops: GdnOps) -> None:
    pool = StatePool.allocate(SPEC, SLOTS, "cpu")

    for size in (*SIZES, 33, 64, 129, 200, 399, 400):
        ops.decode_step(*_layer(size), PARAMS, pool, state_indices=_index(size))

    assert _variants() == {"_conv1d_update": 3, "_decode": 2}


def test_a_prefill_is_compiled_twice_with_sequences_cut_and_whole(ops: GdnOps) -> None:
    pool = StatePool.allocate(SPEC, SLOTS, "cpu")

    for tokens in (64, 255, 300, 512, 1000, 4000):
        metadata = PrefillMetadata(torch.tensor([0, tokens]), torch.tensor([1]))
        ops.prefill_step(*_layer(tokens), PARAMS, pool, metadata=metadata)

    once = dict.fromkeys(("_front_end", "attend", "invert", "_bridge"), 1)
    assert _variants() == {**once, "_scan": 2}


@pytest.mark.parametrize("dt_bias", [torch.float32, SPEC.dtype], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("step", "protocols"),
    [
        (_prefill, ()),
        (_prefill_of_a_prefix_cache, ()),
        (_decode, ()),
        (_decodes_that_defer, ()),
        (_replay, [DraftProtocol.REPLAY]),
        (_first_replay, [DraftProtocol.REPLAY]),
        (_replay_of_a_tree, [DraftProtocol.REPLAY]),
        (_snapshots, [DraftProtocol.SNAPSHOT]),
        (_snapshots_of_a_tree, [DraftProtocol.SNAPSHOT]),
        (_slot_table, [DraftProtocol.SLOT_TABLE]),
        (_first_slot_table, [DraftProtocol.SLOT_TABLE]),
        (_slot_table, None),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)).removeprefix("_"),
)
def test_nothing_is_compiled_after_warmup(
    monkeypatch: pytest.MonkeyPatch,
    ops: GdnOps,
    step: Callable[[GdnOps, int, StatePool], None],
    protocols: Collection[DraftProtocol] | None,
    dt_bias: torch.dtype,
) -> None:
    params = replace(PARAMS, dt_bias=PARAMS.dt_bias.to(dt_bias))
    monkeypatch.setitem(globals(), "PARAMS", params)
    pool = StatePool.allocate(SPEC, SLOTS, "cpu")
    launchers = {op: getattr(ops, op.value) for op in Op}
    warmup(
        SPEC,
        ops.device,
        launchers,
        prefill_tokens=(300,),
        max_drafts=P,
        max_deferred=R,
        protocols=protocols,
        index_dtypes=[torch.int32],
    )
    compiled = _variants()

    for size in SIZES:
        step(ops, size, pool)

    assert _variants() == compiled
