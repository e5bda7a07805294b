# SPDX-License-Identifier: Apache-2.0
"""FlyDSL's kernels: compiled as far as assembly, without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

from ci.aiter.launch import launch

LAST_STAGE = "18_*.mlir"  # before a linker would be needed
TO_ASSEMBLY = 'builtin.module(gpu-module-to-binary{format=isa opts="" section= toolkit=})'
TENSORS = (
    "query", "key", "value", "a", "b", "dt_bias", "A_log", "read_indices", "write_indices",
    "state", "out",
)  # fmt: skip
ARGUMENT = re.compile(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)")


def use_flydsl(arch: str) -> None:
    """Make ``flydsl_gdr_decode`` run on the simulator."""
    settings = {"FLYDSL_GPU_ARCH": arch, "ARCH": arch, "COMPILE_ONLY": "1", "FLYDSL_DUMP_IR": "1"}
    os.environ.update({**settings, "FLYDSL_RUNTIME_ENABLE_CACHE": "0"})
    module: Any = importlib.import_module("aiter.ops.flydsl.linear_attention_kernels")
    texts: dict[int, tuple[object, str]] = {}  # the kernel is kept, or its id would be another's

    def run(kernel: Any, *arguments: Any) -> None:
        if id(kernel) not in texts:
            texts[id(kernel)] = kernel, _assembly(kernel, arguments)
        text = texts[id(kernel)][1]
        tensors = dict(zip(TENSORS, arguments, strict=False))
        batch = arguments[len(TENSORS)]
        name = re.search(r"_(\d+)w\d+x\d+_vs(\d+)", text)
        assert name is not None
        waves, blocks = map(int, name.groups())
        programs = batch * tensors["state"].shape[1] * blocks
        launch(text, _packed(text, arguments), tensors, (programs, 1, 1), waves)

    module._run_compiled = run


def _assembly(kernel: Any, arguments: tuple[Any, ...]) -> str:
    compiler: Any = importlib.import_module("flydsl.compiler")
    jit: Any = importlib.import_module("flydsl.compiler.jit_function")
    ir: Any = importlib.import_module("flydsl._mlir.ir")
    passes: Any = importlib.import_module("flydsl._mlir.passmanager")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLYDSL_DUMP_DIR"] = folder
        # it says where every stage is, and ends in an error, as there is no linker here
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            compiler.compile(kernel, *arguments)
        while ir.Context.current is not None:
            ir.Context.current.__exit__(None, None, None)
        lowered = next(Path(folder).rglob(LAST_STAGE)).read_text()
    context = ir.Context()
    context.load_all_available_dialects()
    with context:
        module = ir.Module.parse(lowered)
        passes.PassManager.parse(TO_ASSEMBLY).run(module.operation)
        text: str = jit._extract_isa_text(module.operation.get_asm(enable_debug_info=False))
    return text


def _packed(text: str, arguments: tuple[Any, ...]) -> bytes:
    """Return pointers and numbers where the metadata has them; shapes are not read."""
    packed, values = bytearray(), iter(arguments)
    for offset, size, kind in ARGUMENT.findall(text):
        packed += bytes(int(offset) + int(size) - len(packed))
        if kind == "global_buffer":
            struct.pack_into("<Q", packed, int(offset), next(values).data_ptr())
        last = int(offset)
    struct.pack_into("<i", packed, last, next(values))
    return bytes(packed)
