# SPDX-License-Identifier: Apache-2.0
"""The code in README and docs runs as it is printed; what they name and link to is there."""

import re
from pathlib import Path

import pytest
import torch
from gdn_backend_triton import ARCHS, CONV_WIDTHS, FLOATS, HEAD_DIMS

from gdn_portable import Device, GdnSpec, Op, explain, select

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.name, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
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
def test_a_code_block_runs(block: str) -> None:
    exec(compile(block, "<docs>", "exec"), {"__name__": "docs"})


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
    ("page", "head_dims"),
    [
        ("README.md", f"powers of two {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"),
        ("docs/kernels.md", f"{', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"),
    ],
)
def test_the_limits_of_the_kernels_are_those_that_they_declare(page: str, head_dims: str) -> None:
    text = (ROOT / page).read_text()
    width = f"{CONV_WIDTHS[0]} to {CONV_WIDTHS[-1]}"

    assert set(re.findall(r"\b(?:sm\d+|gfx\d+)\b", text)) == set(ARCHS)
    assert "fp32, bf16, fp16" in text
    assert set(FLOATS) == {torch.float32, torch.bfloat16, torch.float16}
    assert head_dims in text
    assert width in text
