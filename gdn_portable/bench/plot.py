# SPDX-License-Identifier: Apache-2.0
"""Times against the size of the batch: a panel for each op and layer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gdn_portable.bench.cases import DECODE_OPS, VERIFY_OPS, Case
from gdn_portable.bench.run import Row
from gdn_portable.errors import InputError

COLUMNS = 3
PANEL = (5.0, 3.8)  # inches


def check_matplotlib() -> None:
    """Find out before anything is timed whether a plot can be made.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--plot is given and matplotlib is not installed, "
            "needs: pip install 'gdn-portable[bench]'; in a checkout: pip install '.[bench]'"
        )


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write a PNG: one sequence a line, batches of prefills as hollow markers beside it."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    timed = [row for row in rows if row.timing is not None]
    panels = list(dict.fromkeys((row.case.op, row.case.variant) for row in timed)) or [("", "")]
    colours = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(row.kernel for row in timed))}
    lines = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    size = (PANEL[0] * columns, PANEL[1] * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        chosen = [row for row in timed if (row.case.op, row.case.variant) == panel]
        _draw(axes, chosen, colours)
        axes.set_title(" ".join(panel), fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def _draw(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    floors = [(_size(row.case), row.floor, _is_batch(row.case)) for row in rows]
    _curve(axes, floors, "floor", "black", "--")
    for kernel in dict.fromkeys(row.kernel for row in rows):
        points = [
            (_size(row.case), row.timing.microseconds, _is_batch(row.case))
            for row in rows
            if row.kernel == kernel and row.timing is not None
        ]
        _curve(axes, points, kernel, colours[kernel], "-")
    sizes = sorted({_size(row.case) for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(_axis(rows))
    axes.set_ylabel("us per call")
    axes.grid(visible=True, which="major", alpha=0.3)
    if rows:
        axes.legend(fontsize=6)


def _curve(
    axes: Any, points: Iterable[tuple[int, float, bool]], label: str, colour: str, style: str
) -> None:
    ordered = sorted(set(points))
    line = [point for point in ordered if not point[2]]
    batches = [point for point in ordered if point[2]]
    marker = "o" if style == "-" else None
    xs, ys = [x for x, *_ in line], [y for _, y, _ in line]
    axes.plot(xs, ys, style, color=colour, marker=marker, markersize=3, label=label)
    shape = "o" if style == "-" else "_"
    hollow = {"markerfacecolor": "none", "linestyle": "none"}
    axes.plot([x for x, *_ in batches], [y for _, y, _ in batches], shape, color=colour, **hollow)


def _is_batch(case: Case) -> bool:
    """Say whether a case packs several sequences where others have one."""
    return case.op not in (*DECODE_OPS, *VERIFY_OPS) and case.num_sequences > 1


def _size(case: Case) -> int:
    return case.num_sequences if case.op in (*DECODE_OPS, *VERIFY_OPS) else case.num_tokens


def _axis(rows: Sequence[Row]) -> str:
    if not rows or rows[0].case.op in (*DECODE_OPS, *VERIFY_OPS):
        return "sequences"
    packed = any(_is_batch(row.case) for row in rows)
    return "tokens (hollow: several sequences)" if packed else "tokens"
