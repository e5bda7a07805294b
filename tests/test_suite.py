# SPDX-License-Identifier: Apache-2.0
"""The command that runs all cases on simulated GPUs reports every one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import typer

pytest.importorskip("triton")

from ci.amdgcn import Order, suite
from ci.amdgcn.suite import Job, Result
from gdn_portable import GdnOps, GdnSpec, bind
from gdn_portable.testing import cases

JOB = Job("gfx942", "small", 0, Order.LOCK_STEP, "decode")


def _results_of(pattern: str) -> list[Result]:
    parts = (replace(JOB, part=part, pattern=pattern) for part in range(suite.PARTS))
    return [result for job in parts for result in suite.run(job)]


def test_every_case_is_in_one_part() -> None:
    names = [case.name for case in cases(suite.SMALL) if case.name.startswith("decode")]

    results = _results_of("decode*")

    assert sorted(result.case for result in results) == sorted(names)
    assert all(0 < result.error <= 1 and not result.failure for result in results)


def test_a_case_that_fails_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(spec: GdnSpec, arch: str) -> GdnOps:
        return bind(replace(spec, scale=0.26), "cpu")

    monkeypatch.setattr(suite, "bind_simulated", wrong)

    (result,) = _results_of("decode")

    assert result.error == float("inf")
    assert "AssertionError: decode: output is off by" in result.failure


def test_the_command_sums_up_layers_and_fails_where_a_case_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def results(jobs: list[Job], processes: int | None) -> Iterator[Result]:
        for job in jobs:
            yield Result(job, "decode", 0.5)
        yield Result(jobs[-1], "prefill", float("inf"), "AssertionError: off")

    monkeypatch.setattr(suite, "_results", results)

    with pytest.raises(typer.Exit) as ended:
        suite.main(full=True, arch=["gfx950"], layer=["Qwen3-Next", "small"])

    assert ended.value.exit_code == 1
    assert capsys.readouterr().out.splitlines() == [
        "gfx950, Qwen3-Next: 8 of 8 cases pass, largest error 50% of its bound, in decode",
        "gfx950, small: 8 of 9 cases pass, largest error inf% of its bound, in prefill",
        "  prefill: AssertionError: off",
    ]
