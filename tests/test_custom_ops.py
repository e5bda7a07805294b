# SPDX-License-Identifier: Apache-2.0
"""The ops as custom ops: the same results, traced whole, pools written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gdn_portable import (
    GdnOps,
    GdnParams,
    GdnSpec,
    InputError,
    Op,
    PrefillMetadata,
    SnapshotDrafts,
    StatePool,
    VerifyMetadata,
    bind,
    custom_ops,
)
from gdn_portable.nn import GatedDeltaNet
from gdn_portable.testing import cases
from tests.fakes import backend_of, install, kernel_of, recorded_kernel

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=16,
    head_v_dim=8,
    dtype=torch.float32,
    state_dtype=torch.float32,
    conv_window=6,
)
HIDDEN = 32
CASES = {case.name: case for case in cases(SPEC)}
# between them every op but the norm, every field of metadata, every protocol, chains and trees
TRACED = [
    "gating at softplus's threshold",
    "prefill to other slots",
    "conv of prefill to other slots",
    "rule of prefill to other slots",
    "prefill with a gate and no flags",
    "decode to other slots with a gate",
    "conv of decode to other slots with a gate",
    "rule of decode to other slots with a gate",
    "verify of a tree by replay",
    "verify of a tree by snapshot",
    "verify of a ragged chain by slot table",
    "conv of verify of a tree by snapshot",
    "rule of verify of a ragged chain by replay",
    "commit of verify of a tree by replay",
    "commit to other slots of verify of a chain by snapshot",
]
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _registered(**options: Any) -> GdnOps:
    return custom_ops.register(bind(SPEC, "cpu", **options), custom_ops.free_name("tested"))


@cache
def _ops() -> GdnOps:
    return _registered()


class Calls(TorchDispatchMode):
    """Notes every custom op that is called, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == custom_ops.NAMESPACE:
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


class Stack(nn.Module):
    """Two layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([GatedDeltaNet(SPEC, HIDDEN) for _ in range(2)])

    def prefill(
        self, x: Tensor, ops: GdnOps, pools: list[StatePool], metadata: PrefillMetadata
    ) -> Tensor:
        for layer, pool in zip(self.layers, pools, strict=True):
            x = x + layer.prefill(x, ops, pool, metadata=metadata)
        return x

    def decode(
        self, x: Tensor, ops: GdnOps, pools: list[StatePool], state_indices: Tensor
    ) -> Tensor:
        for layer, pool in zip(self.layers, pools, strict=True):
            x = x + layer.decode(x, ops, pool, state_indices=state_indices)
        return x


def _separate_pools() -> list[StatePool]:
    return [StatePool.allocate(SPEC, 6, "cpu") for _ in range(2)]


def _pools_of_one_tensor() -> list[StatePool]:
    """Return the layers' slices of two tensors with a layer axis."""
    conv_state = torch.zeros(2, 6, SPEC.conv_dim, SPEC.conv_state_len)
    state = torch.zeros(2, 6, SPEC.num_v_heads, SPEC.head_v_dim, SPEC.head_k_dim)
    return [StatePool(*layer) for layer in zip(conv_state, state, strict=True)]


def _packed(lengths: list[int]) -> PrefillMetadata:
    return PrefillMetadata(
        torch.tensor([0, *lengths]).cumsum(0),
        torch.arange(len(lengths)),
        torch.zeros(len(lengths), dtype=torch.bool),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_case_passes_outside_of_compiled_code(name: str) -> None:
    CASES[name].check(_ops())


@pytest.mark.parametrize("name", TRACED)
def test_a_case_passes_traced_whole(name: str) -> None:
    case, ops = CASES[name], _ops()
    launch = getattr(ops, case.op.value)
    traced = torch.compile(
        lambda arguments: launch(**arguments), fullgraph=True, backend="aot_eager"
    )

    case.check(replace(ops, **{case.op.value: lambda **arguments: traced(arguments)}))


@pytest.mark.parametrize("name", TRACED)
def test_what_an_op_writes_is_declared_and_its_fake_is_true(name: str) -> None:
    with Calls() as calls:
        CASES[name].results(_ops())

    assert calls.made
    for op, values in calls.made:
        torch.library.opcheck(op, values, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "make_pools", [_separate_pools, _pools_of_one_tensor], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_layers_compiled_by_inductor_write_the_pools_themselves(
    make_pools: Callable[[], list[StatePool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    plain = bind(SPEC, "cpu")

    def decode_step(*args: Any, pool: StatePool, **kwargs: Any) -> Tensor:
        written.extend(x.data_ptr() for x in (pool.conv_state, pool.state) if x is not None)
        return plain.decode_step(*args, pool=pool, **kwargs)

    fake = install(monkeypatch, backend_of(kernel_of(Op.DECODE_STEP, "fake.step", decode_step)))
    ops, stack = _registered(backend=fake), Stack()
    pools, expected_pools = make_pools(), make_pools()
    compiled = torch.compile(stack.decode, fullgraph=True)
    tokens, slots = torch.randn(3, 2, HIDDEN), torch.tensor([4, 1])

    for x in tokens:
        close(compiled(x, ops, pools, slots), stack.decode(x, plain, expected_pools, slots))

    for pool, expected in zip(pools, expected_pools, strict=True):
        close(pool.state, expected.state)
        close(pool.conv_state, expected.conv_state)
    addresses = [x.data_ptr() for pool in pools for x in (pool.conv_state, pool.state)]
    assert written == addresses * len(tokens)


@torch.no_grad()
def test_a_plan_is_made_once_for_all_layers_and_later_batches_compile_nothing_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[Op] = []
    fake = install(monkeypatch, backend_of(recorded_kernel(Op.PLAN_PREFILL, plans)))
    ops, plain, stack = _registered(backend=fake), bind(SPEC, "cpu"), Stack()
    compiled = torch.compile(stack.prefill, fullgraph=True, backend="aot_eager")
    graphs = []

    for lengths in ([5, 3], [4, 9], [70, 2], [6, 8]):
        x, batch = torch.randn(sum(lengths), HIDDEN), _packed(lengths)
        pools, expected_pools = _separate_pools(), _separate_pools()
        expected = stack.prefill(x, plain, expected_pools, _packed(lengths))
        ops.plan_prefill(batch)
        close(compiled(x, ops, pools, batch), expected)
        close([pool.state for pool in pools], [pool.state for pool in expected_pools])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    assert plans == [Op.PLAN_PREFILL] * 4
    # of fixed sizes first, then of any
    assert graphs == [1, 2, 2, 2]


def test_a_plan_keeps_its_number_and_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    plain = bind(SPEC, "cpu")

    def chunk_prefill(*args: Any, metadata: PrefillMetadata, **kwargs: Any) -> Tensor:
        seen.append(metadata.plan)
        return plain.chunk_prefill(*args, metadata=metadata, **kwargs)

    kernel = kernel_of(Op.CHUNK_PREFILL, "fake.chunk", chunk_prefill)
    ops = _registered(backend=install(monkeypatch, backend_of(kernel)))
    batch, other = _packed([5, 3]), _packed([5, 3])
    arguments = CASES["rule of prefill of one token repeated"].arguments

    ops.plan_prefill(batch)
    first = batch.plan
    batch.cu_seqlens = torch.tensor([0, 70, 80])
    ops.plan_prefill(batch)
    ops.plan_prefill(other)
    ops.chunk_prefill(**{**arguments, "metadata": batch})

    assert isinstance(first, custom_ops.NumberedPlan)
    assert isinstance(batch.plan, custom_ops.NumberedPlan)
    assert isinstance(other.plan, custom_ops.NumberedPlan)
    assert first.number == batch.plan.number != other.plan.number
    assert seen == [batch.plan]


@pytest.mark.parametrize("plans", [True, False], ids=["a plan", "nothing to plan"])
def test_lengths_on_the_host_reach_the_kernel_with_the_plan(
    monkeypatch: pytest.MonkeyPatch, plans: bool
) -> None:
    seen: list[object] = []
    plain = bind(SPEC, "cpu")

    def chunk_prefill(*args: Any, metadata: PrefillMetadata, **kwargs: Any) -> Tensor:
        seen.append(metadata.seq_lens_cpu)
        return plain.chunk_prefill(*args, metadata=replace(metadata, plan=None), **kwargs)

    kernels = [kernel_of(Op.CHUNK_PREFILL, "fake.chunk", chunk_prefill)]
    if not plans:
        kernels.append(kernel_of(Op.PLAN_PREFILL, "fake.plan", lambda metadata: None))
    ops = _registered(backend=install(monkeypatch, backend_of(*kernels)))
    arguments = CASES["rule of prefill of one token repeated"].arguments
    batch = replace(arguments["metadata"], state_indices=torch.tensor([3, 2]))

    for lengths in ([70, 60], [30, 100], None):
        batch.cu_seqlens = torch.tensor([0, 30 if lengths is None else lengths[0], 130])
        batch.seq_lens_cpu = lengths
        ops.plan_prefill(batch)
        ops.chunk_prefill(**{**arguments, "metadata": batch})
    ops.chunk_prefill(**{**arguments, "metadata": replace(batch, plan=None)})

    assert seen == [[70, 60], [30, 100], None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pools_in_pages_of_one_dtype_are_written_by_compiled_code(dtype: torch.dtype) -> None:
    spec = replace(SPEC, dtype=dtype, state_dtype=dtype)
    ops = custom_ops.register(bind(spec, "cpu"), custom_ops.free_name("pages"))
    pages, plain = (StatePool.allocate(spec, 3, "cpu", paged=on) for on in (True, False))
    x, weight = torch.randn(2, spec.conv_dim).to(dtype), torch.randn(spec.conv_dim, 4).to(dtype)
    a, zeros, slots = torch.randn(2, spec.num_v_heads), torch.zeros(spec.num_v_heads), [2, 0]
    params = GdnParams(weight, zeros, zeros)

    def decode(pool: StatePool) -> Tensor:
        return ops.decode_step(x, a, a, params, pool, state_indices=torch.tensor(slots))

    with torch.no_grad():
        traced = torch.compile(decode, fullgraph=True, backend="aot_eager")(pages)
        close(traced, decode(plain))

    assert pages.state is not None and pages.conv_state is not None
    assert pages.state.untyped_storage().data_ptr() == pages.conv_state.untyped_storage().data_ptr()
    close(pages.state, plain.state)
    close(pages.conv_state, plain.conv_state)


def test_the_norm_is_traced_whole() -> None:
    ops, x = _ops(), torch.randn(3, 4, 8)
    gate, weight = torch.randn(3, 4, 8), torch.randn(8)

    traced = torch.compile(ops.gated_rms_norm, fullgraph=True, backend="aot_eager")

    close(
        traced(x, gate, weight, eps=0.1), bind(SPEC, "cpu").gated_rms_norm(x, gate, weight, eps=0.1)
    )


def test_a_tree_given_by_links_is_made_parents_in_traced_code() -> None:
    links = torch.tensor([[1, 3, -1, -1]]), torch.tensor([[-1, 2, -1, -1]])
    batch = VerifyMetadata(torch.tensor([0]), 4, next_token=links[0], next_sibling=links[1])
    ops, x = _ops(), torch.randn(4, SPEC.conv_dim)
    weight, drafts = torch.randn(SPEC.conv_dim, 4), SnapshotDrafts.allocate(SPEC, 1, 4, "cpu")
    window = torch.zeros(1, SPEC.conv_dim, SPEC.conv_state_len)

    def verify(batch: VerifyMetadata) -> Tensor:
        return ops.conv1d_verify(x, weight, None, window, metadata=batch, drafts=drafts)

    torch.compile(verify, fullgraph=True, backend="aot_eager")(batch)

    assert batch.parents is not None
    assert batch.parents.tolist() == [[0, 0, 0, 1]]


def test_an_input_that_requires_a_gradient_is_refused() -> None:
    case = CASES["gating at softplus's threshold"]
    a = case.arguments["a"].clone().requires_grad_()

    with pytest.raises(InputError, match=r"requires a gradient, custom ops need torch.no_grad"):
        _ops().gating(**{**case.arguments, "a": a})


@pytest.mark.parametrize("makes_plan", [bind(SPEC, "cpu"), _registered()], ids=["bare", "other"])
def test_a_plan_of_other_ops_is_refused(makes_plan: GdnOps) -> None:
    case = CASES["rule of prefill of one token repeated"]
    batch = _packed([5, 3])
    makes_plan.plan_prefill(batch)

    with pytest.raises(InputError, match="plan was made by other ops, needs plan_prefill of these"):
        _ops().chunk_prefill(**{**case.arguments, "metadata": batch})


def test_a_plan_inside_of_compiled_code_is_refused_where_it_would_be_traced() -> None:
    whole = torch.compile(_ops().plan_prefill, fullgraph=True, backend="eager")
    with_breaks, batch = torch.compile(_ops().plan_prefill, backend="eager"), _packed([5, 3])

    with pytest.raises(RuntimeError, match="plan_prefill was compiled, needs a call in front"):
        whole(_packed([5, 3]))
    with_breaks(batch)

    assert isinstance(batch.plan, custom_ops.NumberedPlan)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("my-model", "is 'my-model', needs an identifier"), ("taken", "'taken', which is registered")],
)
def test_a_name_that_cannot_be_registered_is_refused(name: str, reason: str) -> None:
    ops = bind(SPEC, "cpu")
    if name == "taken" and custom_ops.free_name("taken") == "taken_0":
        custom_ops.register(ops, "taken")

    with pytest.raises(InputError, match=reason):
        custom_ops.register(ops, name)


def test_arguments_that_an_op_does_not_take_are_refused() -> None:
    case = CASES["gating at softplus's threshold"]

    with pytest.raises(TypeError, match="gating takes a, b, A_log, dt_bias, got"):
        _ops().gating(**case.arguments, scale=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got 5 by position, and by name dt_bias"):
        _ops().gating(*case.arguments.values(), *[0], dt_bias=0)  # type: ignore[misc, arg-type]
    with pytest.raises(TypeError, match="got 1 by position, and by name a, b, A_log, dt_bias"):
        _ops().gating(0, **case.arguments)  # type: ignore[misc, arg-type]
