# SPDX-License-Identifier: Apache-2.0
"""mtp_commit against the oracle, after chains; trees are in test_trees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn_portable import ConvLayout, StateLayout, StatePool, VerifyMetadata
from tests import oracle
from tests.cases import (
    SPEC,
    ab,
    assert_written,
    check,
    copies,
    cpu,
    generator,
    index_forms,
    mixed_qkv,
    nan,
    offsets,
    over_long,
    params,
    pending_drafts,
    pool,
    protocols,
    random,
    slots,
    snapshot_drafts,
    strided,
    tensors,
)

both_layouts = pytest.mark.parametrize(
    "layouts", [(ConvLayout.DIM_FIRST, StateLayout.VK), (ConvLayout.LEN_FIRST, StateLayout.KV)]
)


def verified(spec, rng, states, T, *, metadata, drafts):
    """Fill ``drafts`` by a verify, and return the arguments of the commit after it."""
    rows = mixed_qkv(spec, rng, T), *ab(spec, rng, T)
    cpu(spec).verify_step(*rows, params(spec, rng), states, metadata=metadata, drafts=drafts)
    return states, drafts


@protocols
@both_layouts
@pytest.mark.parametrize("width, window", [(2, None), (3, 5), (4, None), (4, 7)])
def test_state_and_window_after_the_last_accepted_draft_are_kept(
    make_drafts, layouts, width, window
):
    spec = replace(
        SPEC,
        conv_layout=layouts[0],
        state_layout=layouts[1],
        conv_width=width,
        conv_window=window,
    )
    rng, metadata = generator(), VerifyMetadata(slots(5, 0, 2, 3), max_drafts=4)
    states, drafts = pool(spec, rng, 6, live=[5, 0, 2, 3]), make_drafts(spec, 6, 4)
    arguments = verified(spec, rng, states, 16, metadata=metadata, drafts=drafts)

    check(spec, "mtp_commit", *arguments, metadata=metadata, last_accepted=slots(3, 0, -1, 1))


@protocols
@both_layouts
@pytest.mark.parametrize("last_accepted", [(3, 0, -1, 1), (-1, -1, -1, -1), (0, 3, 2, 0)])
def test_a_copy_in_another_slot_leaves_the_own_slot_as_it_is(make_drafts, layouts, last_accepted):
    spec = replace(SPEC, conv_layout=layouts[0], state_layout=layouts[1], conv_window=6)
    rng, metadata = generator(), VerifyMetadata(slots(5, 0, 2, 3), max_drafts=4)
    states, drafts = pool(spec, rng, 12, live=[5, 0, 2, 3]), make_drafts(spec, 12, 4)
    arguments = verified(spec, rng, states, 16, metadata=metadata, drafts=drafts)

    check(
        spec,
        "mtp_commit",
        *arguments,
        metadata=metadata,
        last_accepted=slots(*last_accepted),
        out_state_indices=slots(11, 1, 9, -1),
    )


@protocols
@pytest.mark.parametrize("pad_slot, indices", [(-1, (4, -1, 1, -2)), (0, (4, 0, 1, -1))])
@pytest.mark.parametrize("targets", [None, (2, 3, -1, 0)])
def test_padding_rows_touch_nothing(make_drafts, pad_slot, indices, targets):
    spec, rng = replace(SPEC, pad_slot=pad_slot), generator()
    metadata = VerifyMetadata(slots(*indices), max_drafts=2)
    states, drafts = pool(spec, rng, 5, live=[4, 1]), make_drafts(spec, 5, 2)
    arguments = verified(spec, rng, states, 8, metadata=metadata, drafts=drafts)

    check(
        spec,
        "mtp_commit",
        *arguments,
        metadata=metadata,
        last_accepted=slots(1, 1, 0, 1),
        out_state_indices=targets and slots(*targets),
    )


@protocols
@index_forms
def test_index_tensors_of_any_form(make_drafts, form):
    rng = generator()
    metadata = VerifyMetadata(
        form(slots(5, 0, 2)),
        max_drafts=3,
        cu_seqlens=strided(offsets(3, 1, 2, dtype=torch.int64)),
        num_accepted=form(slots(0, 0, 0)),
        rows=form(slots(4, 1, 3)),
    )
    states, drafts = pool(SPEC, rng, 9, live=[5, 0, 2]), make_drafts(SPEC, 9, 3)
    arguments = verified(SPEC, rng, states, 6, metadata=metadata, drafts=drafts)

    check(
        SPEC,
        "mtp_commit",
        *arguments,
        metadata=metadata,
        last_accepted=strided(slots(2, 0, 1)),
        out_state_indices=form(slots(8, -1, 6)),
    )


@protocols
def test_ragged_batches_with_an_empty_sequence(make_drafts):
    rng = generator()
    metadata = VerifyMetadata(slots(5, 0, 2), 3, cu_seqlens=offsets(2, 0, 3))
    states, drafts = pool(SPEC, rng, 6, live=[5, 0, 2]), make_drafts(SPEC, 6, 3)
    arguments = verified(SPEC, rng, states, 5, metadata=metadata, drafts=drafts)

    check(SPEC, "mtp_commit", *arguments, metadata=metadata, last_accepted=slots(1, -1, 2))


@protocols
def test_a_ragged_batch_ends_with_its_offsets_though_all_indices_are_longer(make_drafts):
    rng = generator()
    metadata = VerifyMetadata(over_long(slots(5, 3)), 3, cu_seqlens=offsets(2, 3))
    states, drafts = pool(SPEC, rng, 6, live=[5, 3, 0]), make_drafts(SPEC, 6, 3)
    arguments = verified(SPEC, rng, states, 5, metadata=metadata, drafts=drafts)
    last_accepted = over_long(slots(1, 2))

    check(SPEC, "mtp_commit", *arguments, metadata=metadata, last_accepted=last_accepted)


@protocols
def test_other_indices_of_padding_rows_may_hold_anything(make_drafts):
    rng, metadata = generator(), VerifyMetadata(slots(4, -1), 2, rows=slots(1, 99))
    states, drafts = pool(SPEC, rng, 5, live=[4]), make_drafts(SPEC, 5, 2)
    arguments = verified(SPEC, rng, states, 4, metadata=metadata, drafts=drafts)

    check(SPEC, "mtp_commit", *arguments, metadata=metadata, last_accepted=slots(1, 99))


@protocols
def test_states_in_pages_are_written_in_place(make_drafts):
    rng, metadata = generator(), VerifyMetadata(slots(5, 0), max_drafts=3)
    states, drafts = pool(SPEC, rng, 6, live=[5, 0], paged=True), make_drafts(SPEC, 6, 3)
    arguments = verified(SPEC, rng, states, 6, metadata=metadata, drafts=drafts)

    check(SPEC, "mtp_commit", *arguments, metadata=metadata, last_accepted=slots(2, 1))


@protocols
def test_no_sequences_touch_nothing(make_drafts):
    rng, metadata = generator(), VerifyMetadata(slots(), max_drafts=2)
    arguments = pool(SPEC, rng, 2, live=[]), make_drafts(SPEC, 2, 2)

    check(SPEC, "mtp_commit", *arguments, metadata=metadata, last_accepted=slots())


@protocols
@pytest.mark.parametrize("missing", ["conv_state", "state"])
def test_a_missing_pool_is_passed_over(make_drafts, missing):
    rng, metadata = generator(), VerifyMetadata(slots(5, 0), max_drafts=3)
    states, drafts = pool(SPEC, rng, 6, live=[5, 0]), make_drafts(SPEC, 6, 3)
    verified(SPEC, rng, states, 6, metadata=metadata, drafts=drafts)
    half = replace(states, **{missing: None})

    check(SPEC, "mtp_commit", half, drafts, metadata=metadata, last_accepted=slots(2, 1))


def test_pending_drafts_that_the_verify_replayed_are_not_replayed_again():
    rng = generator()
    metadata = VerifyMetadata(slots(5, 0), max_drafts=3, num_accepted=slots(3, 1))
    states, drafts = pool(SPEC, rng, 6, live=[5, 0]), pending_drafts(SPEC, rng, 6, 3, {5: 3, 0: 1})
    arguments = verified(SPEC, rng, states, 6, metadata=metadata, drafts=drafts)

    check(SPEC, "mtp_commit", *arguments, metadata=metadata, last_accepted=slots(1, -1))


def test_snapshots_of_one_slot_in_many_rows_go_to_many_slots():
    rng = generator()
    metadata = VerifyMetadata(slots(5, 5, 5), max_drafts=3, rows=slots(6, 0, 2))
    states, drafts = pool(SPEC, rng, 6, live=[5]), snapshot_drafts(SPEC, 7, 5)
    arguments = verified(SPEC, rng, states, 9, metadata=metadata, drafts=drafts)

    check(
        SPEC,
        "mtp_commit",
        *arguments,
        metadata=metadata,
        last_accepted=slots(2, -1, 0),
        out_state_indices=slots(0, 1, 3),
    )


def test_snapshots_of_overlapping_windows():
    rng, D, P, columns = generator(), SPEC.conv_dim, 4, 9
    drafts = snapshot_drafts(SPEC, 3, P)
    windows = nan(3, D, columns).as_strided((3, P, D, 3), (D * columns, 1, columns, 1))
    drafts.conv_state = windows
    metadata = VerifyMetadata(slots(5, 0), P, rows=slots(2, 0))
    states = pool(SPEC, rng, 6, live=[5, 0])
    arguments = verified(SPEC, rng, states, 8, metadata=metadata, drafts=drafts)

    check(SPEC, "mtp_commit", *arguments, metadata=metadata, last_accepted=slots(3, 1))


@both_layouts
@pytest.mark.parametrize("last_accepted", [(2, 0, -1), (0, 1, 2)])
@pytest.mark.parametrize("targets", [None, (4, -1, 1)])
def test_all_layers_commit_in_one_call(layouts, last_accepted, targets):
    spec = replace(SPEC, conv_layout=layouts[0], state_layout=layouts[1], conv_window=5)
    rng, metadata = generator(), VerifyMetadata(slots(5, 0, 2), 3, rows=slots(1, 3, 0))
    per_layer = [pool(spec, rng, 6, live=[5, 0, 2]) for _ in range(3)]
    states = StatePool(
        torch.stack([layer.conv_state for layer in per_layer]),
        torch.stack([layer.state for layer in per_layer]),
    )
    drafts = snapshot_drafts(spec, 4, 3, layers=(3,))
    for tensor in tensors(drafts):
        tensor[:, [1, 3, 0]] = random(rng, 3, 3, *tensor.shape[2:])
    batch = {
        "metadata": metadata,
        "last_accepted": slots(*last_accepted),
        "out_state_indices": targets and slots(*targets),
    }
    before, want = copies(states), copies(states)

    cpu(spec).mtp_commit(states, drafts, **batch)

    for i in range(3):
        of_layer = replace(drafts, conv_state=drafts.conv_state[i], state=drafts.state[i])
        oracle.mtp_commit(spec, oracle.layer(want, i), of_layer, **batch)
    assert_written(states.conv_state, before.conv_state, want.conv_state)
    assert_written(states.state, before.state, want.state)
