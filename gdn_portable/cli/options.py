# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, turned into torch's terms."""

from __future__ import annotations

from enum import Enum

import torch

from gdn_portable.errors import InputError
from gdn_portable.spec import Device


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


def imagined_device(arch: str) -> Device:
    """Return the device of an architecture that need not be here: sm90, gfx942, cpu."""
    if arch.startswith("sm") and arch[2:].isdigit():
        return Device("cuda", arch)
    if arch.startswith("gfx") and len(arch) > 3:
        return Device("rocm", arch)
    if arch == "cpu":
        return Device("cpu", "cpu")
    raise InputError(f"arch is {arch!r}, needs cpu, sm90, sm100, gfx942, gfx950 or the like")
