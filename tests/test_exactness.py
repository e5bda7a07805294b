# SPDX-License-Identifier: Apache-2.0
"""What must be equal to the last bit: verify then commit, and as many decodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn_portable import VerifyMetadata
from tests.cases import (
    FLOAT32,
    ab,
    assert_identical,
    copies,
    cpu,
    generator,
    mixed_qkv,
    params,
    pool,
    protocols,
    replay_drafts,
    slots,
)

P = 4
BFLOAT16 = replace(FLOAT32, dtype=torch.bfloat16)
dtypes = pytest.mark.parametrize("spec", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
accepted_counts = pytest.mark.parametrize("k", range(P + 1))
FORKS = torch.tensor([[-1, 0, 0, 1, 1, 2, 4], [-1, 0, 1, 2, 3, 4, 5]])
PATHS = [[(), ()], [(0,), (0, 1)], [(0, 2, 5), (0, 1, 2)], [(0, 1, 4, 6), (0, 1, 2, 3, 4, 5, 6)]]


def draft_rows(spec, rng, B, drafts):
    """mixed_qkv, a and b of every draft: [B, drafts, ...]."""
    rows = mixed_qkv(spec, rng, B * drafts), *ab(spec, rng, B * drafts)
    return [tensor.unflatten(0, (B, drafts)) for tensor in rows]


def flat(rows):
    return [tensor.flatten(0, 1) for tensor in rows]


def decode_path(spec, rows, weights, states, b, slot, path):
    """Decode the drafts on a path of sequence ``b`` one by one, and return their outputs."""
    return [
        cpu(spec).decode_step(
            *(tensor[b, t : t + 1] for tensor in rows), weights, states, state_indices=slots(slot)
        )[0]
        for t in path
    ]


@protocols
@dtypes
@accepted_counts
def test_verify_of_a_chain_then_commit_equals_decodes(make_drafts, spec, k):
    rng, ops = generator(k), cpu(spec)
    rows, weights = draft_rows(spec, rng, 2, P), params(spec, rng)
    states, drafts = pool(spec, rng, 4, live=[3, 0]), make_drafts(spec, 4, P)
    decoded, metadata = copies(states), VerifyMetadata(slots(3, 0), P)
    first = decode_path(spec, rows, weights, decoded, 0, 3, range(k))
    second = decode_path(spec, rows, weights, decoded, 1, 0, range(P - k))

    out = ops.verify_step(*flat(rows), weights, states, metadata=metadata, drafts=drafts)
    ops.mtp_commit(states, drafts, metadata=metadata, last_accepted=slots(k - 1, P - k - 1))

    assert_identical(states, decoded)
    assert_identical(list(out[:k]), first)
    assert_identical(list(out[P : 2 * P - k]), second)


@protocols
@dtypes
@pytest.mark.parametrize("paths", PATHS)
def test_verify_of_a_tree_then_commit_equals_decodes_of_the_path(make_drafts, spec, paths):
    rng, ops = generator(), cpu(spec)
    rows, weights = draft_rows(spec, rng, 2, 7), params(spec, rng)
    states, drafts = pool(spec, rng, 4, live=[3, 0]), make_drafts(spec, 4, 7)
    decoded, metadata = copies(states), VerifyMetadata(slots(3, 0), 7, parents=FORKS.clone())
    first = decode_path(spec, rows, weights, decoded, 0, 3, paths[0])
    second = decode_path(spec, rows, weights, decoded, 1, 0, paths[1])

    out = ops.verify_step(*flat(rows), weights, states, metadata=metadata, drafts=drafts)
    last_accepted = slots(*((-1, *path)[-1] for path in paths))
    ops.mtp_commit(states, drafts, metadata=metadata, last_accepted=last_accepted)

    assert_identical(states, decoded)
    assert_identical([out[t] for t in paths[0]], first)
    assert_identical([out[7 + t] for t in paths[1]], second)


@dtypes
@pytest.mark.parametrize("k", range(1, P + 1))
def test_a_slot_table_holds_what_decodes_give(spec, k):
    spec, rng = replace(spec, conv_window=6), generator(k)
    rows, weights = draft_rows(spec, rng, 2, P), params(spec, rng)
    states = pool(spec, rng, 9, live=[8, 0])
    table = slots(8, 1, 2, 3, 0, 4, 5, 6).unflatten(0, (2, P))
    decoded = copies(states)
    first = decode_path(spec, rows, weights, decoded, 0, 8, range(k))
    second = decode_path(spec, rows, weights, decoded, 1, 0, range(k))

    out = cpu(spec).verify_step(*flat(rows), weights, states, metadata=VerifyMetadata(table, P))

    held = states.state[table[:, k - 1].long()]
    assert torch.equal(held, decoded.state[[8, 0]])
    assert torch.equal(
        states.conv_state[[8, 0], :, k - 1 : k + 2], decoded.conv_state[[8, 0], :, :3]
    )
    assert torch.equal(out[:k], torch.stack(first))
    assert torch.equal(out[P : P + k], torch.stack(second))


@dtypes
@pytest.mark.parametrize("k", range(1, P + 1))
def test_the_next_verify_of_a_slot_table_continues_from_the_accepted_draft(spec, k):
    spec, rng = replace(spec, conv_window=6), generator(k)
    ops, weights = cpu(spec), params(spec, rng)
    first_rows, next_rows = draft_rows(spec, rng, 1, P), draft_rows(spec, rng, 1, P)
    states = pool(spec, rng, 5, live=[4])
    decoded = copies(states)
    table = slots(4, 1, 2, 3)[None]
    decode_path(spec, first_rows, weights, decoded, 0, 4, range(k))
    want = decode_path(spec, next_rows, weights, decoded, 0, 4, range(P))

    ops.verify_step(*flat(first_rows), weights, states, metadata=VerifyMetadata(table, P))
    metadata = VerifyMetadata(table, P, num_accepted=slots(k))
    got = ops.verify_step(*flat(next_rows), weights, states, metadata=metadata)

    assert torch.equal(got, torch.stack(want))
    assert torch.equal(states.state[3], decoded.state[4])
    assert torch.equal(states.conv_state[4, :, 3:6], decoded.conv_state[4, :, :3])


@dtypes
@pytest.mark.parametrize("k", range(1, P + 1))
def test_after_a_verify_of_one_row_the_first_slot_of_a_table_is_one_for_decodes(spec, k):
    spec, rng = replace(spec, conv_window=6), generator(k)
    ops, weights = cpu(spec), params(spec, rng)
    first_rows, next_rows = draft_rows(spec, rng, 1, P), draft_rows(spec, rng, 1, P)
    states = pool(spec, rng, 5, live=[4])
    decoded, table = copies(states), slots(4, 1, 2, 3)[None]
    decode_path(spec, first_rows, weights, decoded, 0, 4, range(k))
    want = decode_path(spec, next_rows, weights, decoded, 0, 4, range(P))

    ops.verify_step(*flat(first_rows), weights, states, metadata=VerifyMetadata(table, P))
    alone = VerifyMetadata(table, P, cu_seqlens=slots(0, 1), num_accepted=slots(k))
    root = [tensor[:, :1] for tensor in next_rows]
    got = [ops.verify_step(*flat(root), weights, states, metadata=alone)[0]]
    got += decode_path(spec, next_rows, weights, states, 0, 4, range(1, P))

    assert torch.equal(torch.stack(got), torch.stack(want))


@dtypes
@pytest.mark.parametrize("num_accepted", [None, slots(0), slots(1)], ids=["none", "0", "1"])
def test_the_first_verify_of_a_slot_table_starts_in_its_first_slot(spec, num_accepted):
    spec, rng = replace(spec, conv_window=6), generator(1)
    rows, weights = draft_rows(spec, rng, 1, P), params(spec, rng)
    states = pool(spec, rng, 5, live=[4])
    want = decode_path(spec, rows, weights, copies(states), 0, 4, range(P))

    metadata = VerifyMetadata(slots(4, 1, 2, 3)[None], P, num_accepted=num_accepted)
    got = cpu(spec).verify_step(*flat(rows), weights, states, metadata=metadata)

    assert torch.equal(got, torch.stack(want))


@dtypes
@accepted_counts
def test_num_accepted_of_the_next_replay_equals_a_commit(spec, k):
    rng, ops = generator(k), cpu(spec)
    weights = params(spec, rng)
    first_rows, next_rows = draft_rows(spec, rng, 2, P), draft_rows(spec, rng, 2, P)
    told, drafts = pool(spec, rng, 4, live=[3, 0]), replay_drafts(spec, 4, P)
    first = VerifyMetadata(slots(3, 0), P)
    ops.verify_step(*flat(first_rows), weights, told, metadata=first, drafts=drafts)
    committed, committed_drafts = copies(told), copies(drafts)
    ops.mtp_commit(
        committed, committed_drafts, metadata=first, last_accepted=slots(k - 1, P - k - 1)
    )

    metadata = VerifyMetadata(slots(3, 0), P, num_accepted=slots(k, P - k))
    got = ops.verify_step(*flat(next_rows), weights, told, metadata=metadata, drafts=drafts)
    want = ops.verify_step(
        *flat(next_rows), weights, committed, metadata=first, drafts=committed_drafts
    )

    assert torch.equal(got, want)
    assert_identical(told, committed)
    assert_identical(drafts, committed_drafts)
