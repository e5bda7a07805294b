# SPDX-License-Identifier: Apache-2.0
"""Drafts that contradict their protocol: one clear error, and nothing is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.calls import (
    COMMITS,
    REPLAYS,
    SNAPSHOTS,
    SPEC,
    TABLES,
    Call,
    call_of,
    contents,
    refusal,
    replaced,
    run,
)
from tests.cases import pool, slots

CHAINS_AND_TREES = (*REPLAYS, *SNAPSHOTS)
every_verify = pytest.mark.parametrize("case", [*REPLAYS, *SNAPSHOTS, *TABLES])
with_drafts = pytest.mark.parametrize("case", CHAINS_AND_TREES)
every_replay = pytest.mark.parametrize("case", REPLAYS)
every_snapshot = pytest.mark.parametrize("case", SNAPSHOTS)
every_table = pytest.mark.parametrize("case", TABLES)


@with_drafts
def test_a_verify_that_names_no_protocol_is_refused(case: str) -> None:
    message = refusal(case, {**call_of(case), "drafts": None})

    assert "drafts is None and state_indices has 1 axes, which names no protocol" in message
    assert "needs ReplayDrafts, SnapshotDrafts, or state_indices [B, P]" in message


@pytest.mark.parametrize("case", [*CHAINS_AND_TREES, *COMMITS])
def test_drafts_with_a_slot_table_name_two_protocols(case: str) -> None:
    table = slots([2, 3, 4], [5, 6, 7])

    message = refusal(case, replaced(call_of(case), metadata__state_indices=table))

    assert "state_indices is [B, P], which names the slot table, and drafts were given" in message
    assert "needs state_indices [B] with drafts, or no drafts" in message


@every_table
@pytest.mark.parametrize(
    "links",
    [
        {"parents": slots([0, 0, 0], [0, 0, 0])},
        {"next_token": slots([1, 2, -1], [1, 2, -1]), "next_sibling": slots([-1] * 3, [-1] * 3)},
    ],
    ids=["parents", "links"],
)
def test_a_slot_table_holds_no_tree(case: str, links: dict[str, Tensor]) -> None:
    call = replaced(call_of(case), **{f"metadata__{name}": link for name, link in links.items()})

    message = refusal(case, call)

    assert "a slot table holds a chain, got a tree: needs drafts" in message


@every_verify
@pytest.mark.parametrize("max_drafts", [0, -1])
def test_room_for_no_draft_is_refused(case: str, max_drafts: int) -> None:
    message = refusal(case, replaced(call_of(case), metadata__max_drafts=max_drafts))

    assert f"max_drafts is {max_drafts}, needs at least 1: the root counts" in message


@pytest.mark.parametrize("case", [*REPLAYS, *SNAPSHOTS, *TABLES, *COMMITS])
def test_the_most_drafts_are_a_whole_number(case: str) -> None:
    message = refusal(case, replaced(call_of(case), metadata__max_drafts=3.0))

    assert "max_drafts is 3.0, needs an integer" in message


@pytest.mark.parametrize("case", ["conv1d_verify table", "verify_step table"])
@pytest.mark.parametrize("row", [[-1, 3, 4], [2, -1, 4]], ids=["window", "state"])
def test_window_and_state_of_a_slot_table_are_padding_together(case: str, row: list[int]) -> None:
    table = slots(row, [5, 6, 7])  # two are accepted of the first

    message = refusal(case, replaced(call_of(case), metadata__state_indices=table))

    assert f"state_indices[0] is {row}, needs both or neither of padding" in message
    assert f"window is in slot {row[0]}, and num_accepted 2 reads the state in slot {row[1]}" in (
        message
    )


@every_verify
def test_more_drafts_than_the_most_are_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=slots(0, 4, 5))

    assert "a sequence has 4 drafts, needs at most 3" in refusal(case, call)


@every_verify
def test_uniform_drafts_come_in_multiples_of_the_most(case: str) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=None, metadata__max_drafts=4)

    message = refusal(case, call)

    assert "6 draft tokens without cu_seqlens, needs a multiple of max_drafts (4)" in message
    assert "which counts the root" in message


@with_drafts
def test_uniform_drafts_of_more_sequences_than_there_are_slots_are_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=None, metadata__state_indices=slots(2))

    message = refusal(case, call)

    assert "state_indices is (1), needs one axis of at least 2: 6 draft tokens are 2 seq" in message
    assert "of max_drafts (3), which counts the root" in message


@every_verify
@pytest.mark.parametrize("cu_seqlens", [[1, 3, 5], [0, 3, 2]])
def test_offsets_that_do_not_rise_from_0_are_refused(case: str, cu_seqlens: list[int]) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=slots(*cu_seqlens))

    message = refusal(case, call)

    assert f"cu_seqlens is {cu_seqlens}, needs 0 first and no step back" in message


@every_verify
def test_offsets_past_the_rows_are_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__cu_seqlens=slots(0, 3, 6, 7))

    assert "cu_seqlens ends at 7, needs at most the 6 rows" in refusal(case, call)


@pytest.mark.parametrize("case", [*REPLAYS, *TABLES])
@pytest.mark.parametrize("num_accepted", [-1, 4])
def test_more_accepted_drafts_than_there_can_be_are_refused(case: str, num_accepted: int) -> None:
    call = replaced(call_of(case), metadata__num_accepted=slots(2, num_accepted))

    assert f"num_accepted[1] is {num_accepted}, needs 0 to 3" in refusal(case, call)


@every_snapshot
def test_snapshots_do_not_read_how_many_were_accepted(case: str) -> None:
    call, twin = call_of(case), replaced(call_of(case), metadata__num_accepted=slots(99, -5))

    assert torch.equal(run(case, call), run(case, twin))


@every_replay
@pytest.mark.parametrize(
    ("parents", "problem"),
    [
        ([0, 1, 0], "parents[0, 1] is 1, needs 0 to 0"),
        ([0, 0, 2], "parents[0, 2] is 2, needs 0 to 1"),
        ([0, 0, -1], "parents[0, 2] is -1, needs 0 to 1"),
    ],
)
def test_a_parent_must_come_before_its_child(case: str, parents: list[int], problem: str) -> None:
    links = slots(parents, [0, 0, 0])

    message = refusal(case, replaced(call_of(case), metadata__parents=links))

    assert problem in message


@every_replay
def test_the_parent_of_the_root_and_of_drafts_that_are_not_there_is_not_read(case: str) -> None:
    call = replaced(call_of(case), metadata__parents=slots([-9, 0, 1], [77, 0, 99]))

    assert torch.equal(run(case, call), run(case, call_of(case)))


@every_snapshot
@pytest.mark.parametrize("half", ["next_token", "next_sibling"])
def test_child_and_sibling_links_come_together(case: str, half: str) -> None:
    call = replaced(call_of(case), **{f"metadata__{half}": None})

    assert "next_token and next_sibling: needs both or neither" in refusal(case, call)


@every_snapshot
@pytest.mark.parametrize("name", ["next_token", "next_sibling"])
@pytest.mark.parametrize("link", [0, 1, 3, -2])
def test_a_link_must_point_to_a_later_draft(case: str, name: str, link: int) -> None:
    links = slots([-1, link, -1], [-1, -1, -1])

    message = refusal(case, replaced(call_of(case), **{f"metadata__{name}": links}))

    assert f"{name}[0, 1] is {link}, needs 2 to 2, or -1 for none" in message


@every_table
def test_a_slot_table_narrower_than_the_drafts_is_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__state_indices=slots([2, 3], [5, 6]))

    assert "state_indices is (2, 2), needs (2, 3) [B, P]" in refusal(case, call)


@every_table
def test_a_slot_table_shorter_than_the_batch_is_refused(case: str) -> None:
    call = replaced(call_of(case), metadata__state_indices=slots([2, 3, 4]))

    assert "state_indices is (1, 3), needs (2, 3) [B, P]" in refusal(case, call)


@every_table
@pytest.mark.parametrize(
    "table",
    [[[2, 3, 2], [5, 6, 7]], [[2, 3, 4], [5, 4, 7]], [[2, 3, 4], [3, 6, 7]]],
    ids=["in one row", "by two rows", "and read by another"],
)
def test_a_slot_table_names_a_slot_once(case: str, table: list[list[int]]) -> None:
    message = refusal(case, replaced(call_of(case), metadata__state_indices=slots(*table)))

    assert "needs it once" in message


@every_table
def test_a_slot_table_row_may_not_read_what_another_writes(case: str) -> None:
    call = replaced(
        call_of(case),
        metadata__state_indices=slots([2, 3, 4], [5, 6, 4]),
        metadata__num_accepted=slots(0, 3),
    )

    assert "row 1 reads slot 4, which row 0 writes" in refusal(case, call)


@pytest.mark.parametrize("case", ["conv1d_verify table", "verify_step table"])
def test_a_slot_table_needs_longer_windows(case: str) -> None:
    spec = replace(SPEC, conv_window=4)

    message = refusal(case, call_of(case, spec), spec)

    assert "conv_state has windows of 4 columns, needs 5 for a slot table of 3 drafts" in message
    assert "set conv_window in the spec" in message


@pytest.mark.parametrize("case", ["conv1d_verify table", "verify_step table"])
def test_more_accepted_drafts_than_the_window_holds_are_refused(case: str) -> None:
    call = replaced(
        call_of(case),
        metadata__state_indices=slots([2, 3, 4, -1], [5, 6, 7, 1]),
        metadata__num_accepted=slots(0, 4),
    )

    message = refusal(case, call)

    assert "num_accepted[1] is 4, needs 0 to 3" in message or "needs 6" in message


@every_verify
def test_padded_sequences_may_hold_anything(case: str) -> None:
    one, two = _padded(case, -1), _padded(case, -77)
    next(iter(two.values()))[3:] = float("nan")

    results = [run(case, call) for call in (one, two)]

    assert torch.equal(*results)
    assert torch.equal(results[0][3:], torch.zeros_like(results[0][3:]))
    assert _states(one) == _states(two)


def _padded(case: str, garbage: int) -> Call:
    """Return a call whose second sequence is padding, with garbage in all that is said of it."""
    call = call_of(case)
    given = {
        "state_indices": slots(2, garbage),
        "num_accepted": slots(2, 7 * garbage),
        "rows": slots(1, -garbage),
        "parents": slots([0, 0, 1], [garbage] * 3),
        "next_token": slots([1, -1, -1], [-garbage] * 3),
        "next_sibling": slots([-1, 2, -1], [garbage] * 3),
    }
    if case in TABLES:
        given["state_indices"] = slots([2, 3, 4], [garbage] * 3)
    has = {name for name in given if getattr(call["metadata"], name) is not None}
    return replaced(call, **{f"metadata__{name}": given[name] for name in has})


def _states(call: Call) -> dict[str, bytes]:
    named = ("state", "drafts", "pool")
    return {name: value for name, value in contents(call).items() if name.startswith(named)}


def test_a_slot_table_of_the_last_slots_is_in_range() -> None:
    call = call_of("mtp_verify table")
    call["state"] = pool(SPEC, torch.Generator(), 20, live=range(20)).state
    table = slots([17, 18, 19], [14, 15, 16])

    written = run("mtp_verify table", replaced(call, metadata__state_indices=table))

    assert not written.isnan().any()
