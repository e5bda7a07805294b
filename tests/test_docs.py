# SPDX-License-Identifier: Apache-2.0
"""The code in README and docs runs as it is printed, and what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


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
