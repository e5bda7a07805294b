# SPDX-License-Identifier: Apache-2.0
"""The command: compile, compare with the tables or replace them, and say what is wrong."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ci.resources import compilers, table

Job = tuple[str, str]  # a GPU and a compiler


def main(
    arch: Annotated[list[str] | None, typer.Option(help="Compile for this alone.")] = None,
    compiler: Annotated[
        list[str] | None, typer.Option(help="Compile with this alone: triton-3.6.0.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the tables again.")] = False,
    every: Annotated[
        bool, typer.Option("--every", help="Compile more layers; check limits alone. Hours.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Compile the models' steps alone, as CI does.")
    ] = False,
    install: Annotated[
        bool, typer.Option("--install", help="Install the compilers, and end.")
    ] = False,
) -> None:
    """Compile every kernel for every GPU, and compare what it needs with the tables."""
    if write and (every or models):
        raise typer.BadParameter("--write needs all calls of the tables: no --every, no --models")
    console = Console(soft_wrap=True)
    _refuse_others("--compiler", compiler, compilers.names())
    chosen = compiler or compilers.names()
    for name in chosen:
        if not compilers.is_installed(name):
            console.print(f"installing {name} into {compilers.folder(name)}")
            compilers.install(name)
    if install:
        return
    calls = "every" if every else "models" if models else "table"
    jobs = [(gpu, name) for name in chosen for gpu in compilers.gpus(name)]
    _refuse_others("--arch", arch, {gpu for gpu, _ in jobs})
    wrong = 0
    for (gpu, name), found in _compile([j for j in jobs if j[0] in (arch or j)], calls, console):
        lines = list(found.faults)
        if write:
            table.write(gpu, name, found.rows)
        elif not every:
            lines += table.differences(table.read(gpu, name), found)
        console.print(f"{gpu}, {name}: {len(found.rows)} kernels, {len(lines)} faults")
        for line in lines:
            console.print(f"  {line}", highlight=False)
        wrong += len(lines)
    raise typer.Exit(1 if wrong else 0)


def _refuse_others(option: str, given: list[str] | None, known: Collection[str]) -> None:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"{option} is {name}, needs {', '.join(sorted(known))}")


def _compile(jobs: list[Job], calls: str, console: Console) -> Iterator[tuple[Job, table.Found]]:
    """Run as many processes as there are cores."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        done = progress.add_task("GPUs and compilers", total=len(jobs))
        kernels = progress.add_task("kernels", total=None)

        def run(job: Job) -> table.Found:
            found = table.Found()
            for line in compilers.compiled(*job, calls):
                found.add(line)
                progress.update(kernels, advance=line["kernel"] is not None)
            progress.update(done, advance=1)
            return found

        yield from zip(jobs, pool.map(run, jobs), strict=True)


if __name__ == "__main__":
    typer.run(main)
