# SPDX-License-Identifier: Apache-2.0
"""HIP kernels: the device code of a file, compiled without ROCm's headers."""

from __future__ import annotations

import functools
import importlib
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ci.aiter.launch import launch

PRELUDE = Path(__file__).with_name("prelude.hip")
OCML = Path(triton.__file__).parent / "backends" / "amd" / "lib" / "ocml.bc"
TYPES = {torch.bfloat16: "hip_bfloat16", torch.float16: "_Float16", torch.float32: "float"}
INSTANCE = (
    "template __global__ void causal_conv1d_update_kernel<"
    "Causal_conv1d_update_kernel_traits<64, {width}, {x}, {weight}>, false>(ConvParamsBaseUpdate);"
)


def compiler() -> str | None:
    """Return the compiler, under Debian's name or its own."""
    return shutil.which("clang++-22") or shutil.which("clang++")


def use_hip(checkout: Path, arch: str) -> None:
    """Make both HIP kernels run on the simulator."""
    kernels = checkout / "csrc" / "kernels"
    source = _part(kernels / "gdr_decode_packed_bf16.cu", "constexpr int kQHeads", "} // namespace")
    decode: Any = importlib.import_module("aiter.ops.gdr_decode_packed_bf16")
    decode._gdr_decode_packed_bf16 = functools.partial(_decode, source, arch)
    source = _part(kernels / "causal_conv1d_update.cu", "struct ConvParams", "// Launch")
    update: Any = importlib.import_module("aiter.ops.causal_conv1d_update")
    update.causal_conv1d_update = functools.partial(_update, source, arch)


def _part(path: Path, start: str, end: str) -> str:
    """Return what the GPU runs of a file."""
    text = path.read_text()
    first = text.index(start)
    return text[first : text.index(end, first)]


@functools.cache
def _assembly(source: str, arch: str) -> str:
    clang = compiler()
    assert clang is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.hip")
        file.write_text(PRELUDE.read_text() + source)
        command = [
            clang, "-x", "hip", "-S", "-O3", "-w", "-std=c++17", "--offload-device-only",
            f"--offload-arch={arch}", "-nogpuinc", "-nogpulib", "-nostdinc", "-Xclang",
            "-mlink-builtin-bitcode", "-Xclang", str(OCML), str(file), "-o", f"{folder}/kernel.s",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return Path(folder, "kernel.s").read_text()


def _decode(
    source: str,
    arch: str,
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    indices: Tensor,
    state: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    tensors = (mixed_qkv, a, b, dt_bias, A_log, indices, state, out)
    B, strided = len(mixed_qkv), (mixed_qkv, a, b, indices, state)
    packed = struct.pack(
        "<8Qi4x5qif",
        *(x.data_ptr() for x in tensors),
        B,
        *(x.stride(0) for x in strided),
        len(state),
        scale,
    )
    named = {str(i): x for i, x in enumerate(tensors)}
    launch(_assembly(source, arch), packed, named, (B * 32 * 4, 1, 1), 4)


def _update(
    source: str,
    arch: str,
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    use_silu: bool,
    cache_seqlens: Tensor,
    conv_state_indices: Tensor,
    pad_slot_id: int,
) -> None:
    B, D, _ = x.shape
    W = weight.shape[1]
    instance = INSTANCE.format(width=W, x=TYPES[x.dtype], weight=TYPES[weight.dtype])
    tensors = (x, weight, bias, out, conv_state, cache_seqlens, conv_state_indices)
    packed = struct.pack(
        "<4i?3x8Ii3I4x7Qi4x",
        *(B, D, 1, W, use_silu),
        *(*x.stride(), *weight.stride(), *out.stride()),
        *(conv_state.shape[2], *conv_state.stride()),
        *(tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors),
        pad_slot_id,
    )
    memory = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
    named = {str(i): tensor for i, tensor in enumerate(memory.values())}
    launch(_assembly(source + instance, arch), packed, named, (B, -(-D // 64), 1), 1)
