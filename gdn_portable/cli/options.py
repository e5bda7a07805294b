# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, turned into torch's terms."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

import torch

from gdn_portable.errors import InputError
from gdn_portable.spec import Device, GdnSpec

SHARE_OF_MEMORY = 0.4
INTERRUPTED = 130  # exit code
STOPPED = "stopped from the keyboard"
WIDTH = 200  # of what is not shown on a terminal


class Dtype(str, Enum):
    """Dtypes by the name users type."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP64 = "fp64"

    @property
    def torch(self) -> torch.dtype:
        """Torch's dtype of that name."""
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
        dtype: torch.dtype = getattr(torch, names[self.value])
        return dtype


def present_device(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        InputError: the name is no device, or nothing answers to it.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from error
    if device.type == "cpu" and device.index:  # torch takes any number for the one CPU there is
        raise InputError(f"device {name!r} cannot be used: there is one cpu")
    return device


def default_device(name: str | None) -> torch.device:
    """Return the device that is named, else a GPU if one is here, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return present_device(name)


def present_gpu(name: str, command: str) -> torch.device:
    """Return an NVIDIA or AMD GPU that is there.

    Raises:
        InputError: there is none of that name; ``command`` says what needs it.
    """
    needs = f"{command} needs an NVIDIA or AMD GPU and a torch built for it"
    try:
        device = present_device(name)
    except InputError as error:
        raise InputError(f"{error}; {needs}") from error
    if device.type != "cuda":
        raise InputError(f"device is {name!r}; {needs}")
    return device


def memory_for(device: torch.device, gibibytes: float | None) -> int:
    """Return the bytes that inputs may take: those asked for, or a share of what is free."""
    if gibibytes is not None:
        return int(gibibytes * 2**30)
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE_OF_MEMORY * free)


def layer_of(config: Path | None, tp_size: int = 1, dtype: torch.dtype | None = None) -> GdnSpec:
    """Return the layer of a Hugging Face config.json, by default Qwen3-Next's.

    Raises:
        InputError: the file cannot be read.
        SpecError: it describes no such layer, or its heads do not divide.
    """
    if config is None:
        return GdnSpec(
            num_k_heads=16,
            num_v_heads=32,
            head_k_dim=128,
            head_v_dim=128,
            dtype=dtype or torch.bfloat16,
            state_dtype=torch.float32,
        ).shard(tp_size)
    try:
        fields = json.loads(config.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"config {config} cannot be read: {error}") from error
    return GdnSpec.from_config(fields, tp_size, dtype=dtype)


def imagined_device(arch: str) -> Device:
    """Return the device of an architecture that need not be here: sm90, gfx942, cpu."""
    if arch.startswith("sm") and arch[2:].isdigit():
        return Device("cuda", arch)
    if arch.startswith("gfx") and len(arch) > 3:
        return Device("rocm", arch)
    if arch == "cpu":
        return Device("cpu", "cpu")
    raise InputError(f"arch is {arch!r}, needs cpu, sm90, sm100, gfx942, gfx950 or the like")
