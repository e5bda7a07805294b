# SPDX-License-Identifier: Apache-2.0
"""Input that is unusual and in order: accepted with checks on, with the same results."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdn_portable import bind
from tests.calls import (
    CASES,
    COMMITS,
    DECODES,
    PREFILLS,
    REPLAYS,
    SNAPSHOTS,
    SPEC,
    TABLES,
    Call,
    call_of,
    contents,
    leaves,
    replaced,
    run,
)
from tests.cases import index_forms, slots, strided

VERIFIES = (*REPLAYS, *SNAPSHOTS, *TABLES)
WITH_INDICES = tuple(case for case in CASES if case not in ("gating", "gated_rms_norm"))
ROWS = ("x", "mixed_qkv", "a", "b", "g", "beta", "q", "k", "v", "gate", "out")


def _same(case: str, one: Call, other: Call) -> None:
    """Run two calls and compare what they return and every state they leave."""
    results = [run(case, call) for call in (one, other)]
    results = [result if isinstance(result, tuple) else (result,) for result in results]
    for first, second in zip(*results, strict=True):
        assert first is second is None or torch.equal(first, second)
    assert _states(one) == _states(other)


def _states(call: Call) -> dict[str, bytes]:
    named = ("state", "conv_state", "pool", "drafts", "checkpoint_state")
    return {
        name: value
        for name, value in contents(call).items()
        if name.startswith(named) and not name.endswith("indices")
    }


@index_forms
@pytest.mark.parametrize("case", WITH_INDICES)
def test_indices_may_be_of_either_width_strided_and_over_long(
    case: str, form: Callable[[Tensor], Tensor]
) -> None:
    call, plain = call_of(case), call_of(case)
    indices = {
        name: form(value) if not name.endswith("cu_seqlens") else value.long()
        for name, value in leaves(call).items()
        if value.dtype == torch.int32
    }

    _same(case, replaced(call, **indices), plain)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_projections_may_be_strided(case: str) -> None:
    call, plain = call_of(case), call_of(case)
    names = ("x", "mixed_qkv", "weight", "bias", "a", "b", "g", "beta", "A_log", "dt_bias")
    wide = {name: strided(leaves(call)[name]) for name in names if name in leaves(call)}

    _same(case, {**call, **wide}, plain)


@pytest.mark.parametrize("case", [case for case in CASES if "out" in call_of(case)])
def test_an_output_may_be_strided_and_of_another_float(case: str) -> None:
    call, plain = call_of(case), call_of(case)
    wide = strided(torch.zeros(call["out"].shape, dtype=torch.float32))

    got, expected = run(case, {**call, "out": wide}), run(case, plain)

    assert got is wide
    assert torch.equal(got.to(SPEC.dtype), expected)


@pytest.mark.parametrize("case", ["conv1d_update", "conv1d_verify replay", "conv1d_verify table"])
def test_a_convolution_of_an_update_or_verify_may_write_its_input(case: str) -> None:
    call, plain = call_of(case), call_of(case)

    _same(case, {**call, "out": call["x"]}, plain)


def test_a_gated_norm_may_write_its_input() -> None:
    call, plain = call_of("gated_rms_norm"), call_of("gated_rms_norm")

    _same("gated_rms_norm", {**call, "out": call["x"]}, plain)


@pytest.mark.parametrize("case", DECODES)
def test_reads_may_repeat(case: str) -> None:
    call = {**call_of(case), "state_indices": slots(1, 1), "out_state_indices": slots(2, 3)}

    assert not run(case, call).isnan().any()


@pytest.mark.parametrize("case", DECODES)
def test_a_padded_target_alone_computes_and_writes_nothing(case: str) -> None:
    call, plain = call_of(case), call_of(case)
    before = _states(call)

    got = run(case, {**call, "out_state_indices": slots(-1, -50)})

    assert torch.equal(got, run(case, plain))
    assert _states(call) == before


@pytest.mark.parametrize("case", DECODES)
def test_padded_rows_of_a_decode_may_hold_anything(case: str) -> None:
    call, plain = call_of(case), call_of(case)
    garbage = {name: _spoilt(call[name], row=1) for name in ROWS[:-1] if name in call}
    padded = {"state_indices": slots(1, -9), "out_state_indices": slots(1, 5)}

    got = run(case, {**call, **garbage, **padded})

    assert torch.equal(got[0], run(case, plain)[0])
    assert torch.equal(got[1], torch.zeros_like(got[1]))


def _spoilt(rows: Tensor, row: int) -> Tensor:
    """Return a copy with NaN in one row."""
    spoilt = rows.clone()
    spoilt[row] = float("nan")
    return spoilt


@pytest.mark.parametrize("case", [*DECODES, *PREFILLS, *VERIFIES])
def test_a_batch_of_padding_gives_zeros_and_touches_nothing(case: str) -> None:
    call = call_of(case)
    padded = {
        name: torch.full_like(value, -3)
        for name, value in leaves(call).items()
        if name.endswith("state_indices")
    }
    before = _states(call)

    got = run(case, replaced(call, **padded))

    assert torch.equal(got, torch.zeros_like(got))
    assert _states(call) == before


@pytest.mark.parametrize("case", COMMITS)
def test_a_commit_of_padding_touches_nothing(case: str) -> None:
    call = call_of(case)
    before = _states(call)

    run(case, replaced(call, metadata__state_indices=slots(-1, -4), last_accepted=slots(99, -99)))

    assert _states(call) == before


@pytest.mark.parametrize("case", [*DECODES, *PREFILLS, *VERIFIES])
def test_an_empty_batch_gives_an_empty_output_and_touches_nothing(case: str) -> None:
    call = call_of(case)
    empty = {name: call[name][:0] for name in ROWS if name in call}
    nobody = {"metadata__cu_seqlens": slots(0)} if "metadata" in call else {}
    nobody |= {"metadata__seq_lens_cpu": []} if case in PREFILLS else {}
    before = _states(call)

    got = run(case, replaced({**call, **empty}, **nobody))

    assert got.shape == (0, *call["out"].shape[1:])
    assert _states(call) == before


@pytest.mark.parametrize("case", [*PREFILLS, *VERIFIES])
def test_a_batch_of_empty_sequences_gives_zeros(case: str) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=slots(0, 0, 0))
    nowhere = {"metadata__seq_lens_cpu": None, "metadata__checkpoint_offsets": slots(0, -1)}
    call = replaced(call, **nowhere) if case in PREFILLS else call

    got = run(case, call)

    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("case", ["chunk_prefill", "prefill_step"])
def test_a_checkpoint_state_that_nobody_asks_for_is_left_alone(case: str) -> None:
    nobody = {"metadata__checkpoint_offsets": None, "metadata__checkpoint_indices": None}
    call, plain = (replaced(call_of(case), **nobody) for _ in range(2))
    kept = call_of("chunk_prefill")["checkpoint_state"]

    _same(case, {**call, "checkpoint_state": kept}, {**plain, "checkpoint_state": kept.clone()})

    assert kept.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_plan_holds_for_the_same_lengths_in_either_width(dtype: torch.dtype) -> None:
    call, plain = call_of("prefill_step"), call_of("prefill_step")
    run("plan_prefill", {"metadata": call["metadata"]})
    same = call["metadata"].cu_seqlens.to(dtype)

    _same("prefill_step", replaced(call, metadata__cu_seqlens=same), plain)


@pytest.mark.parametrize("case", PREFILLS)
def test_the_plan_of_another_backend_is_not_looked_into(case: str) -> None:
    call, plain = call_of(case), call_of(case)

    _same(case, replaced(call, metadata__plan=object()), plain)


def test_overlapping_windows_hold_a_chain() -> None:
    call, plain = (
        replaced(call_of("conv1d_verify snapshot"), metadata__next_token=None) for _ in range(2)
    )
    call, plain = (replaced(given, metadata__next_sibling=None) for given in (call, plain))
    columns = torch.zeros(2, SPEC.conv_dim, 5, dtype=SPEC.dtype)
    overlapping = replaced(call, drafts__conv_state=columns.unfold(2, 3, 1).movedim(2, 1))

    got, expected = (run("conv1d_verify snapshot", given) for given in (overlapping, plain))

    assert torch.equal(got, expected)
    first, second = (given["drafts"].conv_state for given in (overlapping, plain))
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0, :2], second[0, :2])


def test_snapshots_may_have_more_steps_and_rows_than_needed() -> None:
    call, plain = call_of("mtp_verify snapshot"), call_of("mtp_verify snapshot")
    roomy = torch.zeros(5, 7, *call["drafts"].state.shape[2:])

    got = run("mtp_verify snapshot", replaced(call, drafts__state=roomy))

    assert torch.equal(got, run("mtp_verify snapshot", plain))
    assert torch.equal(roomy[1, :3], plain["drafts"].state[1])
    assert torch.equal(roomy[0, :2], plain["drafts"].state[0, :2])
    assert not roomy[2:].any()


@pytest.mark.parametrize("case", [case for case in CASES if "gate" in call_of(case)])
def test_a_gate_may_be_flat(case: str) -> None:
    one, other = call_of(case), call_of(case)

    _same(case, one, {**other, "gate": other["gate"].flatten(1)})


def test_a_checked_op_shows_the_signature_of_the_contract() -> None:
    parameters = inspect.signature(bind(SPEC, "cpu").conv1d_update).parameters

    assert [*parameters] == [
        "x",
        "weight",
        "bias",
        "conv_state",
        "state_indices",
        "out_state_indices",
        "out",
    ]
