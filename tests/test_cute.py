# SPDX-License-Identifier: Apache-2.0
"""The CuTe kernel of verify_step without a GPU: when it is chosen, and which calls it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gdn_backend_cuda.cute_replay.plan import Kind, least_items, shapes_of

from gdn_portable import (
    Choice,
    ConvLayout,
    Device,
    GdnSpec,
    InputError,
    Op,
    SnapshotDrafts,
    StateLayout,
    StatePool,
    explain,
)
from tests.command import Command
from tests.cute_cases import SPEC, P, replay_case
from tests.cute_double import HOPPER, Double
from tests.libraries import Site

CUTE = "cute.verify_step"
TRITON = "triton.verify_step"
Call = dict[str, Any]


def _choices(spec: GdnSpec = SPEC, device: Device = HOPPER) -> dict[str, Choice]:
    choices = explain(spec, device, backend="cuda")
    return {choice.kernel: choice for choice in choices if choice.op is Op.VERIFY_STEP}


def _bare(site: Site) -> None:
    """Install nothing."""


def _too_old(site: Site) -> None:
    site.install_cute("4.5.3")


def _half_installed(site: Site) -> None:
    site.install_cute()
    (site.path / "cutlass/cute/__init__.py").unlink()
    (site.path / "cutlass/cute").rmdir()


def _without_bindings(site: Site) -> None:
    site.install_cute()
    (site.path / "cuda/bindings/driver.py").unlink()


def _failing(site: Site) -> None:
    site.install_cute()
    site.write("cutlass/__init__.py", "raise OSError('libcute.so: no such file\\nat all')")


def _without_a_name(site: Site) -> None:
    site.install_cute()
    site.write("cutlass/cutlass_dsl.py")


REASONS: dict[str, tuple[Callable[[Site], None], str]] = {
    "missing": (_bare, "nvidia-cutlass-dsl is not installed"),
    "too old": (_too_old, "nvidia-cutlass-dsl is 4.5.3, needs 4.6 or newer"),
    "half installed": (
        _half_installed,
        "cutlass.cute cannot be imported: ModuleNotFoundError: No module named 'cutlass.cute'",
    ),
    "without cuda-bindings": (
        _without_bindings,
        "cuda.bindings.driver cannot be imported: ModuleNotFoundError: "
        "No module named 'cuda.bindings.driver'",
    ),
    "failing": (_failing, "cutlass cannot be imported: OSError: libcute.so: no such file"),
    "without a name": (_without_a_name, "cutlass.cutlass_dsl has no dsl_user_op"),
}


@pytest.mark.parametrize(("install", "reason"), REASONS.values(), ids=REASONS)
def test_a_library_that_cannot_be_used_gives_its_reason_and_triton_serves(
    site: Site, install: Callable[[Site], None], reason: str
) -> None:
    install(site)

    choices = _choices()

    assert choices[CUTE].reasons == (reason,)
    assert choices[TRITON].chosen


def test_a_library_in_order_serves(site: Site) -> None:
    site.install_cute()

    assert _choices()[CUTE].chosen


def test_doctor_shows_why_the_library_cannot_be_used(site: Site, command: Command) -> None:
    _failing(site)

    document = command.document("doctor", "--arch", "sm90")

    choices = {choice["kernel"]: choice for choice in document["backends"]["cuda"]}
    assert choices[CUTE]["reasons"][0].endswith("OSError: libcute.so: no such file")
    assert choices[TRITON]["chosen"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state_layout": StateLayout.KV}, "state layout is KV, needs VK"),
        ({"head_v_dim": 64}, "head dims (K, V) is (128, 64), needs (128, 128)"),
        ({"dtype": torch.float32}, "dtype is torch.float32, needs torch.bfloat16"),
        ({"conv_dtype": torch.float32}, "conv dtype is torch.float32, needs torch.bfloat16"),
        ({"conv_width": 3}, "conv_width is 3, needs 4"),
        ({"num_v_heads": 16}, "HV / H is 8, needs at most 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layer_that_the_kernel_cannot_take_is_refused(
    site: Site, change: dict[str, object], reason: str
) -> None:
    site.install_cute()

    choices = _choices(replace(SPEC, **change))

    assert choices[CUTE].reasons[0].startswith(reason)
    assert choices[TRITON].chosen


@pytest.mark.parametrize(
    "change",
    [{"conv_layout": ConvLayout.LEN_FIRST}, {"conv_window": 7}, {"pad_slot": 0}, {"scale": 1.0}],
    ids=str,
)
def test_a_layer_may_have_another_window_padding_or_scale(
    site: Site, change: dict[str, object]
) -> None:
    site.install_cute()

    assert _choices(replace(SPEC, **change))[CUTE].chosen


def test_only_hopper_is_served(site: Site) -> None:
    site.install_cute()

    choices = _choices(device=Device("cuda", "sm100"))

    assert choices[CUTE].reasons == ("arch is sm100, needs sm90",)


class Calls:
    """The op with both kernels doubled: one does nothing, the other notes its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, deterministic: bool = False) -> None:
        self.double = Double(monkeypatch)
        self.started: list[list[int]] = []
        self.to_triton: list[Call] = []

        def start_of(shape: object, arch: str) -> Callable[[list[int]], None]:
            return self.started.append

        def triton_step(*args: Any, **kwargs: Any) -> str:
            self.to_triton.append({"args": args, **kwargs})
            return "triton's"

        launcher = self.double.launcher
        monkeypatch.setattr(launcher, "start_of", start_of)
        monkeypatch.setattr(launcher, "make_triton_step", lambda *_, **__: triton_step)
        monkeypatch.setattr(launcher, "least_items", lambda *_: 12)
        self.step = launcher.make_verify_step(SPEC, HOPPER, deterministic=deterministic)

    def __call__(self, call: Call) -> Any:
        named = dict(call)
        args = [named.pop(name) for name in ("mixed_qkv", "a", "b", "params", "pool")]
        return self.step(*args, **named)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def _call(B: int = 6, **options: bool) -> Call:
    return dict(replay_case(SPEC, B, **options).arguments)


def _with(call: Call, name: str, **changes: Any) -> Call:
    return {**call, name: replace(call[name], **changes)}


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Copy a tensor to memory that starts ``by`` elements off an aligned address."""
    memory = torch.empty(x.numel() + by, dtype=x.dtype)
    return memory[by:].view(x.shape).copy_(x)


def _padded(x: torch.Tensor, by: int) -> torch.Tensor:
    """Return it with rows of so many more numbers."""
    memory = torch.empty(*x.shape[:-1], x.shape[-1] + by, dtype=x.dtype)
    return memory[..., : x.shape[-1]].copy_(x)


def test_a_call_that_the_kernel_serves_goes_to_it_alone(calls: Calls) -> None:
    call = _call()

    assert calls(call) is call["out"]

    assert (len(calls.started), calls.to_triton) == (1, [])


def test_outputs_are_allocated_where_none_are_given(calls: Calls) -> None:
    out = calls({**_call(), "out": None})

    assert (out.shape, out.dtype, len(calls.started)) == ((24, 4, 128), torch.bfloat16, 1)


ROWS = ("mixed_qkv", "a", "b", "out")
OTHERS: dict[str, Callable[[Call], Call]] = {
    "fewer sequences": lambda call: _call(5),
    "no sequences": lambda call: {**call, **{name: call[name][:0] for name in ROWS}},
    "chains of five": lambda call: _with(call, "metadata", max_drafts=5),
    "chains of many lengths": lambda call: _with(
        call, "metadata", cu_seqlens=torch.arange(7) * 4
    ),
    "parents": lambda call: _with(call, "metadata", parents=torch.zeros(6, P, dtype=torch.int32)),
    "links": lambda call: _with(
        call, "metadata", next_token=torch.zeros(6, P), next_sibling=torch.zeros(6, P)
    ),
    "snapshots": lambda call: {**call, "drafts": SnapshotDrafts.allocate(SPEC, 6, P, "cpu")},
    "a slot table": lambda call: {
        **_with(call, "metadata", state_indices=torch.zeros(6, P, dtype=torch.int32)),
        "drafts": None,
    },
    "room for seventeen": lambda call: _with(
        call, "drafts", k=torch.zeros(9, 17, 2, 128).bfloat16()
    ),
    "gates in float32": lambda call: {**call, "a": call["a"].float()},
    "rates in bfloat16": lambda call: _with(
        call, "params", A_log=call["params"].A_log.bfloat16()
    ),
    "weights in float32": lambda call: _with(
        call, "params", conv_weight=call["params"].conv_weight.float()
    ),
    "outputs in float32": lambda call: {**call, "out": call["out"].float()},
    "outputs with V apart": lambda call: {**call, "out": call["out"].mT.contiguous().mT},
    "outputs at an odd address": lambda call: {**call, "out": _shifted(call["out"], 1)},
    "states at an odd address": lambda call: _with(
        call, "pool", state=_shifted(call["pool"].state, 1)
    ),
    "kept keys at an odd address": lambda call: _with(
        call, "drafts", k=_shifted(call["drafts"].k, 4)
    ),
    "kept values with strides of 8 bytes": lambda call: _with(
        call, "drafts", v=_padded(call["drafts"].v, 4)
    ),
    "states with K apart": lambda call: _with(
        call, "pool", state=call["pool"].state.mT.contiguous().mT
    ),
    "no window": lambda call: {**call, "pool": StatePool(None, call["pool"].state)},
    "a gate and no weight": lambda call: {
        **_with(call, "params", norm_weight=None), "gate": call["out"],
    },
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_any_other_call_goes_to_triton_as_it_is(
    calls: Calls, change: Callable[[Call], Call]
) -> None:
    call = change(_call())

    assert calls(call) == "triton's"

    (passed,) = calls.to_triton
    args = [call[name] for name in ("mixed_qkv", "a", "b", "params", "pool")]
    assert all(x is y for x, y in zip(passed.pop("args"), args, strict=True))
    assert all(passed[name] is call[name] for name in ("metadata", "drafts", "gate", "out"))
    assert calls.started == []


def test_a_small_batch_that_must_not_differ_from_a_large_one_goes_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch, deterministic=True)

    calls(_call(3))

    assert (len(calls.started), calls.to_triton) == (1, [])


def test_no_sequences_start_no_kernel_even_where_small_batches_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch, deterministic=True)

    assert calls(OTHERS["no sequences"](_call())) == "triton's"

    assert calls.started == []


def test_a_small_batch_compiles_what_a_large_one_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    double = Double(monkeypatch)
    monkeypatch.setattr(double.launcher, "make_triton_step", lambda *_, **__: lambda *_, **__: None)
    monkeypatch.setattr(double.launcher, "least_items", lambda *_: 7)
    step = double.launcher.make_verify_step(SPEC, HOPPER, deterministic=False)

    for case in (_call(3), _call(3), _call(3, bias=True), _call(3, fresh=True)):
        step(**case)

    kinds = [(s.has_bias, s.float32_dt_bias, s.has_accepted, s.warps) for s in double.compiled]
    expected = [(False, False, True), (True, True, True), (False, False, False)]
    assert kinds == [(*kind, warps) for kind in expected for warps in (8, 4)]
    assert double.started == 0


@pytest.mark.parametrize(
    ("change", "by_items"),
    [
        ({}, {132: (8, 1), 133: (4, 2)}),
        ({"num_v_heads": 2}, {132: (8, 2), 133: (8, 2)}),
        ({"num_v_heads": 8}, {132: (8, 1), 133: (8, 1)}),
        ({"state_dtype": torch.bfloat16}, {132: (8, 2), 133: (8, 2)}),
    ],
    ids=str,
)
def test_how_many_warps_take_an_item_goes_by_its_states_and_the_batch(
    change: dict[str, Any], by_items: dict[int, tuple[int, int]]
) -> None:
    shapes = shapes_of(replace(SPEC, **change), Kind(False, True, True, P, P))

    for items, team in by_items.items():
        shape = next(shape for most, shape in shapes if items <= most)
        assert (shape.warps, shape.blocks) == team
        assert shape.blocks * (shape.shared + 1024) <= 228 * 1024


@pytest.mark.parametrize(
    ("ratio", "drafts", "dtypes", "least"),
    [
        (1, 1, (torch.bfloat16, torch.float32), 32),
        (2, 2, (torch.float16, torch.bfloat16), 32),
        (2, 3, (torch.bfloat16, torch.float16), 16),
        (2, 4, (torch.float16, torch.float16), 32),
        (2, 5, (torch.bfloat16, torch.bfloat16), 1),
        (3, 4, (torch.bfloat16, torch.float32), 64),
        (4, 8, (torch.bfloat16, torch.bfloat16), 32),
        (4, 1, (torch.float16, torch.float16), 64),
    ],
    ids=str,
)
def test_few_items_with_few_drafts_or_many_heads_are_left_to_triton(
    ratio: int, drafts: int, dtypes: tuple[torch.dtype, torch.dtype], least: int
) -> None:
    dtype, state_dtype = dtypes
    heads = ratio * SPEC.num_k_heads
    spec = replace(SPEC, num_v_heads=heads, dtype=dtype, state_dtype=state_dtype)

    assert least_items(spec, drafts) == least


def test_a_gradient_is_refused(calls: Calls) -> None:
    call = _call()

    with pytest.raises(InputError, match="requires a gradient"):
        calls({**call, "mixed_qkv": call["mixed_qkv"].clone().requires_grad_()})


def test_two_protocols_are_refused(calls: Calls) -> None:
    call = _with(_call(), "metadata", state_indices=torch.zeros(6, P, dtype=torch.int32))

    with pytest.raises(InputError, match="names the slot table, and drafts were given"):
        calls(call)


def test_the_norm_and_the_gate_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    double, normed = Double(monkeypatch), []
    launcher = double.launcher
    monkeypatch.setattr(launcher, "start_of", lambda *_: lambda numbers: None)
    monkeypatch.setattr(launcher, "least_items", lambda *_: 1)

    def norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, **more: Any) -> str:
        normed.append((x, gate.shape, weight, more))
        return "normed"

    monkeypatch.setattr(launcher, "make_gated_rms_norm", lambda *_, **__: norm)
    call = dataclasses.replace(replay_case(SPEC, 3, gate=True)).arguments
    step = launcher.make_verify_step(SPEC, HOPPER, deterministic=False)

    assert step(**{**call, "gate": call["gate"].flatten(1)}) == "normed"

    ((x, shape, weight, more),) = normed
    assert x is call["out"] is more["out"] and weight is call["params"].norm_weight
    assert (shape, more["eps"]) == ((12, 4, 128), 1e-6)
