# SPDX-License-Identifier: Apache-2.0
"""The workflows are valid, call scripts that are there, and cover what the project supports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("check_jsonschema")

from ci.resources.measure import GPUS  # noqa: E402

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted(path for path in (ROOT / "ci").iterdir() if path.is_file() and not path.suffix)
GUARD = "github.event.pull_request.head.repo.full_name == github.repository"


@cache
def _jobs(name: str) -> dict[str, Any]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    jobs: dict[str, Any] = workflow["jobs"]
    return jobs


def _matrix(workflow: str, job: str, name: str) -> list[str]:
    values: list[str] = _jobs(workflow)[job]["strategy"]["matrix"][name]
    return values


STEPS = [
    (path.name, step["run"])
    for path in WORKFLOWS
    for job in _jobs(path.name).values()
    for step in job["steps"]
    if "run" in step
]


def test_the_workflows_are_what_github_takes() -> None:
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("workflow", "line"), STEPS)
def test_a_step_calls_one_script_that_runs_by_hand(workflow: str, line: str) -> None:
    script = ROOT / line.split()[0]

    assert "\n" not in line
    assert script in SCRIPTS
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_a_program_that_bash_can_read(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)

    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ")


def test_the_tests_run_on_every_python_that_is_declared() -> None:
    project = (ROOT / "pyproject.toml").read_text()

    assert _matrix("checks.yml", "cpu", "python") == re.findall(r"Python :: (3\.\d+)", project)


def test_the_oldest_triton_runs_as_well() -> None:
    (oldest,) = _matrix("checks.yml", "cpu", "include")
    pinned = (ROOT / oldest["constraints"]).read_text()

    assert re.search(r"^triton==3\.6\.", pinned, re.MULTILINE)


def test_the_kernels_are_compiled_for_every_gpu_with_a_table() -> None:
    assert sorted(_matrix("checks.yml", "compile", "arch")) == sorted(GPUS)


def test_a_fork_never_gets_a_runner_with_a_gpu() -> None:
    job = _jobs("gpus.yml")["gpu"]

    assert job["runs-on"][0] == "self-hosted"
    assert "!github.event.repository.fork" in job["if"]
    assert GUARD in job["if"]
    owners = [name for path in WORKFLOWS for name, j in _jobs(path.name).items() if _is_own(j)]
    assert owners == ["gpu"]


def _is_own(job: dict[str, Any]) -> bool:
    return "self-hosted" in job["runs-on"]
