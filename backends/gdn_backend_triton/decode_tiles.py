# SPDX-License-Identifier: Apache-2.0
"""How the rows of a state are dealt out to the programs of a decode, by batch, layer and GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gdn_portable.spec import Device, GdnSpec, StateLayout


class Tile(NamedTuple):
    """How the rows of V of one head's state are dealt out, where K is 128; all of K stays whole.

    Of a wider head fewer rows are taken, of a narrower one more. Of a panel every lane needs 16
    bytes at least: warps that hold the same rows twice could load them after they are stored.
    """

    rows: int  # of a program
    panel: int  # rows that a program holds at a time
    lanes: int  # that share a row, each with 16 bytes of it at a time; not used by the layout KV
    warps: int


class Choice(NamedTuple):
    """A tile as it fits a layer."""

    BV: int
    BP: int
    BK: int
    num_warps: int


# by arch and bytes of a state's element: up to how many heads of a batch (B * HV), which tile
Table = Mapping[tuple[str, int], Sequence[tuple[int, Tile]]]
ANY = sys.maxsize
DEFAULT_ARCH = {"cuda": "sm90", "rocm": "gfx942"}
TILES: Table = {
    # H200, H16/HV32, K = V = 128, recurrence alone, B = 8 / 32 / 128 / 512: 10.0 / 36.0 / 136 / 538
    # us with a float32 state, 6.1 / 19.7 / 72.4 / 275 with bfloat16; with 8 lanes 10.2 / 36.4 / 138
    # / 545 and 6.2 / 20.1 / 72.9 / 279
    ("sm90", 4): ((128, Tile(16, 16, 4, 1)), (ANY, Tile(16, 16, 16, 1))),
    ("sm90", 2): (
        (64, Tile(8, 8, 4, 1)),
        (2048, Tile(16, 16, 16, 1)),
        (ANY, Tile(32, 16, 16, 2)),
    ),
    ("gfx942", 4): ((256, Tile(8, 8, 8, 1)), (ANY, Tile(16, 16, 8, 1))),
    ("gfx942", 2): ((256, Tile(16, 16, 8, 1)), (ANY, Tile(32, 32, 8, 1))),
}
# behind a convolution, whose loads may queue behind those of the first panels. H200, the same
# layer, B = 8 / 32 / 128 / 512, us a step: 11.5 / 38.0 / 140 / 552 with a float32 state, with the
# tiles above 12.4 / 39.4 / 145 / 565; with bfloat16 8.0 / 22.7 / 77.7 / 298, with panels of 16 rows
# 8.0 / 23.2 / 78.8 / 302, and of 16 rows in 8 lanes 7.7 / 23.0 / 77.9 / 300
STEP_TILES: Table = {
    **TILES,
    ("sm90", 4): ((64, Tile(16, 16, 4, 1)), (ANY, Tile(16, 8, 16, 1))),
    ("sm90", 2): ((64, Tile(8, 8, 4, 1)), (256, Tile(16, 16, 8, 1)), (ANY, Tile(16, 8, 16, 1))),
}
# where a gate is given: a program that owns a whole head normalises it, else a launch more does,
# which wins on Hopper where there are enough heads
GATED_TILES: Table = {
    ("sm90", 4): (
        (64, Tile(128, 128, 8, 16)),
        (512, Tile(128, 64, 8, 8)),
        (ANY, Tile(16, 8, 16, 1)),
    ),
    ("sm90", 2): (
        (64, Tile(128, 128, 8, 8)),
        (1024, Tile(128, 64, 8, 8)),
        (ANY, Tile(16, 8, 16, 1)),
    ),
    ("gfx942", 4): ((256, Tile(128, 128, 8, 8)), (ANY, Tile(128, 64, 8, 4))),
    ("gfx942", 2): ((256, Tile(128, 128, 8, 8)), (ANY, Tile(128, 64, 8, 4))),
}
# where states are written every few tokens alone. H200, the same layer, 7 updates deferred at most,
# float32 state, B = 8 / 128 / 512, us a step: 12.7 / 89.5 / 330; of 32 rows in panels of 8 14.7 /
# 91.4 / 339
DEFERRED_TILES: Table = {
    ("sm90", 4): ((ANY, Tile(16, 16, 16, 1)),),
    ("sm90", 2): ((ANY, Tile(16, 16, 16, 1)),),
    ("gfx942", 4): ((ANY, Tile(16, 16, 8, 1)),),
    ("gfx942", 2): ((ANY, Tile(16, 16, 8, 1)),),
}
# likewise, by tensor cores. Bfloat16 state, B = 8 / 32 / 128 / 512: 11.4 / 22.9 / 60.3 / 206, of 16
# rows 11.6 / 22.9 / 62.3 / 220; without tensor cores 11.1 / 23.6 / 68.1 / 254
DOT_TILES: Table = {("sm90", 2): ((ANY, Tile(32, 32, 32, 1)),)}
LEAST_RUN = 64  # bytes of a row of the layout KV that a panel takes at least
MOST_WARPS = 16


def fit(tile: Tile, spec: GdnSpec) -> Choice:
    """Return a tile for a layer's heads."""
    K, V, itemsize = spec.head_k_dim, spec.head_v_dim, spec.state_dtype.itemsize
    rows, panel = (max(1, number * 128 // K) for number in (tile.rows, tile.panel))
    BK = min(K, tile.lanes * 16 // itemsize)
    if spec.state_layout is StateLayout.KV:
        panel, BK = max(panel, LEAST_RUN // itemsize), K
    BP = min(panel, V)
    warps = tile.warps * BP * K // (tile.panel * 128)
    return Choice(min(max(rows, BP), V), BP, BK, min(max(warps, 1), MOST_WARPS))


def choices_of(
    table: Table, spec: GdnSpec, device: Device, *, deterministic: bool
) -> list[tuple[int, Choice]]:
    """Return up to how many heads of a batch which tile is used."""
    itemsize = spec.state_dtype.itemsize
    entries = table.get((device.arch, itemsize), table[DEFAULT_ARCH[device.kind], itemsize])
    fitted = [(heads, fit(tile, spec)) for heads, tile in entries]
    return fitted[-1:] if deterministic else fitted


def only_choice_of(table: Table, spec: GdnSpec, device: Device) -> Choice:
    """Return what a table without batches uses for a layer."""
    ((_, choice),) = choices_of(table, spec, device, deterministic=True)
    return choice


def pick(choices: list[tuple[int, Choice]], heads: int) -> Choice:
    """Return the choice for a batch with so many heads."""
    # sooner than a generator expression
    for most, choice in choices:
        if heads <= most:
            return choice
    return choices[-1][1]
