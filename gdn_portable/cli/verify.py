# SPDX-License-Identifier: Apache-2.0
"""``verify``: the conformance cases on the device that is here, as a report to attach."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Annotated

import torch
import typer
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gdn_portable.cli.conformance import (
    LAYERS,
    MODEL,
    Outcome,
    outcomes_of,
    prepare_process,
)
from gdn_portable.cli.options import INTERRUPTED, STOPPED, WIDTH, default_device
from gdn_portable.errors import DeviceLostError, InputError
from gdn_portable.select import detect_device, explain
from gdn_portable.spec import Device, Op
from gdn_portable.testing import Case, cases
from gdn_portable.versions import versions


@dataclass(slots=True, kw_only=True)
class Report:
    """All that a run found out.

    Attributes:
        device: where the kernels ran.
        name: of the device, as its driver has it.
        outcomes: of the cases that were run.
        interrupted: why not all were.
    """

    device: Device
    name: str
    outcomes: list[Outcome] = field(default_factory=list)
    interrupted: str | None = None

    @property
    def passed(self) -> int:
        """How many cases passed."""
        return sum(outcome.error is not None for outcome in self.outcomes)

    @property
    def refused(self) -> int:
        """How many cases no kernel took."""
        return sum(outcome.refusal is not None for outcome in self.outcomes)

    @property
    def failed(self) -> int:
        """How many cases failed."""
        return sum(outcome.failure is not None for outcome in self.outcomes)


def verify(
    device: Annotated[
        str | None, typer.Option(help="Where: cpu, cuda, cuda:1. Default: a GPU if one is here.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help=f"Only this: {', '.join(LAYERS)}; repeatable.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; repeatable.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases that match: '*tree*'; repeatable.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend to bind; default: the device's.")
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="Processes that share the device: kernels compile as it runs."),
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run every op but planning against the reference on hard cases: a report for an issue."""
    target = default_device(device)
    chosen = _chosen(layer or list(LAYERS), op or [member.value for member in Op], case or ["*"])
    report = Report(device=detect_device(target), name=_name(target))
    explain(MODEL, report.device, backend=backend)  # raises where a name is mistaken
    prepare_process()
    with torch.no_grad():
        _watch(report, chosen, target, backend, jobs)
    if as_json:
        print(json.dumps(_document(report), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH).print(_rendered(report))
    if report.interrupted == STOPPED:
        raise typer.Exit(INTERRUPTED)
    if report.interrupted or report.failed or not report.passed:
        raise typer.Exit(1)


def _chosen(
    layers: Sequence[str], ops: Sequence[str], patterns: Sequence[str]
) -> list[tuple[str, Case]]:
    """Return the cases that are asked for, each with the name of its layer."""
    _all_known("layer", layers, list(LAYERS))
    _all_known("op", ops, [member.value for member in Op])
    chosen = [
        (name, case)
        for name in layers
        for case in cases(LAYERS[name])
        if case.op.value in ops and any(fnmatch(case.name, pattern) for pattern in patterns)
    ]
    if not chosen:
        if "*" in patterns:
            raise InputError(f"there is no case of {', '.join(ops)}, needs an op that has one")
        raise InputError(f"no case of these ops is called {' or '.join(patterns)}, needs one")
    return chosen


def _all_known(what: str, asked: Sequence[str], names: Sequence[str]) -> None:
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise InputError(f"{what} is {unknown[0]!r}, needs {', '.join(names)}")


def _watch(
    report: Report,
    chosen: Sequence[tuple[str, Case]],
    target: torch.device,
    backend: str | None,
    jobs: int,
) -> None:
    """Run the cases and draw a bar; what was found before a run ends early is kept."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
    with progress:
        task = progress.add_task("", total=len(chosen))

        def say(what: str) -> None:
            progress.update(task, description=what)

        try:
            for outcome in outcomes_of(chosen, target, backend, jobs, say):
                report.outcomes.append(outcome)
                progress.advance(task)
            say("done")
        except KeyboardInterrupt:
            report.interrupted = STOPPED
        except DeviceLostError as error:
            report.interrupted = str(error)
    order = {(layer, case.name): place for place, (layer, case) in enumerate(chosen)}
    report.outcomes.sort(key=lambda outcome: order[outcome.layer, outcome.case])


def _name(target: torch.device) -> str:
    if target.type == "cuda":
        return torch.cuda.get_device_name(target)
    return platform.processor() or platform.machine()


def _document(report: Report) -> dict[str, object]:
    device = report.device
    return {
        "device": {"kind": device.kind, "arch": device.arch, "name": report.name},
        "versions": versions(),
        "interrupted": report.interrupted,
        "cases": len(report.outcomes),
        "passed": report.passed,
        "refused": report.refused,
        "failed": report.failed,
        "worst_error": max((o.error for o in report.outcomes if o.error is not None), default=None),
        "layers": {name: str(LAYERS[name]) for name in _names(report)},
        "outcomes": [asdict(outcome) for outcome in report.outcomes],
    }


def _names(report: Report) -> list[str]:
    return list(dict.fromkeys(outcome.layer for outcome in report.outcomes))


def _rendered(report: Report) -> Group:
    """Return the report for people: the device, a line for every kernel, and the failures."""
    facts = Table(show_header=False, box=None, padding=(0, 2))
    facts.add_row("device", f"{report.device}, {report.name}")
    for name, version in versions().items():
        if version is not None:
            facts.add_row(name, version)
    table = Table("op", "kernel", "layers", "passed", "refused", "failed", "worst", box=None)
    groups: dict[tuple[Op, str], list[Outcome]] = {}
    for outcome in report.outcomes:
        groups.setdefault((outcome.op, outcome.kernel), []).append(outcome)
    for (op, kernel), outcomes in sorted(groups.items()):
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        refused = sum(outcome.refusal is not None for outcome in outcomes)
        failed = len(outcomes) - len(errors) - refused
        layers = len({outcome.layer for outcome in outcomes})
        worst = f"{max(errors):.2f}" if errors else "-"
        counts = map(str, (layers, len(errors), refused, failed))
        table.add_row(op.value, kernel, *counts, worst, style="red" if failed else None)
    verdict = (
        f"{report.passed} of {len(report.outcomes)} cases passed, {report.refused} refused, "
        f"{report.failed} failed; errors are relative to what is allowed."
    )
    if report.interrupted:
        verdict += f" Not all were run: {report.interrupted}."
    return Group(facts, "", table, "", *_texts(report), verdict)


def _texts(report: Report) -> list[Text]:
    """Return why cases did not pass, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for outcome in report.outcomes:
        for what, why in (("refused", outcome.refusal), ("failed", outcome.failure)):
            if why is not None:
                found.setdefault((what, why), []).append(outcome.layer)
    return [
        Text(f"{len(layers)} {what} in {', '.join(dict.fromkeys(layers))}: {why}")
        for (what, why), layers in found.items()
    ]
