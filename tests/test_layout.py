# SPDX-License-Identifier: Apache-2.0
"""Layout adapters: kernels see transposed views of the engine's pools, and only where they must."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from functools import partial
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    ConvLayout,
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
    select,
)
from gdn_portable.layout import STATE_ARGUMENTS
from tests import fakes
from tests.fakes import (
    backend_of,
    install,
    kernel_of,
)

bind = partial(select.bind, check=False)

SPEC = replace(fakes.SPEC, dtype=torch.float32)
TURNED = replace(SPEC, state_layout=StateLayout.KV, conv_layout=ConvLayout.LEN_FIRST)
LAYOUTS = pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, conv_layout=ConvLayout.LEN_FIRST),
        replace(SPEC, state_layout=StateLayout.KV),
        TURNED,
    ],
    ids=["VK DIM_FIRST", "VK LEN_FIRST", "KV DIM_FIRST", "KV LEN_FIRST"],
)
STATEFUL = ("conv_state", "state", "checkpoint_state", "pool", "drafts")
BY_KEYWORD = [(op, name) for op, names in STATE_ARGUMENTS.items() for name in names]
BY_POSITION = [
    (op, name, position)
    for op, names in STATE_ARGUMENTS.items()
    for name, position in names.items()
    if position is not None
]


class Recorder:
    """A launcher that keeps what it was called with."""

    def __init__(self) -> None:
        """Start without a call."""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Keep the arguments."""
        self.args, self.kwargs = args, kwargs


def _recorded(monkeypatch: pytest.MonkeyPatch, op: Op, spec: GdnSpec) -> tuple[Recorder, Any]:
    """Return a recorder and the op of ``spec`` bound to it."""
    recorder = Recorder()
    kernel = kernel_of(op, "recorder", recorder)
    ops = bind(spec, "cpu", backend=install(monkeypatch, backend_of(kernel)))
    return recorder, getattr(ops, op.value)


def _argument(name: str) -> Tensor | StatePool | SnapshotDrafts:
    """Return what an engine with KV states and LEN_FIRST windows passes as ``name``."""
    pool = StatePool.allocate(TURNED, 3, "cpu", paged=True)
    assert pool.conv_state is not None and pool.state is not None
    arguments: dict[str, Tensor | StatePool | SnapshotDrafts] = {
        "conv_state": pool.conv_state,
        "state": pool.state,
        "checkpoint_state": pool.state,
        "pool": pool,
        "drafts": SnapshotDrafts.allocate(TURNED, 2, 3, "cpu"),
    }
    return arguments[name]


def _tensors(argument: Any) -> list[Tensor]:
    """Return the tensors of an argument."""
    if isinstance(argument, Tensor):
        return [argument]
    return [argument.conv_state, argument.state]


def _assert_turned(op: Op, seen: Any, given: Any) -> None:
    """Check what ``op`` reads of an argument: of snapshots, a convolution only the windows."""
    assert type(seen) is type(given)
    used = {Op.CONV1D_VERIFY: slice(0, 1), Op.MTP_VERIFY: slice(-1, None)}.get(op, slice(None))
    for view, tensor in zip(_tensors(seen)[used], _tensors(given)[used], strict=True):
        assert view.data_ptr() == tensor.data_ptr()
        assert view.shape == tensor.mT.shape
        assert view.stride() == tensor.mT.stride()


@pytest.mark.parametrize("op", Op, ids=lambda op: op.value)
def test_every_stateful_argument_of_the_contract_is_adapted(op: Op) -> None:
    protocol = get_type_hints(GdnOps)[op.value]
    parameters = list(inspect.signature(protocol.__call__).parameters.values())[1:]

    expected = {
        parameter.name: None if parameter.kind is parameter.KEYWORD_ONLY else position
        for position, parameter in enumerate(parameters)
        if parameter.name in STATEFUL
    }

    assert STATE_ARGUMENTS.get(op, {}) == expected


@pytest.mark.parametrize(("op", "name"), BY_KEYWORD)
def test_a_kernel_sees_transposed_views_of_keyword_arguments(
    monkeypatch: pytest.MonkeyPatch, op: Op, name: str
) -> None:
    recorder, launch = _recorded(monkeypatch, op, TURNED)
    given = _argument(name)

    launch(**{name: given})

    _assert_turned(op, recorder.kwargs[name], given)


@pytest.mark.parametrize(("op", "name", "position"), BY_POSITION)
def test_a_kernel_sees_transposed_views_of_positional_arguments(
    monkeypatch: pytest.MonkeyPatch, op: Op, name: str, position: int
) -> None:
    recorder, launch = _recorded(monkeypatch, op, TURNED)
    given = _argument(name)

    launch(*[None] * position, given)

    _assert_turned(op, recorder.args[position], given)
    assert recorder.args[:position] == (None,) * position


@pytest.mark.parametrize(("op", "name"), BY_KEYWORD)
def test_no_adapter_is_inserted_where_the_layouts_agree(
    monkeypatch: pytest.MonkeyPatch, op: Op, name: str
) -> None:
    recorder, launch = _recorded(monkeypatch, op, SPEC)

    assert launch is recorder


@pytest.mark.parametrize("op", [Op.GATING, Op.GATED_RMS_NORM, Op.PLAN_PREFILL])
def test_no_adapter_is_inserted_for_an_op_without_states(
    monkeypatch: pytest.MonkeyPatch, op: Op
) -> None:
    recorder, launch = _recorded(monkeypatch, op, TURNED)

    assert launch is recorder


@pytest.mark.parametrize(
    ("op", "spec"),
    [
        (Op.CONV1D_PREFILL, replace(SPEC, state_layout=StateLayout.KV)),
        (Op.CONV1D_UPDATE, replace(SPEC, state_layout=StateLayout.KV)),
        (Op.CONV1D_VERIFY, replace(SPEC, state_layout=StateLayout.KV)),
        (Op.CHUNK_PREFILL, replace(SPEC, conv_layout=ConvLayout.LEN_FIRST)),
        (Op.RECURRENT_DECODE, replace(SPEC, conv_layout=ConvLayout.LEN_FIRST)),
        (Op.MTP_VERIFY, replace(SPEC, conv_layout=ConvLayout.LEN_FIRST)),
    ],
)
def test_no_adapter_is_inserted_for_a_layout_that_the_op_does_not_touch(
    monkeypatch: pytest.MonkeyPatch, op: Op, spec: GdnSpec
) -> None:
    recorder, launch = _recorded(monkeypatch, op, spec)

    assert launch is recorder


@pytest.mark.parametrize(
    ("turned", "same"),
    [("conv_state", "state"), ("state", "conv_state")],
    ids=["LEN_FIRST alone", "KV alone"],
)
def test_only_the_state_that_differs_is_turned(
    monkeypatch: pytest.MonkeyPatch, turned: str, same: str
) -> None:
    specs = {
        "conv_state": replace(SPEC, conv_layout=ConvLayout.LEN_FIRST),
        "state": replace(SPEC, state_layout=StateLayout.KV),
    }
    spec = specs[turned]
    recorder, launch = _recorded(monkeypatch, Op.DECODE_STEP, spec)
    pool = StatePool.allocate(spec, 3, "cpu")

    launch(pool=pool)

    seen = recorder.kwargs["pool"]
    assert getattr(seen, same) is getattr(pool, same)
    assert getattr(seen, turned).shape == getattr(pool, turned).mT.shape
    assert getattr(seen, turned).data_ptr() == getattr(pool, turned).data_ptr()


def test_what_has_no_layout_is_passed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, launch = _recorded(monkeypatch, Op.VERIFY_STEP, TURNED)
    drafts, pool = ReplayDrafts.allocate(TURNED, 3, 2, "cpu"), StatePool(None, None)

    launch(pool=pool, drafts=drafts, gate=None)
    first = dict(recorder.kwargs)
    launch(pool=pool, drafts=None)

    assert first["drafts"] is drafts and first["gate"] is None
    assert first["pool"].state is None and first["pool"].conv_state is None
    assert recorder.kwargs["drafts"] is None


@LAYOUTS
def test_every_layout_gives_the_same_results(spec: GdnSpec) -> None:
    expected_pool = StatePool.allocate(SPEC, 4, "cpu")
    pool = StatePool.allocate(spec, 4, "cpu")

    expected = _run_every_step(bind(SPEC, "cpu"), expected_pool)
    results = _run_every_step(bind(spec, "cpu"), pool)

    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def _run_every_step(ops: GdnOps, pool: StatePool) -> list[Tensor]:
    """Return the outputs of prefill, decode and verify, and all states as VK and DIM_FIRST."""
    spec, generator = ops.spec, torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    params = GdnParams(
        draw(spec.conv_dim, spec.conv_width), draw(spec.num_v_heads), draw(spec.num_v_heads)
    )
    prefill, decode, verify = (
        (
            draw(tokens, spec.conv_dim),
            draw(tokens, spec.num_v_heads),
            draw(tokens, spec.num_v_heads),
        )
        for tokens in (8, 2, 6)
    )
    slots, last = torch.tensor([3, 1]), torch.tensor([1, -1])
    batch = PrefillMetadata(torch.tensor([0, 3, 8]), slots)
    drafted = VerifyMetadata(slots, max_drafts=3)
    drafts = SnapshotDrafts.allocate(spec, 2, 3, "cpu")
    outputs = [
        ops.prefill_step(*prefill, params, pool, metadata=batch),
        ops.decode_step(*decode, params, pool, state_indices=slots),
        ops.verify_step(*verify, params, pool, metadata=drafted, drafts=drafts),
    ]
    ops.mtp_commit(pool, drafts, metadata=drafted, last_accepted=last)
    turns = (spec.conv_layout is ConvLayout.LEN_FIRST, spec.state_layout is StateLayout.KV)
    kept = [
        tensor.mT if turn else tensor
        for holder in (drafts, pool)
        for tensor, turn in zip(_tensors(holder), turns, strict=True)
    ]
    return outputs + kept


def test_every_op_of_the_bound_object_was_considered() -> None:
    names = {field.name for field in fields(GdnOps)}

    assert {op.value for op in STATE_ARGUMENTS} <= names
