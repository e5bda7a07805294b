# SPDX-License-Identifier: Apache-2.0
"""The simulator of AMD GPUs: what it computes, and the mistakes that it finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ci.amdgcn import (  # noqa: E402
    EndlessLoopError,
    LdsAccessError,
    LdsRaceError,
    MemoryAccessError,
    Order,
    Simulator,
    UnknownInstructionError,
    UnsupportedLaunchError,
    bind_simulated,
    execution,
    simulated,
)
from gdn_portable import GdnSpec  # noqa: E402

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=32,
    head_v_dim=32,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["gfx942", "gfx950"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Simulator]:
    """Return each simulated GPU."""
    with simulated(request.param) as simulator:
        yield simulator


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_close(value: Tensor, expected: Tensor) -> None:
    exact = expected.double()
    error = (value.double() - exact).abs().max()
    assert error <= EPSILON[value.dtype] * exact.abs().max().clamp(min=1)


@triton.jit
def _scaled_sum(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    total = tl.load(x + i, mask=mask, other=0.0) + 3 * tl.load(y + i, mask=mask, other=0.0)
    tl.store(out + i, total, mask=mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_elements_that_a_mask_leaves_are_computed_and_no_other_is_written(
    gpu: Simulator, dtype: torch.dtype
) -> None:
    x, y = random(2, 300, dtype=dtype)
    out = torch.full((310,), 7.0, dtype=dtype)
    _scaled_sum[(2,)](x, y, out, 300, BLOCK=256)
    assert_close(out[:300], x.double() + 3 * y.double())
    assert (out[300:] == 7).all()


@triton.jit
def _reductions(x, sums, maxima, running, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    block = tl.load(x + i[:, None] * COLUMNS + j[None, :])
    tl.store(sums + i, tl.sum(block, 1))
    tl.store(maxima + j, tl.max(block, 0))
    tl.store(running + i[:, None] * COLUMNS + j[None, :], tl.cumsum(block, 1))


@pytest.mark.parametrize("num_warps", [1, 4])
def test_sums_maxima_and_running_sums_agree_with_torch(gpu: Simulator, num_warps: int) -> None:
    x = random(16, 128)
    sums, maxima, running = torch.empty(16), torch.empty(128), torch.empty(16, 128)
    _reductions[(1,)](x, sums, maxima, running, 16, 128, num_warps=num_warps)
    assert_close(sums, x.double().sum(1))
    assert torch.equal(maxima, x.max(0).values)
    assert_close(running, x.double().cumsum(1))


@triton.jit
def _functions(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    size = tl.abs(value) + 0.5
    tl.store(out + i, tl.exp(value))
    tl.store(out + BLOCK + i, tl.log(size))
    tl.store(out + 2 * BLOCK + i, tl.rsqrt(size))
    tl.store(out + 3 * BLOCK + i, tl.sigmoid(value))
    tl.store(out + 4 * BLOCK + i, tl.where(value > 0, value / size, tl.sqrt(size)))


def test_functions_agree_with_torch(gpu: Simulator) -> None:
    x, out = random(256) * 4, torch.empty(5, 256)
    _functions[(1,)](x, out, 256)
    size = x.abs() + 0.5
    chosen = torch.where(x > 0, x / size, size.sqrt())
    expected = torch.stack([x.exp(), size.log(), size.rsqrt(), x.sigmoid(), chosen])
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-7)


@triton.jit
def _integers(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, (a * b) // 7 + (a >> 3) % 5 - tl.minimum(a, b) * (a ^ b))
    tl.store(out + BLOCK + i, a // b + a % b)


def test_integers_of_32_and_64_bits_agree_with_torch(gpu: Simulator) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.int32, torch.int64):
        x, y = torch.randint(1, 1000, (2, 256), generator=generator).to(dtype)
        out = torch.empty(2, 256, dtype=dtype)
        _integers[(1,)](x, y, out, 256)
        first = (x * y) // 7 + (x >> 3) % 5 - torch.minimum(x, y) * (x ^ y)
        assert torch.equal(out, torch.stack([first, x // y + x % y]))


@triton.jit
def _histogram(x, counts, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counts + tl.load(x + i), 1)


def test_atomics_of_all_lanes_add_up(gpu: Simulator) -> None:
    x = torch.randint(0, 5, (1024,), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(5, dtype=torch.int32)
    _histogram[(4,)](x, counts, 256)
    assert torch.equal(counts.long(), x.bincount(minlength=5))


@triton.jit
def _sum_by_the_last(x, partial, arrivals, order, out, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    program = tl.program_id(0)
    total = tl.sum(tl.load(x + program * BLOCK + tl.arange(0, BLOCK)), 0)
    tl.store(partial + program, total)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
    tl.store(order + program, arrived)
    if arrived == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, PROGRAMS)), 0))


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_the_last_workgroup_to_arrive_sees_what_all_have_written(
    gpu: Simulator, order: Order
) -> None:
    gpu.order = order
    x, partial, out = random(8 * 256), torch.full((8,), torch.nan), torch.full((1,), torch.nan)
    arrivals = torch.zeros(1, dtype=torch.int32)
    places = torch.full((8,), -1, dtype=torch.int32)
    _sum_by_the_last[(8,)](x, partial, arrivals, places, out, 256, 8)
    assert sorted(places.tolist()) == list(range(8))
    assert_close(out, x.double().sum().reshape(1))


@triton.jit
def _collatz(x, steps):
    program = tl.program_id(0)
    value = tl.load(x + program)
    count = 0
    while value != 1:
        if value % 2 == 1:
            value = 3 * value + 1
            count += 1
        value = value // 2
        count += 1
    tl.store(steps + program, count)


def test_workgroups_may_take_different_ways_through_a_loop(gpu: Simulator) -> None:
    steps = torch.empty(9, dtype=torch.int32)
    _collatz[(9,)](torch.arange(1, 10, dtype=torch.int32), steps)
    assert steps.tolist() == [0, 1, 7, 2, 5, 8, 16, 3, 19]


@triton.jit
def _copy(x, out, offset, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + offset + i))


def test_a_load_past_the_end_names_the_tensor_and_the_instruction(gpu: Simulator) -> None:
    x, out = random(300)[:256], torch.empty(256)
    with pytest.raises(
        MemoryAccessError, match=r"(?s)illegal load.*nearest is x, 1024.*_copy.*load"
    ):
        _copy[(1,)](x, out, 3, 256)


def test_a_store_past_the_end_names_the_tensor_and_the_instruction(gpu: Simulator) -> None:
    x, out = random(256), torch.empty(300)[:250]
    with pytest.raises(MemoryAccessError, match=r"(?s)illegal store.*is out, 1000.*_copy.*store"):
        _copy[(1,)](x, out, 0, 256)


def test_a_missing_barrier_is_a_race(gpu: Simulator) -> None:
    x, sums, maxima, running = random(16, 128), *map(torch.empty, (16, 128, 16 * 128))
    gpu.rewrite = lambda text: re.sub(r"\ts_barrier\n", "\n", text)
    with pytest.raises(LdsRaceError, match=r"(?s)no barrier between.*_reductions.*ds_"):
        _reductions[(1,)](x, sums, maxima, running, 16, 128, num_warps=4)


def test_an_access_past_the_end_of_shared_memory_is_an_error(gpu: Simulator) -> None:
    x, sums, maxima, running = random(16, 128), *map(torch.empty, (16, 128, 16 * 128))
    gpu.rewrite = lambda text: re.sub(
        r"(\tds_write_\w+ v.*?)( offset.*)?\n", r"\1 offset:65000\n", text
    )
    with pytest.raises(
        LdsAccessError, match=r"(?s)store of \d+ bytes of LDS.*_reductions.*ds_write"
    ):
        _reductions[(1,)](x, sums, maxima, running, 16, 128, num_warps=4)


def test_a_register_that_was_never_written_is_nan(gpu: Simulator) -> None:
    x, out = random(256), torch.zeros(256)
    gpu.rewrite = lambda text: re.sub(r"(buffer_store_dword\w*) \S+,", r"\1 v[200:203],", text)
    _copy[(1,)](x, out, 0, 256, num_warps=1)
    assert out.isnan().all()


@triton.jit
def _announce(out):
    tl.store(out, tl.program_id(0))


def test_workgroups_that_race_leave_what_the_last_of_them_wrote(gpu: Simulator) -> None:
    written = []
    for order in (Order.FORWARD, Order.REVERSED):
        gpu.order = order
        out = torch.full((1,), -1, dtype=torch.int32)
        _announce[(5,)](out)
        written.append(int(out))
    assert written == [4, 0]


@triton.jit
def _reverse_in_place(x, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if WAITS:
        tl.debug_barrier()
    tl.store(x + BLOCK - 1 - i, value)


@pytest.mark.parametrize("waits", [True, False])
def test_waves_that_race_through_global_memory_differ_by_their_order(
    gpu: Simulator, waits: bool
) -> None:
    agree = []
    for order in Order:
        gpu.order = order
        x = random(256)
        expected = x.flip(0)
        _reverse_in_place[(1,)](x, 256, waits, num_warps=4)
        agree.append(torch.equal(x, expected))
    assert agree == ([True] * 3 if waits else [True, False, False])


def test_an_unknown_instruction_is_an_error_that_names_it(gpu: Simulator) -> None:
    gpu.rewrite = lambda text: text.replace("\ts_endpgm", "\tv_frobnicate_b32 v0, v1\n\ts_endpgm")
    with pytest.raises(UnknownInstructionError, match=r"(?s)'v_frobnicate_b32'.*_announce.*v0, v1"):
        _announce[(1,)](torch.zeros(1, dtype=torch.int32))


def test_a_loop_without_an_end_is_an_error(gpu: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "MAX_BLOCKS", 1000)
    with pytest.raises(EndlessLoopError, match="_collatz does not end"):
        _collatz[(1,)](torch.zeros(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32))


def test_a_launch_counts_bytes_once_and_as_often_as_they_move(gpu: Simulator) -> None:
    x, out = random(64), torch.empty(64)
    _copy[(3,)](x, out, 0, 64, num_warps=1)
    launch = gpu.launches[-1]
    assert (launch.kernel, launch.grid, launch.num_warps) == ("_copy", (3, 1, 1), 1)
    assert (launch.traffic["x"].loaded, launch.traffic["x"].unique_loaded) == (3 * 256, 256)
    assert (launch.traffic["out"].stored, launch.traffic["out"].unique_stored) == (3 * 256, 256)
    assert launch.counts.instructions["s_endpgm"] == 3
    assert launch.resources["vgpr_spill_count"] == 0


def test_the_former_driver_is_back_after_the_simulation(gpu: Simulator) -> None:
    outer = triton.runtime.driver.active
    with pytest.raises(ZeroDivisionError), simulated("gfx942"):
        raise ZeroDivisionError
    assert triton.runtime.driver.active is outer


def test_one_kernel_runs_on_both_architectures_in_one_process() -> None:
    x, out = random(2, 300)
    for arch in ("gfx942", "gfx950", "gfx942"):
        with simulated(arch) as gpu:
            _scaled_sum[(2,)](x, x, out, 300, BLOCK=256)
        target = gpu.launches[0].assembly.splitlines()[0]
        assert "amdgcn_target" in target and arch in target


def test_an_architecture_that_is_not_simulated_is_refused() -> None:
    with pytest.raises(UnsupportedLaunchError, match="gfx1100"), simulated("gfx1100"):
        pass


def test_ops_are_bound_for_tensors_on_the_cpu(gpu: Simulator) -> None:
    ops = bind_simulated(SPEC, gpu.arch)
    x, gate, weight = random(5, 2, 32).bfloat16(), torch.ones(5, 2, 32), torch.ones(32)
    out = ops.gated_rms_norm(x, gate.bfloat16(), weight.bfloat16())
    normalised = torch.nn.functional.rms_norm(x.double(), (32,), eps=1e-6)
    assert_close(out, normalised * torch.nn.functional.silu(torch.ones(1)))
    assert ops.kernels


def test_a_nan_is_no_padding_to_a_norm(gpu: Simulator) -> None:
    spec = replace(SPEC, dtype=torch.float32)
    x, gate = random(3, 2, 32), random(3, 2, 32)
    x[1, 0, 5], x[2, 1] = torch.nan, 0

    out = bind_simulated(spec, gpu.arch).gated_rms_norm(x, gate, torch.ones(32))

    assert out[1, 0].isnan().all()
    assert not out[2, 1].any()
    assert out[0].isfinite().all()
