# SPDX-License-Identifier: Apache-2.0
"""A Triton driver that compiles for any GPU, and launches nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.cache import get_cache_manager

MORE_THAN_ANY_GPU = 1 << 30


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as it was compiled.

    Attributes:
        name: of the function.
        num_warps: of a program; waves on AMD.
        shared_bytes: of a program.
        files: what every stage of the compiler wrote, by its suffix: ``ttir``, ``ptx``, ...
    """

    name: str
    num_warps: int
    shared_bytes: int
    files: dict[str, Path]


def target_of(arch: str) -> GPUTarget:
    """Return Triton's name for ``sm90``, ``gfx942`` and the like."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)


@contextmanager
def compiling_for(arch: str, report: Callable[[Compiled], None]) -> Iterator[None]:
    """Make Triton compile for ``arch`` what is launched on CPU tensors, until the block ends.

    Args:
        arch: ``"sm90"``, ``"gfx942"`` and the like.
        report: called with every kernel, once.
    """
    config = triton.runtime.driver
    # the public property would look for a GPU
    former = config._active
    config.set_active(Driver(target_of(arch), report))
    try:
        yield
    finally:
        config.set_active(former)


class Utilities:
    """What Triton asks about a device: no limit is enforced here, they are checked afterwards."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return a device on which everything fits."""
        return {"max_shared_mem": MORE_THAN_ANY_GPU, "multiprocessor_count": 1, "warpSize": 64}

    def load_binary(self, *_: object) -> tuple[str, None, int, int, int]:
        """Return a module, no function, no registers, no spills, and the most threads."""
        # without a module Triton would load the kernel for every launch
        return "module", None, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Do nothing."""


class Driver(GPUDriver):  # type: ignore[misc]
    """Triton's view of a GPU that is not here."""

    def __init__(self, target: GPUTarget, report: Callable[[Compiled], None]) -> None:
        # the base class looks for a GPU in its __init__
        self.target = target
        self.report = report
        self.utils = Utilities()
        # Triton keeps compiled kernels by device number: every architecture has its own
        number = 2000 + int(re.sub(r"\D", "", str(target.arch)))
        self.get_current_device = lambda: number
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0

    @staticmethod
    def is_active() -> bool:
        """Return that Triton never picks this driver by itself."""
        return False

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Report a kernel when it is first launched; return what launches it."""
        # long names are cut where Triton names files
        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json")
        files = {Path(path).suffix[1:]: Path(path) for path in group.values()}
        self.report(Compiled(metadata.name, metadata.num_warps, metadata.shared, files))
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Return a type as it is: no launcher is compiled."""
        return kind

    def get_active_torch_device(self) -> torch.device:
        """Return where tensors live."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Return the module of that device."""
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Return a clock that stands still: nothing is tuned."""
        return lambda run, quantiles=None, **_: [1.0, 1.0, 1.0]
