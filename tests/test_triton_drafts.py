# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that verify and commit drafts, on a simulated GPU: long chains and trees."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    GdnOps,
    GdnSpec,
    InputError,
    Op,
    ReplayDrafts,
    SnapshotDrafts,
    StatePool,
    UnsupportedCallError,
    VerifyMetadata,
)
from gdn_portable.testing import ABSOLUTE, Case
from tests.calls import Call
from tests.cases import (
    ab,
    assert_identical,
    copies,
    first_child_next_sibling,
    generator,
    mixed_qkv,
    params,
    pending_drafts,
    pool,
    random_parents,
    replay_drafts,
    slots,
    snapshot_drafts,
)

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=32,
    head_v_dim=32,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    conv_window=6,
)
FLOAT32 = replace(SPEC, dtype=torch.float32)
NUM_SLOTS = 6
SLOTS = (4, -1, 2)


def simulated(spec: GdnSpec) -> GdnOps:
    from ci.amdgcn import bind_simulated

    return bind_simulated(spec, "gfx942")


def check(op: Op, call: Call, spec: GdnSpec) -> None:
    """Compare a call with the reference."""
    Case(op.value, op, spec, call).check(simulated(spec))


def verify(
    spec: GdnSpec, P: int, *, drafts: ReplayDrafts | SnapshotDrafts | None, **metadata: Tensor
) -> Call:
    """Return the arguments of a step that verifies P drafts of every sequence."""
    rng = generator()
    batch = VerifyMetadata(**{"state_indices": slots(*SLOTS), **metadata}, max_drafts=P)
    rows = len(batch.state_indices) * P
    a, b = ab(spec, rng, rows)
    states = pool(spec, rng, NUM_SLOTS, live=range(NUM_SLOTS), columns=spec.conv_state_len)
    call = {"mixed_qkv": mixed_qkv(spec, rng, rows), "a": a, "b": b, "params": params(spec, rng)}
    return {**call, "pool": states, "metadata": batch, "drafts": drafts}


def pending(spec: GdnSpec, count: int) -> ReplayDrafts:
    """Return ``count`` drafts of every slot."""
    every = dict.fromkeys(range(NUM_SLOTS), count)
    return pending_drafts(spec, generator(1), NUM_SLOTS, count, pending=every)


def snapshots(rng: torch.Generator, layers: tuple[int, ...] = ()) -> SnapshotDrafts:
    """Return snapshots of 4 drafts in 3 rows, of numbers."""
    drafts = snapshot_drafts(SPEC, 3, 4, layers)
    drafts.state.normal_(generator=rng)
    drafts.conv_state.normal_(generator=rng)
    return drafts


@pytest.mark.parametrize("spec", [SPEC, FLOAT32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("P", [1, 16])
def test_the_fewest_and_the_most_drafts_are_replayed(
    amd_gpu: Simulator, P: int, shape: str, spec: GdnSpec
) -> None:
    tree = {"parents": random_parents(generator(2), 3, P)} if shape == "tree" else {}

    check(
        Op.VERIFY_STEP,
        verify(spec, P, drafts=pending(spec, P), num_accepted=slots(P, 1, P - 1), **tree),
        spec,
    )


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("P", [4, 9, 16])
def test_replay_in_the_order_of_nvidia_s_tensor_cores(
    amd_gpu: Simulator, monkeypatch: pytest.MonkeyPatch, P: int, state_dtype: torch.dtype
) -> None:
    from gdn_backend_triton.replay import TILES

    monkeypatch.setitem(TILES, "rocm", TILES["cuda"])
    spec = replace(SPEC, head_k_dim=64, state_dtype=state_dtype)

    check(
        Op.VERIFY_STEP,
        verify(spec, P, drafts=pending(spec, P), num_accepted=slots(P, 0, 1)),
        spec,
    )


def test_more_drafts_may_be_pending_than_are_verified(amd_gpu: Simulator) -> None:
    call = verify(SPEC, 3, drafts=pending(SPEC, 12), num_accepted=slots(9, 0, 12))

    check(Op.VERIFY_STEP, call, SPEC)


def test_repeated_drafts_that_are_remembered_stay_accurate(amd_gpu: Simulator) -> None:
    drafts = pending(FLOAT32, 16)
    drafts.k[:], drafts.g[:], drafts.beta[:] = drafts.k[:1, :1].clone(), -1e-9, 1 - 1e-6
    call = verify(FLOAT32, 16, drafts=drafts, num_accepted=slots(16, 0, 15))
    one_key = {
        "mixed_qkv": call["mixed_qkv"][:1].repeat(48, 1),
        "a": torch.full_like(call["a"], -30),
        "b": torch.full_like(call["b"], 12),
    }

    check(Op.VERIFY_STEP, {**call, **one_key}, FLOAT32)


@pytest.mark.parametrize("strong", [8.0, 80.0, 2000.0])
def test_a_strong_decay_of_one_branch_does_not_reach_the_others(
    amd_gpu: Simulator, strong: float
) -> None:
    tree = torch.tensor([[-1, 0, 0, 1, 2, 2]] * 3)
    drafts = pending(FLOAT32, 6)
    drafts.g[:, 2] = -strong
    call = verify(FLOAT32, 6, drafts=drafts, num_accepted=slots(6, 0, 2), parents=tree)
    call["a"][1::6] = strong

    check(Op.VERIFY_STEP, call, FLOAT32)


@pytest.mark.parametrize("protocol", ["replay", "snapshot"])
def test_links_give_the_same_bits_as_parents_and_fill_them(
    amd_gpu: Simulator, protocol: str
) -> None:
    parents = random_parents(generator(3), 3, 7)
    next_token, next_sibling = first_child_next_sibling(parents)
    drafts = pending(SPEC, 7) if protocol == "replay" else snapshot_drafts(SPEC, 3, 7)
    links = {"next_token": next_token, "next_sibling": next_sibling}
    linked = verify(SPEC, 7, drafts=copies(drafts), **links)
    named = verify(SPEC, 7, drafts=copies(drafts), parents=parents)
    ops = simulated(SPEC)

    assert_identical(ops.verify_step(**linked), ops.verify_step(**named))

    assert_identical(linked["drafts"], named["drafts"])
    assert torch.equal(linked["metadata"].parents[:, 1:].long(), parents[:, 1:])


def test_parents_that_are_there_are_filled_in_place(amd_gpu: Simulator) -> None:
    parents = random_parents(generator(4), 3, 5)
    next_token, next_sibling = first_child_next_sibling(parents)
    given = torch.full((5, 3), 77, dtype=torch.int32).t()
    links = {"next_token": next_token, "next_sibling": next_sibling, "parents": given}

    simulated(SPEC).verify_step(
        **verify(SPEC, 5, drafts=replay_drafts(SPEC, NUM_SLOTS, 5), **links)
    )

    assert torch.equal(given[:, 1:].long(), parents[:, 1:])


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_commit_of_many_drafts_by_replay(amd_gpu: Simulator, shape: str, width: int) -> None:
    spec = replace(SPEC, conv_width=width)
    tree = {"parents": random_parents(generator(5), 3, 16)} if shape == "tree" else {}
    metadata = VerifyMetadata(slots(4, 1, 2), 16, **tree)
    states = pool(spec, generator(), NUM_SLOTS, live=range(NUM_SLOTS))
    call = {"pool": states, "drafts": pending(spec, 16), "metadata": metadata}

    check(Op.MTP_COMMIT, {**call, "last_accepted": slots(15, -1, 9)}, spec)


@pytest.mark.parametrize("part", ["state", "conv_state"])
@pytest.mark.parametrize("protocol", ["replay", "snapshot"])
def test_a_commit_may_be_of_one_pool_alone(amd_gpu: Simulator, protocol: str, part: str) -> None:
    rng = generator()
    drafts = pending(SPEC, 4) if protocol == "replay" else snapshots(rng)
    states = pool(SPEC, rng, NUM_SLOTS, live=range(NUM_SLOTS))
    metadata = VerifyMetadata(slots(4, 1, 2), 4)
    call = {"pool": replace(states, **{part: None}), "drafts": drafts, "metadata": metadata}

    check(Op.MTP_COMMIT, {**call, "last_accepted": slots(3, 0, -1)}, SPEC)


@pytest.mark.parametrize("part", ["conv_state", "state"])
def test_snapshots_that_are_none_and_needed_are_refused(amd_gpu: Simulator, part: str) -> None:
    rng = generator()
    drafts = replace(snapshots(rng), **{part: None})
    states = pool(SPEC, rng, NUM_SLOTS, live=range(NUM_SLOTS))
    metadata, last = VerifyMetadata(slots(4, 1, 2), 4), slots(3, 0, -1)
    before = copies(states)

    for call in (
        lambda: simulated(SPEC).mtp_commit(states, drafts, metadata=metadata, last_accepted=last),
        lambda: simulated(SPEC).verify_step(**{**verify(SPEC, 4, drafts=drafts), "pool": states}),
    ):
        with pytest.raises(InputError, match=f"drafts.{part} is None, needs a tensor"):
            call()

    assert_identical(states, before)


def test_a_commit_of_snapshots_serves_all_layers_at_once(amd_gpu: Simulator) -> None:
    layers = 3
    ours, drafts = _layered(layers)
    theirs, drafts_of_one = copies((ours, drafts))
    metadata = VerifyMetadata(slots(4, -1, 2), 4, rows=slots(1, 0, 2))
    last = slots(3, 0, -1)

    simulated(SPEC).mtp_commit(ours, drafts, metadata=metadata, last_accepted=last)
    for i in range(layers):
        one = replace(theirs, conv_state=theirs.conv_state[i], state=theirs.state[i])
        kept = SnapshotDrafts(drafts_of_one.conv_state[i], drafts_of_one.state[i])
        simulated(SPEC).mtp_commit(one, kept, metadata=metadata, last_accepted=last)

    assert_identical(ours, theirs)
    assert_identical(ours.state[:, 4], drafts.state[:, 1, 3])
    assert_identical(ours.conv_state[:, 4, :, :3], drafts.conv_state[:, 1, 3])


def _layered(layers: int) -> tuple[StatePool, SnapshotDrafts]:
    rng = generator()
    pools = [pool(SPEC, rng, NUM_SLOTS, live=range(NUM_SLOTS)) for _ in range(layers)]
    states = replace(
        pools[0],
        conv_state=torch.stack([one.conv_state for one in pools]),
        state=torch.stack([one.state for one in pools]),
    )
    return states, snapshots(rng, (layers,))


P = 4
MAKE_DRAFTS = {"replay": replay_drafts, "snapshot": snapshot_drafts}


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with the tolerance of the conformance cases for results of either path."""
    exact = expected.double()
    assert (got.double() - exact).abs().max() <= 4 * ABSOLUTE[dtype] * exact.abs().max()


@pytest.mark.parametrize("protocol", MAKE_DRAFTS)
@pytest.mark.parametrize("spec", [SPEC, FLOAT32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_verify_then_commit_is_as_good_as_decodes(
    amd_gpu: Simulator, protocol: str, spec: GdnSpec, k: int
) -> None:
    ops, drafts = simulated(spec), MAKE_DRAFTS[protocol](spec, NUM_SLOTS, P)
    call = verify(spec, P, drafts=drafts, state_indices=slots(3))
    decoded = copies(call["pool"])

    out = ops.verify_step(**call)
    batch = {"metadata": call["metadata"], "last_accepted": slots(k - 1)}
    ops.mtp_commit(call["pool"], drafts, **batch)
    for t in range(k):
        rows = (call[name][t : t + 1] for name in ("mixed_qkv", "a", "b"))
        y = ops.decode_step(*rows, call["params"], decoded, state_indices=slots(3))
        _close(out[t], y[0], spec.dtype)

    _close(call["pool"].state, decoded.state, spec.dtype)
    assert_identical(call["pool"].conv_state[3, :, :3], decoded.conv_state[3, :, :3])


@pytest.mark.parametrize("spec", [SPEC, FLOAT32], ids=["bf16", "fp32"])
def test_a_slot_table_is_as_good_as_decodes(amd_gpu: Simulator, spec: GdnSpec) -> None:
    ops = simulated(spec)
    call = verify(spec, P, drafts=None, state_indices=slots([4, 1, 0, 5]))
    decoded = copies(call["pool"])

    out = ops.verify_step(**call)
    for t, slot in enumerate((4, 1, 0, 5)):
        rows = (call[name][t : t + 1] for name in ("mixed_qkv", "a", "b"))
        y = ops.decode_step(*rows, call["params"], decoded, state_indices=slots(4))
        _close(out[t], y[0], spec.dtype)
        _close(call["pool"].state[slot], decoded.state[4], spec.dtype)


@pytest.mark.parametrize("k", [1, 4])
def test_the_next_replay_applies_what_a_commit_would(amd_gpu: Simulator, k: int) -> None:
    ops, drafts = simulated(FLOAT32), replay_drafts(FLOAT32, NUM_SLOTS, P)
    call = verify(FLOAT32, P, drafts=drafts, state_indices=slots(3, 0))
    ops.verify_step(**call)
    told = verify(FLOAT32, P, drafts=drafts, state_indices=slots(3, 0), num_accepted=slots(k, 2))
    told = {**told, "pool": call["pool"], "mixed_qkv": call["mixed_qkv"].flip(0)}
    committed = copies(told)
    batch = {"metadata": call["metadata"], "last_accepted": slots(k - 1, 1)}
    ops.mtp_commit(committed["pool"], committed["drafts"], **batch)
    committed["metadata"].num_accepted = None

    _close(ops.verify_step(**told), ops.verify_step(**committed), torch.float32)

    _close(told["pool"].state, committed["pool"].state, torch.float32)
    assert_identical(told["pool"].conv_state[:, :, :3], committed["pool"].conv_state[:, :, :3])
    assert_identical(told["drafts"], committed["drafts"])


def test_replay_refuses_a_tree_whose_paths_do_not_fit_before_anything_is_written(
    amd_gpu: Simulator,
) -> None:
    drafts = replay_drafts(SPEC, NUM_SLOTS, 32)
    call = verify(SPEC, 32, drafts=drafts, parents=torch.zeros(3, 32, dtype=torch.int32))
    before = copies(call)

    with pytest.raises(UnsupportedCallError, match="max_drafts of a tree is 32, needs at most 31"):
        simulated(SPEC).verify_step(**call)

    assert_identical(call, before)
