# SPDX-License-Identifier: Apache-2.0
"""The CuTe kernel as it is compiled, run on a CPU: whatever is late, it waits for it."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gdn_backend_cuda.cute_replay.plan import Team
from gdn_backend_cuda.cute_replay.shape import Shape

from ci.resources import compilers
from gdn_portable import GdnOps, GdnSpec, bind
from tests.calls import leaves
from tests.cute_cases import SPEC, replay_case
from tests.cute_double import HOPPER, Double
from tests.cute_lanes import Space
from tests.ptx_block import Block, DeadlockError
from tests.ptx_program import Program, Statement, parse

CUTLASS = next((name for name in compilers.names() if name.startswith("cutlass-")), None)
if CUTLASS is None or not compilers.is_installed(CUTLASS):
    pytest.skip("needs the CuTe DSL: python -m ci.resources --install", allow_module_level=True)

COMPILE = """
from gdn_backend_cuda.cute_replay.kernel import compile_for
from gdn_backend_cuda.cute_replay.shape import Shape
print(compile_for({shape}, "sm90", "--keep-ptx").__ptx__)
"""
RATIO2 = replace(SPEC, num_k_heads=1, num_v_heads=2)
BFLOAT16 = replace(SPEC, num_v_heads=2, state_dtype=torch.bfloat16)
TILE_BY_TILE, TIES = "fp32 state, tile by tile", "bf16 state, ties"
# the layer, sequences, who takes an item, and what a call brings
KINDS: dict[str, tuple[GdnSpec, int, Team, dict[str, int]]] = {
    "fp32 state, all tiles at once": (RATIO2, 3, Team(8, 1), {"bias": True}),
    "fp32 state, three of four tiles": (RATIO2, 5, Team(4, 2), {"bias": True}),
    TILE_BY_TILE: (RATIO2, 3, Team(8, 2), {}),
    "fp32 state, one head": (replace(RATIO2, num_v_heads=1), 3, Team(8, 2), {"fresh": True}),
    "fp32 state, three drafts": (RATIO2, 5, Team(4, 2), {"P": 3, "ties": True}),
    TIES: (BFLOAT16, 5, Team(8, 2), {"ties": True}),
    "bf16 state, two drafts, room for three": (BFLOAT16, 5, Team(8, 2), {"P": 2, "room": 3}),
    "fp16 state": (replace(BFLOAT16, state_dtype=torch.float16), 5, Team(8, 2), {"bias": True}),
    "fp16": (replace(RATIO2, dtype=torch.float16), 3, Team(4, 2), {"ties": True}),
    "fp32 state, eight drafts": (RATIO2, 3, Team(8, 1), {"P": 8, "bias": True}),
    "bf16 state, five drafts": (BFLOAT16, 3, Team(4, 2), {"P": 5, "ties": True}),
    "fp32 state, sixteen drafts": (RATIO2, 3, Team(4, 2), {"P": 16, "bias": True}),
    "bf16 state, nine drafts, room for ten": (BFLOAT16, 3, Team(8, 1), {"P": 9, "room": 10}),
    "bf16 state, every warp solves": (
        replace(BFLOAT16, num_k_heads=1, num_v_heads=4),
        3,
        Team(4, 2),
        {},
    ),
    "bf16 state, one draft": (BFLOAT16, 3, Team(8, 2), {"P": 1}),
}
Change = Callable[[Program], Program]


@cache
def _program(shape: Shape, dumps: str) -> Program:
    assert CUTLASS is not None
    paths = os.pathsep.join(map(str, compilers.paths(CUTLASS)))
    environment = {**os.environ, "PYTHONPATH": paths, "CUTE_DSL_DUMP_DIR": dumps}
    command = [sys.executable, "-c", COMPILE.format(shape=shape)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return parse(done.stdout)


class Machine:
    """Runs the op with the kernel's PTX."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dumps: str) -> None:
        self.double = Double(monkeypatch)
        self.dumps = dumps
        monkeypatch.setattr(self.double.launcher, "start_of", self.start_of)
        monkeypatch.setattr(self.double.launcher, "least_items", lambda *_: 1)

    def start_of(self, shape: Shape, arch: str) -> Callable[[Sequence[int]], None]:
        shape = replace(shape, **self.team._asdict())
        program = self.change(_program(shape, self.dumps))

        def start(numbers: Sequence[int]) -> None:
            memory, rng = Space.of(self.double.memory), random.Random(self.seed)
            items = numbers[-1]
            blocks = [
                Block(
                    program, numbers, memory, Space.shared(shape.shared),
                    32 * shape.warps, n, items, rng,
                )
                for n in range(items)
            ]  # fmt: skip
            for block in blocks:
                block.run()

        return start

    def check(self, kind: str, seed: int, change: Change = lambda program: program) -> None:
        spec, B, self.team, options = KINDS[kind]
        self.seed, self.change = seed, change
        replay_case(spec, B, seed=seed, **options).check(self.bound(spec))

    def bound(self, spec: GdnSpec) -> GdnOps:
        step = self.double.launcher.make_verify_step(spec, HOPPER, deterministic=False)

        def verify_step(**arguments: Any) -> torch.Tensor:
            self.double.memory = list(leaves(arguments).values())
            return step(**arguments)

        return dataclasses.replace(bind(spec, "cpu", backend="reference"), verify_step=verify_step)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(monkeypatch, str(tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_kernel_passes_whatever_lands_when(machine: Machine, kind: str) -> None:
    machine.check(kind, seed=0)


@pytest.mark.parametrize("P", [4, 16])
def test_results_are_the_same_bits_whoever_takes_an_item(machine: Machine, P: int) -> None:
    machine.seed, machine.change = 0, lambda program: program
    written = []
    for machine.team in (Team(8, 1), Team(4, 2)):
        arguments = replay_case(RATIO2, 3, P=P).arguments
        machine.bound(RATIO2).verify_step(**arguments)
        written.append(leaves(arguments))

    one, other = written
    assert all(torch.equal(x.nan_to_num(), other[name].nan_to_num()) for name, x in one.items())


# in the order of the text; a product of one term is soon done, and then waits for what is solved
WAITS = (
    ("griddepcontrol", 0, TILE_BY_TILE),
    ("bar.sync", 0, TILE_BY_TILE),
    ("try_wait", 0, TILE_BY_TILE),
    ("try_wait", 1, TIES),
    ("wait_group", 0, TILE_BY_TILE),
    ("wait_group", 1, TILE_BY_TILE),
)


def _without(op: str, number: int) -> Change:
    """Return what makes a program go on at one of its waits."""

    def change(program: Program) -> Program:
        waits = [n for n, statement in enumerate(program.statements) if op in statement.op]
        at = waits[number]
        passed = Statement("fence", ())
        if op == "try_wait":
            passed = Statement("mov.pred", (program.statements[at].operands[0], "1"))
        before, after = program.statements[:at], program.statements[at + 1 :]
        return replace(program, statements=(*before, passed, *after))

    return change


@pytest.mark.parametrize(("op", "number", "kind"), WAITS)
def test_a_kernel_that_does_not_wait_is_found_out(
    machine: Machine, op: str, number: int, kind: str
) -> None:
    found = r"is off|has NaN|warps wait|does not wait"
    with pytest.raises((AssertionError, DeadlockError), match=found):
        machine.check(kind, 0, _without(op, number))
