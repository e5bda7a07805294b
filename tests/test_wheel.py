# SPDX-License-Identifier: Apache-2.0
"""Wheel and sdist hold all that they should and nothing else, and what is installed works."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "gdn_portable", *sorted((ROOT / "backends").glob("gdn_backend_*")))


def _run(*command: object, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a wheel and an sdist."""
    folder = tmp_path_factory.mktemp("dist")
    _run("-m", "hatchling", "build", "-d", folder, folder=ROOT)
    return folder


def _files(package: Path) -> set[str]:
    """Return what is in a package's folder, caches left out."""
    paths = (path for path in package.rglob("*") if path.is_file())
    kept = (path for path in paths if "__pycache__" not in path.parts)
    return {path.relative_to(package.parent).as_posix() for path in kept}


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    held = {name for name in names if ".dist-info/" not in name}
    assert held == set().union(*map(_files, PACKAGES))
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= held
    assert "gdn_portable/demo/shakespeare.safetensors" in held
    assert any(name.startswith("gdn_backend_cuda/tuned/") for name in held)
    assert [name for name in names if name.endswith("licenses/LICENSE")] != []


def test_the_sdist_holds_what_tests_and_docs_need_and_no_build(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    expected = {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "ci/test"}
    assert expected | {"docs/conf.py", "ci/constraints.txt"} <= names
    assert {name for name in names if name.startswith("docs/_site")} == set()


def test_the_installed_wheel_binds_generates_and_passes_cases(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    options = ("-q", "--no-deps", "--no-index", "--target", installed)
    _run("-m", "pip", "install", *options, wheel, folder=empty)

    printed = _run(ROOT / "ci" / "installed.py", folder=empty, PYTHONPATH=str(installed))

    assert f"{installed / 'gdn_portable'}: " in printed
    assert " passed, 0 failed" in printed
