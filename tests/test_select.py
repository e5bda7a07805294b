# SPDX-License-Identifier: Apache-2.0
"""Which kernels bind chooses, how it says why, and what a bound call costs."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch

from gdn_portable import (
    Backend,
    ConvLayout,
    Device,
    GdnSpec,
    Kernel,
    Op,
    StateLayout,
    UnknownBackendError,
    UnsupportedError,
    explain,
    get_backend,
    select,
)
from gdn_portable import (
    backend as declarations,
)
from tests.fakes import (
    CPU,
    HOPPER,
    MI300,
    SPEC,
    backend_of,
    bare_backend_of,
    in_canonical_layouts,
    install,
    kernel_of,
    reference_kernel,
)

bind = partial(select.bind, check=False)

STEPS = (Op.PREFILL_STEP, Op.DECODE_STEP, Op.VERIFY_STEP)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)


def _decode(name: str, **changes: Any) -> Kernel:
    """Declare the reference's decode under another name, with restrictions."""
    return replace(reference_kernel(Op.RECURRENT_DECODE), name=name, **changes)


def test_bind_names_a_kernel_for_every_op() -> None:
    ops = bind(SPEC, "cpu")

    assert set(ops.kernels) == set(Op)
    assert {ops.kernels[op] for op in STEPS} == {f"composed.{op.value}" for op in STEPS}
    assert all(ops.kernels[op] == f"reference.{op.value}" for op in Op if op not in STEPS)


def test_a_bound_object_carries_its_spec_and_device() -> None:
    ops = bind(SPEC, torch.device("cpu"))

    assert ops.spec is SPEC
    assert ops.device == CPU


@pytest.mark.parametrize("kind", ["cpu", "cuda", "rocm"])
def test_every_vendor_has_a_default_backend(kind: str) -> None:
    name = select.default_backend(Device(kind, kind))

    assert name == select.DEFAULT_FOR[kind]
    assert get_backend(name).name == name


def test_a_device_kind_that_nobody_serves_gets_the_reference() -> None:
    assert select.default_backend(Device("xpu", "xpu")) == "reference"
    assert bind(SPEC, Device("xpu", "xpu")).kernels[Op.GATING] == "reference.gating"


@pytest.mark.parametrize("device", [CPU, HOPPER, MI300], ids=str)
def test_explain_names_one_chosen_kernel_per_op_on_a_device_that_is_not_here(
    device: Device,
) -> None:
    spec = replace(SPEC, dtype=torch.bfloat16, state_dtype=torch.float32, head_k_dim=16)
    choices = explain(replace(spec, head_v_dim=32), device)

    assert [choice.op for choice in choices if choice.chosen] == list(Op)
    assert all(bool(choice.reasons) is False for choice in choices if choice.chosen)


def test_explain_lists_every_kernel_in_order_with_the_reasons_against_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = backend_of(
        _decode("hopper.decode", archs=("sm90",)), _decode("amd.decode", devices=("rocm",))
    )
    name = install(monkeypatch, table)

    on_hopper, on_mi300 = (
        [
            (choice.kernel, choice.chosen, choice.reasons)
            for choice in explain(SPEC, device, backend=name)
            if choice.op is Op.RECURRENT_DECODE
        ]
        for device in (HOPPER, MI300)
    )

    assert on_hopper == [
        ("hopper.decode", True, ()),
        ("amd.decode", False, ("device is cuda, needs rocm",)),
        ("reference.recurrent_decode", False, ()),
    ]
    assert on_mi300 == [
        ("hopper.decode", False, ("arch is gfx942, needs sm90",)),
        ("amd.decode", True, ()),
        ("reference.recurrent_decode", False, ()),
    ]


@pytest.mark.parametrize("device", [CPU, HOPPER, MI300], ids=str)
def test_explain_and_bind_agree(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    table = backend_of(
        _decode("hopper.decode", archs=("sm90",)), _decode("amd.decode", devices=("rocm",))
    )
    name = install(monkeypatch, table)

    chosen = {c.op: c.kernel for c in explain(SPEC, device, backend=name) if c.chosen}

    assert chosen == bind(SPEC, device, backend=name).kernels


@pytest.mark.parametrize(
    ("restriction", "reason"),
    [
        ({"devices": ("cuda",)}, "device is cpu, needs cuda"),
        ({"archs": ("sm90", "sm100")}, "arch is cpu, needs sm90 or sm100"),
        ({"dtypes": (torch.float16,)}, "dtype is torch.bfloat16, needs torch.float16"),
        ({"state_dtypes": (torch.half,)}, "state dtype is torch.float32, needs torch.float16"),
        ({"head_dims": ((128, 128),)}, "head dims (K, V) is (16, 8), needs (128, 128)"),
        ({"probe": lambda: "fakelib is not installed"}, "fakelib is not installed"),
        ({"refuse": lambda spec, device: f"no {device.kind} today"}, "no cpu today"),
    ],
    ids=["device", "arch", "dtype", "state dtype", "head dims", "probe", "refuse"],
)
def test_each_restriction_gives_its_reason(restriction: dict[str, Any], reason: str) -> None:
    assert _decode("picky.decode", **restriction).reasons(SPEC, CPU) == [reason]


def test_an_op_without_an_able_kernel_raises_every_reason_of_every_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picky = _decode(
        "picky.decode",
        devices=("cuda",),
        archs=("sm90",),
        dtypes=(torch.float16,),
        state_dtypes=(torch.bfloat16,),
        head_dims=((128, 128), (64, 64)),
        probe=lambda: "fakelib is not installed",
        refuse=lambda spec, device: "an odd number of slots",
    )
    absent = _decode("absent.decode", probe=lambda: "absentlib is not installed")
    name = install(monkeypatch, bare_backend_of(picky, absent))

    with pytest.raises(UnsupportedError) as caught:
        bind(SPEC, "cpu", backend=name)

    assert caught.value.rejected == {
        "picky.decode": [
            "device is cpu, needs cuda",
            "arch is cpu, needs sm90",
            "dtype is torch.bfloat16, needs torch.float16",
            "state dtype is torch.float32, needs torch.bfloat16",
            "head dims (K, V) is (16, 8), needs (128, 128) or (64, 64)",
            "fakelib is not installed",
            "an odd number of slots",
        ],
        "absent.decode": ["absentlib is not installed"],
    }
    message = str(caught.value)
    assert message.startswith("no kernel can serve recurrent_decode on cpu\n")
    assert message.endswith(f"the layer is {SPEC}")
    reasons = itertools.chain.from_iterable(caught.value.rejected.values())
    assert all(reason in message for reason in reasons)


def test_a_backend_that_lacks_an_op_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    name = install(monkeypatch, Backend(name="fake", devices=None, kernels=()))

    with pytest.raises(UnsupportedError, match="no kernel can serve conv1d_prefill") as caught:
        bind(SPEC, "cpu", backend=name)

    assert caught.value.rejected == {}


def test_the_first_able_kernel_of_the_table_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _decode("first.decode"), _decode("second.decode")
    unable = _decode("unable.decode", devices=("cuda",))
    one = install(monkeypatch, backend_of(unable, first, second))
    other = install(monkeypatch, replace(backend_of(second, unable, first), name="other"))

    kernels = [bind(SPEC, "cpu", backend=name).kernels for name in (one, other)]

    assert [names[Op.RECURRENT_DECODE] for names in kernels] == ["first.decode", "second.decode"]


def test_a_target_is_imported_only_when_it_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = _decode("absent.decode", target="library_not_here:decode")
    name = install(monkeypatch, backend_of(_decode("first.decode"), absent))

    ops = bind(SPEC, "cpu", backend=name)

    assert ops.kernels[Op.RECURRENT_DECODE] == "first.decode"


def test_a_launcher_is_made_for_the_spec_the_device_and_the_determinism_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[GdnSpec, Device, bool]] = []

    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> Callable[..., None]:
        made.append((spec, device, deterministic))
        return lambda: None

    name = install(monkeypatch, backend_of(_decode("made.decode", target=make)))

    bind(SPEC, "cpu", backend=name)
    bind(SPEC, HOPPER, backend=name, deterministic=True)

    assert made == [(SPEC, CPU, False), (SPEC, HOPPER, True)]


def test_a_declared_step_replaces_the_composed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = kernel_of(Op.DECODE_STEP, "fused.decode_step", lambda *args, **kwargs: "fused")
    name = install(monkeypatch, backend_of(fused))

    ops = bind(SPEC, "cpu", backend=name)

    assert ops.kernels[Op.DECODE_STEP] == "fused.decode_step"
    assert ops.kernels[Op.PREFILL_STEP] == "composed.prefill_step"
    assert ops.decode_step(None, None, None, None, None, state_indices=None) == "fused"  # type: ignore[arg-type]


def test_every_table_ends_with_the_composed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = kernel_of(Op.DECODE_STEP, "fused.decode_step", lambda: None)
    name = install(monkeypatch, backend_of(replace(fused, devices=("cuda",))))

    ops = bind(SPEC, "cpu", backend=name)
    choices = [c for c in explain(SPEC, "cpu", backend=name) if c.op is Op.DECODE_STEP]

    assert ops.kernels[Op.DECODE_STEP] == "composed.decode_step"
    assert [(choice.kernel, choice.chosen, choice.reasons) for choice in choices] == [
        ("fused.decode_step", False, ("device is cpu, needs cuda",)),
        ("composed.decode_step", True, ()),
    ]


def test_a_named_step_that_is_unable_is_refused_and_not_composed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = kernel_of(Op.DECODE_STEP, "fused.decode_step", lambda: None)
    name = install(monkeypatch, backend_of(replace(fused, devices=("cuda",))))

    with pytest.raises(UnsupportedError, match="device is cpu, needs cuda"):
        bind(SPEC, "cpu", backend=name, kernels={"decode_step": "fused.decode_step"})


def test_every_op_without_a_kernel_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = install(monkeypatch, Backend(name="fake", devices=None, kernels=()))

    with pytest.raises(UnsupportedError) as caught:
        bind(SPEC, "cpu", backend=name)

    missing = [op for op in Op if f"no kernel can serve {op.value} on" in str(caught.value)]
    assert missing == [op for op in Op if not op.value.endswith("_step")]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, state_layout=StateLayout.KV), "state layout is KV, needs VK"),
        (
            replace(SPEC, conv_layout=ConvLayout.LEN_FIRST),
            "conv layout is LEN_FIRST, needs DIM_FIRST",
        ),
    ],
    ids=["KV", "LEN_FIRST"],
)
def test_a_kernel_that_cannot_read_the_engines_memory_refuses(spec: GdnSpec, reason: str) -> None:
    kernel = in_canonical_layouts(kernel_of(Op.RECURRENT_DECODE, "dense.decode", lambda: None))

    assert kernel.reasons(spec, CPU) == [reason]
    assert kernel.reasons(SPEC, CPU) == []


@pytest.mark.parametrize("where", ["target", "probe", "refuse"])
def test_an_unexpected_exception_is_never_turned_into_a_fallback(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("the library is broken")

    changes: dict[str, Any] = {where: fail}
    name = install(monkeypatch, backend_of(_decode("broken.decode", **changes)))

    with pytest.raises(ZeroDivisionError, match="the library is broken"):
        bind(SPEC, "cpu", backend=name)


@pytest.mark.parametrize("target", ["library_not_here:decode", "gdn_portable.reference:nothing"])
def test_a_target_that_cannot_be_imported_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    name = install(monkeypatch, backend_of(_decode("absent.decode", target=target)))

    with pytest.raises((ModuleNotFoundError, AttributeError), match=r"library_not_here|nothing"):
        bind(SPEC, "cpu", backend=name)


def test_a_probe_tells_a_missing_library_from_a_namesake() -> None:
    probes = [
        declarations.needs("library_not_here", "library"),
        declarations.needs("tests", "amd-tests"),
        declarations.needs("torch", "torch"),
    ]

    assert [probe() for probe in probes] == [
        "library is not installed",
        "module 'tests' is not from amd-tests",
        None,
    ]


def test_bind_takes_less_than_a_millisecond() -> None:
    bind(SPEC, "cpu")
    times = []

    for _ in range(21):
        start = time.perf_counter()
        bind(SPEC, "cpu")
        times.append(time.perf_counter() - start)

    assert statistics.median(times) < 1e-3


def _frames_before(call: Callable[[], object], function: Callable[..., object]) -> int:
    """Return how many Python frames lie between ``call``'s own and that of ``function``."""
    depth, found = 0, []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal depth
        if event == "call" and frame.f_code is function.__code__:
            found.append(depth)
        depth += {"call": 1, "return": -1}.get(event, 0)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[0] - 1


@pytest.mark.parametrize(
    ("state_layout", "frames"), [(StateLayout.VK, 0), (StateLayout.KV, 1)], ids=["same", "adapted"]
)
def test_a_bound_call_adds_no_frame_and_an_adapter_one(
    monkeypatch: pytest.MonkeyPatch, state_layout: StateLayout, frames: int
) -> None:
    def launch(*args: object, **kwargs: object) -> None:
        return None

    kernel = kernel_of(Op.RECURRENT_DECODE, "frames.decode", launch)
    name = install(monkeypatch, backend_of(kernel))
    ops = bind(replace(SPEC, state_layout=state_layout), "cpu", backend=name)
    x, slots = torch.zeros(2, 2), torch.tensor([0])

    added = _frames_before(
        lambda: ops.recurrent_decode(x, x, x, x, x, x, x, x, state_indices=slots), launch
    )

    assert added == frames


def test_an_unknown_backend_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownBackendError) as caught:
        bind(SPEC, "cpu", backend="referense")

    assert "no backend 'referense'; there is " in str(caught.value)
    assert "did you mean 'reference'?" in str(caught.value)


def test_explain_refuses_an_unknown_backend_too() -> None:
    with pytest.raises(UnknownBackendError, match="did you mean 'reference'"):
        explain(SPEC, "cpu", backend="referense")
