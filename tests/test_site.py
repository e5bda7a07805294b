# SPDX-License-Identifier: Apache-2.0
"""The documentation builds as a site without a warning, and says what the docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import gdn_portable
from gdn_portable import Op

pytest.importorskip("sphinx")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site; links and anchors that lead nowhere are warnings."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-b", "html"]
    result = subprocess.run(
        [*command, "-d", str(folder / "read"), "docs", str(folder / "html")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return folder / "html"


def _text(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_every_page_is_in_the_navigation(site: Path) -> None:
    pages = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").glob("**/*.md")}
    navigation = (site / "index.html").read_text()

    missing = [page for page in pages if f'href="{page.with_suffix(".html")}"' not in navigation]
    assert [str(page) for page in missing if page.name != "index.md"] == []


def test_every_op_is_on_the_page_of_the_contract(site: Path) -> None:
    page = (site / "contract.html").read_text()

    assert [op for op in Op if f'id="gdn_portable.GdnOps.{op.value}"' not in page] == []


def test_every_name_that_is_exported_is_on_the_page_of_types(site: Path) -> None:
    page = (site / "types.html").read_text()
    names = set(gdn_portable.__all__) - {"nn"}

    assert [
        name for name in sorted(names) if not re.search(rf'id="gdn_portable\.(\w+\.)?{name}"', page)
    ] == []


def test_the_contract_is_that_of_the_docstrings(site: Path) -> None:
    text = _text(site / "contract.html")

    assert "S = exp(g) * S; u = beta * (v - S k); S += u k^T; o = S q" in " ".join(text.split())
    assert "[T, H, K] queries; normalised and scaled inside." in text
