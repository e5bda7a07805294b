# SPDX-License-Identifier: Apache-2.0
"""``tune``: measure, on this GPU, which kernel is fastest for which prefill."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gdn_portable.bench.card import foreign_memory, l2_of, readings_of, warnings_of
from gdn_portable.bench.floors import Rates
from gdn_portable.bench.run import CACHES, ROTATION, Plan
from gdn_portable.bench.timing import GpuClock
from gdn_portable.bench.tune import (
    GRID,
    Task,
    changes,
    fastest_of,
    forget,
    tasks,
    time_all,
    untimed,
)
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
from gdn_portable.tuned import OPS, Cell, Layer, Tuned, open_file, user_folder

FLOORLESS = Rates(math.inf, math.inf)


def tune(
    config: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json; default: Qwen3-Next's layer.")
    ] = None,
    tp_size: Annotated[
        list[int] | None, typer.Option(help="Ranks that share the heads; repeatable. Default 1.")
    ] = None,
    norms: Annotated[
        bool, typer.Option(help="Whether the layer applies norms to q and k (qk_l2norm).")
    ] = True,
    op: Annotated[
        list[Op] | None, typer.Option(help="chunk_prefill or prefill_step; default both.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend whose kernels to time; default: the device's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1.")] = "cuda",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the file; default: where bind looks for it.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Take times anew that the file holds.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Start nothing more after so long.")
    ] = None,
    replays: Annotated[int | None, typer.Option(min=3, help="To time; default 15.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of inputs; default 40 % of what is free.")
    ] = None,
) -> None:
    """Time the prefill kernels, for bind to choose by; run again, it goes on where it ended."""
    for name in op or ():
        if name not in OPS:
            raise InputError(f"--op is {name.value}, needs {' or '.join(o.value for o in OPS)}")
    layers = [layer_of(config, ranks) for ranks in tp_size or (1,)]
    specs = [replace(layer, qk_l2norm=norms) for layer in layers]
    target = present_gpu(device, "tune")
    facts = detect_device(target)
    folder = output or user_folder()
    if folder is None:
        raise InputError("there is no home to keep the times in, needs --output")
    wanted = tasks(specs, op or OPS, facts, backend, GRID)
    if not wanted:
        raise InputError("fewer than two kernels can serve each op: there is nothing to choose")
    tuned = open_file(folder, facts)
    if again:
        forget(wanted, tuned)
    with torch.no_grad(), torch.cuda.device(target):
        plan = Plan(
            device=facts,
            clock=GpuClock(target),
            rates=FLOORLESS,
            rotation=max(ROTATION, CACHES * l2_of(target)),
            memory=memory_for(target, memory),
            kernels={},
            replays=replays,
            with_peers=False,
            deadline=math.inf if minutes is None else time.monotonic() + 60 * minutes,
        )
        warnings = warnings_of(readings_of(target), foreign_memory(target))
        ended = fill(wanted, tuned, plan, warnings)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    report(console, wanted, tuned, warnings)
    if ended:
        console.print(f"{ended}: the same command goes on")
        raise typer.Exit(INTERRUPTED)


def fill(wanted: Sequence[Task], tuned: Tuned, plan: Plan, warnings: list[str]) -> str | None:
    """Time what a file has no times of.

    Args:
        wanted: what it is to hold.
        tuned: receives the times, and is written after each.
        plan: how to time.
        warnings: receives what speaks against a time.

    Returns:
        Why it ended early; None where it did not.
    """
    left = untimed(wanted, tuned)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # a thread that draws would take the host's time from what is timed
    console = Console(file=sys.stderr)
    progress = Progress(
        *columns, TextColumn("{task.description}"), console=console, auto_refresh=False
    )
    with progress:
        total = sum(len(task.kernels) for task in wanted)
        missing = sum(len(task.kernels) for task in left)
        bar = progress.add_task("", total=total, completed=total - missing)

        def say(what: str) -> None:
            progress.update(bar, description=what)
            progress.refresh()

        try:
            for task, row in time_all(left, tuned, plan, say):
                progress.advance(bar)
                speaks = filter(None, (row.error, *row.warnings))
                warnings += [f"{task} {row.kernel}: {line}" for line in speaks]
        except KeyboardInterrupt:
            return STOPPED
        except DeviceLostError as error:
            return str(error)
        say("done")
    return "the time given is over" if untimed(wanted, tuned) else None


def report(console: Console, wanted: Sequence[Task], tuned: Tuned, warnings: list[str]) -> None:
    """Print the fastest kernel of every cell, what changed, what to mistrust, and the file."""
    for layer, op in dict.fromkeys((Layer.of(task.spec), task.op) for task in wanted):
        times = tuned.times(layer, op)
        columns = sorted({cell.tokens for cell in times})
        title = f"{layer} {op.value}: fastest kernel, microseconds, by sequences and tokens"
        table = Table("N", *map(str, columns), title=title, title_justify="left")
        for sequences in sorted({cell.sequences for cell in times}):
            cells = [Cell(sequences, tokens // sequences) for tokens in columns]
            table.add_row(str(sequences), *(_fastest(times.get(cell, {})) for cell in cells))
        console.print(table)
    for line in changes(wanted, tuned):
        console.print(f"changed: {line}")
    for line in warnings:
        console.print(f"warning: {line}")
    console.print(f"times in {tuned.path}", soft_wrap=True)


def _fastest(times: dict[str, float | None]) -> str:
    name = fastest_of(times)
    return "" if name is None else f"{name}\n{times[name]}"
