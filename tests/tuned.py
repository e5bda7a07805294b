# SPDX-License-Identifier: Apache-2.0
"""What tests of measured choices share: kernels that say who they are, and times of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gdn_portable import Backend, Device, GdnSpec, Kernel, Op
from gdn_portable.measured import measured
from gdn_portable.reference import BACKEND as REFERENCE
from gdn_portable.tuned import Cell, Layer, Times, Tuned, file_name, versions
from tests.fakes import SPEC, kernel_of, reference_kernel

H200 = Device("cuda", "sm90", 0, "NVIDIA H200")
ONE_LONG, EIGHT_SHORT = Cell(1, 8192), Cell(8, 1024)
# a wins one long sequence, b eight short ones
BY_CELL = {ONE_LONG: {"a": 10.0, "b": 20.0}, EIGHT_SHORT: {"a": 20.0, "b": 10.0}}


def named(op: Op, name: str, **changes: Any) -> Kernel:
    """Declare a kernel of ``op`` that returns its library's name, and takes anything."""
    kernel = kernel_of(op, f"{name}.{op.value}", lambda *args, **kwargs: name)
    return replace(kernel, **changes)


A, B = named(Op.CHUNK_PREFILL, "a"), named(Op.CHUNK_PREFILL, "b")
STEP_A, STEP_B = named(Op.PREFILL_STEP, "a"), named(Op.PREFILL_STEP, "b")
PLANNER = reference_kernel(Op.PLAN_PREFILL)


def backend_of_measured(shipped: Path | None, *kernels: Kernel) -> Backend:
    """Return a table that chooses among ``kernels``, with the reference's after them."""
    served = {kernel.op for kernel in kernels}
    rest = [kernel for kernel in REFERENCE.kernels if kernel.op not in served]
    table = (*kernels, *rest)
    return Backend(name="fake", devices=None, kernels=(*measured(table, shipped), *table))


def times_of(op: Op, by_cell: Mapping[Cell, Mapping[str, float | None]]) -> Times:
    """Return times by the full names of kernels."""
    return {
        cell: {f"{name}.{op.value}": time for name, time in by_kernel.items()}
        for cell, by_kernel in by_cell.items()
    }


def keep(
    folder: Path,
    device: Device = H200,
    spec: GdnSpec = SPEC,
    *,
    by_cell: Mapping[Cell, Mapping[str, float | None]] = BY_CELL,
    ops: tuple[Op, ...] = (Op.CHUNK_PREFILL,),
    **changes: Any,
) -> Tuned:
    """Write a file of times."""
    layers = {Layer.of(spec): {op: times_of(op, by_cell) for op in ops}}
    path = folder / file_name(device, versions())
    tuned = replace(Tuned(path=path, device=device, versions=versions(), layers=layers), **changes)
    tuned.write()
    return tuned
