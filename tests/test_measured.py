# SPDX-License-Identifier: Apache-2.0
"""Prefill kernels chosen by measured times: where the choice changes, and who serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn_portable import (
    Device,
    GdnOps,
    Op,
    PrefillMetadata,
    UnsupportedError,
    bind,
    explain,
    select,
)
from gdn_portable.measured import Fastest, measured
from gdn_portable.metadata import Plans, plan_of
from gdn_portable.reference.prefill import ChunkPlan
from gdn_portable.tuned import Cell, Times
from tests.calls import call_of, refusal, run
from tests.fakes import CPU, SPEC, install, recorded_kernel, reference_kernel
from tests.tuned import (
    BY_CELL,
    H200,
    PLANNER,
    STEP_A,
    STEP_B,
    A,
    B,
    backend_of_measured,
    keep,
    named,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the times of this machine's user out, and return where a user's are."""
    monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gdn_portable" / "tuned"


def _fake(monkeypatch: pytest.MonkeyPatch, shipped: Path | None, *kernels: Any) -> str:
    return install(monkeypatch, backend_of_measured(shipped, *(kernels or (A, B))))


def _batch(lengths: Sequence[int], *, hint: bool = False) -> PrefillMetadata:
    """Return a batch whose index tensors have no memory: whoever asks for a value fails."""
    cu_seqlens = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    slots = torch.empty(len(lengths), dtype=torch.int32, device="meta")
    return PrefillMetadata(cu_seqlens, slots, seq_lens_cpu=lengths if hint else None)


def _serves(ops: GdnOps, metadata: PrefillMetadata, tokens: int) -> Any:
    x: Any = torch.empty(tokens, 1, device="meta")
    return ops.chunk_prefill(x, x, x, x, x, x, metadata=metadata)


def _times(*rows: tuple[int, int, float | None, float | None]) -> Times:
    return {Cell(n, tokens // n): {"a": a, "b": b} for n, tokens, a, b in rows}


@pytest.mark.parametrize(
    ("sequences", "tokens", "fastest"),
    [
        (1, 1000, "a"),
        (1, 4000, "b"),
        # a takes 10 to 40 and b 20 throughout: equal at 2000
        (1, 1990, "a"),
        (1, 2010, "b"),
        (1, 1, "a"),
        (1, 10**6, "b"),
        (0, 1000, "a"),
        # the geometric mean of 1 and 4 is where one row ends and the next begins
        (1.9, 1000, "a"),
        (2.1, 1000, "b"),
        (4, 4000, "a"),
        (300, 4000, "a"),
    ],
)
def test_the_choice_changes_where_times_cross_and_rows_meet(
    sequences: float, tokens: int, fastest: str
) -> None:
    times = _times((1, 1000, 10, 20), (1, 4000, 40, 20), (4, 1000, 9, 5), (4, 4000, 3, 20))

    picked = Fastest.of(times, ["a", "b"]).pick(sequences, tokens)

    assert ["a", "b"][picked] == fastest


def test_with_other_heads_as_many_in_all_are_looked_up() -> None:
    times = _times((1, 1000, 10, 20), (1, 4000, 40, 20), (4, 1000, 9, 5), (4, 4000, 3, 20))
    there, half = Fastest.of(times, ["a", "b"]), Fastest.of(times, ["a", "b"], share=0.5)

    batches = [(n, tokens) for n in (1, 1.9, 2.1, 4) for tokens in (500, 1990, 2010, 9000)]
    assert [half.pick(2 * n, 2 * tokens) for n, tokens in batches] == [
        there.pick(n, tokens) for n, tokens in batches
    ]


def test_times_of_other_heads_serve_a_layer_in_its_own_measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path)
    twice = replace(SPEC, num_k_heads=4, num_v_heads=8)

    ops = bind(twice, H200, backend=_fake(monkeypatch, tmp_path))

    # four sequences of 8 heads are the eight of 4 heads that b wins, two are the row between
    assert _serves(ops, _batch([1024] * 4), 4096) == "b"
    assert _serves(ops, _batch([8192]), 8192) == "a"


def test_a_kernel_that_failed_in_a_cell_is_chosen_up_to_there() -> None:
    fastest = Fastest.of(_times((1, 1000, 1, 5), (1, 2000, None, 9), (1, 4000, 7, 8)), ["a", "b"])

    assert [fastest.pick(1, tokens) for tokens in (1000, 1100, 2000, 4000)] == [0, 1, 1, 0]


def test_of_equal_times_the_first_of_the_table_serves() -> None:
    assert Fastest.of(_times((1, 64, 3.0, 3.0)), ["a", "b"]).pick(1, 64) == 0


def test_the_bound_op_runs_what_is_fastest_and_names_what_it_chooses_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path)
    name = _fake(monkeypatch, tmp_path)

    ops = bind(SPEC, H200, backend=name)

    assert (
        ops.kernels[Op.CHUNK_PREFILL] == "measured.chunk_prefill: a.chunk_prefill | b.chunk_prefill"
    )
    assert ops.kernels[Op.PREFILL_STEP] == "composed.prefill_step"
    assert _serves(ops, _batch([8192]), 8192) == "a"
    assert _serves(ops, _batch([1024] * 8), 8192) == "b"


@pytest.mark.parametrize(
    ("lengths", "hint", "fastest"),
    [
        ([8000] + [24] * 8, False, "b"),
        ([8000] + [24] * 8, True, "a"),
        ([1024] * 8, True, "b"),
        ([0, 0], True, "a"),
        ([], True, "a"),
    ],
)
def test_a_plan_knows_the_long_sequence_beside_many_short_ones(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lengths: list[int],
    hint: bool,
    fastest: str,
) -> None:
    keep(tmp_path)
    ops = bind(SPEC, H200, backend=_fake(monkeypatch, tmp_path, A, B, _no_planner()))
    metadata = _batch(lengths, hint=hint)

    ops.plan_prefill(metadata)

    assert _serves(ops, metadata, max(sum(lengths), 1)) == fastest


def _no_planner() -> Any:
    return named(Op.PLAN_PREFILL, "a")


def test_a_step_is_chosen_by_its_own_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turned = {cell: {"a": t["b"], "b": t["a"]} for cell, t in BY_CELL.items()}
    tuned = keep(tmp_path)
    step = keep(tmp_path, by_cell=turned, ops=(Op.PREFILL_STEP,))
    for layer, by_op in step.layers.items():
        tuned.layers[layer].update(by_op)
    tuned.write()
    ops = bind(SPEC, H200, backend=_fake(monkeypatch, tmp_path, A, B, STEP_A, STEP_B))
    x: Any = torch.empty(8192, 1, device="meta")

    step_runs = ops.prefill_step(x, x, x, x, x, metadata=_batch([8192]))

    assert ops.kernels[Op.PREFILL_STEP].startswith("measured.prefill_step: a.prefill_step | b")
    assert step_runs == "b"
    assert _serves(ops, _batch([8192]), 8192) == "a"


def test_the_first_argument_may_be_given_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path)
    ops = bind(SPEC, H200, backend=_fake(monkeypatch, tmp_path))
    x: Any = torch.empty(8192, 1, device="meta")

    served = ops.chunk_prefill(q=x, k=x, v=x, g=x, beta=x, state=x, metadata=_batch([8192]))

    assert served == "a"


def test_explain_says_whose_times_decide_and_what_they_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path)
    name = _fake(monkeypatch, tmp_path)

    choices = [c for c in explain(SPEC, H200, backend=name) if c.op is Op.CHUNK_PREFILL]

    assert [(c.kernel.partition(":")[0], c.chosen) for c in choices] == [
        ("measured.chunk_prefill", True),
        ("a.chunk_prefill", False),
        ("b.chunk_prefill", False),
    ]
    first = choices[0].among
    assert first is not None and first.pick is not None
    assert first.kernels == ("a.chunk_prefill", "b.chunk_prefill")
    assert first.source.startswith("times of NVIDIA H200 (nvidia-h200_gdn-portable-")
    assert first.pick(8, 8192) == "b.chunk_prefill"
    assert "serves: times of NVIDIA H200" in str(choices[0])


@pytest.mark.parametrize(
    ("device", "kernels", "reason"),
    [
        (
            Device("cuda", "sm100", 0, "NVIDIA B200"),
            (A, B),
            "no times of a.chunk_prefill and b.chunk_prefill on NVIDIA B200 (sm100): tune "
            "measures them",
        ),
        (
            H200,
            (A, replace(B, archs=("gfx942",))),
            "fewer than two kernels to choose from: a.chunk_prefill",
        ),
        (
            H200,
            (A, named(Op.CHUNK_PREFILL, "c")),
            "no times of a.chunk_prefill and c.chunk_prefill on NVIDIA H200 (sm90)",
        ),
    ],
    ids=["another GPU", "one able", "one timed"],
)
def test_without_times_the_first_able_kernel_of_the_table_serves_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: Device,
    kernels: tuple[Any, ...],
    reason: str,
) -> None:
    keep(tmp_path)
    name = _fake(monkeypatch, tmp_path, *kernels)

    choice, *_ = (c for c in explain(SPEC, device, backend=name) if c.op is Op.CHUNK_PREFILL)

    assert not choice.chosen and reason in choice.reasons[0]
    assert bind(SPEC, device, backend=name).kernels[Op.CHUNK_PREFILL] == "a.chunk_prefill"
    assert bind(SPEC, device, backend=name).kernels[Op.PLAN_PREFILL] == "reference.plan_prefill"


def test_a_kernel_that_is_never_the_fastest_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path, by_cell={cell: {**times, "c": 30.0} for cell, times in BY_CELL.items()})
    slow = named(Op.CHUNK_PREFILL, "c", target="library_not_here:chunk_prefill")

    ops = bind(SPEC, H200, backend=_fake(monkeypatch, tmp_path, slow, A, B))

    assert ops.kernels[Op.CHUNK_PREFILL].endswith(": a.chunk_prefill | b.chunk_prefill")


def test_a_kernel_that_is_always_the_fastest_serves_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path, by_cell={cell: {"a": 9.0, "b": 1.0} for cell in BY_CELL})

    ops = bind(SPEC, H200, backend=_fake(monkeypatch, tmp_path))

    assert ops.kernels[Op.CHUNK_PREFILL] == "measured.chunk_prefill: b.chunk_prefill"
    assert _serves(ops, _batch([8192]), 8192) == "b"


def test_a_kernel_without_times_is_not_chosen_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path)
    new = named(Op.CHUNK_PREFILL, "new")

    ops = bind(SPEC, H200, backend=_fake(monkeypatch, tmp_path, new, A, B))

    assert ops.kernels[Op.CHUNK_PREFILL].endswith(": a.chunk_prefill | b.chunk_prefill")
    assert _serves(ops, _batch([1024] * 8), 8192) == "b"


def test_deterministic_takes_the_first_able_kernel_whatever_the_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path)
    name = _fake(monkeypatch, tmp_path)

    ops = bind(SPEC, H200, backend=name, deterministic=True)
    choices = explain(SPEC, H200, backend=name, deterministic=True)

    assert ops.kernels[Op.CHUNK_PREFILL] == "a.chunk_prefill"
    assert ops.kernels[Op.PLAN_PREFILL] == "reference.plan_prefill"
    assert _serves(ops, _batch([8192]), 8192) == _serves(ops, _batch([1024] * 8), 8192) == "a"
    assert {c.op: c.kernel for c in choices if c.chosen} == ops.kernels
    with pytest.raises(UnsupportedError, match="it chooses by the batch, not deterministic"):
        bind(
            SPEC,
            H200,
            backend=name,
            deterministic=True,
            kernels={"chunk_prefill": "measured.chunk_prefill"},
        )


def test_a_kernel_that_is_named_serves_every_batch_and_the_step_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path, ops=(Op.CHUNK_PREFILL, Op.PREFILL_STEP))
    name = _fake(monkeypatch, tmp_path, A, B, STEP_A, STEP_B)

    ops = bind(SPEC, H200, backend=name, kernels={"chunk_prefill": "b.chunk_prefill"})
    x: Any = torch.empty(8192, 1, device="meta")

    assert ops.kernels[Op.CHUNK_PREFILL] == "b.chunk_prefill"
    assert _serves(ops, _batch([8192]), 8192) == "b"
    assert ops.prefill_step(x, x, x, x, x, metadata=_batch([8192])) == "a"


def test_a_planner_goes_with_the_kernel_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path)
    plan_a, plan_b = named(Op.PLAN_PREFILL, "a"), named(Op.PLAN_PREFILL, "b")
    name = _fake(monkeypatch, tmp_path, A, B, plan_a, plan_b)

    def planner(**kernels: str) -> str:
        return bind(SPEC, H200, backend=name, kernels=kernels).kernels[Op.PLAN_PREFILL]

    assert planner() == "measured.plan_prefill: a.plan_prefill | b.plan_prefill"
    assert planner(chunk_prefill="b.chunk_prefill") == "b.plan_prefill"
    assert planner(chunk_prefill="reference.chunk_prefill") == "reference.plan_prefill"
    both = {"plan_prefill": "a.plan_prefill", "chunk_prefill": "b.chunk_prefill"}
    assert planner(**both) == "a.plan_prefill"


def test_a_choice_is_named_like_any_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep(tmp_path)
    name = _fake(monkeypatch, tmp_path)
    chosen = {"chunk_prefill": "measured.chunk_prefill"}

    ops = bind(SPEC, H200, backend=name, kernels=chosen)

    assert _serves(ops, _batch([1024] * 8), 8192) == "b"


def _two_references(folder: Path, calls: list[Op]) -> Any:
    """Return the reference twice, under two names, with times on the CPU."""
    keep(folder, CPU)
    chunk = recorded_kernel(Op.CHUNK_PREFILL, calls)
    return (
        replace(reference_kernel(Op.CHUNK_PREFILL), name="a.chunk_prefill"),
        replace(chunk, name="b.chunk_prefill"),
        PLANNER,
    )


def test_kernels_find_their_plans_among_those_of_others_and_planners_fill_them_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Op] = []
    kernels = _two_references(tmp_path, calls)
    ops = bind(SPEC, "cpu", backend=_fake(monkeypatch, tmp_path, *kernels), check=True)
    metadata = PrefillMetadata(torch.tensor([0, 3, 70]), torch.tensor([1, 0]))

    ops.plan_prefill(metadata)
    first = plan_of(metadata, ChunkPlan)
    metadata.cu_seqlens = torch.tensor([0, 5, 70])
    ops.plan_prefill(metadata)

    assert isinstance(metadata.plan, Plans)
    assert first is not None and plan_of(metadata, ChunkPlan) is first
    assert first.cu_seqlens.tolist() == [0, 5, 70]


def test_a_plan_for_other_lengths_is_refused_where_it_is_one_of_several() -> None:
    call = call_of("chunk_prefill")
    metadata = call["metadata"]
    run("plan_prefill", {"metadata": metadata})
    metadata.plan = Plans(1.0, (None, metadata.plan))
    metadata.cu_seqlens, metadata.seq_lens_cpu = metadata.cu_seqlens - torch.tensor([0, 1, 0]), None

    assert "plan was made for other cu_seqlens" in refusal("chunk_prefill", call)


def test_warmup_runs_every_kernel_that_may_be_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Op] = []
    kernels = _two_references(tmp_path, calls)
    ops = bind(SPEC, "cpu", backend=_fake(monkeypatch, tmp_path, *kernels), check=False)

    ops.warmup(max_drafts=0)

    assert Op.CHUNK_PREFILL in calls  # of b, which is slower at every size that is run


def test_entries_stand_for_two_ops_and_their_planner() -> None:
    assert [kernel.name for kernel in measured([A, B])] == [
        "measured.chunk_prefill",
        "measured.prefill_step",
        "measured.plan_prefill",
    ]
