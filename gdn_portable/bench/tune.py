# SPDX-License-Identifier: Apache-2.0
"""Time every able kernel of a prefill over a grid of batches, for the choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gdn_portable.bench.cases import Case
from gdn_portable.bench.run import Plan, Row, run
from gdn_portable.select import Choice, explain
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.steps import COMPOSED
from gdn_portable.tuned import Cell, Layer, Tuned

SEQUENCES = (1, 2, 4, 8, 16)
TOKENS = (256, 1024, 2048, 4096, 8192, 32768)
SHORTEST = 64  # tokens of a sequence
GRID = tuple(Cell(n, t // n) for n in SEQUENCES for t in TOKENS if t // n >= SHORTEST)


@dataclass(frozen=True, slots=True)
class Task:
    """One batch of one op of a layer, and what there is to time.

    Attributes:
        spec: the layer.
        op: chunk_prefill or prefill_step.
        cell: the batch.
        kernels: the able ones.
        before: the one that served so far by measured times; None where there were none.
    """

    spec: GdnSpec
    op: Op
    cell: Cell
    kernels: tuple[str, ...]
    before: str | None

    def __str__(self) -> str:
        return f"{Layer.of(self.spec)} {self.op.value} {self.cell}"


def tasks(
    specs: Sequence[GdnSpec],
    ops: Sequence[Op],
    device: Device,
    backend: str | None,
    grid: Sequence[Cell],
) -> list[Task]:
    """Return what there is to time: nothing of an op that a single kernel can serve."""
    found = list[Task]()
    for spec in dict.fromkeys(specs):
        choices = explain(spec, device, backend=backend)
        for op in ops:
            able = [c for c in choices if c.op is op and not c.reasons]
            kernels = tuple(c.kernel for c in able if not _is_made_of_others(c))
            pick = next((c.among.pick for c in able if c.among), None)
            if len(kernels) > 1:
                found += [
                    Task(spec, op, cell, kernels, pick and pick(cell.sequences, cell.tokens))
                    for cell in grid
                ]
    return found


def _is_made_of_others(choice: Choice) -> bool:
    composed = COMPOSED.get(choice.op)
    return choice.among is not None or (composed is not None and choice.kernel == composed.name)


def untimed(wanted: Sequence[Task], tuned: Tuned) -> list[Task]:
    """Write all cells of ``wanted`` down in a file, and return what it has no times of."""
    left = list[Task]()
    for task in wanted:
        times = _times(task, tuned)
        kernels = tuple(name for name in task.kernels if name not in times)
        if kernels:
            left.append(replace(task, kernels=kernels))
    return left


def forget(wanted: Sequence[Task], tuned: Tuned) -> None:
    """Drop the times of ``wanted`` from a file, for them to be taken again."""
    for task in wanted:
        _times(task, tuned).clear()


def time_all(
    left: Sequence[Task], tuned: Tuned, plan: Plan, say: Callable[[str], None]
) -> Iterator[tuple[Task, Row]]:
    """Time what is left, and write the file after every kernel; one that failed has None there.

    Args:
        left: what to time.
        tuned: receives the times.
        plan: how to time; past its deadline no cell is started.
        say: told what is about to run.

    Raises:
        DeviceLostError: nothing more can be timed.
    """
    for task in left:
        if plan.now() > plan.deadline:
            return
        lengths = (task.cell.length,) * task.cell.sequences
        case = Case(op=task.op.value, spec=task.spec, lengths=lengths)
        times = _times(task, tuned)
        here = replace(plan, kernels={task.op: task.kernels}, deadline=math.inf)
        for row in run([case], here, say):
            # inputs that could not be drawn fail for all
            for name in (row.kernel,) if row.kernel in task.kernels else task.kernels:
                times[name] = round(row.timing.microseconds, 2) if row.timing else None
            tuned.write()
            yield task, row


def changes(wanted: Sequence[Task], tuned: Tuned) -> Iterator[str]:
    """Say in which cells another kernel is the fastest than the one that served so far."""
    for task in wanted:
        fastest = fastest_of(_times(task, tuned))
        if fastest is not None and task.before not in (None, fastest):
            yield f"{task}: {fastest}, was {task.before}"


def fastest_of(times: dict[str, float | None]) -> str | None:
    """Return the fastest kernel of a cell; None where none was timed."""
    timed = {name: time for name, time in times.items() if time is not None}
    return min(timed, key=timed.__getitem__, default=None)


def _times(task: Task, tuned: Tuned) -> dict[str, float | None]:
    return tuned.times(Layer.of(task.spec), task.op).setdefault(task.cell, {})
