# SPDX-License-Identifier: Apache-2.0
"""What an import costs and loads, who may import whom, and that contract and reference agree."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import gdn_portable
from gdn_portable import GdnOps, Op
from gdn_portable.reference import BACKEND as REFERENCE
from gdn_portable.steps import PARTS

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "gdn_portable").rglob("*.py"))
BACKENDS = sorted((ROOT / "backends").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SHARED_KERNELS = "gdn_backend_triton"
VENDOR_LIBRARIES = {"triton", "flashinfer", "cutlass", "aiter"}
OTHER_LIBRARIES = {"transformers", "typer", "rich", "safetensors"}
# whoever asks for them imports them
LATER = {"bench", "cli", "custom_ops", "demo", "engines", "parallel", "reference", "testing"}
MAY_IMPORT_THE_REFERENCE = {"reference", "demo", "cli"}
BACKEND_PACKAGES = sorted({path.relative_to(ROOT / "backends").parts[0] for path in BACKENDS})
POSITIONAL_OR_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD

IMPORT_TABLES = """
import sys
from gdn_portable import select
for name in select.BUILTIN:
    select.get_backend(name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
IMPORT = """
import sys
import torch
before = set(sys.modules)
import gdn_portable
print(*sorted(set(sys.modules) - before))
"""


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imported(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere in it, with the names taken from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def _roots(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in _imported(path)}


def _takes_reference(path: Path) -> bool:
    modules = _imported(path)
    return any(f"{module}.".startswith("gdn_portable.reference.") for module in modules)


def test_an_import_loads_no_library_but_torch_and_of_ours_what_ops_are_bound_with() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
    )

    modules = set(result.stdout.split())
    packages = {name.partition(".")[0] for name in modules}
    assert "gdn_portable" in packages
    assert packages & (VENDOR_LIBRARIES | OTHER_LIBRARIES) == set()
    assert not {package for package in packages if package.startswith("gdn_backend")}
    assert modules & {f"gdn_portable.{name}" for name in LATER} == set()


def test_the_tables_of_all_backends_load_no_vendor_library() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_TABLES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((".", "backends"))},
        capture_output=True,
        text=True,
        check=True,
    )

    loaded = set(result.stdout.split())
    assert loaded & VENDOR_LIBRARIES == set()
    assert set(BACKEND_PACKAGES) <= loaded


def test_the_wheel_holds_every_backend() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = (\[.*?\])", project, re.MULTILINE | re.DOTALL)

    assert packages is not None
    expected = ["gdn_portable", *(f"backends/{name}" for name in BACKEND_PACKAGES)]
    assert sorted(ast.literal_eval(packages[1])) == sorted(expected)
    assert all((ROOT / "backends" / name / "py.typed").exists() for name in BACKEND_PACKAGES)


@pytest.mark.parametrize("path", CORE, ids=_name)
def test_core_imports_no_backend_and_no_vendor_library(path: Path) -> None:
    roots = _roots(path)

    assert roots & VENDOR_LIBRARIES == set()
    assert not {root for root in roots if root.startswith("gdn_backend")}


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in CORE
        if path.relative_to(ROOT / "gdn_portable").parts[0] not in MAY_IMPORT_THE_REFERENCE
    ],
    ids=_name,
)
def test_core_names_the_reference_only_in_the_table_of_backends(path: Path) -> None:
    assert not _takes_reference(path)


def test_a_backend_imports_the_shared_kernels_and_no_other_backend() -> None:
    imports = {
        (path.relative_to(ROOT / "backends").parts[0], root)
        for path in BACKENDS
        for root in _roots(path)
        if root.startswith("gdn_backend")
    }

    assert {(own, root) for own, root in imports if root not in (own, SHARED_KERNELS)} == set()


def test_no_kernel_imports_the_reference() -> None:
    assert [_name(path) for path in BACKENDS if _takes_reference(path)] == []


@pytest.mark.parametrize("path", [*CORE, *BACKENDS, *TESTS], ids=_name)
def test_a_file_starts_with_its_licence(path: Path) -> None:
    assert path.read_text().splitlines()[:1] == ["# SPDX-License-Identifier: Apache-2.0"]


@pytest.mark.parametrize("path", CORE, ids=_name)
def test_a_file_of_the_core_has_at_most_400_lines_of_code(path: Path) -> None:
    """The contract's docstrings are not counted: they are written once, in one place."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    ]
    prose = sum((doc.end_lineno or doc.lineno) - doc.lineno + 1 for doc in docstrings)

    assert len(path.read_text().splitlines()) - prose <= 400


def test_every_public_name_exists_and_is_listed_once_in_order() -> None:
    names = gdn_portable.__all__

    assert [name for name in names if not hasattr(gdn_portable, name)] == []
    assert names == sorted(set(names))


def test_the_bound_object_has_a_field_for_every_op() -> None:
    names = [field.name for field in fields(GdnOps)]

    assert set(names) == {op.value for op in Op} | {"spec", "device", "kernels", "warmup"}


def _contract(op: Op) -> list[tuple[str, Any, object]]:
    """Return names, kinds and defaults of an op's parameters as ``interface`` states them."""
    protocol = get_type_hints(GdnOps)[op.value]
    return _parameters(protocol.__call__)[1:]


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, object]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.parametrize("op", [kernel.op for kernel in REFERENCE.kernels], ids=str)
def test_the_reference_has_the_parameters_of_the_contract_after_the_spec(op: Op) -> None:
    function = getattr(gdn_portable.reference, op.value)

    spec, *rest = _parameters(function)

    assert spec == ("spec", POSITIONAL_OR_KEYWORD, inspect.Parameter.empty)
    assert rest == _contract(op)


@pytest.mark.parametrize("op", PARTS, ids=str)
def test_a_composed_step_has_the_parameters_of_the_contract_and_then_its_parts(op: Op) -> None:
    step, parts = PARTS[op]
    contract = _contract(op)

    parameters = _parameters(step)

    assert parameters[: len(contract)] == contract
    assert [name for name, *_ in parameters[len(contract) :]] == ["spec", *(p.value for p in parts)]


def test_the_reference_or_a_composition_serves_every_op() -> None:
    served = [kernel.op for kernel in REFERENCE.kernels]

    assert sorted([*served, *PARTS]) == sorted(Op)


@pytest.mark.parametrize("op", Op, ids=str)
def test_every_op_has_a_contract_in_words(op: Op) -> None:
    protocol = get_type_hints(GdnOps)[op.value]

    assert protocol.__doc__ and protocol.__call__.__doc__
