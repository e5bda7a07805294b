# SPDX-License-Identifier: Apache-2.0
"""Compiles the calls of a set for one GPU, and prints a line of JSON for every kernel and call.

It runs in a process of its own: the compiler is the one that this process finds, stderr is a file
from which what it writes is read, and nothing comes from a cache.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import torch

from ci.resources import calls, compilers
from ci.resources.driver import Compiled, compiling_for
from ci.resources.measure import Needs, faults_of, needs_of
from gdn_portable import Device

STDERR = 2
SETS = {"models": calls.model_calls, "table": calls.table_calls, "every": calls.every_call}


def compile_all(arch: str, compiler: str, name: str) -> None:
    """Print a line for every kernel that the calls of a set compile, and one after each call.

    The CuTe DSL has one set.
    """
    device = Device("rocm" if arch.startswith("gfx") else "cuda", arch)
    call: calls.Call | None = None
    compiling: AbstractContextManager[None]
    read = 0

    def said() -> str:
        nonlocal read
        text = os.pread(STDERR, 1 << 20, read)
        read += len(text)
        return text.decode(errors="replace").strip()

    def tell(kernel: str | None, needs: Needs | None, faults: list[str]) -> None:
        assert call is not None
        place = {"layer": call.layer, "call": call.name, "kernel": kernel}
        line = {**place, "needs": asdict(needs) if needs else None, "faults": faults}
        print(json.dumps(line), flush=True)

    def report(kernel: Compiled) -> None:
        needs = needs_of(kernel, arch)
        tell(kernel.name, needs, faults_of(kernel, arch, needs, said()))

    if compiler.startswith("cutlass-"):
        from ci.resources.cute import cute_calls

        called, compiling = cute_calls(arch, report), nullcontext()
    else:
        called, compiling = SETS[name](device), compiling_for(arch, report)
    with compiling, torch.no_grad():
        for call in called:
            faults = []
            try:
                call.run()
            except Exception as error:  # whatever a compiler raises is what is looked for
                faults = [f"{type(error).__name__}: {error}"]
            if rest := said():
                faults.append(f"the compiler says: {rest}")
            tell(None, None, faults)


def main() -> None:
    """Compile for the GPU, with the compiler and the set of calls that are named."""
    torch.set_num_threads(1)
    arch, compiler, name = sys.argv[1:]
    library, _, version = compiler.partition("-")
    found = importlib.metadata.version(compilers.CUTLASS if library == "cutlass" else library)
    if found != version:
        sys.exit(f"{library} is {found}, needs {version}")
    compile_all(arch, compiler, name)


if __name__ == "__main__":
    main()
