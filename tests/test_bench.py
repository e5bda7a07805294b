# SPDX-License-Identifier: Apache-2.0
"""The benchmark, without a GPU: cases, floors, inputs, timing, rows and the host's times."""

from __future__ import annotations

import importlib.machinery
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gdn_portable import Device, DraftProtocol, InputError, Op, UnknownBackendError
from gdn_portable.bench import card, host, run
from gdn_portable.bench.cases import (
    FEW_HEADS,
    FRONT_END,
    LAYER,
    OPS,
    VERIFY_OPS,
    Case,
    Gates,
    all_cases,
    cases_of,
    default_cases,
    select_cases,
    with_drafts,
)
from gdn_portable.bench.floors import Rates, Work, floor_of, work_of
from gdn_portable.bench.inputs import Slots, draw_params, gates_of
from gdn_portable.bench.ours import contenders
from gdn_portable.bench.timing import Run, Timing, measure
from gdn_portable.cli.bench import named_kernels
from tests.bench import DECODE, NORM, RATES, SMALL, FakeClock, plan_of, rows_of


@pytest.mark.parametrize(
    ("case", "microseconds"),
    [
        # 32 heads of 128 x 128 float32 read and written: 33.55 MB of 8 sequences, 0.2 MB of rows
        (Case(op="recurrent_decode", spec=LAYER, lengths=(1,) * 8), 8.0),
        # and windows of 3 x 8192 bfloat16 read and written: 25 MB of 512 sequences
        (Case(op="decode_step", spec=LAYER, lengths=(1,) * 512), 522.6),
        (Case(op="conv1d_update", spec=LAYER, lengths=(1,) * 128), 4.0),
        (Case(op="conv1d_prefill", spec=LAYER, lengths=(16384,)), 127.0),
        (Case(op=FRONT_END, spec=LAYER, lengths=(8192,)), 64.2),
        # 24832 bytes a token, and 4.2 MB of state
        (Case(op="chunk_prefill", spec=LAYER, lengths=(8192,)), 49.1),
        # 135168 FLOPs a token and value head at four value heads a key head: the products decide
        (Case(op="chunk_prefill", spec=replace(LAYER, num_v_heads=64), lengths=(8192,)), 89.7),
        (Case(op="chunk_prefill", spec=FEW_HEADS, lengths=(32768,)), 44.9),
        (Case(op="gated_rms_norm", spec=LAYER, lengths=(2048,)), 11.9),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_floors_are_those_worked_out_by_hand(case: Case, microseconds: float) -> None:
    assert floor_of(work_of(case), RATES) == pytest.approx(microseconds, rel=0.008)


def test_the_floor_is_the_larger_of_bytes_and_products() -> None:
    assert floor_of(Work(10, 0), Rates(1e6, 1e6)) == 10
    assert floor_of(Work(10, 20), Rates(1e6, 1e6)) == 20


@pytest.mark.parametrize(
    ("protocol", "op", "states"),
    [
        (DraftProtocol.REPLAY, "mtp_verify", 2),  # read and written once
        (DraftProtocol.SNAPSHOT, "mtp_verify", 5),  # one read, four written
        (DraftProtocol.SLOT_TABLE, "mtp_verify", 5),
        (DraftProtocol.SNAPSHOT, "verify_step", 7),  # and one read and written by the commit
    ],
)
def test_a_verify_moves_so_many_states(protocol: DraftProtocol, op: str, states: int) -> None:
    case = Case(op=op, spec=LAYER, lengths=(4,) * 8, protocol=protocol)
    state = 32 * 128 * 128 * 4

    assert work_of(case).bytes / (8 * state) == pytest.approx(states, rel=0.11)
    assert work_of(case).bytes > 8 * state * states


def test_the_default_cases_are_the_table_that_was_asked_for() -> None:
    names = [case.name for case in default_cases()]

    assert len(names) == len(set(names)) == 51
    assert "decode_step/H16-HV32/B128/fp32/deferred7/real" in names
    assert "decode_step/H16-HV32/B512/bf16/real" in names
    assert "verify_step/H16-HV32/B128xP4/fp32/replay/real" in names
    assert "front_end/H16-HV32/1x16384/fp32/real" in names
    assert "chunk_prefill/H16-HV32/8x4096/fp32/slow/norms" in names
    assert "chunk_prefill/H2-HV8/8x1024/fp32/real/norms" in names


def test_all_cases_hold_every_op_and_the_default_ones_once() -> None:
    cases = all_cases()

    assert {case.op for case in cases} == set(OPS)
    assert len({case.name for case in cases}) == len(cases)
    assert set(default_cases()) <= set(cases)


def test_a_chunk_prefill_that_normalises_is_a_case_of_its_own() -> None:
    chosen = select_cases(all_cases(), None, ["chunk_prefill/H16-HV64/24576+8192/fp32/real*"])

    assert [case.variant for case in chosen] == [
        "H16-HV64/fp32/real/norms",
        "H16-HV64/fp32/real",
    ]
    assert [case.spec.qk_l2norm for case in chosen] == [True, False]
    norms, plain = (contenders(case, Device("cpu", "cpu"), {})[0].includes for case in chosen)
    assert norms == f"norms, {plain}"


def test_cases_are_selected_by_op_and_by_name() -> None:
    chosen = select_cases(all_cases(), ["chunk_prefill"], ["*/H2-*/8x1024/*", "*1x2048*real"])

    assert {case.op for case in chosen} == {"chunk_prefill"}
    assert {case.shape for case in chosen} == {"8x1024", "1x2048"}


def test_a_pattern_that_matches_nothing_names_a_case_that_is_near() -> None:
    with pytest.raises(InputError, match="did you mean 'chunk_prefill/H2-HV8/8x1024"):
        select_cases(default_cases(), None, ["chunk_prefill/H2-HV8/8x1025"])
    with pytest.raises(InputError, match="op is 'decode', needs one of decode_step"):
        select_cases(default_cases(), ["decode"], None)


def test_a_case_of_mixed_lengths_and_other_head_dims_is_named_in_full() -> None:
    spec = replace(SMALL, state_dtype=torch.bfloat16)
    case = Case(op="prefill_step", spec=spec, lengths=(3, 5), gates=Gates.SLOW)

    assert case.name == "prefill_step/H1-HV2-K16-V16/3+5/bf16/slow"


def test_gates_are_those_of_fresh_checkpoints_or_near_zero() -> None:
    spec, generator = replace(SMALL, num_v_heads=512), torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 512, generator=generator), torch.randn(64, 512, generator=generator)
    real = draw_params(spec, Gates.REAL, torch.device("cpu"), generator)
    slow = draw_params(spec, Gates.SLOW, torch.device("cpu"), generator)

    rate = real.A_log.exp()
    assert 0.01 <= rate.min() < 0.5 and 15.5 < rate.max() <= 16
    assert rate.mean() == pytest.approx(8, abs=0.7)
    assert bool((real.dt_bias == 1).all())
    g, beta = gates_of(real, a, b)
    assert g.median() < -5 and g.dtype == torch.float32
    assert beta.min() > 0 and beta.max() < 1
    assert gates_of(slow, a, b)[0].min() > -0.01


def test_slots_are_shuffled_and_leave_the_first_alone() -> None:
    case = Case(op="decode_step", spec=SMALL, lengths=(1,) * 64)
    table = next(c for c in cases_of(SMALL) if c.protocol is DraftProtocol.SLOT_TABLE)
    generator = torch.Generator().manual_seed(0)

    slots = Slots(case, torch.device("cpu"), generator).slots
    by_draft = Slots(table, torch.device("cpu"), generator)

    assert slots.sort().values.tolist() == list(range(1, 65))
    assert slots.tolist() != list(range(1, 65))
    assert by_draft.read.tolist() == by_draft.by_draft[:, 2].tolist()
    assert 0 not in by_draft.by_draft


def test_draws_are_as_many_as_the_rotation_needs_and_the_memory_allows() -> None:
    touched = work_of(NORM).bytes
    cpu = torch.device("cpu")

    cold = run.draw(NORM, cpu, rotation=3 * touched, memory=2**30)
    warm = run.draw(NORM, cpu, rotation=3 * touched, memory=1)

    assert (len(cold.batches), cold.is_cold) == (3, True)
    assert (len(warm.batches), warm.is_cold) == (1, False)
    assert not torch.equal(cold.batches[0].x, cold.batches[1].x)


def test_a_refreshed_state_is_as_it_was_drawn() -> None:
    case = Case(op="verify_step", spec=SMALL, lengths=(4, 4), protocol=DraftProtocol.REPLAY)
    rotation = run.draw(case, torch.device("cpu"), 1, 2**30)
    batch = rotation.batches[0]
    rotation.refresh()
    state, drafts = batch.state.clone(), batch.drafts
    batch.state.fill_(math.nan)
    rotation.refresh()

    assert torch.equal(batch.state, state)
    assert drafts is not None and bool(drafts.g.le(0).all())  # type: ignore[union-attr]


def test_timing_is_the_median_of_the_replays_after_the_warm_up() -> None:
    clock = FakeClock(9000, 9000, 2000, 60, 40, 50, 52, 48)
    calls: list[int] = []
    runs: list[Run] = [lambda: calls.append(0), lambda: calls.append(1)]

    timing = measure(runs, clock, 5)

    assert (timing.microseconds, timing.calls, timing.replays) == (12.5, 4, 5)
    assert timing.spread == pytest.approx(0.4)
    assert timing.is_wide and timing.fallback is None
    assert calls == [0, 1] + [0, 1, 0, 1] * 8  # once to compile, then two rounds a replay


def test_a_call_that_cannot_be_captured_is_timed_by_events_and_says_so() -> None:
    timing = measure([lambda: None], FakeClock(refuses=True), 4)

    assert timing.fallback == "it asks the host"
    assert timing.microseconds == 250


def test_every_op_gives_a_row_on_the_reference() -> None:
    cases = [
        replace(case, lengths=tuple(min(length, 9) for length in case.lengths[:2]))
        for case in cases_of(SMALL)
    ]
    rows = rows_of(list(dict.fromkeys(cases)))

    assert {row.case.op for row in rows} == set(OPS)
    assert [row.error for row in rows if row.error] == []
    assert {row.case.protocol for row in rows} == {None, *DraftProtocol}
    assert {warning for row in rows for warning in row.warnings} == set()


@pytest.mark.parametrize("drafts", [1, 2, 6])
def test_a_verify_of_any_number_of_drafts_gives_a_row(drafts: int) -> None:
    cases = {
        with_drafts(replace(case, lengths=case.lengths[:2]), drafts)
        for case in cases_of(SMALL)
        if case.op in VERIFY_OPS
    }
    rows = rows_of(list(cases))

    assert {row.case.shape for row in rows} == {f"B{n}xP{drafts}" for n in (1, 2)}
    assert [row.error for row in rows if row.error] == []


def test_kernels_of_one_op_are_timed_side_by_side_and_compared() -> None:
    twice = "composed.decode_step, reference.gating, decode_step=composed.decode_step"
    named = named_kernels(twice)

    rows = rows_of([DECODE], kernels=named)

    assert [row.kernel for row in rows] == ["composed.decode_step"] * 2
    assert [row.difference for row in rows] == [None, 0.0]


def test_a_kernel_that_is_not_able_leaves_those_beside_it_alone() -> None:
    named = named_kernels("triton.decode_step, composed.decode_step")

    refused, timed = rows_of([DECODE], kernels=named)

    assert refused.kernel == "triton.decode_step"
    assert "device is cpu, needs cuda or rocm" in (refused.error or "")
    assert timed.error is None


def test_a_kernel_that_does_not_exist_is_a_mistake() -> None:
    with pytest.raises(UnknownBackendError):
        rows_of([DECODE], kernels=named_kernels("tritn.conv1d_update"))
    with pytest.raises(InputError, match=r"'triton\.decode', needs library\.op or op=name"):
        named_kernels("triton.decode")


def test_nothing_is_started_when_the_time_is_over() -> None:
    rows = rows_of([NORM, DECODE], deadline=5.0, now=lambda: 6.0)

    assert [row.error for row in rows] == ["not timed: the time given is over"] * 2


def test_host_rows_hold_a_call_and_no_launches_of_a_kernel_without_triton() -> None:
    (row,) = host.host_rows([NORM, replace(NORM, lengths=(9,))], plan_of(), lambda _: None)

    assert row.case == NORM
    assert row.call is not None and row.call > 0
    assert (row.launches, row.bare, row.ratio) == (0, None, None)


def test_the_launches_of_a_call_are_found_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    class JITFunction:
        def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            made.append((args, grid, kwargs))

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=False, **kwargs)

    for name in ("triton", "triton.runtime", "triton.runtime.jit"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["triton.runtime.jit"])["JITFunction"] = JITFunction
    kernel = JITFunction()

    def call() -> None:
        kernel[(3,)](1, 2, num_warps=4)
        kernel[(5,)](7)

    launches = host.triton_launches(call)
    for launch in launches:
        launch()

    assert made == [((1, 2), (3,), {"num_warps": 4}), ((7,), (5,), {})] * 2


def test_host_times_are_those_of_the_fastest_rounds_of_calls_that_take_turns() -> None:
    durations = iter([3.0, 9.0, 2.0, 5.0, 1.0, 4.0, 2.0, 8.0, 6.0, 7.0, 5.0, 6.0, 4.0, 5.0])
    clock, called = [0.0], []

    def run(name: str) -> None:
        called.append(name)
        clock[0] += next(durations)

    runs = [lambda: run("call"), lambda: run("launches")]
    times = host.host_times(runs, plan_of(), now=lambda: clock[0], calls=1)

    assert called == ["call", "launches"] * host.ROUNDS
    assert times == [1e6, 4e6]


def test_a_timing_is_wide_when_its_replays_differ() -> None:
    assert Timing(1.0, 0.2, 3, 4).is_wide
    assert not Timing(1.0, 0.05, 3, 4).is_wide


def test_an_op_that_is_not_in_the_interface_has_no_kernel_of_its_own() -> None:
    assert {op for op in OPS if op not in {o.value for o in Op}} == {FRONT_END}


@pytest.mark.parametrize(
    ("hip", "name", "reported", "expected"),
    [
        (None, "sm90", 50 * 2**20, 50 * 2**20),
        (None, "sm90", 0, card.UNKNOWN_L2),
        ("7.0.0", "gfx942:sramecc+:xnack-", 4 * 2**20, 256 * 2**20),
        ("7.0.0", "gfx950", 4 * 2**20, 256 * 2**20),
    ],
    ids=["NVIDIA", "unknown", "MI300X", "MI355X"],
)
def test_a_card_has_its_largest_cache(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, name: str, reported: int, expected: int
) -> None:
    facts = {"name": "a card", "total_memory": 2**37, "major": 9, "minor": 0}
    properties = SimpleNamespace(**facts, gcnArchName=name, L2_cache_size=reported)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(card, "measure_rates", lambda device, clock: RATES)

    assert card.read_card(torch.device("cuda", 0), FakeClock()).l2 == expected
