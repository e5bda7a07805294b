# SPDX-License-Identifier: Apache-2.0
"""The committed tables of what kernels need: one for every GPU and compiler."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ci.resources.measure import Needs

TABLES = Path(__file__).parent / "tables"
KEY = ("layer", "call", "kernel")
COLUMNS = (*KEY, *(f.name for f in fields(Needs)))

Key = tuple[str, ...]
Rows = dict[Key, Needs]


@dataclass(slots=True)
class Found:
    """What was compiled.

    Attributes:
        rows: what each kernel needs, by layer, call and kernel; a kernel stands where it was
            first compiled.
        calls: the layers and calls that were made.
        faults: what speaks against kernels and calls, in words.
    """

    rows: Rows = field(default_factory=dict)
    calls: set[Key] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    _seen: Counter[Key] = field(default_factory=Counter)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of the compiling process."""
        place = [line["layer"], line["call"]]
        if line["kernel"] is None:
            self.calls.add(tuple(place))
        else:
            key = (*place, line["kernel"])
            self._seen[key] += 1
            if self._seen[key] > 1:
                key = (*place, f"{line['kernel']} {self._seen[key]}")
            place = [*key]
            self.rows[key] = Needs(**line["needs"])
        self.faults += [f"{': '.join(place)}: {fault}" for fault in line["faults"]]


def path(arch: str, compiler: str) -> Path:
    """Return the file of a table."""
    return TABLES / f"{arch}-{compiler}.csv"


def read(arch: str, compiler: str) -> Rows:
    """Return a table."""
    with path(arch, compiler).open(newline="") as file:
        return {
            tuple(row[name] for name in KEY): Needs(
                **{f.name: int(row[f.name]) for f in fields(Needs)}
            )
            for row in csv.DictReader(file)
        }


def write(arch: str, compiler: str, rows: Rows) -> None:
    """Replace a table."""
    TABLES.mkdir(exist_ok=True)
    with path(arch, compiler).open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows((*key, *asdict(needs).values()) for key, needs in rows.items())


def differences(table: Rows, found: Found) -> list[str]:
    """Return in words what differs, of the calls that were made."""
    expected = {key: needs for key, needs in table.items() if key[:2] in found.calls}
    lines = [f"{': '.join(key)}: not compiled" for key in expected if key not in found.rows]
    for key, needs in found.rows.items():
        name = ": ".join(key)
        if key not in expected:
            lines.append(f"{name}: not in the table, {_words(asdict(needs))}")
            continue
        before, now = asdict(expected[key]), asdict(needs)
        changed = {k: f"{before[k]} -> {now[k]}" for k in now if now[k] != before[k]}
        if changed:
            lines.append(f"{name}: {_words(changed)}")
    return lines


def _words(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def gather(lines: Iterable[Mapping[str, Any]]) -> Found:
    """Return what a process compiled."""
    found = Found()
    for line in lines:
        found.add(line)
    return found
