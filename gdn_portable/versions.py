# SPDX-License-Identifier: Apache-2.0
"""The versions of what takes part, for reports."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from gdn_portable import __version__

# Triton goes by several names, and of two distributions called aiter one is AMD's
LIBRARIES = (
    "triton",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "triton-rocm",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
    "amd-aiter",
    "aiter",
    "flydsl",
)


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str | None]:
    """Return the versions of this library, of what it runs on and of others; None if absent."""
    found: dict[str, str | None] = {
        "gdn-portable": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA runtime": torch.version.cuda,
        "ROCm runtime": torch.version.hip,
    }
    return found | {name: version_of(name) for name in libraries}


def version_of(distribution: str) -> str | None:
    """Return the version of what is installed under that name; None if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
