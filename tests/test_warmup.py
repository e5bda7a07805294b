# SPDX-License-Identifier: Apache-2.0
"""Warmup: every op runs once per size on memory of its own, and says what it runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from gdn_portable import (
    ConvLayout,
    Device,
    DraftProtocol,
    GdnParams,
    GdnSpec,
    InputError,
    Op,
    PrefillMetadata,
    StateLayout,
    StatePool,
    VerifyMetadata,
    select,
)
from gdn_portable.cli.demo import warm_up
from gdn_portable.metadata import Drafts, draft_protocol
from gdn_portable.reference import BACKEND as REFERENCE
from tests.fakes import SPEC, backend_of, install, kernel_of, recorded_kernel

bind = partial(select.bind, check=False)

REFERENCE_OPS = [kernel.op for kernel in REFERENCE.kernels]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, pad_slot=0),
        replace(SPEC, pad_slot=3),
        replace(SPEC, state_layout=StateLayout.KV, conv_layout=ConvLayout.LEN_FIRST),
        replace(SPEC, conv_window=6, conv_dtype=torch.float32),
        replace(SPEC, dtype=torch.float64, state_dtype=torch.float64),
        replace(SPEC, activation=None, gate_activation="sigmoid", qk_l2norm=False),
        replace(SPEC, num_v_heads=6, conv_width=3),
    ],
    ids=[
        "plain",
        "pad_slot 0",
        "pad_slot 3",
        "KV LEN_FIRST",
        "slot table",
        "float64",
        "other activations",
        "ratio 3",
    ],
)
def test_warmup_runs_for_every_kind_of_spec(spec: GdnSpec) -> None:
    said: list[str] = []

    bind(spec, "cpu").warmup(
        batch_sizes=(1, 3), prefill_tokens=(1, 65), max_drafts=3, progress=said.append
    )

    assert said == [
        f"{batch}, {dtype} indices"
        for dtype in ("int32", "int64")
        for batch in (
            "prefill of 1 tokens",
            "prefill of 65 tokens",
            "decode of 1 sequences",
            "verify of 1 sequences with 3 drafts",
            "decode of 3 sequences",
            "verify of 3 sequences with 3 drafts",
        )
    ]


def test_warmup_without_arguments_takes_one_size_of_each() -> None:
    said: list[str] = []

    bind(SPEC, "cpu").warmup(progress=said.append)

    assert said == [
        "prefill of 64 tokens, int32 indices",
        "decode of 1 sequences, int32 indices",
        "verify of 1 sequences with 4 drafts, int32 indices",
        "prefill of 64 tokens, int64 indices",
        "decode of 1 sequences, int64 indices",
        "verify of 1 sequences with 4 drafts, int64 indices",
    ]


def test_warmup_without_drafts_skips_verify() -> None:
    said: list[str] = []

    bind(SPEC, "cpu").warmup(max_drafts=0, progress=said.append)

    assert not [batch for batch in said if batch.startswith("verify")]


def test_warmup_of_what_defers_runs_its_decodes() -> None:
    said: list[str] = []
    options = {"prefill_tokens": (), "max_drafts": 0, "index_dtypes": (torch.int32,)}

    bind(SPEC, "cpu").warmup(batch_sizes=(2,), max_deferred=3, progress=said.append, **options)

    assert said == [
        "decode of 2 sequences, int32 indices",
        "decode of 2 sequences that defers, int32 indices",
    ]


@pytest.mark.parametrize("protocol", DraftProtocol)
def test_warmup_of_one_protocol_and_index_dtype_runs_no_other(
    monkeypatch: pytest.MonkeyPatch, protocol: DraftProtocol
) -> None:
    seen: set[tuple[DraftProtocol, torch.dtype]] = set()

    def verify(*_: object, metadata: VerifyMetadata, drafts: Drafts | None, **__: object) -> None:
        seen.add((draft_protocol(metadata, drafts), metadata.state_indices.dtype))

    name = install(monkeypatch, backend_of(kernel_of(Op.VERIFY_STEP, "seen.verify", verify)))
    ops = bind(replace(SPEC, conv_window=6), "cpu", backend=name)

    ops.warmup(prefill_tokens=(), protocols=(protocol,), index_dtypes=(torch.int64,))

    assert seen == {(protocol, torch.int64)}


def test_warmup_of_no_protocol_skips_verify() -> None:
    said: list[str] = []

    bind(SPEC, "cpu").warmup(protocols=(), index_dtypes=(torch.int32,), progress=said.append)

    assert said == ["prefill of 64 tokens, int32 indices", "decode of 1 sequences, int32 indices"]


def test_warmup_refuses_an_index_dtype_that_no_op_takes() -> None:
    with pytest.raises(InputError, match=r"index_dtypes has torch\.int16, needs torch\.int32 or"):
        bind(SPEC, "cpu").warmup(index_dtypes=(torch.int32, torch.int16))


@pytest.mark.parametrize("protocols", ["replay", ("snapshots",)])
def test_warmup_refuses_a_protocol_that_is_none(protocols: Any) -> None:
    with pytest.raises(InputError, match=r"protocols has \w+, needs DraftProtocol\.REPLAY or"):
        bind(SPEC, "cpu").warmup(protocols=protocols)


@pytest.mark.parametrize(
    "sizes",
    [{"batch_sizes": 4}, {"batch_sizes": (1, -1)}, {"prefill_tokens": (2.0,)}, {"max_drafts": -1}],
    ids=str,
)
def test_warmup_refuses_sizes_that_are_no_numbers_of_tokens_or_sequences(sizes: Any) -> None:
    name = next(iter(sizes))

    with pytest.raises(InputError, match=f"{name} is .*, needs whole numbers of at least 0"):
        bind(SPEC, "cpu").warmup(**sizes)


def test_warmup_of_no_size_runs_nothing() -> None:
    said: list[str] = []

    bind(SPEC, "cpu").warmup(batch_sizes=(), prefill_tokens=(), progress=said.append)

    assert said == []


@pytest.mark.parametrize("op", REFERENCE_OPS, ids=lambda op: op.value)
def test_warmup_runs_every_op(monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    calls: list[Op] = []
    name = install(monkeypatch, backend_of(recorded_kernel(op, calls)))

    bind(SPEC, "cpu", backend=name).warmup(prefill_tokens=(2,), max_drafts=2)

    assert op in calls


@pytest.mark.parametrize("op", REFERENCE_OPS, ids=lambda op: op.value)
def test_warmup_runs_every_op_where_the_steps_are_fused(
    monkeypatch: pytest.MonkeyPatch, op: Op
) -> None:
    calls: list[Op] = []
    steps = [
        kernel_of(step, f"fused.{step.value}", lambda *args, **kwargs: None)
        for step in (Op.PREFILL_STEP, Op.DECODE_STEP, Op.VERIFY_STEP)
    ]
    name = install(monkeypatch, backend_of(recorded_kernel(op, calls), *steps))

    bind(SPEC, "cpu", backend=name).warmup(prefill_tokens=(2,), max_drafts=2)

    assert op in calls


def test_warmup_changes_neither_a_pool_nor_what_a_call_returns() -> None:
    torch.manual_seed(0)
    ops, pool = bind(SPEC, "cpu"), StatePool.allocate(SPEC, 3, "cpu")
    params = GdnParams(torch.randn(SPEC.conv_dim, 4), torch.randn(4), torch.randn(4))
    fresh = torch.tensor([False])
    batch = PrefillMetadata(torch.tensor([0, 5]), torch.tensor([1]), has_initial_state=fresh)
    mixed_qkv, a, b = (torch.randn(5, n, dtype=SPEC.dtype) for n in (SPEC.conv_dim, 4, 4))
    before = ops.prefill_step(mixed_qkv, a, b, params, pool, metadata=batch)
    assert pool.state is not None and pool.conv_state is not None
    state, conv_state = pool.state.clone(), pool.conv_state.clone()

    ops.warmup(batch_sizes=(2,), prefill_tokens=(5,))

    assert torch.equal(pool.state, state) and torch.equal(pool.conv_state, conv_state)
    after = ops.prefill_step(mixed_qkv, a, b, params, pool, metadata=batch)
    assert torch.equal(after, before)


def test_warmup_leaves_the_random_numbers_of_the_caller_as_they_were() -> None:
    ops = bind(SPEC, "cpu")
    torch.manual_seed(0)
    expected = torch.rand(4)

    torch.manual_seed(0)
    ops.warmup()

    assert torch.equal(torch.rand(4), expected)


def test_warmup_leaves_the_settings_of_torch_as_they_were() -> None:
    with torch.enable_grad():
        bind(SPEC, "cpu").warmup()

        assert torch.is_grad_enabled()
        assert torch.zeros(1).device.type == "cpu"
        assert torch.get_default_dtype() is torch.float32


def test_an_error_of_a_kernel_reaches_the_caller_of_warmup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("the kernel is broken")

    name = install(monkeypatch, backend_of(kernel_of(Op.GATING, "broken.gating", fail)))

    with pytest.raises(ZeroDivisionError, match="the kernel is broken"):
        bind(SPEC, "cpu", backend=name).warmup(prefill_tokens=(2,), max_drafts=2)


def test_the_demo_warms_a_gpu_up_for_its_own_calls_and_a_cpu_not_at_all() -> None:
    calls: list[dict[str, object]] = []
    on_a_cpu = replace(bind(SPEC, "cpu"), warmup=lambda **sizes: calls.append(sizes))
    on_a_gpu = replace(on_a_cpu, device=Device("cuda", "sm90"))

    for ops in (on_a_cpu, on_a_gpu):
        warm_up(ops, batch=4, tokens=99, max_drafts=3, protocols=(DraftProtocol.REPLAY,))

    (sizes,) = calls
    assert callable(sizes.pop("progress"))
    assert sizes == {
        "batch_sizes": (4,),
        "prefill_tokens": (99,),
        "max_drafts": 3,
        "protocols": (DraftProtocol.REPLAY,),
        "index_dtypes": (torch.int64,),
    }
