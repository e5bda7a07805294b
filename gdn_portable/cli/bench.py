# SPDX-License-Identifier: Apache-2.0
"""``bench``: the times of the ops and of the libraries beside them, on a GPU."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gdn_portable.bench.card import (
    drift,
    foreign_memory,
    measure_rates,
    read_card,
    readings_of,
    warnings_of,
)
from gdn_portable.bench.cases import (
    DRAFTS,
    Case,
    all_cases,
    cases_of,
    default_cases,
    select_cases,
    with_drafts,
)
from gdn_portable.bench.floors import work_of
from gdn_portable.bench.host import host_rows
from gdn_portable.bench.peers import libraries
from gdn_portable.bench.plot import check_matplotlib, plot
from gdn_portable.bench.report import Report, document_of, render
from gdn_portable.bench.run import CACHES, ROTATION, Plan, run
from gdn_portable.bench.timing import GpuClock
from gdn_portable.cli.options import (
    INTERRUPTED,
    STOPPED,
    WIDTH,
    layer_of,
    memory_for,
    present_gpu,
)
from gdn_portable.errors import DeviceLostError, InputError
from gdn_portable.select import detect_device
from gdn_portable.spec import Op


def bench(
    op: Annotated[list[str] | None, typer.Option(help="Time only this op; repeatable.")] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Time the cases whose names match: 'chunk*/1x*'; repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json whose layer to time.")
    ] = None,
    tp_size: Annotated[int, typer.Option(help="Ranks that share the heads of --config.")] = 1,
    drafts: Annotated[
        int, typer.Option(min=1, max=16, help="Of a sequence that is verified, root included.")
    ] = DRAFTS,
    kernels: Annotated[
        str | None,
        typer.Option(help="Ours, by name, separated by commas; several of an op are compared."),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Time other libraries as well.")] = True,
    replays: Annotated[
        int | None, typer.Option(min=3, help="To time; default 30, and 15 of prefill.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Start nothing more after so long.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of inputs; default 40 % of what is free.")
    ] = None,
    host: Annotated[bool, typer.Option("--host", help="Time the host as well.")] = False,
    device: Annotated[str, typer.Option(help="cuda, cuda:1.")] = "cuda",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write JSON there.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Write a PNG there.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Show the cases and end.")] = False,
) -> None:
    """Time our ops and the installed peers side by side, with cold caches."""
    chosen = _cases(op, case, config, tp_size, drafts, everything=list_cases)
    named = named_kernels(kernels)
    if list_cases:
        _print_cases(chosen, drafts)
        return
    for path in filter(None, (json_path, plot_path)):
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if plot_path is not None:
        check_matplotlib()
    target = present_gpu(device, "bench without --list")
    with torch.no_grad(), torch.cuda.device(target):
        report = _run(
            chosen,
            target,
            named,
            with_peers=peers,
            replays=replays,
            deadline=math.inf if minutes is None else time.monotonic() + 60 * minutes,
            memory=memory_for(target, memory),
            host=host,
            json_path=json_path,
        )
    Console(width=None if sys.stdout.isatty() else WIDTH).print(render(report))
    if plot_path is not None:
        plot(report.rows, report.card.name, plot_path)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)


def named_kernels(text: str | None) -> dict[Op, tuple[str, ...]]:
    """Read kernels as ``library.op`` or ``op=name``, and return their names by op.

    Raises:
        InputError: an op does not exist.
    """
    named: dict[Op, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        op_name, equals, name = part.partition("=")
        name = name if equals else part
        op_name = op_name if equals else part.rpartition(".")[2]
        if op_name not in {op.value for op in Op}:
            raise InputError(f"kernel is {part!r}, needs library.op or op=name, as doctor shows it")
        op = Op(op_name)
        named[op] = (*named.get(op, ()), name)
    return named


def _cases(
    ops: list[str] | None,
    patterns: list[str] | None,
    config: Path | None,
    tp_size: int,
    drafts: int,
    *,
    everything: bool,
) -> tuple[Case, ...]:
    """Return what is asked for: of the default cases, and by name of all there are."""

    def drafted(cases: Iterable[Case]) -> tuple[Case, ...]:
        return tuple(with_drafts(case, drafts) for case in cases)

    if config is not None:
        return select_cases(drafted(cases_of(layer_of(config, tp_size))), ops, patterns)
    if tp_size != 1:
        raise InputError("--tp-size is given without --config, needs both")
    if everything or patterns:
        return select_cases(drafted(all_cases()), ops, patterns)
    default = default_cases()
    covered = {case.op for case in default}
    named = (case for case in all_cases() if case.op in set(ops or ()) - covered)
    return select_cases(drafted((*default, *named)), ops, None)


def _print_cases(cases: Sequence[Case], drafts: int) -> None:
    default = {with_drafts(case, drafts) for case in default_cases()}
    width = max(len(case.name) for case in cases)
    for case in cases:
        work, mark = work_of(case), "default" if case in default else ""
        print(f"{case.name:{width}} {mark:7} {work.bytes / 1e6:9.2f} MB {work.flops / 1e9:8.2f} GF")


def _run(
    cases: tuple[Case, ...],
    device: torch.device,
    kernels: dict[Op, tuple[str, ...]],
    *,
    with_peers: bool,
    replays: int | None,
    deadline: float,
    memory: int,
    host: bool,
    json_path: Path | None,
) -> Report:
    foreign, clock = foreign_memory(device), GpuClock(device)
    card = read_card(device, clock)
    report = Report(
        card=card,
        readings=readings_of(device),
        libraries=libraries() if with_peers else {},
    )
    report.warnings += warnings_of(report.readings, foreign)
    plan = Plan(
        device=detect_device(device),
        clock=clock,
        rates=card.rates,
        rotation=max(ROTATION, CACHES * card.l2),
        memory=memory,
        kernels=kernels,
        replays=replays,
        with_peers=with_peers,
        deadline=deadline,
    )

    def keep() -> None:
        if json_path is not None:
            json_path.write_text(json.dumps(document_of(report), indent=2) + "\n")

    fill(report, cases, plan, host=host, keep=keep)
    with contextlib.suppress(KeyboardInterrupt):
        if report.interrupted is None:
            after = [*drift(card.rates, measure_rates(device, clock))]
            after += warnings_of(readings_of(device), foreign_memory(device))
            report.warnings += [line for line in after if line not in report.warnings]
    keep()
    return report


def fill(
    report: Report, cases: Sequence[Case], plan: Plan, *, host: bool, keep: Callable[[], None]
) -> None:
    """Time what there is to time. What was timed before a run ends early is kept.

    Args:
        report: receives the rows.
        cases: what to time.
        plan: how.
        host: whether to time the host as well.
        keep: called after every row.
    """
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # a thread that draws would take the host's time from what is timed
    progress = Progress(*columns, console=Console(file=sys.stderr), auto_refresh=False)
    with progress:
        task = progress.add_task("", total=len(cases))

        def say(what: str) -> None:
            done = len(dict.fromkeys(row.case for row in report.rows))
            progress.update(task, description=what, completed=done)
            progress.refresh()

        try:
            for row in run(cases, plan, say):
                report.rows.append(row)
                keep()
            for host_row in host_rows(cases, plan, say) if host else ():
                report.host.append(host_row)
            say("done")
        except KeyboardInterrupt:
            report.interrupted = STOPPED
        except DeviceLostError as error:
            report.interrupted = str(error)
