# SPDX-License-Identifier: Apache-2.0
"""On a Hopper GPU: the CuTe kernel passes, repeats itself bit for bit, and runs in graphs."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import GdnOps, GdnSpec, Op, ReplayDrafts, StatePool, bind
from gdn_portable.testing import Case, _copied, cases
from tests.calls import leaves
from tests.cute_cases import SPEC, replay_case

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU, torch sees none", allow_module_level=True)
pytest.importorskip("cutlass.cute")

from gdn_backend_cuda import cute_verify_step
from gdn_backend_cuda.cute_replay import kernel

NAMED = {Op.VERIFY_STEP: "cute.verify_step"}
BFLOAT16 = replace(SPEC, state_dtype=torch.bfloat16)
LAYER = replace(SPEC, num_k_heads=16, num_v_heads=32)  # of Qwen3-Next
SPECS = {
    "fp32 state": SPEC,
    "bf16 state": BFLOAT16,
    "fp16 state": replace(SPEC, state_dtype=torch.float16),
}
VERIFIES = [case.name for case in cases(SPEC) if case.op is Op.VERIFY_STEP]
KINDS: dict[str, tuple[GdnSpec, int, dict[str, int]]] = {
    "fp32": (SPEC, 6, {}),
    "fp32, bias, ties, gate": (SPEC, 6, {"bias": True, "ties": True, "gate": True}),
    "fp32, none pending": (SPEC, 6, {"fresh": True}),
    "fp32, one key head": (replace(SPEC, num_k_heads=1, num_v_heads=2), 3, {"ties": True}),
    "fp32, ratio 1, no norm": (replace(SPEC, num_v_heads=2, qk_l2norm=False), 6, {}),
    "fp32, ratio 3, null block": (replace(SPEC, num_v_heads=6, pad_slot=0), 40, {"bias": True}),
    "fp32, ratio 4, ties": (replace(SPEC, num_v_heads=8), 40, {"bias": True, "ties": True}),
    "fp32, Qwen3-Next": (LAYER, 48, {"bias": True, "ties": True}),
    "fp32, three drafts": (SPEC, 6, {"P": 3, "ties": True, "gate": True}),
    "fp32, two drafts, room for three": (SPEC, 6, {"P": 2, "room": 3, "bias": True}),
    "bf16, one draft, room for four": (BFLOAT16, 6, {"P": 1, "room": 4}),
    "bf16, Qwen3-Next, three drafts": (replace(LAYER, state_dtype=torch.bfloat16), 48, {"P": 3}),
    "fp16": (replace(SPEC, state_dtype=torch.float16), 6, {"bias": True, "ties": True}),
    "fp32, eight drafts": (SPEC, 6, {"P": 8, "bias": True, "ties": True}),
    "bf16, five drafts": (BFLOAT16, 6, {"P": 5}),
    "fp32, sixteen drafts": (SPEC, 6, {"P": 16, "bias": True, "ties": True, "gate": True}),
    "fp32, Qwen3-Next, sixteen drafts": (LAYER, 48, {"P": 16}),
    "bf16, nine drafts, room for twelve": (BFLOAT16, 6, {"P": 9, "room": 12, "ties": True}),
    "bf16, ratio 4, sixteen drafts": (replace(BFLOAT16, num_v_heads=8), 40, {"P": 16}),
    "fp16, sixteen drafts": (
        replace(SPEC, dtype=torch.float16, state_dtype=torch.float16),
        6,
        {"P": 16},
    ),
    "fp16 activations": (replace(SPEC, dtype=torch.float16), 6, {"bias": True, "ties": True}),
    "bf16": (BFLOAT16, 6, {}),
    "bf16, no activation": (replace(BFLOAT16, activation=None), 6, {"bias": True}),
    "bf16, ratio 4, every warp solves": (replace(BFLOAT16, num_v_heads=8), 70, {}),
    "bf16, ratio 4": (replace(BFLOAT16, num_v_heads=8), 40, {"gate": True}),
    "bf16, Qwen3-Next": (replace(LAYER, state_dtype=torch.bfloat16), 48, {}),
}


@pytest.fixture
def cute_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every batch to the kernel, and none to Triton."""

    def unreachable(*_: Any, **__: Any) -> None:
        pytest.fail("went to Triton")

    monkeypatch.setattr(cute_verify_step, "least_items", lambda *_: 1)
    monkeypatch.setattr(cute_verify_step, "make_triton_step", lambda *_, **__: unreachable)


@cache
def _case(kind: str) -> Case:
    spec, B, options = KINDS[kind]
    return replay_case(spec, B, **options)


def _bound(spec: GdnSpec, **options: Any) -> GdnOps:
    return bind(spec, "cuda", kernels=NAMED, check=False, **options)


def _on_gpu(case: Case) -> dict[str, Any]:
    arguments: dict[str, Any] = _copied(case.arguments, torch.device("cuda"), None)
    return arguments


def _written(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Return all that a call may write."""
    kept = (StatePool, ReplayDrafts)
    parts = {n: x for n, x in arguments.items() if n == "out" or isinstance(x, kept)}
    return leaves(parts)


def _assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, x in _written(one).items():
        y = _written(other)[name]
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), f"{name} differs"


@pytest.mark.parametrize("name", VERIFIES)
@pytest.mark.parametrize("spec", SPECS)
def test_every_case_passes_with_the_kernel_named(spec: str, name: str) -> None:
    case = next(case for case in cases(SPECS[spec]) if case.name == name)

    case.check(_bound(case.spec))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_passes(cute_alone: None, kind: str) -> None:
    case = _case(kind)

    case.check(_bound(case.spec))


@pytest.mark.parametrize("kind", ["fp32, Qwen3-Next", "bf16, Qwen3-Next"])
def test_two_runs_are_the_same_bit_for_bit(cute_alone: None, kind: str) -> None:
    case, ops = _case(kind), _bound(_case(kind).spec)
    one, other = _on_gpu(case), _on_gpu(case)

    ops.verify_step(**one)
    ops.verify_step(**other)

    _assert_same(one, other)


@pytest.mark.parametrize("kind", ["fp32, Qwen3-Next", "bf16, ratio 4"])
def test_a_sequence_comes_out_the_same_alone_and_in_a_batch(cute_alone: None, kind: str) -> None:
    case, ops = _case(kind), _bound(_case(kind).spec, deterministic=True)
    together, alone = _on_gpu(case), _on_gpu(case)
    rows = slice(4 * 4, 5 * 4)
    batch = together["metadata"]
    ops.verify_step(**together)

    metadata = replace(
        batch, state_indices=batch.state_indices[4:5], num_accepted=batch.num_accepted[4:5]
    )
    names = ("mixed_qkv", "a", "b", "out", "gate")
    given = {name: alone[name] if alone[name] is None else alone[name][rows] for name in names}
    ops.verify_step(**{**alone, **given, "metadata": metadata})

    slot = int(batch.state_indices[4])
    assert torch.equal(alone["out"][rows], together["out"][rows])
    assert torch.equal(alone["pool"].state[slot], together["pool"].state[slot])


@pytest.mark.parametrize("kind", ["fp32, bias, ties, gate", "fp32, Qwen3-Next", "bf16, ratio 4"])
def test_a_graph_replays_with_other_slots_and_counts(cute_alone: None, kind: str) -> None:
    case, ops = _case(kind), _bound(_case(kind).spec)
    ops.verify_step(**_on_gpu(case))
    captured, eager = _on_gpu(case), _on_gpu(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.verify_step(**captured)
    for arguments in (captured, eager):
        metadata = arguments["metadata"]
        # the padded row is another's, and all counts are
        metadata.state_indices.copy_(metadata.state_indices.roll(1))
        metadata.num_accepted.copy_((metadata.num_accepted + 2) % 5)

    graph.replay()
    ops.verify_step(**eager)

    torch.cuda.synchronize()
    _assert_same(captured, eager)


def test_two_steps_on_another_stream_are_those_of_the_first(cute_alone: None) -> None:
    case, ops = _case("fp32"), _bound(SPEC)
    one, other = _on_gpu(case), _on_gpu(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    with torch.cuda.stream(stream):
        for _ in range(2):
            ops.verify_step(**one)
    for _ in range(2):
        ops.verify_step(**other)

    torch.cuda.synchronize()
    _assert_same(one, other)


def test_a_call_does_not_synchronise(cute_alone: None) -> None:
    ops, arguments = _bound(SPEC), _on_gpu(_case("fp32"))
    ops.verify_step(**arguments)
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.verify_step(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_after_the_warmup_of_one_sequence_no_batch_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a layer that no other test compiles for
    spec = dataclasses.replace(SPEC, scale=0.05)
    ops = _bound(spec)
    ops.warmup(batch_sizes=(1,), prefill_tokens=())
    monkeypatch.setattr(kernel, "compile_for", lambda *_: pytest.fail("compiles"))
    monkeypatch.setattr(cute_verify_step, "least_items", lambda *_: 1)

    for options in ({}, {"bias": True}):
        replay_case(spec, 6, **options).check(ops)
    torch.cuda.synchronize()
