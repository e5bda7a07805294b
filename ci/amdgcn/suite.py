# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance cases on simulated GPUs; the command is ``ci/simulate``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain, groupby, product
from multiprocessing import get_context
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from ci.amdgcn.conformance import bind_simulated
from ci.amdgcn.driver import LDS_BYTES, simulated
from ci.amdgcn.execution import Order
from gdn_portable import GdnSpec
from gdn_portable.testing import cases

QWEN3_NEXT = GdnSpec(
    num_k_heads=16,
    num_v_heads=32,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
SMALL = replace(QWEN3_NEXT, num_k_heads=1, num_v_heads=2, head_k_dim=32, head_v_dim=32)
LAYERS = {
    "small": SMALL,
    "small fp16": replace(SMALL, dtype=torch.float16, state_dtype=torch.float16),
}
MODELS = {
    "Qwen3-Next": QWEN3_NEXT,
    "Qwen3-Next, bf16 state": replace(QWEN3_NEXT, state_dtype=torch.bfloat16),
    "Qwen3-Next, fp16": replace(QWEN3_NEXT, dtype=torch.float16),
    "Qwen3-Next, TP 8": QWEN3_NEXT.shard(8),
    "H16/HV48, TP 4": replace(QWEN3_NEXT, num_v_heads=48).shard(4),
    "H16/HV64, TP 4": replace(QWEN3_NEXT, num_v_heads=64).shard(4),
}
PARTS = 8  # of a layer's cases, so that the processes have something to share


@dataclass(frozen=True, slots=True)
class Job:
    """Every ``PARTS``-th case of a layer, from ``part`` on."""

    arch: str
    layer: str
    part: int
    order: Order
    pattern: str

    @property
    def place(self) -> tuple[str, str]:
        """The GPU and the layer."""
        return self.arch, self.layer


@dataclass(frozen=True, slots=True)
class Result:
    """A case: the largest error over its bound, or what it failed with."""

    job: Job
    case: str
    error: float
    failure: str = ""


def run(job: Job) -> list[Result]:
    """Run a job's cases."""
    torch.set_num_threads(1)
    spec = {**LAYERS, **MODELS}[job.layer]
    results = []
    for number, case in enumerate(cases(spec)):
        if number % PARTS != job.part or not fnmatchcase(case.name, job.pattern):
            continue
        ops = bind_simulated(case.spec, job.arch)
        with torch.no_grad(), simulated(job.arch, order=job.order):
            try:
                results.append(Result(job, case.name, case.check(ops)))
            except Exception as error:  # whatever it is, the other cases are run as well
                failure = f"{type(error).__name__}: {error}"
                results.append(Result(job, case.name, float("inf"), failure))
    return results


def _results(jobs: list[Job], processes: int | None) -> Iterator[Result]:
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool:
        done = track(pool.map(run, jobs), "cases", len(jobs), console=Console(stderr=True))
        yield from chain.from_iterable(done)


def main(
    full: Annotated[bool, typer.Option("--full", help="At models' shapes; half an hour.")] = False,
    arch: Annotated[list[str] | None, typer.Option(help="gfx942 or gfx950; both.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="One of the layers by name.")] = None,
    case: Annotated[str, typer.Option(help="Pattern of the cases' names.")] = "*",
    order: Annotated[Order, typer.Option(help="Of workgroups and waves.")] = Order.LOCK_STEP,
    processes: Annotated[int | None, typer.Option(help="By default one for every core.")] = None,
) -> None:
    """Run the conformance cases on simulated AMD GPUs."""
    layers = layer or [*(MODELS if full else LAYERS)]
    if unknown := set(layers) - {*LAYERS, *MODELS}:
        known = ", ".join((*LAYERS, *MODELS))
        raise typer.BadParameter(f"no layer {', '.join(unknown)}; there is {known}")
    jobs = [Job(*place, order, case) for place in product(arch or LDS_BYTES, layers, range(PARTS))]
    failed = made = 0
    by_layer = groupby(_results(jobs, processes), lambda result: result.job.place)
    for (gpu, name), results in by_layer:
        found = list(results)
        worst = max(found, key=lambda result: result.error)
        failures = [result for result in found if result.failure]
        print(
            f"{gpu}, {name}: {len(found) - len(failures)} of {len(found)} cases pass, "
            f"largest error {worst.error:.0%} of its bound, in {worst.case}",
            flush=True,
        )
        for result in failures:
            print(f"  {result.case}: {result.failure}")
        failed += len(failures)
        made += len(found)
    if not made:
        raise typer.BadParameter(f"no case matches {case!r}")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
