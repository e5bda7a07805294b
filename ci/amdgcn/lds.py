# SPDX-License-Identifier: Apache-2.0
"""Shared memory of workgroups (LDS): bounds, alignment, and races between waves."""

from __future__ import annotations

import numpy as np

from ci.amdgcn.errors import LdsAccessError, LdsRaceError
from ci.amdgcn.waves import POISON, Array, Dtype, Waves

u8, u32 = np.uint8, np.uint32
_CELLS: dict[int, Dtype] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SEVERAL = 255


class Lds:
    """The shared memory of all workgroups that run together, one after the other.

    It consists of cells, as large as the smallest access of the kernel. For every cell it keeps
    which wave has written it, and which has read it, since the last barrier: 0 for none, the
    wave's number + 1, or 255 for several. A wave that reads what another has written, or writes
    what another has read or written, races with it, unless what it writes is already there.

    Args:
        workgroups: how many run together.
        size: bytes of each.
        cell: bytes of a cell: 1, 2 or 4.
        detects_races: whether to keep who used what.
    """

    def __init__(self, workgroups: int, size: int, cell: int, *, detects_races: bool) -> None:
        self._size = size
        self._stride = (size + 15) & ~15
        self._cell = cell
        self._shift = cell.bit_length() - 1
        self._cells = np.full(workgroups * self._stride // 4, POISON, u32).view(_CELLS[cell])
        self._detects_races = detects_races
        self._writers = np.zeros(len(self._cells) if detects_races else 0, u8)
        self._readers = np.zeros_like(self._writers)
        self.loaded = self.stored = 0

    def barrier(self) -> None:
        """Forget who has used what: all waves of all workgroups have met."""
        self._writers.fill(0)
        self._readers.fill(0)

    def load(self, waves: Waves, addresses: Array, size: int) -> list[Array]:
        """Return ``size`` bytes at [waves, lanes] byte addresses, as words of the active lanes."""
        cells, marks = self._locate(waves, addresses, size, "load")
        self.loaded += size * len(cells)
        if self._detects_races:
            self._note_load(cells, marks)
        values = self._cells[cells]
        if size < 4:
            values = values.view(_CELLS[size]).astype(u32)
        return list(values.view(u32).T)

    def store(self, waves: Waves, addresses: Array, words: list[Array], size: int) -> None:
        """Write ``size`` bytes at [waves, lanes] byte addresses, as words of the active lanes."""
        cells, marks = self._locate(waves, addresses, size, "store")
        self.stored += size * len(cells)
        # the low bytes of a word come first
        values = np.stack(words, axis=1).view(_CELLS[self._cell])[:, : cells.shape[1]]
        if not self._detects_races:
            self._cells[cells] = values
            return
        race = self._store_race(cells, marks, values)
        if race is not None:
            # lanes of a wave may all store one sum, each with a last bit of its own: the last stays
            cells, marks, values = _last_lanes(cells, marks, values)
            race = self._store_race(cells, marks, values)
        if race is not None:
            raise race
        self._cells[cells] = values
        self._writers[cells] = marks

    def _locate(self, waves: Waves, addresses: Array, size: int, what: str) -> tuple[Array, Array]:
        """Return the cells of every active lane, and the mark of the lane's wave, as a column."""
        starts = waves.workgroups * self._stride
        marks: Array
        local: Array
        numbers = (waves.numbers + 1).astype(u8)
        if waves.all_active:
            local = addresses.reshape(-1)
            places = (addresses + starts[:, None]).reshape(-1)
            marks = np.repeat(numbers, addresses.shape[1])
        else:
            wave, lane = np.nonzero(waves.active)
            local = addresses[wave, lane]
            places = local + starts[wave]
            marks = numbers[wave]
        if len(local):
            highest = int(local.max())
            if highest + size > self._size:
                raise LdsAccessError(
                    f"{what} of {size} bytes of LDS at {highest:#x}, of {self._size} bytes"
                )
            if (local & u32(min(size, 4) - 1)).any():
                raise LdsAccessError(f"misaligned {what} of {size} bytes of LDS")
        cells = (places >> self._shift)[:, None] + np.arange(size >> self._shift)
        return cells, marks[:, None]

    def _note_load(self, cells: Array, marks: Array) -> None:
        written = self._writers[cells]
        racing = (written != 0) & (written != marks)
        if racing.any():
            writer = written[racing][0] - 1
            raise self._race(cells[racing], f"a wave reads what wave {writer} wrote")
        earlier = self._readers[cells]
        readers = np.where((earlier == 0) | (earlier == marks), marks, u8(_SEVERAL))
        self._readers[cells] = readers
        # of several waves that read a cell in one instruction, one stays
        lost = self._readers[cells] != readers
        if lost.any():
            self._readers[cells[lost]] = _SEVERAL

    def _store_race(self, cells: Array, marks: Array, values: Array) -> LdsRaceError | None:
        """Return what speaks against a store; nothing is written."""
        before = self._cells[cells]
        changed = before != values
        for users, verb in ((self._writers, "wrote"), (self._readers, "reads")):
            other = users[cells]
            racing = (other != 0) & (other != marks) & changed
            if racing.any():
                number = other[racing][0]
                who = "others" if number == _SEVERAL else f"wave {number - 1}"
                return self._race(cells[racing], f"a wave writes what {who} {verb}")
        # of several waves that write a cell in one instruction, one stays
        writers = self._writers[cells]
        self._cells[cells] = values
        self._writers[cells] = marks
        lost = (self._cells[cells] != values) & (self._writers[cells] != marks)
        self._cells[cells] = before
        self._writers[cells] = writers
        if lost.any():
            return self._race(cells[lost], "two waves write different values")
        return None

    def _race(self, cells: Array, what: str) -> LdsRaceError:
        workgroup, address = divmod(int(cells[0]) * self._cell, self._stride)
        return LdsRaceError(
            f"LDS race at {address:#x} of workgroup {workgroup} of those that run together: "
            f"{what}, with no barrier between"
        )


def _last_lanes(cells: Array, marks: Array, values: Array) -> tuple[Array, Array, Array]:
    """Keep the last lane's store to each cell of each wave."""
    marks = np.broadcast_to(marks, cells.shape).reshape(-1)
    keys = cells.reshape(-1).astype(np.int64) * (int(_SEVERAL) + 1) + marks
    _, last = np.unique(keys[::-1], return_index=True)
    last = keys.size - 1 - last
    columns = (cells.reshape(-1)[last], marks[last], values.reshape(-1)[last])
    return columns[0][:, None], columns[1][:, None], columns[2][:, None]
