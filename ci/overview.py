# SPDX-License-Identifier: Apache-2.0
"""README's picture of times, out of the tables of ``docs/performance.md``.

``python -m ci.overview --write`` draws it; without it, the picture is printed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "pictures" / "overview.svg"
# of a table the heading and how the paragraph above starts; then the case, and what to call it
CASES = (
    ("decode_step", "Convolution", "B1 fp32", "decode, 1 sequence"),
    ("decode_step", "Convolution", "B32 fp32", "decode, 32 sequences"),
    ("decode_step", "Convolution", "B512 fp32", "decode, 512 sequences"),
    ("verify_step and commit", "Replay", "B8xP4 fp32", "replay, 8 x 4 drafts"),
    ("verify_step and commit", "Replay", "B128xP4 fp32", "replay, 128 x 4 drafts"),
    ("verify_step and commit", "Snapshot", "B32xP4 fp32", "snapshot, 32 x 4 drafts"),
    ("verify_step and commit", "Slot table", "B32xP4 fp32", "slot table, 32 x 4 drafts"),
    ("chunk_prefill", "The recurrence", "16/32 1x2048", "recurrence, 2048 tokens"),
    ("chunk_prefill", "The recurrence", "16/32 1x8192", "recurrence, 8192 tokens"),
    ("chunk_prefill", "The recurrence", "16/32 8x4096", "recurrence, 8 x 4096 tokens"),
)
# a kernel that is bound has a dot in its name, a peer's call is described in words
OURS = re.compile(r"^[a-z]+\.[a-z_0-9]+$")
NOT_TIMED = ("case", "gates", "floor")
LEFT, WIDTH, RIGHT = 190, 300, 290
TOP, ROW, BAR = 66, 46, 15


class Times(NamedTuple):
    """Microseconds of a case: ours, the fastest peer's with its name, and the floor."""

    ours: float
    peer: float
    peer_name: str
    floor: float


def tables(text: str) -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """Yield every table with its heading and the first words of the paragraph above it."""
    heading = paragraph = ""
    for block in text.split("\n\n"):
        if block.startswith("#"):
            heading = block.lstrip("# ")
        elif block.startswith("|"):
            names, _, *rows = [
                [cell.strip(" *") for cell in line.strip("|").split("|")]
                for line in block.strip().splitlines()
            ]
            yield heading, paragraph, [dict(zip(names, row, strict=True)) for row in rows]
        else:
            paragraph = block.strip()


def times_of(heading: str, start: str, case: str) -> Times:
    """Return the times of the first row of that case.

    Raises:
        LookupError: there is no such row on the page.
    """
    for title, paragraph, rows in tables(PAGE.read_text()):
        if title != heading or not paragraph.startswith(start):
            continue
        for row in rows:
            if row.get("case") == case:
                return _fastest(row)
    raise LookupError(f"no case {case} below {heading}, {start}, on {PAGE.name}")


def _fastest(row: dict[str, str]) -> Times:
    timed = {n: float(cell) for n, cell in row.items() if n not in NOT_TIMED and cell[:1].isdigit()}
    ours = min(time for name, time in timed.items() if OURS.match(name))
    peer, name = min((time, name) for name, time in timed.items() if not OURS.match(name))
    return Times(ours, peer, name, float(row["floor"]))


def drawn() -> str:
    """Return the picture: a row for a case, in it a bar for us and one for the fastest peer."""
    height, width = TOP + ROW * len(CASES) + 10, LEFT + WIDTH + RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        "<title>Microseconds per call on an H200, ours and the fastest peer's</title>",
        "<style>text{font:12px sans-serif;fill:#222}.b{font-weight:bold}.s{fill:#555}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        _text(14, 24, "Microseconds per call on an H200, shorter is better", "b"),
        _bar(14, 36, BAR, "#3182bd") + _text(35, 48, "gdn_portable"),
        _bar(130, 36, BAR, "#bdbdbd") + _text(151, 48, "the fastest peer"),
        _mark(262, 35, BAR + 2)
        + _text(270, 48, "floor: bytes or FLOPs at the card's measured rates"),
    ]
    for number, (heading, start, case, label) in enumerate(CASES):
        found, y = times_of(heading, start, case), TOP + ROW * number
        scale = WIDTH / max(found.ours, found.peer)
        lines += [
            _text(14, y + 20, label),
            _bar(LEFT, y, found.ours * scale, "#3182bd"),
            _text(LEFT + found.ours * scale + 6, y + 12, f"{found.ours:g}", "b"),
            _bar(LEFT, y + BAR + 2, found.peer * scale, "#bdbdbd"),
            _text(LEFT + found.peer * scale + 6, y + 29, f"{found.peer:g}  {found.peer_name}", "s"),
            _mark(LEFT + found.floor * scale, y - 2, 2 * BAR + 6),
        ]
    return "\n".join([*lines, "</svg>", ""])


def _bar(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{BAR}" fill="{fill}"/>'


def _mark(x: float, y: float, height: int) -> str:
    return f'<path d="M{x:.1f} {y:g}v{height}" stroke="#000" stroke-width="2"/>'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:g}" class="{style}">{escape(text)}</text>'


def main() -> None:
    """Print the picture, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the file")
    if parser.parse_args().write:
        PICTURE.write_text(drawn())
    else:
        print(drawn())


if __name__ == "__main__":
    main()
