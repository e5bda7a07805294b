# SPDX-License-Identifier: Apache-2.0
"""Verification and commit of draft trees against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn_portable import ConvLayout, GdnSpec, StateLayout, VerifyMetadata
from gdn_portable.reference.trees import parents_from_links
from tests.cases import (
    SPEC,
    ab,
    assert_identical,
    check,
    conv_params,
    cpu,
    decays,
    first_child_next_sibling,
    generator,
    mixed_qkv,
    nan,
    offsets,
    params,
    pending_drafts,
    pool,
    protocols,
    qkv,
    random_parents,
    slots,
    strided,
)

KV_LEN_FIRST: GdnSpec = replace(SPEC, state_layout=StateLayout.KV, conv_layout=ConvLayout.LEN_FIRST)
FORKS = torch.tensor([[-1, 0, 0, 1, 1, 2], [-1, 0, 1, 2, 0, 4], [-1, 0, 0, 0, 0, 0]])


def check_ops(spec, rng, states, T, **batch):
    inputs = *qkv(spec, rng, T), *ab(spec, rng, T), *decays(spec, rng)
    x = mixed_qkv(spec, rng, T)

    check(spec, "conv1d_verify", x, *conv_params(spec, rng), states.conv_state, **batch)
    check(spec, "mtp_verify", *inputs, states.state, **batch)


@protocols
@pytest.mark.parametrize("spec", [SPEC, KV_LEN_FIRST, replace(SPEC, conv_width=2, conv_window=4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_draft_starts_from_its_parent(make_drafts, spec, dtype):
    rng = generator()
    states = pool(spec, rng, 6, live=[5, 0, 2])
    metadata = VerifyMetadata(slots(5, 0, 2), max_drafts=6, parents=strided(FORKS.to(dtype)))

    check_ops(spec, rng, states, 18, metadata=metadata, drafts=make_drafts(spec, 6, 6))


@protocols
@pytest.mark.parametrize("lengths", [(6, 1, 4), (0, 3, 6), (2, 0, 0)])
def test_ragged_trees(make_drafts, lengths):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    metadata = VerifyMetadata(slots(5, 0, 2), 6, offsets(*lengths), parents=FORKS.clone())

    check_ops(SPEC, rng, states, sum(lengths), metadata=metadata, drafts=make_drafts(SPEC, 6, 6))


@protocols
@pytest.mark.parametrize("seed", range(4))
def test_random_trees(make_drafts, seed):
    rng = generator(seed)
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    metadata = VerifyMetadata(slots(5, 0, 2), 9, parents=random_parents(rng, 3, 9))

    check_ops(SPEC, rng, states, 27, metadata=metadata, drafts=make_drafts(SPEC, 6, 9))


@protocols
@pytest.mark.parametrize("seed", range(4))
def test_trees_given_by_first_child_and_next_sibling(make_drafts, seed):
    rng = generator(seed)
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    parents = random_parents(rng, 3, 7)
    next_token, next_sibling = first_child_next_sibling(parents)
    metadata = VerifyMetadata(
        slots(5, 0, 2), 7, next_token=next_token, next_sibling=next_sibling.int()
    )

    check_ops(SPEC, rng, states, 21, metadata=metadata, drafts=make_drafts(SPEC, 6, 7))

    assert torch.equal(metadata.parents[:, 1:].long(), parents[:, 1:])


@protocols
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_parents_are_filled_in_place_where_given(make_drafts, dtype):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    next_token, next_sibling = first_child_next_sibling(FORKS)
    filled = strided(torch.zeros(3, 6, dtype=dtype))
    metadata = VerifyMetadata(
        slots(5, 0, 2), 6, parents=filled, next_token=next_token, next_sibling=next_sibling
    )

    check_ops(SPEC, rng, states, 18, metadata=metadata, drafts=make_drafts(SPEC, 6, 6))

    assert metadata.parents is filled
    assert torch.equal(filled[:, 1:].long(), FORKS[:, 1:])


@protocols
def test_stale_parents_are_replaced_when_the_children_change(make_drafts):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    next_token, next_sibling = first_child_next_sibling(FORKS)
    metadata = VerifyMetadata(slots(5, 0, 2), 6, next_token=next_token, next_sibling=next_sibling)
    check_ops(SPEC, rng, states, 18, metadata=metadata, drafts=make_drafts(SPEC, 6, 6))
    for table, changed in zip(
        (next_token, next_sibling), first_child_next_sibling(FORKS.flip(0)), strict=True
    ):
        table.copy_(changed)

    check_ops(SPEC, rng, states, 18, metadata=metadata, drafts=make_drafts(SPEC, 6, 6))

    assert torch.equal(metadata.parents[:, 1:].long(), FORKS.flip(0)[:, 1:])


def test_links_left_behind_the_last_draft_change_nothing():
    # two sequences of three drafts, a root with two children
    links = torch.tensor([[1, -1, -1, -1]] * 2), torch.tensor([[-1, 2, -1, -1]] * 2)
    clean = parents_from_links(*links)
    links[0][0, 3], links[1][1, 3] = 1, 1

    assert torch.equal(parents_from_links(*links)[:, :3], clean[:, :3])
    assert clean.tolist() == [[0, 0, 0, 0]] * 2


@protocols
def test_padding_rows_are_zero_and_other_slots_untouched(make_drafts):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 2])
    x, inputs = mixed_qkv(SPEC, rng, 18), [*qkv(SPEC, rng, 18), *ab(SPEC, rng, 18)]
    for tensor in (x, *inputs):
        tensor[6:12] = float("nan")
    parents = FORKS.clone()
    parents[1] = -1
    metadata = VerifyMetadata(slots(5, -1, 2), 6, parents=parents)
    batch = {"metadata": metadata, "drafts": make_drafts(SPEC, 6, 6)}

    check(SPEC, "conv1d_verify", x, *conv_params(SPEC, rng), states.conv_state, **batch)
    check(SPEC, "mtp_verify", *inputs, *decays(SPEC, rng), states.state, **batch)


def test_pending_chains_are_replayed_before_a_tree():
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    drafts = pending_drafts(SPEC, rng, 6, 6, {5: 3, 0: 0, 2: 6})
    metadata = VerifyMetadata(slots(5, 0, 2), 6, num_accepted=slots(3, 0, 6), parents=FORKS.clone())

    check_ops(SPEC, rng, states, 18, metadata=metadata, drafts=drafts)


@protocols
@pytest.mark.parametrize("spec", [SPEC, KV_LEN_FIRST])
@pytest.mark.parametrize("last_accepted", [(5, 3, -1), (0, 5, 4), (3, 2, 5)])
@pytest.mark.parametrize("by_children", [True, False])
def test_commit_keeps_the_path_to_the_last_accepted_draft(
    make_drafts, spec, last_accepted, by_children
):
    rng = generator()
    states = pool(spec, rng, 6, live=[5, 0, 2])
    drafts = make_drafts(spec, 6, 6)
    next_token, next_sibling = first_child_next_sibling(FORKS)
    trees = {
        True: {"next_token": next_token, "next_sibling": next_sibling},
        False: {"parents": FORKS.clone()},
    }
    metadata = VerifyMetadata(slots(5, 0, 2), 6, **trees[by_children])
    rows = mixed_qkv(spec, rng, 18), *ab(spec, rng, 18)
    check(spec, "verify_step", *rows, params(spec, rng), states, metadata=metadata, drafts=drafts)

    check(
        spec,
        "mtp_commit",
        states,
        drafts,
        metadata=metadata,
        last_accepted=slots(*last_accepted),
    )


@protocols
def test_a_tree_without_branches_equals_the_chain(make_drafts):
    rng = generator()
    spec = replace(SPEC, dtype=torch.float32, state_dtype=torch.float32)
    rows, weights = (mixed_qkv(spec, rng, 10), *ab(spec, rng, 10)), params(spec, rng)
    chain, tree = (pool(spec, generator(1), 4, live=[3, 0]) for _ in range(2))
    chain_drafts, tree_drafts = (make_drafts(spec, 4, 5) for _ in range(2))
    parents = torch.arange(-1, 4).repeat(2, 1)
    ops = cpu(spec)

    want = ops.verify_step(
        *rows, weights, chain, metadata=VerifyMetadata(slots(3, 0), 5), drafts=chain_drafts
    )
    got = ops.verify_step(
        *rows,
        weights,
        tree,
        metadata=VerifyMetadata(slots(3, 0), 5, parents=parents),
        drafts=tree_drafts,
        out=nan(10, 4, 3, dtype=torch.float32),
    )

    assert torch.equal(got, want)
    assert_identical([tree_drafts, tree], [chain_drafts, chain])
