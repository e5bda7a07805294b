# SPDX-License-Identifier: Apache-2.0
"""Tries the package that is installed, away from the tree; ``ci/package`` says where it is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[1]
CASES = ("--layer", "fp32", "--op", "decode_step", "--op", "chunk_prefill", "--op", "mtp_verify")


def run(*arguments: str) -> Any:
    """Return what a command prints as JSON, run in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gdn_portable", *arguments, "--json"]
        # threads that wait for each other make small products slow
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(printed.stdout)


def main() -> None:
    """Import, bind and run what was installed; raise where something is off."""
    import gdn_backend_triton

    import gdn_portable
    from gdn_portable import select

    for module in (gdn_portable, gdn_backend_triton):
        assert TREE not in Path(str(module.__file__)).resolve().parents, f"{module} is the tree's"
    assert importlib.metadata.version("gdn-portable") == gdn_portable.__version__
    for name in select.BUILTIN:
        select.get_backend(name)
    assert run("doctor", "--arch", "gfx942")["default_backend"] == "rocm"
    assert run("demo", "--new-bytes", "16", "--prompt", "ROMEO")["speculative_equals_plain"]
    report = run("verify", "--device", "cpu", *CASES)
    assert report["passed"] == report["cases"] > 0, report
    print(f"{Path(str(gdn_portable.__file__)).parent}: {report['passed']} passed, 0 failed")


if __name__ == "__main__":
    sys.path.remove(str(TREE / "ci"))
    main()
