# SPDX-License-Identifier: Apache-2.0
"""Packed batches that contradict themselves: one clear error, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.calls import (
    NUM_SLOTS,
    PREFILLS,
    SPEC,
    call_of,
    contents,
    refusal,
    replaced,
    run,
)
from tests.cases import nan, offsets, slots

every_prefill = pytest.mark.parametrize("case", PREFILLS)
every_reader_of_lengths = pytest.mark.parametrize("case", [*PREFILLS, "plan_prefill"])


@every_reader_of_lengths
@pytest.mark.parametrize("cu_seqlens", [[1, 3, 5], [0, 3, 2], [0, -1, 2], [5, 3, 0]])
def test_offsets_that_do_not_rise_from_0_are_refused(case: str, cu_seqlens: list[int]) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=slots(*cu_seqlens))

    message = refusal(case, call)

    assert f"cu_seqlens is {cu_seqlens}, needs 0 first and no step back" in message


@every_prefill
def test_offsets_past_the_rows_are_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=slots(0, 3, 7), metadata__seq_lens_cpu=None)

    assert "cu_seqlens ends at 7, needs at most the 6 rows" in refusal(case, call)


@every_reader_of_lengths
def test_no_offsets_at_all_are_refused(case: str) -> None:
    empty = torch.zeros(0, dtype=torch.int32)

    message = refusal(case, replaced(call_of(case), metadata__cu_seqlens=empty))

    assert "cu_seqlens is (0), needs one axis of at least 1" in message


@every_reader_of_lengths
@pytest.mark.parametrize("seq_lens_cpu", [[3, 3], [3], [2, 3], [3, 2, 0]])
def test_lengths_on_the_host_that_disagree_are_refused(case: str, seq_lens_cpu: list[int]) -> None:
    message = refusal(case, replaced(call_of(case), metadata__seq_lens_cpu=seq_lens_cpu))

    assert f"seq_lens_cpu is {seq_lens_cpu}, needs [3, 2] as cu_seqlens says" in message


@every_prefill
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_flags_of_initial_states_must_be_bool(case: str, dtype: torch.dtype) -> None:
    flags = torch.tensor([1, 0], dtype=dtype)

    message = refusal(case, replaced(call_of(case), metadata__has_initial_state=flags))

    assert f"has_initial_state has dtype {dtype}, needs torch.bool" in message


@every_prefill
@pytest.mark.parametrize("half", ["checkpoint_offsets", "checkpoint_indices"])
def test_checkpoints_given_by_halves_are_refused(case: str, half: str) -> None:
    message = refusal(case, replaced(call_of(case), **{f"metadata__{half}": None}))

    assert "checkpoint_offsets and checkpoint_indices: needs both or neither" in message


@every_prefill
def test_a_checkpoint_past_the_end_of_its_sequence_is_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__checkpoint_offsets=slots(-1, 3))

    message = refusal(case, call)

    assert "checkpoint_offsets[1] is 3, needs at most the length 2" in message


@pytest.mark.parametrize("case", ["conv1d_prefill", "prefill_step"])
@pytest.mark.parametrize("slot", [1, 4, 5], ids=["its own", "one read", "one written"])
def test_a_checkpoint_onto_a_slot_in_use_is_refused(case: str, slot: int) -> None:
    call = replaced(call_of(case), metadata__checkpoint_indices=slots(slot, -1))

    message = refusal(case, call)

    assert f"checkpoint_indices[0] is {slot}, needs a slot that no sequence uses" in message


@every_prefill
def test_two_checkpoints_in_one_slot_are_refused(case: str) -> None:
    call = replaced(
        call_of(case),
        metadata__checkpoint_offsets=slots(1, 1),
        metadata__checkpoint_indices=slots(6, 6),
    )

    assert "rows 0 and 1 both write slot 6, needs one writer a slot" in refusal(case, call)


def test_two_checkpoints_in_one_row_are_refused_where_slot_0_is_padding() -> None:
    spec = replace(SPEC, pad_slot=0)
    call = replaced(
        call_of("chunk_prefill", spec),
        metadata__checkpoint_offsets=slots(1, 1),
        metadata__checkpoint_indices=slots(0, 0),
    )

    assert "both write" in refusal("chunk_prefill", call, spec)


@pytest.mark.parametrize("case", ["chunk_prefill", "prefill_step"])
def test_a_checkpoint_past_the_rows_of_its_own_pool_is_refused(case: str) -> None:
    call = {**call_of(case), "checkpoint_state": _kept(4)}

    message = refusal(case, call)

    assert "checkpoint_indices[0] is 6, needs a slot below 4" in message


def test_a_step_that_keeps_states_in_rows_may_use_the_number_of_a_slot_in_use() -> None:
    call = {**call_of("prefill_step"), "checkpoint_state": _kept(2 * NUM_SLOTS)}
    call = replaced(call, metadata__checkpoint_indices=slots(5, 12))
    plain = replaced(
        call_of("prefill_step"),
        metadata__checkpoint_offsets=None,
        metadata__checkpoint_indices=None,
    )

    run("prefill_step", call)
    run("prefill_step", plain)

    assert contents(call)["pool__conv_state"] == contents(plain)["pool__conv_state"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_checkpoint_state_is_in_the_precision_of_the_maths(dtype: torch.dtype) -> None:
    message = refusal(
        "chunk_prefill", {**call_of("chunk_prefill"), "checkpoint_state": _kept(8).to(dtype)}
    )

    assert f"checkpoint_state has dtype {dtype}, needs torch.float32" in message


def test_an_output_on_top_of_the_inputs_is_refused_in_a_prefill() -> None:
    call = call_of("conv1d_prefill")

    message = refusal("conv1d_prefill", {**call, "out": call["x"]})

    assert "out shares memory with x, needs memory of its own" in message


def test_an_output_that_overlaps_the_inputs_is_refused_in_a_prefill() -> None:
    call = call_of("conv1d_prefill")
    rows = torch.zeros(len(call["x"]) + 1, SPEC.conv_dim, dtype=SPEC.dtype)

    message = refusal("conv1d_prefill", {**call, "x": rows[:-1], "out": rows[1:]})

    assert "out shares memory with x, needs memory of its own" in message


@pytest.mark.parametrize("case", ["prefill_step", "decode_step", "verify_step replay"])
@pytest.mark.parametrize("first", [0, 1])
def test_an_output_inside_the_projection_is_refused_in_a_step(case: str, first: int) -> None:
    call = call_of(case)
    heads = SPEC.num_v_heads, SPEC.head_v_dim
    columns = slice(first, first + SPEC.num_v_heads * SPEC.head_v_dim)

    message = refusal(case, {**call, "out": call["mixed_qkv"][:, columns].unflatten(1, heads)})

    assert "out shares memory with mixed_qkv, needs memory of its own" in message


def test_a_decay_that_lets_the_state_grow_is_refused() -> None:
    call = call_of("chunk_prefill")
    call["g"][3:5, 1] = torch.tensor([0.25, 0.5])

    assert "g is 0.5 in sequence 1, needs at most 0: a log decay" in refusal("chunk_prefill", call)


@pytest.mark.parametrize("case", ["chunk_prefill", "prefill_step"])
def test_a_plan_for_other_lengths_is_refused(case: str) -> None:
    call = call_of(case)
    run("plan_prefill", {"metadata": call["metadata"]})
    stale = replaced(call, metadata__cu_seqlens=offsets(2, 3), metadata__seq_lens_cpu=None)

    message = refusal(case, stale)

    assert "plan was made for other cu_seqlens" in message
    assert "needs plan_prefill again" in message


def test_a_refused_plan_leaves_the_one_before() -> None:
    call = call_of("plan_prefill")
    run("plan_prefill", call)
    before = contents(call)

    refusal("plan_prefill", replaced(call, metadata__seq_lens_cpu=[1, 1]))

    assert contents(call) == before
    assert "metadata__plan__tokens" in before


@every_prefill
def test_padded_sequences_may_hold_anything(case: str) -> None:
    one, two = (replaced(call_of(case), **_padded(garbage)) for garbage in (-1, -77))
    first = next(iter(two.values()))
    first[3:] = float("nan")

    results = [run(case, call) for call in (one, two)]

    assert torch.equal(*results)
    assert torch.equal(results[0][3:], torch.zeros_like(results[0][3:]))
    assert _written(one) == _written(two)


def _padded(garbage: int) -> dict[str, Any]:
    """Return changes that make the second sequence padding."""
    return {
        "metadata__state_indices": slots(1, garbage),
        "metadata__out_state_indices": slots(1, garbage),
        "metadata__checkpoint_offsets": slots(2, -garbage),
        "metadata__checkpoint_indices": slots(6, garbage),
    }


def _written(call: dict[str, Any]) -> dict[str, bytes]:
    return {name: value for name, value in contents(call).items() if name.endswith("state")}


def _kept(rows: int) -> torch.Tensor:
    shape = SPEC.num_v_heads, SPEC.head_v_dim, SPEC.head_k_dim
    return nan(rows, *shape, dtype=torch.float32)
