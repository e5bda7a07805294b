# SPDX-License-Identifier: Apache-2.0
"""Rows as tables for people and as a document for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gdn_portable.bench.card import Card, Readings
from gdn_portable.bench.cases import OPS, Case, Gates
from gdn_portable.bench.floors import work_of
from gdn_portable.bench.host import HostRow
from gdn_portable.bench.inputs import DECAY_RATES
from gdn_portable.bench.run import CACHES, ROTATION, Row
from gdn_portable.bench.timing import MIN_CALLS
from gdn_portable.versions import LIBRARIES, versions

PEERS = ("fla-core", "flash-qla", "tilelang", "sglang")
METHOD = (
    "Every call is captured in a CUDA or HIP graph over inputs, parameters and states that are "
    f"rotated through at least {ROTATION >> 20} MB and {CACHES} times the L2, so that caches are "
    f"cold; a graph has at least {MIN_CALLS} calls. The time is the median of the replays, in "
    "microseconds per call. The floor is the larger of the least bytes over the copy bandwidth and "
    "the FLOPs of matrix products over the bfloat16 rate, both measured in this run."
)


@dataclass(slots=True, kw_only=True)
class Report:
    """All that a run found out.

    Attributes:
        card: the device and its rates.
        readings: of nvidia-smi, when the run began.
        libraries: why each peer's library cannot be used; None where it can.
        rows: in the order they were timed.
        host: rows of the host's times.
        warnings: why the run as a whole is not to be trusted.
        interrupted: why it ended early.
    """

    card: Card
    readings: Readings
    libraries: dict[str, str | None]
    rows: list[Row] = field(default_factory=list)
    host: list[HostRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    interrupted: str | None = None


def render(report: Report) -> Group:
    """Return tables, one for each op, with notes below them."""
    notes: dict[str, int] = {}
    tables = [
        _table(op, [row for row in report.rows if row.case.op == op], notes)
        for op in OPS
        if any(row.case.op == op for row in report.rows)
    ]
    if report.host:
        tables.append(_host_table(report.host, notes))
    lines = [Text(f"[{number}] {note}") for note, number in notes.items()]
    card = report.card
    lines.append(
        Text(
            f"{card.name}: copy {card.rates.bandwidth / 1e12:.2f} TB/s, "
            f"bf16 products {card.rates.matmul / 1e12:.0f} TFLOP/s"
        )
    )
    missing = [f"{name}: {reason}" for name, reason in report.libraries.items() if reason]
    lines += [Text(f"peer not timed, or not all of it: {line}") for line in missing]
    lines += [Text(f"do not trust: {warning}", style="bold") for warning in report.warnings]
    if report.interrupted:
        lines.append(Text(f"ended early: {report.interrupted}", style="bold"))
    return Group(*tables, *lines)


def _table(op: str, rows: Sequence[Row], notes: dict[str, int]) -> Table:
    kernels = list(dict.fromkeys(row.kernel for row in rows if row.kernel != "-"))
    table = Table(title=f"{op}: us per call, % of the floor, * fastest", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("gates")
    table.add_column("floor", justify="right")
    for kernel in kernels:
        includes = next(row.includes for row in rows if row.kernel == kernel)
        table.add_column(Text(f"{kernel} {_note(includes, notes)}"), justify="right")
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        fastest = min((r.timing.microseconds for r in of_case if r.timing), default=None)
        by_kernel = {row.kernel: row for row in of_case}
        cells = [_cell(by_kernel.get(kernel), fastest, notes) for kernel in kernels]
        label = case.name.removeprefix(f"{op}/").removesuffix(f"/{case.gates.value}")
        if "-" in by_kernel:
            label += f" {_note(by_kernel['-'].error or '', notes)}"
        table.add_row(Text(label), case.gates.value, f"{of_case[0].floor:.1f}", *cells)
    return table


def _cell(row: Row | None, fastest: float | None, notes: dict[str, int]) -> Text:
    if row is None:
        return Text("")
    marks = "".join(_note(warning, notes) for warning in row.warnings)
    if row.timing is None:
        return Text(f"failed {_note(row.error or '', notes)}", style="dim")
    best = row.timing.microseconds == fastest
    text = f"{row.timing.microseconds:.1f} ({row.of_floor or 0:.0%}){'*' if best else ''}{marks}"
    return Text(text, style="bold" if best else "")


def _note(text: str, notes: dict[str, int]) -> str:
    """Return the number of a note, the same for the same text."""
    return f"[{notes.setdefault(text, len(notes) + 1)}]"


def _host_table(rows: Sequence[HostRow], notes: dict[str, int]) -> Table:
    table = Table(
        "case", "kernel", "call", "bare launches", "launches", "ratio",
        title="host: us of an eager call and of its Triton launches alone", title_justify="left",
    )  # fmt: skip
    for row in rows:
        if row.call is None:
            cells = [f"failed {_note(row.error or '', notes)}", "", "", ""]
        else:
            cells = [f"{row.call:.1f}", _number(row.bare), str(row.launches), _number(row.ratio)]
        table.add_row(row.case.name, row.kernel, *map(Text, cells))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def document_of(report: Report) -> dict[str, object]:
    """Return a report as plain data."""
    card, readings = report.card, report.readings
    return {
        "device": {"name": card.name, "memory_bytes": card.memory, "l2_bytes": card.l2},
        "driver": readings.driver,
        "versions": versions((*LIBRARIES, *PEERS)),
        "method": METHOD,
        "rates": {
            "copy_bytes_per_second": card.rates.bandwidth,
            "matmul_flops_per_second": card.rates.matmul,
        },
        "readings": {
            "clock_mhz": readings.clock,
            "highest_clock_mhz": readings.highest_clock,
            "temperature": readings.temperature,
            "slowdowns": list(readings.slowdowns),
            "other_processes": readings.other_processes,
        },
        "gates": {gates.value: _gates(gates) for gates in Gates},
        "peers": report.libraries,
        "warnings": report.warnings,
        "interrupted": report.interrupted,
        "rows": [_row(row) for row in report.rows],
        "host": [_host_row(row) for row in report.host],
    }


def _row(row: Row) -> dict[str, object]:
    timing = row.timing
    measured: dict[str, object] = {
        "us": timing and timing.microseconds,
        "spread": timing and timing.spread,
        "replays": timing and timing.replays,
        "calls": timing and timing.calls,
        "timed_by": timing and ("events" if timing.fallback else "graph"),
        "percent_of_floor": None if row.of_floor is None else 100 * row.of_floor,
    }
    return {
        **_case(row.case),
        "kernel": row.kernel,
        "ours": row.ours,
        "includes": row.includes,
        "floor_us": row.floor,
        **measured,
        # JSON has no infinity: the warnings say it
        "difference": None if row.difference == math.inf else row.difference,
        "warnings": list(row.warnings),
        "error": row.error,
    }


def _host_row(row: HostRow) -> dict[str, object]:
    return {
        "case": row.case.name,
        "kernel": row.kernel,
        "call_us": row.call,
        "bare_us": row.bare,
        "launches": row.launches,
        "ratio": row.ratio,
        "error": row.error,
    }


def _case(case: Case) -> dict[str, object]:
    spec, work = case.spec, work_of(case)
    return {
        "case": case.name,
        "op": case.op,
        "gates": case.gates.value,
        "protocol": case.protocol and case.protocol.value,
        "num_k_heads": spec.num_k_heads,
        "num_v_heads": spec.num_v_heads,
        "head_k_dim": spec.head_k_dim,
        "head_v_dim": spec.head_v_dim,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "state_dtype": str(spec.state_dtype).removeprefix("torch."),
        "lengths": list(case.lengths),
        "bytes": work.bytes,
        "flops": work.flops,
    }


def _gates(gates: Gates) -> str:
    low, high = DECAY_RATES[gates]
    return f"A uniform in [{low:g}, {high:g}], dt_bias 1, a and b N(0, 1)"
