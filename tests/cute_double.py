# SPDX-License-Identifier: Apache-2.0
"""The CuTe kernel for a CPU: its own maths, lane by lane, in the place of its module."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import gdn_backend_cuda
import numpy as np
import pytest
from gdn_backend_cuda.cute_replay import apply, solve
from gdn_backend_cuda.cute_replay.shape import (
    ROWS,
    V_ROW,
    X_ROW,
    Item,
    K,
    Shape,
    Tensors,
    V,
)
from torch import Tensor

from gdn_portable import Device
from tests.cute_lanes import Lanes, Space

KERNEL = "gdn_backend_cuda.cute_replay.kernel"
LAUNCHER = Path(gdn_backend_cuda.__file__).parent / "cute_verify_step.py"
HOPPER = Device("cuda", "sm90")


class Double:
    """What makes the op, with a kernel that runs on lanes.

    Attributes:
        launcher: the launcher's module, a copy of its own.
        compiled: the shapes that were asked for.
        started: how often the kernel was started.
        memory: tensors that lie in what the kernel may read and write.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[Shape] = []
        self.started = 0
        self.memory: list[Tensor] = []
        kernel = ModuleType(KERNEL)
        vars(kernel).update(start_of=self.start_of, Start=object)
        monkeypatch.setitem(sys.modules, KERNEL, kernel)
        found = importlib.util.spec_from_file_location("cute_verify_step_on_lanes", LAUNCHER)
        assert found is not None and found.loader is not None
        self.launcher = importlib.util.module_from_spec(found)
        found.loader.exec_module(self.launcher)

    def start_of(self, shape: Shape, arch: str) -> Callable[[Sequence[int]], None]:
        assert arch == HOPPER.arch
        self.compiled.append(shape)

        def start(numbers: Sequence[int]) -> None:
            self.started += 1
            # what lanes compute and do not use may be anything
            with np.errstate(all="ignore"):
                run(shape, Space.of(self.memory), numbers)

        return start


def run(shape: Shape, memory: Space, numbers: Sequence[int]) -> None:
    """Take every item as the kernel does: what is gathered and solved, then each warp's rows."""
    *fields, indices, indices_b, accepted, accepted_b, items = numbers
    x = Tensors(*map(np.int64, fields))
    lanes = Lanes(memory, Space.shared(shape.shared))

    def word(address: int) -> int:
        (number,) = memory.data[memory.at(np.array([address]), 4)].view(np.int32)[0]
        return int(number)

    for n in range(items):
        sequence, head = divmod(n, shape.H)
        slot = word(indices + sequence * indices_b)
        pending = word(accepted + sequence * accepted_b) if shape.has_accepted else 0
        pending = min(max(pending, 0), shape.room)
        item = Item(np.int64(slot), np.int64(pending), np.int64(sequence * shape.drafts), head)
        lanes.space.data[:] = 0xFF  # NaN
        if shape.group == 4:
            zeros = shape.gathered_at + shape.keys * X_ROW
            lanes.space.data[zeros : zeros + 4 * X_ROW] = 0
        if slot > shape.pad_slot:
            _solve(lanes, shape, x, item)
        _apply(lanes, shape, x, item)


def _solve(lanes: Lanes, shape: Shape, x: Tensors, item: Item) -> None:
    buffer, lane, thread = shape.gathered_at, np.arange(32), np.arange(K)
    lanes.lanes, vectors = len(thread), range(2 + shape.heads)
    filters = solve.fetch_filters(lanes, shape, x, item.head, thread, vectors)
    drafted = solve.fetch_drafts(lanes, shape, x, item.row, item.head, thread, vectors)
    channels = solve.fetch_channels(lanes, shape, x, item, thread, vectors)
    solve.gather(lanes, shape, x, item, thread, buffer, vectors, filters, drafted, channels)
    lanes.lanes = len(lane)
    solve.keep(lanes, shape, x, item, lane, len(lane), buffer)
    for n in range(shape.heads):
        head = item.head * shape.heads + n
        new = solve.fetch_new_gates(lanes, shape, x, item.row, head, lane)
        gates = solve.Gates(*new, *solve.fetch_pending(lanes, shape, x, item.slot, head, lane))
        rates = solve.fetch_rates(lanes, shape, x, head)
        decays = solve.decays(lanes, shape, x, item, head, lane, rates, gates)
        products = solve.products(lanes, shape, lane, buffer)
        solved = buffer + shape.solved + n * shape.solved_size
        solve.solve(lanes, shape, products, decays, lane, solved)


def _apply(lanes: Lanes, shape: Shape, x: Tensors, item: Item) -> None:
    buffer, lane, tile = shape.gathered_at, np.arange(32), 0
    for part in range(V // ROWS):
        X = apply.operands(lanes, shape, lane, buffer)
        for n in range(shape.heads):
            head, first_row = item.head * shape.heads + n, part * ROWS
            if item.slot <= shape.pad_slot:
                apply.zeros(lanes, shape, x, item, head, lane, first_row)
                continue
            solved = buffer + shape.solved + n * shape.solved_size
            values = buffer + shape.values + n * shape.keys * V_ROW
            source = x.state + item.slot * x.state_s + head * x.state_h + part * shape.tile
            rows = lanes.memory.at(source + np.arange(shape.tile // 16) * 16, 16)
            staged = lanes.space.data[tile : tile + shape.tile].reshape(rows.shape)
            staged[:] = lanes.memory.data[rows]
            products = apply.multiply(lanes, shape, lane, tile, X)
            changes = apply.attend(
                lanes, shape, x, item, head, lane, first_row, values, solved, products
            )
            if item.pending > 0:
                apply.update(lanes, shape, lane, tile, solved, changes, X)
                lanes.memory.data[rows] = staged
