# SPDX-License-Identifier: Apache-2.0
"""The command that times prefill kernels, on a device whose kernels say how long they take."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import Backend, GdnSpec, Kernel, Op, PrefillMetadata, bind, select
from gdn_portable.bench import card, tune
from gdn_portable.bench.timing import Run
from gdn_portable.tuned import Cell, Layer, file_name, read, versions
from tests.command import QWEN3_NEXT, Command
from tests.fakes import CPU, install, kernel_of
from tests.tuned import backend_of_measured

GRID = (Cell(1, 8), Cell(4, 2))
TINY = {
    **QWEN3_NEXT,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SPEC = GdnSpec.from_config(TINY)
LAYER = Layer.of(SPEC)


class Work:
    """A device on which kernels take the time they say, and a clock that reads it."""

    def __init__(self) -> None:
        self.microseconds, self.calls = 0.0, list[str]()
        self.stops_at: tuple[int, BaseException] | None = None
        self.is_lost = self.is_lost_with_it = False

    def kernel(self, op: Op, library: str, *, packed: float, alone: float) -> Kernel:
        """Declare a kernel that takes so long on packed sequences and on one alone."""

        def launch(x: Tensor, *_: object, metadata: PrefillMetadata, **__: object) -> Tensor:
            self.calls.append(library)
            if self.stops_at is not None and len(self.calls) == self.stops_at[0]:
                self.is_lost = self.is_lost_with_it
                raise self.stops_at[1]
            is_alone = len(metadata.cu_seqlens) == 2
            self.microseconds += alone if is_alone else packed
            return torch.zeros(len(x), SPEC.num_v_heads, SPEC.head_v_dim)

        return kernel_of(op, f"{library}.{op.value}", launch)

    def capture(self, run: Run) -> Run:
        return run

    def time(self, run: Run) -> float:
        before = self.microseconds
        run()
        return self.microseconds - before

    def settle(self) -> None:
        if self.is_lost:
            raise RuntimeError("illegal access")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Work:
    """Let the command find a card with two kernels, each the faster one in half of the cells."""
    work, module = Work(), importlib.import_module("gdn_portable.cli.tune")
    replacements: dict[str, Callable[..., Any] | Any] = {
        "present_gpu": lambda name, command: torch.device(name),
        "memory_for": lambda device, gibibytes: 2**30,
        "GpuClock": lambda device: work,
        "l2_of": lambda device: 1,
        "readings_of": lambda device: card.Readings(driver="1.2", clock=1980),
        "foreign_memory": lambda device: 0,
        "ROTATION": 1,
        "GRID": GRID,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, _backend(work))
    return work


def _backend(work: Work, *more: Kernel) -> Backend:
    chunk = Op.CHUNK_PREFILL
    return backend_of_measured(
        None,
        work.kernel(chunk, "a", packed=300.0, alone=500.0),
        work.kernel(chunk, "b", packed=500.0, alone=300.0),
        *more,
    )


@pytest.fixture
def tune_it(command: Command, work: Work, tmp_path: Path) -> Callable[..., Any]:
    """Return the command on the fake backend, for a tiny layer."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    options = ("--backend", "fake", "--device", "cpu", "--config", config, "--replays", "3")
    return lambda *more: command("tune", *options, *more)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Return the file that the command writes where no folder is named."""
    return tmp_path / "cache" / "gdn_portable" / "tuned" / file_name(CPU, versions())


TIMES = {
    Cell(1, 8): {"a.chunk_prefill": 500.0, "b.chunk_prefill": 300.0},
    Cell(4, 2): {"a.chunk_prefill": 300.0, "b.chunk_prefill": 500.0},
}


def test_every_able_kernel_is_timed_in_every_cell_and_bind_chooses_by_it(
    tune_it: Callable[..., Any], kept: Path
) -> None:
    outcome = tune_it()
    ops = bind(SPEC, "cpu", backend="fake")

    assert outcome.code == 0, outcome.stderr
    assert read(kept).layers == {LAYER: {Op.CHUNK_PREFILL: TIMES}}
    assert ops.kernels[Op.CHUNK_PREFILL].endswith("a.chunk_prefill | b.chunk_prefill")
    assert "b.chunk_prefill" in outcome.stdout and "300.0" in outcome.stdout
    assert str(kept) in outcome.stdout
    assert "4/4" in outcome.stderr
    assert "changed" not in outcome.stdout


def test_run_again_it_times_nothing_that_it_has(tune_it: Callable[..., Any], work: Work) -> None:
    tune_it()
    work.calls.clear()

    outcome = tune_it()

    assert outcome.code == 0
    assert work.calls == []
    assert "4/4" in outcome.stderr


def test_stopped_in_the_middle_it_goes_on_where_it_was(
    tune_it: Callable[..., Any], work: Work, kept: Path
) -> None:
    tune_it()
    all_calls = len(work.calls)
    kept.unlink()
    work.calls.clear()
    work.stops_at = (all_calls // 2 + 1, KeyboardInterrupt())

    stopped = tune_it()
    half = read(kept).layers[LAYER][Op.CHUNK_PREFILL]
    chosen_meanwhile = bind(SPEC, "cpu", backend="fake").kernels[Op.CHUNK_PREFILL]
    work.calls.clear()
    work.stops_at = None
    finished = tune_it()

    assert stopped.code == 130
    assert "the same command goes on" in stopped.stdout
    assert half == {Cell(1, 8): TIMES[Cell(1, 8)], Cell(4, 2): {}}
    assert chosen_meanwhile == "a.chunk_prefill"
    assert finished.code == 0
    assert len(work.calls) == all_calls - all_calls // 2
    assert read(kept).layers[LAYER][Op.CHUNK_PREFILL] == TIMES


def test_a_kernel_that_loses_the_device_is_not_run_again(
    tune_it: Callable[..., Any], work: Work, kept: Path
) -> None:
    work.stops_at, work.is_lost_with_it = (1, RuntimeError("illegal access")), True

    lost = tune_it()
    work.is_lost = False
    finished = tune_it()

    assert lost.code == 130
    assert "the device is lost: RuntimeError: illegal access: the same command" in lost.stdout
    assert finished.code == 0
    times = read(kept).layers[LAYER][Op.CHUNK_PREFILL]
    assert times[Cell(1, 8)] == {"a.chunk_prefill": None, "b.chunk_prefill": 300.0}


def test_when_the_time_given_is_over_nothing_is_started(
    tune_it: Callable[..., Any], work: Work
) -> None:
    outcome = tune_it("--minutes", "0")

    assert outcome.code == 130
    assert "the time given is over: the same command goes on" in outcome.stdout
    assert work.calls == []


def test_a_new_kernel_is_timed_beside_what_is_there_and_changes_are_told(
    tune_it: Callable[..., Any], work: Work, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_it()
    work.calls.clear()
    c = work.kernel(Op.CHUNK_PREFILL, "c", packed=400.0, alone=200.0)
    install(monkeypatch, _backend(work, c))

    outcome = tune_it()

    assert set(work.calls) == {"c"}
    times = read(kept).layers[LAYER][Op.CHUNK_PREFILL]
    assert times[Cell(1, 8)] == {**TIMES[Cell(1, 8)], "c.chunk_prefill": 200.0}
    changes = [line for line in outcome.stdout.splitlines() if line.startswith("changed")]
    assert changes == [
        "changed: H=1 HV=2 bfloat16 chunk_prefill 1x8: c.chunk_prefill, was b.chunk_prefill"
    ]


def test_asked_to_it_takes_times_anew(tune_it: Callable[..., Any], work: Work, kept: Path) -> None:
    tune_it()
    spoiled = read(kept)
    spoiled.layers[LAYER][Op.CHUNK_PREFILL][Cell(4, 2)]["a.chunk_prefill"] = 900.0
    spoiled.write()

    outcome = tune_it("--again")

    assert read(kept).layers[LAYER][Op.CHUNK_PREFILL] == TIMES
    assert "4x2: a.chunk_prefill, was b.chunk_prefill" in outcome.stdout


def test_a_kernel_that_fails_is_written_down_and_told(
    tune_it: Callable[..., Any], work: Work, kept: Path
) -> None:
    work.stops_at = (1, RuntimeError("out of memory"))

    outcome = tune_it()

    times = read(kept).layers[LAYER][Op.CHUNK_PREFILL]
    assert times[Cell(1, 8)] == {"a.chunk_prefill": None, "b.chunk_prefill": 300.0}
    assert times[Cell(4, 2)] == TIMES[Cell(4, 2)]
    assert "1x8 a.chunk_prefill: RuntimeError: out of memory" in outcome.stdout


def test_inputs_that_do_not_fit_fail_for_every_kernel(
    tune_it: Callable[..., Any], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(importlib.import_module("gdn_portable.bench.run"), "draw", fail)

    tune_it()

    times = read(kept).layers[LAYER][Op.CHUNK_PREFILL]
    assert times[Cell(1, 8)] == {"a.chunk_prefill": None, "b.chunk_prefill": None}


def test_the_file_goes_where_it_is_told_with_every_tp_size(
    tune_it: Callable[..., Any], tmp_path: Path, kept: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**TINY, "linear_num_key_heads": 2, "linear_num_value_heads": 4}))

    tune_it("--output", tmp_path / "there", "--tp-size", "1", "--tp-size", "2")

    assert not kept.exists()
    layers = read(tmp_path / "there" / file_name(CPU, versions())).layers
    assert [layer[:2] for layer in layers] == [(1, 2), (2, 4)]


def test_layers_with_norms_and_without_lie_in_one_file(
    tune_it: Callable[..., Any], kept: Path
) -> None:
    tune_it()
    tune_it("--no-norms")

    assert [layer.qk_l2norm for layer in read(kept).layers] == [False, True]


def test_neither_choices_nor_compositions_are_timed(work: Work) -> None:
    step = work.kernel(Op.PREFILL_STEP, "a", packed=1.0, alone=1.0)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, _backend(work, step))
        ops = (Op.CHUNK_PREFILL, Op.PREFILL_STEP)
        found = tune.tasks([SPEC, SPEC], ops, CPU, "fake", GRID)

    assert {(task.op, task.kernels) for task in found} == {
        (Op.CHUNK_PREFILL, ("a.chunk_prefill", "b.chunk_prefill"))
    }
    assert len(found) == len(GRID)


def test_where_one_kernel_serves_there_is_nothing_to_choose(
    command: Command, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)

    message = command.mistake("tune", "--device", "cpu", "--backend", "reference")

    assert "fewer than two kernels can serve each op" in message


def test_mistakes_are_said_before_anything_is_timed(command: Command, tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"

    assert "tune needs an NVIDIA or AMD GPU" in command.mistake("tune", "--device", "cpu")
    assert "needs chunk_prefill or prefill_step" in command.mistake("tune", "--op", "gating")
    assert "cannot be read" in command.mistake("tune", "--config", missing)


def test_a_damaged_file_is_not_written_over(tune_it: Callable[..., Any], kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text("{")

    outcome = tune_it()

    assert outcome.code == 2
    assert f"{kept} cannot be used" in outcome.stderr
    assert kept.read_text() == "{"


def test_the_grid_holds_short_and_long_alone_and_packed() -> None:
    assert {Cell(1, 256), Cell(1, 32768), Cell(16, 2048)} <= set(tune.GRID)
    assert all(cell.length >= 64 for cell in tune.GRID)
