# SPDX-License-Identifier: Apache-2.0
"""The code in README and docs runs as it is printed; what they name and link to is there."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from gdn_backend_triton import ARCHS, CONV_WIDTHS, FLOATS, HEAD_DIMS

from ci import overview, support
from gdn_portable import Device, GdnSpec, Op, explain, select
from gdn_portable.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCKS = [
    (page.name, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]

COMMANDS = [
    (page.name, line.strip())
    for page in PAGES
    for line in re.findall(
        r"^ +(python -m gdn_portable \w.*)$", page.read_text().replace("\\\n", ""), re.MULTILINE
    )
]

KERNELS = {
    (page.name, name)
    for page in PAGES
    for name in re.findall(r"\b(?:triton|reference|composed)\.[a-z]\w*\b", page.read_text())
}
OVERRIDES = re.findall(
    rf"^ +{select.OVERRIDE_VARIABLE}=(\S+)$",
    (ROOT / "docs" / "selection.md").read_text(),
    re.MULTILINE,
)
SPEC = GdnSpec(
    num_k_heads=16,
    num_v_heads=32,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)


@pytest.mark.parametrize(
    "block", [block for *_, block in BLOCKS], ids=[f"{page}-{n}" for page, n, _ in BLOCKS]
)
def test_a_code_block_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("printed")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where a compiler looks for globals

    exec(compile(block, "<docs>", "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_link_inside_the_project_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [link for link in links if not link.startswith("http")]

    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(("page", "kernel"), sorted(KERNELS))
def test_a_kernel_that_is_named_exists(page: str, kernel: str) -> None:
    op = kernel.partition(".")[2]

    assert kernel in {c.kernel for c in explain(SPEC, "cpu", kernels={op: kernel})}


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_that_is_printed_is_taken(
    override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(select.OVERRIDE_VARIABLE, override)

    chosen = {c.op: c.kernel for c in explain(SPEC, Device("cuda", "sm90")) if c.chosen}

    assert chosen[Op.RECURRENT_DECODE] == "reference.recurrent_decode"
    assert chosen[Op.DECODE_STEP] == "composed.decode_step"


@pytest.mark.parametrize(
    "page", dict.fromkeys(path for path, *_ in support.blocks()), ids=lambda page: page.name
)
def test_the_tables_of_what_is_supported_are_those_that_the_backends_give(page: Path) -> None:
    # python -m ci.support --write writes them again
    assert page.read_text() == support.written(page)


def test_the_picture_of_times_shows_what_the_tables_say() -> None:
    # python -m ci.overview --write draws it again
    assert overview.PICTURE.read_text() == overview.drawn()


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_that_is_printed_exists_with_its_options(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[3:]
    command = typer.main.get_group(app).commands[name]
    known = {o for each in command.params for o in (*each.opts, *each.secondary_opts)}

    assert {word for word in arguments if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_an_extra_that_is_installed_is_declared(page: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    groups = re.findall(r"""pip install [^\n]*?["']\S*?\[([\w,]+)\]""", page.read_text())

    named = {extra for group in groups for extra in group.split(",")}
    assert {name for name in named if not re.search(rf"^{name} = \[", project, re.M)} == set()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_script_that_is_printed_exists(page: Path) -> None:
    named = re.findall(r"(?:^ +|`)(?:\S+=\S+ )*(ci/\w+)", page.read_text(), re.MULTILINE)
    modules = re.findall(r"python -m (ci\.[\w.]+)", page.read_text())

    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in modules if importlib.util.find_spec(name) is None]
    assert missing == []


def test_the_limits_of_the_kernels_are_those_that_they_declare() -> None:
    text = (DOCS / "kernels.md").read_text()
    head_dims = f"{', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"
    width = f"{CONV_WIDTHS[0]} to {CONV_WIDTHS[-1]}"

    assert set(re.findall(r"\b(?:sm\d+|gfx\d+)\b", text)) == set(ARCHS)
    assert "fp32, bf16, fp16" in text
    assert set(FLOATS) == {torch.float32, torch.bfloat16, torch.float16}
    assert head_dims in text
    assert width in text
