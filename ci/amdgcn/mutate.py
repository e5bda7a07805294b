# SPDX-License-Identifier: Apache-2.0
"""Plants mistakes in the kernels' machine code, and counts how many the conformance cases notice.

python -m ci.amdgcn.mutate --each 40
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ci.amdgcn import execution, program
from ci.amdgcn.conformance import bind_simulated
from ci.amdgcn.driver import Simulator, simulated
from ci.amdgcn.errors import UnknownInstructionError
from ci.amdgcn.execution import Order
from ci.amdgcn.mutants import Mutant, mutants_of
from gdn_portable import GdnOps, GdnSpec
from gdn_portable.testing import Case, cases

SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=32,
    head_v_dim=32,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
MOST_BLOCKS = 100_000  # of a launch; these cases take a tenth at most


@dataclass(slots=True)
class Kernel:
    """A kernel as it was compiled.

    Attributes:
        name: of the function.
        text: its assembly.
        cases: that launch it, the shortest first.
        executed: positions of the instructions that one of them executes.
    """

    name: str
    text: str
    cases: list[Case] = field(default_factory=list)
    executed: set[int] = field(default_factory=set)


class Outcome(Enum):
    """What a mistake did: a case noticed, or a result changed within bounds, or none did."""

    NOTICED = "noticed"
    WITHIN_BOUNDS = "within bounds"
    WITHOUT_EFFECT = "without effect"


@dataclass(frozen=True, slots=True)
class Trial:
    """A mutant of a kernel, and what became of it."""

    kernel: str
    mutant: Mutant
    outcome: Outcome


def kernels_of(every: Iterable[Case], arch: str) -> list[Kernel]:
    """Return the kernels that cases launch."""
    found: dict[str, Kernel] = {}
    seconds: dict[str, float] = {}
    with simulated(arch) as gpu:
        for case in every:
            gpu.launches.clear()
            case.check(bind_simulated(case.spec, arch))
            seconds[case.name] = sum(launch.seconds for launch in gpu.launches)
            for launch in gpu.launches:
                kernel = found.setdefault(launch.assembly, Kernel(launch.kernel, launch.assembly))
                blocks = program.load(launch.assembly).blocks
                for start in launch.counts.blocks:
                    kernel.executed.update(range(start, blocks[start].end))
                if case.name not in (known.name for known in kernel.cases):
                    kernel.cases.append(case)
    for kernel in found.values():
        kernel.cases.sort(key=lambda case: seconds[case.name])
    return list(found.values())


def sample(kernels: Sequence[Kernel], each: int, seed: int) -> list[tuple[Kernel, Mutant]]:
    """Return ``each`` mutants of every kind, that the simulator can decode."""
    by_kind: dict[str, list[tuple[Kernel, Mutant]]] = defaultdict(list)
    for kernel in kernels:
        for mutant in mutants_of(kernel.text, kernel.executed):
            by_kind[mutant.kind].append((kernel, mutant))
    choose = random.Random(seed)
    chosen: list[tuple[Kernel, Mutant]] = []
    for kind in sorted(by_kind):
        drawn = choose.sample(by_kind[kind], len(by_kind[kind]))
        chosen += _first_decodable(drawn, each)
    return chosen


def _first_decodable(
    drawn: Sequence[tuple[Kernel, Mutant]], count: int
) -> Iterator[tuple[Kernel, Mutant]]:
    for kernel, mutant in drawn:
        if count == 0:
            return
        try:
            program.load(mutant.apply(kernel.text))
        except UnknownInstructionError:
            continue
        count -= 1
        yield kernel, mutant


def try_one(kernel: Kernel, mutant: Mutant, arch: str) -> Trial:
    """Return whether one of the kernel's cases notices, or one of their results changes."""
    broken = mutant.apply(kernel.text)
    # what is between two barriers may be right in the order that it is simulated in by default
    orders = tuple(Order) if mutant.kind == "drop s_barrier" else (Order.LOCK_STEP,)
    outcome = Outcome.WITHOUT_EFFECT
    with simulated(arch) as gpu:
        gpu.rewrite = lambda text: broken if text == kernel.text else text
        for gpu.order, case in product(orders, kernel.cases):
            gpu.launches.clear()
            if _notices(case, bind_simulated(case.spec, arch)):
                return Trial(kernel.name, mutant, Outcome.NOTICED)
        if any(_changes(case, gpu) for case in kernel.cases):
            outcome = Outcome.WITHIN_BOUNDS
    return Trial(kernel.name, mutant, outcome)


def _notices(case: Case, ops: GdnOps) -> bool:
    try:
        case.check(ops)
    except Exception:  # a mistake may make anything fail
        return True
    return False


def _changes(case: Case, gpu: Simulator) -> bool:
    """Return whether a bit of the results differs from those of the kernel as it was compiled."""
    ops, rewrite = bind_simulated(case.spec, gpu.arch), gpu.rewrite
    changed = case.results(ops)
    gpu.rewrite = None
    same = case.results(ops)
    gpu.rewrite = rewrite
    return any(not torch.equal(_bits(changed[name]), _bits(same[name])) for name in same)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def run(arch: str, each: int, seed: int) -> Iterator[Trial]:
    """Yield a trial for ``each`` mutants of every kind."""
    former, execution.MAX_BLOCKS = execution.MAX_BLOCKS, MOST_BLOCKS
    try:
        for kernel, mutant in sample(kernels_of(cases(SPEC), arch), each, seed):
            yield try_one(kernel, mutant, arch)
    finally:
        execution.MAX_BLOCKS = former


def kill_rate(trials: Sequence[Trial]) -> float:
    """Return the share that was noticed, of the mistakes that changed a result."""
    effective = [trial for trial in trials if trial.outcome is not Outcome.WITHOUT_EFFECT]
    return sum(trial.outcome is Outcome.NOTICED for trial in effective) / len(effective)


def main(
    arch: Annotated[str, typer.Option(help="gfx942 or gfx950.")] = "gfx942",
    each: Annotated[int, typer.Option(help="Mutants of every kind.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
) -> None:
    """Plant mistakes in the kernels' machine code and count those that the cases notice."""
    torch.set_num_threads(1)
    trials = list(track(run(arch, each, seed), "mutants", console=Console(stderr=True)))
    by_kind: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for trial in trials:
        by_kind[trial.mutant.kind][trial.outcome] += 1
    print(f"| mistake | {' | '.join(outcome.value for outcome in Outcome)} |\n|---|---|---|---|")
    for kind, counts in by_kind.items():
        print(f"| {kind} | {' | '.join(str(counts[outcome]) for outcome in Outcome)} |")
    print(f"\n{arch}: {kill_rate(trials):.1%} of those with an effect are noticed\n")
    for trial in trials:
        if trial.outcome is not Outcome.NOTICED:
            mutant = trial.mutant
            change = f"{mutant.before}  ->  {mutant.after or 'nothing'}"
            print(f"{trial.outcome.value}: {trial.kernel}, line {mutant.line}: {change}")


if __name__ == "__main__":
    typer.run(main)
