# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's adapters on a CPU: their own kernels interpreted, FlashInfer's a double.

``test_flashinfer.py`` runs this file with Triton's interpreter on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    DeferredUpdates,
    Device,
    GdnOps,
    GdnSpec,
    InputError,
    Op,
    PrefillMetadata,
    SnapshotDrafts,
    UnsupportedCallError,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import SLOTS, Case, cases
from tests import flashinfer_double
from tests.cases import ab, decays, g_beta, generator, qkv

SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=32,
    head_v_dim=32,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    scratch_slot=SLOTS,
)
SPECS = {
    "float32 state": SPEC,
    "bfloat16 state, null block, ratio 1": replace(
        SPEC, state_dtype=torch.bfloat16, num_v_heads=1, pad_slot=0
    ),
}
# no GPU that FlashInfer serves: the interpreter cannot overlap kernels
DEVICE = Device("cuda", "sm80")
RULES = {
    Op.CHUNK_PREFILL: "flashinfer_prefill:make_chunk_prefill",
    Op.RECURRENT_DECODE: "flashinfer_decode:make_recurrent_decode",
}
RATIO_3 = replace(SPEC, dtype=torch.float16, num_v_heads=3)
CASES = {
    f"{name}: {case.name}": case
    for name, spec in SPECS.items()
    for case in cases(spec)
    if case.op in RULES and "deferred" not in case.arguments
} | {
    f"float16, ratio 3: {case.name}": case for case in cases(RATIO_3) if case.op is Op.CHUNK_PREFILL
}


@pytest.fixture(params=[False, True], ids=["older", "newer"], autouse=True)
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install the double and return what is called of it."""
    flashinfer_double.install(monkeypatch, is_newer=request.param)
    return flashinfer_double.CALLS


def _with(spec: GdnSpec, **launchers: Callable[..., Any]) -> GdnOps:
    return dataclasses.replace(bind(spec, "cpu", check=False), **launchers)


def _adapter(spec: GdnSpec, target: str) -> Callable[..., Any]:
    from gdn_backend_triton.launch import lazily

    return lazily(f"gdn_backend_cuda.{target}")(spec, DEVICE, deterministic=False)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_adapter_passes_the_case(case: Case, calls: list[str]) -> None:
    launch = _adapter(case.spec, RULES[case.op])

    case.check(_with(case.spec, **{case.op.value: launch}))

    assert calls


def test_a_decode_that_writes_every_state_is_not_told_to_defer(calls: list[str]) -> None:
    launch = _adapter(SPEC, RULES[Op.RECURRENT_DECODE])
    rng = generator()
    rows = (*qkv(SPEC, rng, 1), *ab(SPEC, rng, 1), *decays(SPEC, rng), _states(SPEC))
    deferred = DeferredUpdates.allocate(SPEC, SLOTS + 1, 2, "cpu")

    with pytest.raises(UnsupportedCallError, match="deferred is given: the kernel writes every"):
        launch(*rows, state_indices=torch.tensor([1]), deferred=deferred)
    assert not calls


def _states(spec: GdnSpec) -> Tensor:
    shape = (spec.num_v_heads, spec.head_v_dim, spec.head_k_dim)
    return torch.randn(SLOTS + 1, *shape, generator=generator()).to(spec.state_dtype)


# snapshots of bfloat16 states go to Triton
@pytest.mark.parametrize(
    ("name", "protocol"),
    [("float32 state", "snapshot"), *((name, "slot table") for name in SPECS)],
)
def test_chains_of_the_same_length_are_verified_by_flashinfer(
    name: str, protocol: str, calls: list[str]
) -> None:
    spec, B, P = SPECS[name], 3, 4
    rng, verify = generator(), _adapter(spec, "flashinfer_verify:make_mtp_verify")
    rows = (*qkv(spec, rng, B * P), *ab(spec, rng, B * P), *decays(spec, rng))
    metadata = VerifyMetadata(torch.tensor([3, -1, 5]), P)
    if protocol == "slot table":
        table = torch.tensor([[2, 3, -1, 4], [-1] * P, [5, 6, 7, 8]])
        metadata = VerifyMetadata(table, P, num_accepted=torch.tensor([2, 3, 0]))
    results = []
    for launch in (bind(spec, "cpu").mtp_verify, verify):
        state, drafts = _states(spec), None
        if protocol == "snapshot":
            drafts = SnapshotDrafts.allocate(spec, B, P, "cpu")
        o = launch(*rows, state, metadata=metadata, drafts=drafts)
        kept = [] if drafts is None or drafts.state is None else [drafts.state]
        results.append([o, state[:SLOTS], *kept])

    assert len(calls) == 1
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_a_checkpoint_may_lie_far_behind_the_states_that_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gdn_backend_cuda import checkpoints, flashinfer_prefill, prefill_slots

    for module in (checkpoints, flashinfer_prefill, prefill_slots):
        monkeypatch.setattr(module, "EVERY", 64)
    lengths, rng = [150, 0, 200, 64], generator()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    metadata = PrefillMetadata(
        offsets,
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([True, False, False, True]),
        checkpoint_offsets=torch.tensor([149, 0, 128, 3]),
        checkpoint_indices=torch.tensor([11, 12, 13, 14]),
    )
    T = sum(lengths)
    rows = (*qkv(SPEC, rng, T), *g_beta(SPEC, rng, T))
    prefill = _adapter(SPEC, RULES[Op.CHUNK_PREFILL])
    expected, got = _states(SPEC), _states(SPEC)

    bind(SPEC, "cpu").chunk_prefill(*rows, expected, metadata=metadata)
    prefill(*rows, got, metadata=metadata)

    torch.testing.assert_close(got[:SLOTS], expected[:SLOTS], rtol=2e-2, atol=2e-2)


def _mixed_batch() -> PrefillMetadata:
    """Return 160 tokens, some of padding; a sequence is empty, rows behind them are nobody's."""
    return PrefillMetadata(torch.tensor([0, 20, 90, 90, 160]), torch.tensor([-1, 3, 7, 5]))


def test_keys_that_are_no_unit_vectors_stay_as_they_are() -> None:
    spec, rng = replace(SPEC, qk_l2norm=False), generator()
    rows = (*(0.2 * x for x in qkv(spec, rng, 170)), *g_beta(spec, rng, 170))
    metadata = _mixed_batch()
    expected, got = _states(spec), _states(spec)
    out = torch.full_like(rows[2], torch.nan)

    want = bind(spec, "cpu").chunk_prefill(*rows, expected, metadata=metadata)
    _adapter(spec, RULES[Op.CHUNK_PREFILL])(*rows, got, metadata=metadata, out=out)

    assert not out[:20].any() and not out[160:].any()
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_what_a_finished_front_end_gives_is_taken_as_it_is() -> None:
    from gdn_backend_cuda.flashinfer_prefill import make_rule
    from gdn_backend_cuda.prefill_slots import Given, Placed, placing

    # the interpreter rounds to float16 as a GPU does, and cuts bfloat16 off
    spec, rng = replace(RATIO_3, num_k_heads=2, num_v_heads=6), generator()
    q, k, v = qkv(spec, rng, 170)
    g, beta = g_beta(spec, rng, 170)
    metadata = _mixed_batch()
    states = [_states(spec) for _ in range(3)]
    raw, finished = (
        make_rule(spec, DEVICE, given, use_cp=False) for given in (Given.RAW, Given.FINISHED)
    )

    placed = Placed(
        q, k, g, beta, states[0], v.clone(), metadata=metadata, given=Given.RAW, has_targets=True,
        pad=spec.pad_slot, launch=placing(DEVICE, Given.RAW),
    )  # fmt: skip
    ready = placed.q, placed.k, v, placed.alpha, placed.beta
    want = raw(q, k, v, g, beta, states[1], metadata=metadata)
    o = finished(*ready, states[2], metadata=metadata)

    squares = placed.k.float().square().sum(-1).repeat_interleave(3, 1)
    torch.testing.assert_close((placed.beta * squares)[20:160], beta[20:160])
    assert torch.equal(o, want) and not o[160:].any()
    assert torch.equal(states[2], states[1])


def test_a_pool_whose_slots_interleave_has_no_rows_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flashinfer_double.install(monkeypatch, is_newer=False)
    rng, prefill = generator(), _adapter(SPEC, RULES[Op.CHUNK_PREFILL])
    rows = (*qkv(SPEC, rng, 3), *g_beta(SPEC, rng, 3))
    metadata = PrefillMetadata(torch.tensor([0, 3]), torch.tensor([1]))
    interleaved = torch.zeros(2, SLOTS, 32, 32).transpose(0, 1)

    with pytest.raises(InputError, match="slots lie 1024 numbers apart, needs at least"):
        prefill(*rows, interleaved, metadata=metadata)


def test_a_large_gate_is_no_nan() -> None:
    rng, decode = generator(), _adapter(SPEC, RULES[Op.RECURRENT_DECODE])
    q, k, v = qkv(SPEC, rng, 2)
    a = torch.full((2, 2), 96.0).bfloat16()
    arguments = (q, k, v, a, a, torch.zeros(2), torch.zeros(2))
    expected, got = _states(SPEC), _states(SPEC)
    slots = torch.tensor([4, 5])

    bind(SPEC, "cpu").recurrent_decode(*arguments, expected, state_indices=slots)
    decode(*arguments, got, state_indices=slots)

    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
