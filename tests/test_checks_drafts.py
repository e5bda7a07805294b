# SPDX-License-Identifier: Apache-2.0
"""Buffers of drafts that do not fit, and commits of drafts that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import StatePool
from tests.calls import (
    COMMITS,
    MAX_DRAFTS,
    NUM_SLOTS,
    REPLAYS,
    SNAPSHOTS,
    SPEC,
    Call,
    call_of,
    refusal,
    replaced,
    run,
)
from tests.cases import nan, slots

every_snapshot = pytest.mark.parametrize("case", SNAPSHOTS)
every_commit = pytest.mark.parametrize("case", COMMITS)


@every_snapshot
def test_a_row_of_snapshots_is_written_once(case: str) -> None:
    call = replaced(call_of(case), metadata__rows=slots(1, 1))

    assert "rows is [1, 1], needs each row once" in refusal(case, call)


@every_snapshot
@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_of_snapshots_out_of_range_is_refused(case: str, row: int) -> None:
    call = replaced(call_of(case), metadata__rows=slots(1, row))

    assert f"rows[1] is {row}, needs 0 to 1" in refusal(case, call)


@every_snapshot
def test_fewer_rows_of_snapshots_than_sequences_are_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__rows=None, **_drafts(case, lambda kept: kept[:1]))

    assert "rows[1] is 1, needs 0 to 0" in refusal(case, call)


@every_snapshot
def test_snapshots_of_too_few_steps_are_refused(case: str) -> None:
    call = replaced(call_of(case), **_drafts(case, lambda kept: kept[:, :2]))

    message = refusal(case, call)

    assert ("drafts.conv_state has shape (2, 2, 56, 3), needs (rows, 3, 56, 3)" in message) or (
        "drafts.state has shape (2, 2, 4, 6, 8), needs (rows, 3, 4, 6, 8)" in message
    )


@pytest.mark.parametrize("case", [*SNAPSHOTS, "mtp_commit snapshot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_snapshots_are_of_the_pools_dtype(case: str, dtype: torch.dtype) -> None:
    call = replaced(call_of(case), **_drafts(case, lambda kept: kept.to(dtype)))

    message = refusal(case, call)

    assert f"state has dtype {dtype}, needs torch." in message


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("conv1d_verify snapshot", "conv_state"),
        ("mtp_verify snapshot", "state"),
        ("verify_step snapshot", "conv_state"),
        ("verify_step snapshot", "state"),
        ("mtp_commit snapshot", "conv_state"),
        ("mtp_commit snapshot", "state"),
    ],
)
def test_a_part_of_the_snapshots_that_is_needed_may_not_be_none(case: str, part: str) -> None:
    message = refusal(case, replaced(call_of(case), **{f"drafts__{part}": None}))

    assert f"drafts.{part} is None, needs a tensor" in message


@pytest.mark.parametrize(
    "case", ["conv1d_verify snapshot", "verify_step snapshot", "mtp_commit snapshot"]
)
def test_overlapping_windows_hold_no_tree(case: str) -> None:
    rows = nan(2, SPEC.conv_dim, 5, dtype=SPEC.dtype)
    overlapping = rows.unfold(2, 3, 1).movedim(2, 1)

    message = refusal(case, replaced(call_of(case), drafts__conv_state=overlapping))

    assert "drafts.conv_state has overlapping windows, which hold a chain; a tree needs" in message


@pytest.mark.parametrize("case", [*REPLAYS, "mtp_commit replay"])
@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "conv_inputs"])
@pytest.mark.parametrize("axis", [0, 1], ids=["slots", "drafts"])
def test_too_little_room_for_kept_inputs_is_refused(case: str, name: str, axis: int) -> None:
    call = call_of(case)
    kept = getattr(call["drafts"], name)
    short = kept.narrow(axis, 0, kept.shape[axis] - 1)

    message = refusal(case, replaced(call, **{f"drafts__{name}": short}))

    assert f"has shape ({short.shape[0]}, {short.shape[1]}, " in message
    assert f"needs ({NUM_SLOTS}, {MAX_DRAFTS}, " in message


@pytest.mark.parametrize("case", [*REPLAYS, "mtp_commit replay"])
@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "conv_inputs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_kept_inputs_of_another_precision_are_refused(
    case: str, name: str, dtype: torch.dtype
) -> None:
    call = call_of(case)
    wrong = getattr(call["drafts"], name).to(dtype)

    message = refusal(case, replaced(call, **{f"drafts__{name}": wrong}))

    assert f"drafts.{name} has dtype {dtype}, needs torch." in message


@every_commit
@pytest.mark.parametrize("last_accepted", [3, -2])
def test_a_commit_of_a_draft_that_cannot_be_is_refused(case: str, last_accepted: int) -> None:
    message = refusal(case, {**call_of(case), "last_accepted": slots(last_accepted, 0)})

    assert f"last_accepted[0] is {last_accepted}, needs -1 to 2" in message


@every_commit
def test_a_commit_past_the_drafts_of_a_shorter_sequence_is_refused(case: str) -> None:
    message = refusal(case, {**call_of(case), "last_accepted": slots(0, 2)})

    assert "last_accepted[1] is 2, needs -1 to 1" in message


@every_commit
def test_a_commit_of_fewer_sequences_than_were_verified_is_refused(case: str) -> None:
    message = refusal(case, {**call_of(case), "last_accepted": slots(0)})

    assert "last_accepted is (1), needs one axis of at least 2" in message


def test_a_commit_refuses_parents_that_make_no_path() -> None:
    call = replaced(call_of("mtp_commit replay"), metadata__parents=slots([0, 2, 1], [0, 0, 0]))

    message = refusal("mtp_commit replay", {**call, "last_accepted": slots(2, -1)})

    assert "parents[0, 1] is 2, needs 0 to 0" in message


@every_commit
def test_a_commit_needs_drafts(case: str) -> None:
    table = slots([2, 3, 4], [5, 6, 7])
    call = replaced(call_of(case), metadata__state_indices=table, metadata__parents=None)
    call = replaced(call, metadata__next_token=None, metadata__next_sibling=None)

    message = refusal(case, {**call, "drafts": None})

    assert "drafts is None, needs ReplayDrafts or SnapshotDrafts: a slot table has no" in message
    assert "its next verify is told num_accepted" in message


def test_a_commit_may_copy_one_row_of_snapshots_to_two_slots() -> None:
    case = "mtp_commit snapshot"
    call = replaced(call_of(case), metadata__rows=slots(1, 1), last_accepted=slots(1, 1))
    state, kept = call["pool"].state, call["drafts"].state
    kept[:] = torch.arange(float(kept.numel())).view(kept.shape)

    run(case, call)

    assert torch.equal(state[slots(2, 6)], kept[slots(1, 1), 1])


def test_a_commit_of_kept_inputs_is_of_one_layer() -> None:
    call = call_of("mtp_commit replay")
    layers = StatePool(*(torch.stack([part] * 2) for part in _pools(call)))

    message = refusal("mtp_commit replay", {**call, "pool": layers})

    assert "pool has an axis of layers, needs one layer" in message


@pytest.mark.parametrize("name", ["pool__state", "pool__conv_state", "drafts__conv_state"])
def test_layers_that_are_not_as_many_everywhere_are_refused(name: str) -> None:
    message = refusal("mtp_commit snapshot", _layered(**{name: 3}))

    assert "layers are {" in message
    assert f"'{name.replace('__', '.')}': 3" in message


@pytest.mark.parametrize("part", ["state", "conv_state"])
def test_layers_that_share_memory_are_refused(part: str) -> None:
    call = _layered()
    given = getattr(call["pool"], part)
    call = replaced(call, **{f"pool__{part}": given[:1].expand(given.shape)})

    assert f"pool.{part} has strides (0, " in refusal("mtp_commit snapshot", call)


def _layered(**layers: int) -> Call:
    """Return a commit of two layers, or of as many of a part as is said."""
    call = call_of("mtp_commit snapshot")
    return replaced(
        call,
        **{
            f"{owner}__{part}": torch.stack(
                [getattr(call[owner], part)] * layers.get(f"{owner}__{part}", 2)
            )
            for owner in ("pool", "drafts")
            for part in ("state", "conv_state")
        },
    )


def _pools(call: Call) -> tuple[Tensor, Tensor]:
    return call["pool"].conv_state, call["pool"].state


@every_commit
@pytest.mark.parametrize("name", ["last_accepted", "metadata__state_indices"])
def test_an_index_without_an_axis_is_refused_by_a_commit(case: str, name: str) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=None)

    message = refusal(case, replaced(call, **{name: torch.tensor(1)}))

    assert f"{name.removeprefix('metadata__')} is (), needs one axis" in message


def _drafts(case: str, change: Any) -> dict[str, Tensor]:
    """Return the changes that ``change`` makes to both parts of the snapshots."""
    drafts = call_of(case)["drafts"]
    return {f"drafts__{part}": change(getattr(drafts, part)) for part in ("conv_state", "state")}
