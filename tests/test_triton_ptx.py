# SPDX-License-Identifier: Apache-2.0
"""What Triton's kernels have in assembly, as it is compiled for Hopper, run on a CPU."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from gdn_backend_triton import deferred_decode  # noqa: E402
from gdn_backend_triton.decode import make_recurrent_decode  # noqa: E402
from gdn_backend_triton.maths import widened  # noqa: E402

from ci.resources.driver import Compiled, compiling_for  # noqa: E402
from gdn_portable import Device, GdnSpec, Op, StateLayout, bind  # noqa: E402
from gdn_portable.layout import adapt  # noqa: E402
from gdn_portable.testing import cases  # noqa: E402
from tests.cute_lanes import Space  # noqa: E402
from tests.ptx_block import WARP, Block  # noqa: E402
from tests.ptx_launch import PtxLaunch  # noqa: E402
from tests.ptx_program import parse  # noqa: E402

SIZE = tl.constexpr(2048)
LAYERS = {
    "float32 state": GdnSpec(
        num_k_heads=1,
        num_v_heads=2,
        head_k_dim=32,
        head_v_dim=16,
        dtype=torch.bfloat16,
        state_dtype=torch.float32,
    ),
    "bfloat16 throughout": GdnSpec(
        num_k_heads=1,
        num_v_heads=3,
        head_k_dim=64,
        head_v_dim=32,
        dtype=torch.bfloat16,
        state_dtype=torch.bfloat16,
    ),
}
LAYERS["bfloat16 throughout, KV"] = replace(
    LAYERS["bfloat16 throughout"], head_v_dim=64, state_layout=StateLayout.KV
)
NAMES = [
    case.name
    for case in cases(LAYERS["float32 state"])
    if case.op is Op.RECURRENT_DECODE and "deferred" in case.arguments
]


@triton.jit
def _split(x, high, low):
    tl.extra.cuda.gdc_wait()
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    first = value.to(tl.bfloat16)
    tl.store(high + at, first)
    tl.store(low + at, (value - widened(first)).to(tl.bfloat16))


def test_rounded_numbers_are_taken_apart_in_pairs() -> None:
    x = torch.randn(SIZE.value, generator=torch.Generator().manual_seed(0))
    high, low = cut = torch.empty(2, SIZE.value, dtype=torch.bfloat16)
    found: list[Compiled] = []
    with compiling_for("sm90", found.append):
        _split[(1,)](x, high, low, num_warps=1)
    code = found[0].files["ptx"].read_text()
    numbers = [x.data_ptr(), high.data_ptr(), low.data_ptr(), 0, 0]

    block = Block(
        parse(code), numbers, Space.of([x, cut]), Space.shared(16), WARP, 0, 1, random.Random(0)
    )
    block.run()

    assert "cvt.rn.bf16.f32" not in code
    assert torch.equal(high, x.bfloat16())
    assert torch.equal(low, (x - high.float()).bfloat16())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_decode_that_defers_passes_the_case(
    layer: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LAYERS[layer]
    monkeypatch.setattr(deferred_decode, "Launch", PtxLaunch)
    launch = make_recurrent_decode(spec, Device("cuda", "sm90"), deterministic=False)
    launch = adapt(launch, Op.RECURRENT_DECODE, spec)
    ops = replace(bind(spec, "cpu", check=False), recurrent_decode=launch)

    next(case for case in cases(spec) if case.name == name).check(ops)
