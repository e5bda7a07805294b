# SPDX-License-Identifier: Apache-2.0
"""What the benchmark reports: peers that fail, tables, JSON, plots, the card, and the command."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gdn_portable.bench import card, run
from gdn_portable.bench.cases import Case, all_cases
from gdn_portable.bench.floors import Rates
from gdn_portable.bench.ours import Contender
from gdn_portable.bench.plot import plot
from gdn_portable.bench.report import Report, document_of, render
from gdn_portable.cli.bench import fill
from tests.bench import DECODE, NORM, RATES, SMALL, FakeClock, plan_of, rows_of
from tests.command import QWEN3_NEXT, Command


def _report(rows: Sequence[run.Row]) -> Report:
    return Report(
        card=card.Card("a card", 2**37, 2**26, RATES),
        readings=card.Readings(driver="1.2"),
        libraries={"fla": "not installed", "flashinfer": None},
        rows=list(rows),
    )


def _text(report: Report) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def _contender(name: str, result: Callable[[], torch.Tensor], **changes: Any) -> Contender:
    made = Contender(name=name, ours=False, includes="all", prepare=lambda batch: result)
    return replace(made, **changes)


@pytest.fixture
def strange_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("Misaligned Tensor data\nand more")

    found = [
        _contender("failing", fail),
        _contender("refusing", fail, refusal="head dims (K, V) are (16, 16)"),
        _contender("other", lambda: torch.full((5, 2, 16), 7.0)),
        _contender("infinite", lambda: torch.full((5, 2, 16), math.inf), compares=False),
        _contender("short", lambda: torch.zeros(3)),
    ]
    monkeypatch.setattr(run, "peers", lambda case: found)


@pytest.mark.usefixtures("strange_peers")
def test_a_peer_that_fails_is_a_row_with_its_words_and_the_others_are_timed() -> None:
    rows = {row.kernel: row for row in rows_of([NORM], with_peers=True)}

    assert rows["failing"].error == "ValueError: Misaligned Tensor data"
    assert rows["refusing"].error == "head dims (K, V) are (16, 16)"
    assert rows["reference.gated_rms_norm"].warnings == ()
    assert any("differs from the first of our kernels" in text for text in rows["other"].warnings)
    assert rows["infinite"].warnings == ("the result is not finite",)
    assert rows["infinite"].difference is None
    assert rows["short"].difference == math.inf


@pytest.mark.usefixtures("strange_peers")
def test_the_table_shows_times_shares_failures_and_the_fastest() -> None:
    times = (20_000.0, 400.0, 400.0, 400.0, 20_000.0, 200.0, 200.0, 200.0, 20_000.0, 800.0)
    text = _text(_report(rows_of([NORM], with_peers=True, clock=FakeClock(*times))))

    assert "gated_rms_norm: us per call" in text
    assert "100.0 (0%) " in text and "50.0 (0%)*" in text
    assert "ValueError: Misaligned Tensor data" in text
    assert "peer not timed, or not all of it: fla: not installed" in text
    assert "real" in text


@pytest.mark.usefixtures("strange_peers")
def test_the_document_is_json_and_says_how_what_and_why() -> None:
    rows = rows_of([NORM], with_peers=True, clock=FakeClock(refuses=True))
    document = json.loads(json.dumps(document_of(_report(rows))))

    ours, failing = document["rows"][:2]
    assert document["device"]["name"] == "a card"
    assert document["driver"] == "1.2"
    assert document["versions"]["torch"] == torch.__version__
    assert "graph" in document["method"] and "A uniform in [0.01, 16]" in document["gates"]["real"]
    assert document["peers"]["fla"] == "not installed"
    assert ours["timed_by"] == "events" and "host time included" in ours["warnings"][0]
    assert ours["us"] == 250 and ours["percent_of_floor"] == pytest.approx(ours["floor_us"] / 2.5)
    assert (ours["op"], ours["gates"], ours["lengths"]) == ("gated_rms_norm", "real", [5])
    assert ours["bytes"] == 3 * 5 * 2 * 16 * 2 + 32
    assert failing["us"] is None and failing["error"].startswith("ValueError")


def test_a_stopped_run_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(cases: Sequence[Case], plan: run.Plan, say: Callable[[str], None]) -> Any:
        yield from rows_of([NORM])
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("gdn_portable.cli.bench"), "run", stopped)
    report, kept = _report([]), []

    fill(report, [NORM], plan_of(), host=False, keep=lambda: kept.append(len(report.rows)))

    assert [row.kernel for row in report.rows] == ["reference.gated_rms_norm"]
    assert kept == [1]
    assert "ended early: stopped from the keyboard" in _text(report)


def test_readings_tell_slowdowns_and_other_processes() -> None:
    def ask(arguments: Sequence[str]) -> str:
        if any(argument.startswith("--query-gpu") for argument in arguments):
            return "580.1, 1200, 1980, 71, 0x0000000000000044\n"
        return "11\n12\n13\n"

    readings = card.parse_readings(ask, "GPU-1")

    assert (readings.driver, readings.clock, readings.highest_clock) == ("580.1", 1200, 1980)
    assert card.warnings_of(readings, 0) == [
        "the card is slowed down: power cap",
        "the card is slowed down: thermal slowdown (hardware)",
        "2 other processes use the card",
    ]


def test_a_card_that_cannot_be_asked_is_not_trusted_blindly() -> None:
    warnings = card.warnings_of(card.parse_readings(lambda _: None, None), 3 * 2**30)

    assert warnings == [
        "others hold 3.0 GiB of the card's memory",
        "clocks and slowdowns were not read: nvidia-smi did not answer",
    ]


def test_a_card_that_changed_in_the_course_of_the_run_is_reported() -> None:
    assert card.drift(Rates(100, 100), Rates(99, 101)) == []
    assert card.drift(Rates(100, 100), Rates(90, 100)) == [
        "the copy bandwidth changed by -10% in the course of the run"
    ]


def test_rates_are_bytes_and_flops_over_the_median() -> None:
    rates = card.measure_rates(torch.device("cpu"), FakeClock(), copy_bytes=4000, matmul=16)

    # four calls take 1000 microseconds
    assert rates.bandwidth == pytest.approx(8000 / 250e-6)
    assert rates.matmul == pytest.approx(2 * 16**3 / 250e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_a_plot_is_a_png_with_a_panel_for_each_op(tmp_path: Path) -> None:
    path = tmp_path / "times.png"
    packed = Case(op="chunk_prefill", spec=SMALL, lengths=(4, 4))

    plot(rows_of([NORM, replace(NORM, lengths=(9,)), packed, DECODE]), "a card", path)

    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_the_list_of_cases_needs_no_gpu(command: Command, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(QWEN3_NEXT))

    everything = command("bench", "--list")
    of_config = command("bench", "--list", "--config", config, "--tp-size", "8")

    assert everything.code == of_config.code == 0
    assert len(everything.stdout.splitlines()) == len(all_cases())
    assert sum("default" in line for line in everything.stdout.splitlines()) == 51
    assert "decode_step/H2-HV4/B8/fp32/real" in of_config.stdout
    assert "H16" not in of_config.stdout


def test_verifies_are_listed_with_the_drafts_that_are_asked_for(command: Command) -> None:
    two = command("bench", "--list", "--drafts", "2", "--case", "verify_step/H16-*").stdout

    assert "verify_step/H16-HV32/B8xP2/fp32/replay/real" in two
    assert "P4" not in two
    assert "default" in two


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command find a card where there is none; what it times runs on the CPU."""
    command = importlib.import_module("gdn_portable.cli.bench")
    readings = card.Readings(driver="1.2", clock=1980, highest_clock=1980)
    replacements: dict[str, Callable[..., Any]] = {
        "present_gpu": lambda name, command: torch.device(name),
        "memory_for": lambda device, gibibytes: 2**30,
        "GpuClock": lambda device: FakeClock(),
        "read_card": lambda device, clock: card.Card("a card", 2**37, 1, RATES),
        "readings_of": lambda device: readings,
        "foreign_memory": lambda device: 0,
        "measure_rates": lambda device, clock: Rates(RATES.bandwidth / 2, RATES.matmul),
        "ROTATION": 1,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(command, name, replacement)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.usefixtures("pretended_gpu")
def test_the_command_prints_a_table_and_writes_json(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    chosen = ("--device", "cpu", "--case", "recurrent_decode/H2-*/B1/fp32/*", "--host")

    outcome = command("bench", *chosen, "--json", path, "--no-peers")

    document = json.loads(path.read_text())
    assert outcome.code == 0
    assert "recurrent_decode: us per call" in outcome.stdout
    assert "the copy bandwidth changed by -50%" in outcome.stdout
    assert "done" in outcome.stderr
    assert [row["kernel"] for row in document["rows"]] == ["reference.recurrent_decode"]
    assert document["host"][0]["call_us"] > 0
    assert document["warnings"] == ["the copy bandwidth changed by -50% in the course of the run"]
    assert document["peers"] == {}


@pytest.mark.usefixtures("pretended_gpu")
def test_a_stopped_command_ends_with_its_own_code(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "peers", stopped)

    outcome = command("bench", "--device", "cpu", "--op", "gated_rms_norm")

    assert outcome.code == 130
    assert "ended early: stopped from the keyboard" in outcome.stdout


def test_an_op_without_default_cases_is_timed_at_the_usual_sizes(command: Command) -> None:
    cases = importlib.import_module("gdn_portable.cli.bench")._cases

    chosen = cases(["decode_step", "recurrent_decode"], None, None, 1, 4, everything=False)

    assert sum(case.op == "decode_step" for case in chosen) == 20
    assert sum(case.op == "recurrent_decode" for case in chosen) == 25


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_it_needs(command: Command) -> None:
    assert "bench without --list needs an NVIDIA or AMD GPU" in command.mistake("bench")
    assert "bench without --list needs an NVIDIA or AMD GPU" in command.mistake(
        "bench", "--device", "cpu"
    )


def test_mistakes_of_the_command_are_one_line(command: Command, tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "times.json"

    assert "no case matches 'x'" in command.mistake("bench", "--case", "x")
    assert "--tp-size is given without --config" in command.mistake("bench", "--tp-size", "2")
    assert "there is no folder" in command.mistake("bench", "--json", nowhere)
    assert "needs library.op" in command.mistake("bench", "--kernels", "triton")
