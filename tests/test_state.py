# SPDX-License-Identifier: Apache-2.0
"""State pools: how they lie in memory, and how slots are reset and copied."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    ConvLayout,
    GdnParams,
    GdnSpec,
    InputError,
    PrefillMetadata,
    StateLayout,
    StatePool,
    select,
)
from tests.fakes import SPEC

bind = partial(select.bind, check=False)

# [slots, D, L] and [slots, HV, V, K]: D = 2 * 2 * 16 + 4 * 8
LAYOUTS = pytest.mark.parametrize(
    ("state_layout", "conv_layout", "state_shape", "conv_shape"),
    [
        (StateLayout.VK, ConvLayout.DIM_FIRST, (5, 4, 8, 16), (5, 96, 3)),
        (StateLayout.VK, ConvLayout.LEN_FIRST, (5, 4, 8, 16), (5, 3, 96)),
        (StateLayout.KV, ConvLayout.DIM_FIRST, (5, 4, 16, 8), (5, 96, 3)),
        (StateLayout.KV, ConvLayout.LEN_FIRST, (5, 4, 16, 8), (5, 3, 96)),
    ],
)
PAGED = pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])


def _tensors(pool: StatePool) -> tuple[Tensor, Tensor]:
    assert pool.conv_state is not None and pool.state is not None
    return pool.conv_state, pool.state


def _numbered_pool(*, paged: bool = False, num_slots: int = 5) -> StatePool:
    """Return a pool whose slot i holds i + 1 everywhere."""
    pool = StatePool.allocate(SPEC, num_slots, "cpu", paged=paged)
    numbers = torch.arange(1.0, num_slots + 1)
    conv_state, state = _tensors(pool)
    conv_state.copy_(numbers[:, None, None].expand_as(conv_state))
    state.copy_(numbers[:, None, None, None].expand_as(state))
    return pool


def _numbers(pool: StatePool) -> list[list[float]]:
    """Return what every slot of the conv state and of the state holds; nan where it is mixed."""
    return [
        [slot.unique().item() if len(slot.unique()) == 1 else float("nan") for slot in tensor]
        for tensor in _tensors(pool)
    ]


@LAYOUTS
@PAGED
def test_pools_are_zero_in_the_shapes_and_dtypes_of_the_spec(
    state_layout: StateLayout,
    conv_layout: ConvLayout,
    state_shape: tuple[int, ...],
    conv_shape: tuple[int, ...],
    paged: bool,
) -> None:
    spec = replace(SPEC, state_layout=state_layout, conv_layout=conv_layout)

    conv_state, state = _tensors(StatePool.allocate(spec, 5, "cpu", paged=paged))

    assert (conv_state.shape, conv_state.dtype) == (conv_shape, torch.bfloat16)
    assert (state.shape, state.dtype) == (state_shape, torch.float32)
    assert conv_state[0].is_contiguous() and state[0].is_contiguous()
    assert not conv_state.any() and not state.any()


def test_a_wider_window_and_another_dtype_are_allocated_as_asked() -> None:
    spec = replace(SPEC, conv_window=6, conv_dtype=torch.float32, state_dtype=torch.bfloat16)

    conv_state, state = _tensors(StatePool.allocate(spec, 2, "cpu"))

    assert (conv_state.shape, conv_state.dtype) == ((2, 96, 6), torch.float32)
    assert state.dtype is torch.bfloat16


@LAYOUTS
def test_plain_pools_are_contiguous(
    state_layout: StateLayout,
    conv_layout: ConvLayout,
    state_shape: tuple[int, ...],
    conv_shape: tuple[int, ...],
) -> None:
    spec = replace(SPEC, state_layout=state_layout, conv_layout=conv_layout)

    conv_state, state = _tensors(StatePool.allocate(spec, 5, "cpu"))

    assert conv_state.is_contiguous() and state.is_contiguous()


@LAYOUTS
def test_a_page_holds_both_states_of_a_slot_at_256_byte_boundaries(
    state_layout: StateLayout,
    conv_layout: ConvLayout,
    state_shape: tuple[int, ...],
    conv_shape: tuple[int, ...],
) -> None:
    spec = replace(SPEC, state_layout=state_layout, conv_layout=conv_layout)
    conv_bytes, state_bytes = 96 * 3 * 2, 4 * 8 * 16 * 4  # 576 and 2048

    conv_state, state = _tensors(StatePool.allocate(spec, 5, "cpu", paged=True))

    page_bytes = conv_state.stride(0) * conv_state.element_size()
    assert page_bytes == state.stride(0) * state.element_size() == 768 + 2048
    assert state.data_ptr() - conv_state.data_ptr() == 768 >= conv_bytes
    assert page_bytes - 768 >= state_bytes
    assert conv_state.untyped_storage().data_ptr() == state.untyped_storage().data_ptr()
    assert conv_state.untyped_storage().nbytes() == 5 * page_bytes


def test_states_whose_bytes_are_not_a_multiple_of_256_are_aligned_too() -> None:
    odd = replace(SPEC, head_v_dim=3, head_k_dim=5, num_k_heads=1, num_v_heads=1)

    conv_state, state = _tensors(StatePool.allocate(odd, 3, "cpu", paged=True))

    assert state.data_ptr() - conv_state.data_ptr() == 256
    assert state.stride(0) * state.element_size() == 512


@PAGED
def test_slots_do_not_overlap(paged: bool) -> None:
    pool = _numbered_pool(paged=paged)

    assert _numbers(pool) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


@LAYOUTS
@PAGED
def test_ops_give_the_same_in_every_layout(
    state_layout: StateLayout,
    conv_layout: ConvLayout,
    state_shape: tuple[int, ...],
    conv_shape: tuple[int, ...],
    paged: bool,
) -> None:
    spec = replace(SPEC, state_layout=state_layout, conv_layout=conv_layout)
    expected_pool = StatePool.allocate(SPEC, 5, "cpu")
    expected = _prefill_then_decode(SPEC, expected_pool)
    pool = StatePool.allocate(spec, 5, "cpu", paged=paged)

    outputs = _prefill_then_decode(spec, pool)

    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    conv_state, state = _tensors(pool)
    turned_conv = conv_state if conv_layout is ConvLayout.DIM_FIRST else conv_state.mT
    turned_state = state if state_layout is StateLayout.VK else state.mT
    torch.testing.assert_close(turned_conv, expected_pool.conv_state, rtol=0, atol=0)
    torch.testing.assert_close(turned_state, expected_pool.state, rtol=0, atol=0)


def _prefill_then_decode(spec: GdnSpec, pool: StatePool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    params = GdnParams(
        conv_weight=draw(spec.conv_dim, spec.conv_width, dtype=spec.dtype),
        A_log=draw(spec.num_v_heads),
        dt_bias=draw(spec.num_v_heads),
    )
    slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    metadata = PrefillMetadata(torch.tensor([0, 2, 5, 9], dtype=torch.int32), slots)
    ops = bind(spec, "cpu")
    prefill, decode = (
        (
            draw(tokens, spec.conv_dim, dtype=spec.dtype),
            draw(tokens, spec.num_v_heads, dtype=spec.dtype),
            draw(tokens, spec.num_v_heads, dtype=spec.dtype),
        )
        for tokens in (9, 3)
    )
    return [
        ops.prefill_step(*prefill, params, pool, metadata=metadata),
        ops.decode_step(*decode, params, pool, state_indices=slots),
    ]


@pytest.mark.parametrize("num_slots", [0, -1])
def test_a_pool_needs_a_slot(num_slots: int) -> None:
    with pytest.raises(InputError, match=f"num_slots is {num_slots}, needs at least 1"):
        StatePool.allocate(SPEC, num_slots, "cpu")


@PAGED
@pytest.mark.parametrize(
    "slots",
    [[1, 3], torch.tensor([3, 1]), torch.tensor([1, 3], dtype=torch.int32), range(1, 4, 2)],
    ids=["list", "int64", "int32", "range"],
)
def test_reset_zeroes_the_slots_named_and_no_other(paged: bool, slots: list[int] | Tensor) -> None:
    pool = _numbered_pool(paged=paged)

    pool.reset(slots)

    assert _numbers(pool) == [[1, 0, 3, 0, 5], [1, 0, 3, 0, 5]]


def test_reset_of_no_slot_changes_nothing() -> None:
    pool = _numbered_pool()

    pool.reset([])

    assert _numbers(pool) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_reset_clears_what_is_not_a_number() -> None:
    pool = StatePool(torch.full((2, 96, 3), float("nan")), torch.full((2, 4, 8, 16), torch.inf))

    pool.reset([0, 1])

    assert _numbers(pool) == [[0, 0], [0, 0]]


@PAGED
@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ([1], [4], [1, 2, 3, 4, 2]),
        ([0, 0, 0], [1, 2, 3], [1, 1, 1, 1, 5]),
        ([1, 3], [3, 1], [1, 4, 3, 2, 5]),
        ([0, 1, 2], [1, 2, 0], [3, 1, 2, 4, 5]),
        ([2], [2], [1, 2, 3, 4, 5]),
        ([], [], [1, 2, 3, 4, 5]),
    ],
    ids=["one", "fork", "swap", "rotation", "itself", "none"],
)
def test_copy_reads_all_sources_before_it_writes(
    source: list[int], target: list[int], expected: list[int], paged: bool
) -> None:
    pool = _numbered_pool(paged=paged)

    pool.copy(source, torch.tensor(target, dtype=torch.int32))

    assert _numbers(pool) == [expected, expected]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([0, 1], [2, 2], r"target is \[2, 2\], needs every slot once"),
        ([0], [1, 2], "source has 1 slots, needs 2 like target"),
        ([0, 5], [1, 2], "source names slot 5, needs 0 to 4"),
        ([0, -1], [1, 2], "source names slot -1, needs 0 to 4"),
        ([0, 1], [2, 5], "target names slot 5, needs 0 to 4"),
        ([0, 1], [-1, 2], "target names slot -1, needs 0 to 4"),
    ],
)
def test_a_wrong_copy_is_refused_before_anything_changes(
    source: list[int], target: list[int], message: str
) -> None:
    pool = _numbered_pool()

    with pytest.raises(InputError, match=message):
        pool.copy(source, target)

    assert _numbers(pool) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("slot", [-1, 5])
def test_a_wrong_reset_is_refused_before_anything_changes(slot: int) -> None:
    pool = _numbered_pool()

    with pytest.raises(InputError, match=f"slots names slot {slot}, needs 0 to 4"):
        pool.reset([0, slot])

    assert _numbers(pool) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


@PAGED
def test_bytes_per_slot_counts_both_states_without_padding(paged: bool) -> None:
    pool = StatePool.allocate(SPEC, 5, "cpu", paged=paged)

    assert pool.bytes_per_slot == 96 * 3 * 2 + 4 * 8 * 16 * 4


def test_a_pool_wraps_the_engines_tensors_as_they_are() -> None:
    conv_state, state = torch.zeros(5, 96, 3), torch.zeros(4, 4, 8, 16)

    pool = StatePool(conv_state, state)

    assert pool.conv_state is conv_state and pool.state is state
    assert pool.num_slots == 4


def test_a_pool_of_the_state_alone_is_reset_and_copied() -> None:
    state = torch.ones(3, 4, 8, 16)
    pool = StatePool(None, state)

    pool.reset([0])
    pool.copy([0], [2])

    assert (pool.num_slots, pool.bytes_per_slot) == (3, 4 * 8 * 16 * 4)
    assert [slot.unique().item() for slot in state] == [0, 1, 0]


def test_a_pool_of_the_conv_state_alone_is_reset_and_copied() -> None:
    conv_state = torch.ones(3, 96, 3, dtype=torch.bfloat16)
    pool = StatePool(conv_state, None)

    pool.reset([0])
    pool.copy([0], [2])

    assert (pool.num_slots, pool.bytes_per_slot) == (3, 96 * 3 * 2)
    assert [slot.unique().item() for slot in conv_state] == [0, 1, 0]


@pytest.mark.parametrize(
    ("pool", "missing"),
    [
        (StatePool(None, torch.zeros(2, 4, 8, 16)), "conv_state"),
        (StatePool(torch.zeros(2, 96, 3), None), "state"),
    ],
    ids=["without conv_state", "without state"],
)
def test_a_step_reports_the_state_that_a_pool_lacks(pool: StatePool, missing: str) -> None:
    ops = bind(SPEC, "cpu")
    params = GdnParams(torch.zeros(96, 4), torch.zeros(4), torch.zeros(4))
    x, a = torch.zeros(1, 96, dtype=SPEC.dtype), torch.zeros(1, 4, dtype=SPEC.dtype)

    with pytest.raises(InputError, match=rf"pool\.{missing} is None, needs"):
        ops.decode_step(x, a, a, params, pool, state_indices=torch.tensor([0]))


def test_reset_without_slots_zeroes_them_all() -> None:
    pool = StatePool.allocate(SPEC, 3, "cpu", paged=True)
    assert pool.conv_state is not None and pool.state is not None
    pool.conv_state.fill_(1)
    pool.state.fill_(1)

    pool.reset()

    assert not pool.conv_state.any() and not pool.state.any()
