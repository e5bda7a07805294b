# SPDX-License-Identifier: Apache-2.0
"""A launch goes to the kernel that Triton would find for it, whatever was launched before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from gdn_backend_triton import launches  # noqa: E402
from gdn_backend_triton.launches import Launch  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from ci.resources.driver import compiling_for  # noqa: E402
from gdn_portable import Device  # noqa: E402

GPUS = {"sm90": Device("cuda", "sm90"), "gfx942": Device("rocm", "gfx942")}
FLOATS = torch.zeros(65)
LARGE = torch.empty(2**31, dtype=torch.int8)  # never touched
TENSORS = {
    "float32": FLOATS[:64],
    "misaligned": FLOATS[1:],
    "bfloat16": FLOATS[:64].bfloat16(),
    "none": None,
    "large": LARGE.view(torch.float32)[:64],
}
SIZES = {"1": 1, "16": 16, "negative": -16, "long": 1 << 40}
STRIDES = {"1": 1, "3": 3, "16": 16, "long": 1 << 40}


@triton.jit(do_not_specialize=["N"])
def _copy(x, y, N, stride, scale, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if x is not None:
        value = tl.load(x + i * stride, mask=i < N, other=0.0)
        tl.store(y + i, value * scale, mask=i < N)


class Launched:
    """What goes to the driver, and through Triton's own look at every argument."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Any, tuple[Any, ...]]] = []
        self.looks = 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Record what is launched; whatever is compiled launches nothing."""
    found, run = Launched(), triton.JITFunction.run
    launch = CompiledKernel.__getitem__

    def look(kernel: Any, *args: Any, **options: Any) -> Any:
        found.looks += 1
        compiled = run(kernel, *args, **options)
        found.kernels.append((compiled, (*args, options["OVERLAPS"])))
        return compiled

    def again(compiled: Any, grid: Any) -> Any:
        def record(*args: Any, stream: Any) -> None:
            found.kernels.append((compiled, args))
            launch(compiled, grid)(*args, stream=stream)

        return record

    monkeypatch.setattr(triton.JITFunction, "run", look)
    monkeypatch.setattr(CompiledKernel, "__getitem__", again)
    return found


@pytest.fixture(params=GPUS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Return a device that only compiles."""
    with compiling_for(request.param, lambda _: None):
        yield GPUS[request.param]


def _arguments(tensor: str, size: str, stride: str, block: int = 64) -> tuple[Any, ...]:
    return (TENSORS[tensor], FLOATS), (SIZES[size],), (STRIDES[stride], 0.5, block)


def test_a_launch_goes_where_triton_would_send_it(launched: Launched, device: Device) -> None:
    launch, expected = Launch(_copy, device), Launch(_copy, device)
    every = [(t, size, stride) for t in TENSORS for size in SIZES for stride in STRIDES]

    for names in (*every, *every):
        expected._known.clear()
        expected(1, *_arguments(*names))
        launch(1, *_arguments(*names))

        (compiled, args), (mine, given) = launched.kernels[-2:]
        assert mine is compiled and given == args
    # only AMD's compiler tells "large" from "float32"; "1" is a size as "16" is
    tensors = len(TENSORS) - (device.kind == "cuda")
    assert launched.looks == 2 * len(every) + tensors * (len(SIZES) - 1) * len(STRIDES)
    variants = {kernel.hash for kernel, _ in launched.kernels}
    assert len(variants) > len(TENSORS)


def test_what_is_alike_is_looked_at_once(launched: Launched, device: Device) -> None:
    launch = Launch(_copy, device, num_warps=2)

    for size in ("1", "16", "1"):
        launch(3, *_arguments("float32", size, "3"))

    assert launched.looks == 1
    assert {kernel.hash for kernel, _ in launched.kernels} == {launched.kernels[0][0].hash}
    assert launched.kernels[0][0].metadata.num_warps == 2
    assert [args[2] for _, args in launched.kernels] == [1, 16, 1]


def test_another_device_has_its_own_kernels(launched: Launched) -> None:
    launch = Launch(_copy, GPUS["sm90"])

    for arch in ("sm90", "sm100", "sm90"):
        with compiling_for(arch, lambda _: None):
            launch(1, *_arguments("float32", "1", "3"))

    first, other, again = (kernel for kernel, _ in launched.kernels)
    assert first is again and first is not other
    assert launched.looks == 2


def test_no_more_are_kept_than_may_be(
    launched: Launched, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "MOST", 2)
    launch = Launch(_copy, device)

    for stride in (*STRIDES, *STRIDES):
        launch(1, *_arguments("float32", "1", stride))
        assert len(launch._known) <= 2


def test_only_a_kernel_that_waits_is_told_whether_it_can() -> None:
    @triton.jit
    def plain(x, BLOCK: tl.constexpr):
        pass

    waits = [Launch(_copy, device)._options for device in GPUS.values()]

    assert [options["OVERLAPS"] for options in waits] == [True, False]
    assert [options.get("launch_pdl") for options in waits] == [True, None]
    assert Launch(plain, GPUS["sm90"])._options.keys() == {"enable_fp_fusion"}
