# SPDX-License-Identifier: Apache-2.0
"""The benchmark's peers: what is asked of each library, and that all are asked for the same."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from gdn_portable import DraftProtocol
from gdn_portable.bench import peers, run
from gdn_portable.bench.cases import DRAFTS, FRONT_END, LAYER, Case
from tests import bench_peers
from tests.bench import rows_of

LIBRARIES = ("flashinfer", "fla", "flash_qla", "sglang")
SPEC = replace(LAYER, num_k_heads=1, num_v_heads=2)
TABLE = replace(SPEC, conv_window=2 + DRAFTS)
CHUNK = SPEC
BF16 = replace(SPEC, state_dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def fresh_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    peers.missing.cache_clear()
    yield
    peers.missing.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> bench_peers.Calls:
    found: bench_peers.Calls = []
    bench_peers.install(monkeypatch, found, *LIBRARIES)
    return found


def _rows(case: Case) -> list[run.Row]:
    return rows_of([case], with_peers=True)


def _verify(op: str, protocol: DraftProtocol) -> Case:
    spec = TABLE if protocol is DraftProtocol.SLOT_TABLE else SPEC
    return Case(op=op, spec=spec, lengths=(DRAFTS,) * 2, protocol=protocol)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    ("case", "names"),
    [
        (
            Case(op="recurrent_decode", spec=SPEC, lengths=(1, 1)),
            ["flashinfer decode", "sglang packed decode", "sglang fused decode", "fla recurrent"],
        ),
        (
            Case(op="decode_step", spec=SPEC, lengths=(1, 1)),
            [
                "sglang conv + flashinfer decode",
                "sglang conv + sglang packed decode",
                "sglang conv + sglang fused decode",
                "sglang conv + fla recurrent",
            ],
        ),
        (
            Case(op="decode_step", spec=SPEC, lengths=(1,) * 4, deferred=3),
            ["sglang conv + sglang ring decode"],
        ),
        (Case(op="conv1d_update", spec=SPEC, lengths=(1, 1)), ["sglang conv", "fla conv"]),
        (Case(op="conv1d_prefill", spec=SPEC, lengths=(5, 2)), ["sglang conv", "fla conv"]),
        (
            Case(op=FRONT_END, spec=SPEC, lengths=(5, 2)),
            ["sglang conv + split", "fla conv + split"],
        ),
        (
            Case(op="chunk_prefill", spec=CHUNK, lengths=(5, 2)),
            [
                "flashinfer chunk, cp auto",
                "flashinfer chunk, cp on",
                "flashinfer chunk, cp off",
                "flash_qla chunk",
                "fla chunk",
                "sglang chunk",
            ],
        ),
        (
            Case(op="prefill_step", spec=SPEC, lengths=(5, 2)),
            [
                "sglang conv + flashinfer chunk, cp auto",
                "sglang conv + fla chunk",
                "sglang conv + sglang chunk",
            ],
        ),
        (_verify("mtp_verify", DraftProtocol.SNAPSHOT), ["flashinfer mtp", "sglang verify"]),
        (_verify("mtp_verify", DraftProtocol.SLOT_TABLE), ["flashinfer mtp to slots"]),
        (
            _verify("verify_step", DraftProtocol.SNAPSHOT),
            [
                "sglang conv + flashinfer mtp + sglang commit",
                "sglang conv + sglang verify + sglang commit",
            ],
        ),
        (
            _verify("verify_step", DraftProtocol.SLOT_TABLE),
            ["fla conv + flashinfer mtp to slots"],
        ),
        (Case(op="gated_rms_norm", spec=SPEC, lengths=(5,)), ["sglang norm", "fla norm"]),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_peers_compute_what_our_kernels_do(case: Case, names: list[str]) -> None:
    rows = _rows(case)

    assert [row.error for row in rows if row.error] == []
    assert [row.kernel for row in rows if not row.ours] == names
    assert [row.warnings for row in rows] == [()] * len(rows)
    assert all(row.difference is not None and row.difference < 0.02 for row in rows[1:])


@pytest.mark.usefixtures("calls")
def test_a_replay_stands_beside_commits_of_this_step_and_is_not_compared() -> None:
    rows = _rows(_verify("verify_step", DraftProtocol.REPLAY))[1:]

    assert [row.kernel for row in rows] == [
        "sglang conv + flashinfer mtp + sglang commit",
        "sglang conv + sglang verify + sglang commit",
        "sglang conv + sglang ring verify + sglang fold",
    ]
    assert [row.error for row in rows] == [row.difference for row in rows] == [None] * 3


@pytest.mark.usefixtures("calls")
def test_a_fold_leaves_the_states_that_a_snapshot_and_its_commit_do() -> None:
    states = []
    for protocol in (DraftProtocol.SNAPSHOT, DraftProtocol.REPLAY):
        case = _verify("verify_step", protocol)
        rotation = run.draw(case, torch.device("cpu"), 1, 1 << 20)
        rotation.refresh()
        last = peers.peers(case)[-1]
        last.prepare(rotation.batches[0])()
        states.append((rotation.batches[0].state, rotation.batches[0].conv_state))

    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("norms", [False, True])
def test_flashinfer_is_given_unit_keys_linear_decay_and_the_pool(
    calls: bench_peers.Calls, norms: bool
) -> None:
    _rows(Case(op="chunk_prefill", spec=replace(CHUNK, qk_l2norm=norms), lengths=(5, 2)))

    asked = [given for name, given in calls if name == "flashinfer.chunk_gated_delta_rule"]
    assert {given["use_cp"] for given in asked} == {"auto", True, False}
    given = asked[0]
    assert given["use_qk_l2norm_in_kernel"] is norms
    assert given["k"].float().norm(dim=-1).sub(1).abs().max() < 0.01
    assert given["initial_state"].shape == (3, 2, 128, 128)
    assert given["state_indices"].tolist() in ([1, 2], [2, 1])


def test_flashinfer_keeps_bf16_states_by_its_decode(calls: bench_peers.Calls) -> None:
    case = replace(_verify("mtp_verify", DraftProtocol.SNAPSHOT), spec=BF16)

    assert [row.error for row in _rows(case)] == [None] * 3
    (given,) = {
        (given["initial_state_indices"].dtype, given["intermediate_states_buffer"].dtype)
        for name, given in calls
        if name == "flashinfer.gated_delta_rule_decode_pretranspose"
    }
    assert given == (torch.int32, torch.bfloat16)


def test_fla_does_not_hand_its_chunks_to_flash_qla(calls: bench_peers.Calls) -> None:
    _rows(Case(op="chunk_prefill", spec=CHUNK, lengths=(3,)))

    assert os.environ["FLA_FLASH_QLA"] == "0"
    assert "fla.chunk_gated_delta_rule" in {name for name, _ in calls}


@pytest.mark.usefixtures("calls")
def test_what_a_library_cannot_do_is_a_row_with_the_reason() -> None:
    decode = Case(op="recurrent_decode", spec=BF16, lengths=(1, 1))
    small = replace(decode, spec=replace(SPEC, head_k_dim=64))

    errors = {row.kernel: row.error for row in _rows(decode)}
    assert "it writes torch.float32" in (errors["fla recurrent"] or "")
    assert errors["flashinfer decode"] is None
    errors = {row.kernel: row.error for row in _rows(small)}
    assert errors["flashinfer decode"] == "head dims (K, V) are (64, 128), needs (128, 128)"


def test_without_sglang_its_parts_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: bench_peers.Calls = []
    bench_peers.install(monkeypatch, calls, "flashinfer", "fla")

    decode = _rows(Case(op="decode_step", spec=SPEC, lengths=(1, 1)))
    verify = _rows(_verify("verify_step", DraftProtocol.SNAPSHOT))

    assert [row.kernel for row in decode[1:]] == [
        "fla conv + flashinfer decode",
        "fla conv + fla recurrent",
    ]
    assert [row.kernel for row in verify[1:]] == ["fla conv + flashinfer mtp + torch commit"]
    assert all((row.difference or 0) < 0.02 for row in [*decode, *verify])


def test_a_library_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_peers.install(monkeypatch, [], "flashinfer")
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name == "flashinfer.gdn_prefill":
            raise RuntimeError("no cutlass\nhere")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)

    found = peers.libraries()

    assert found["sglang"] == "not installed"
    assert found["fla"] == "not installed"
    broken_part = "flashinfer.gdn_prefill cannot be imported: RuntimeError: no cutlass"
    assert found["flashinfer"] == broken_part
    assert peers.peers(Case(op="chunk_prefill", spec=CHUNK, lengths=(3,))) == []
