# SPDX-License-Identifier: Apache-2.0
"""Mistakes planted in the kernels' machine code are noticed by the conformance cases."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from ci.amdgcn import mutate
from ci.amdgcn.mutants import Mutant, mutants_of
from ci.amdgcn.mutate import Outcome, Trial
from gdn_portable.testing import cases

EACH = 5
LEAST = 0.8  # of a sample this small; docs/amd-simulator.md has the rate of a larger one
CODE = """\t.type k,@function
k:
\ts_waitcnt vmcnt(0)
\tv_sub_f32_e32 v0, v1, v2
\tds_read_b32 v3, v4 offset:4
\ts_barrier
\ts_cbranch_scc0 .L
.L:
\ts_endpgm
"""


def test_mistakes_that_change_a_result_are_noticed() -> None:
    trials = [*mutate.run("gfx942", EACH, seed=1)]

    assert len({trial.mutant.kind for trial in trials}) * EACH == len(trials)
    assert mutate.kill_rate(trials) >= LEAST


def test_a_line_is_broken_in_every_way() -> None:
    found = [(m.kind, m.line, m.after) for m in mutants_of(CODE, range(5))]

    assert found == [
        ("drop an instruction", 4, ""),
        ("another opcode", 4, "v_add_f32_e32 v0, v1, v2"),
        ("swap two sources", 4, "v_sub_f32_e32 v0, v2, v1"),
        ("another register", 4, "v_sub_f32_e32 v0, v2, v2"),
        ("another register", 4, "v_sub_f32_e32 v0, v1, v3"),
        ("drop an instruction", 5, ""),
        ("another offset", 5, "ds_read_b32 v3, v4 offset:20"),
        ("another register", 5, "ds_read_b32 v3, v5 offset:4"),
        ("drop s_barrier", 6, ""),
        ("invert a branch", 7, "s_cbranch_scc1 .L"),
    ]


def test_only_instructions_that_were_executed_are_broken() -> None:
    assert {mutant.line for mutant in mutants_of(CODE, {2})} == {5}


def test_a_mutant_differs_in_its_line_alone() -> None:
    mutant = Mutant("invert a branch", 7, "s_cbranch_scc0 .L", "s_cbranch_scc1 .L")

    assert mutant.apply(CODE) == CODE.replace("scc0", "scc1")


def test_a_mutant_without_effect_does_not_count() -> None:
    mutant = Mutant("another offset", 1, "", "")
    outcomes = [Outcome.NOTICED, Outcome.WITHIN_BOUNDS, Outcome.WITHOUT_EFFECT, Outcome.NOTICED]

    assert mutate.kill_rate([Trial("k", mutant, outcome) for outcome in outcomes]) == 2 / 3


def test_what_changes_nothing_is_told_from_what_a_case_notices() -> None:
    case = next(case for case in cases(mutate.SPEC) if case.name == "rule of decode")
    (kernel,) = mutate.kernels_of([case], "gfx942")
    stores = [m for m in mutants_of(kernel.text, kernel.executed) if "store" in m.before]
    dropped = next(m for m in stores if m.kind == "drop an instruction")
    nothing = Mutant("another register", dropped.line, dropped.before, dropped.before)

    assert mutate.try_one(kernel, dropped, "gfx942").outcome is Outcome.NOTICED
    assert mutate.try_one(kernel, nothing, "gfx942").outcome is Outcome.WITHOUT_EFFECT
