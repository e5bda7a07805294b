# SPDX-License-Identifier: Apache-2.0
"""A Triton driver that compiles with Triton's AMD backend and runs the result on CPU tensors."""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.cache import get_cache_manager

from ci.amdgcn import execution, program
from ci.amdgcn.errors import UnsupportedLaunchError
from ci.amdgcn.execution import Counts, Grid, Order
from ci.amdgcn.memory import Extent, GlobalMemory, Traffic

LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
# Triton keeps compiled kernels by device number: every architecture has its own
DEVICES = {arch: 1000 + i for i, arch in enumerate(LDS_BYTES)}
SCALAR_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
# two pointers that Triton appends, to scratch memory which is not used here
HIDDEN_ARGUMENTS = bytes(16)

Rewrite = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, and what it did.

    Attributes:
        kernel: its name.
        grid: the number of workgroups in each direction.
        num_warps: waves of a workgroup.
        seconds: that the simulation took.
        lds_bytes: shared memory of a workgroup.
        resources: registers, spills and scratch memory, as the compiler reports them.
        counts: the instructions executed.
        traffic: the bytes moved, by name of the tensor.
        assembly: the text that was run.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    seconds: float
    lds_bytes: int
    resources: dict[str, int]
    counts: Counts
    traffic: dict[str, Traffic]
    assembly: str = field(repr=False)


@dataclass(slots=True)
class Simulator:
    """A simulated GPU.

    Attributes:
        arch: ``"gfx942"`` or ``"gfx950"``.
        order: of the workgroups of a launch; may be changed between launches.
        rewrite: applied to the assembly before it runs, to see whether a mistake would be found.
        launches: every launch so far.
    """

    arch: str
    order: Order = Order.LOCK_STEP
    rewrite: Rewrite | None = None
    launches: list[Launch] = field(default_factory=list)

    def launch(
        self,
        text: str,
        names: Mapping[str, Any],
        grid: tuple[int, int, int],
        metadata: Any,
        arguments: tuple[Any, ...],
    ) -> None:
        """Run a compiled kernel.

        Args:
            text: its assembly.
            names: its parameters' types, by name.
            grid: the number of workgroups in each direction.
            metadata: what Triton knows about the kernel.
            arguments: a value for each parameter.
        """
        started = time.perf_counter()
        if self.rewrite is not None:
            text = self.rewrite(text)
        kernel = program.load(text)
        lds = metadata.shared + kernel.assembly.header.get("group_segment_fixed_size", 0)
        execution.check(grid, metadata.num_warps, lds, LDS_BYTES[self.arch])
        packed = pack(names, arguments)
        storage = ctypes.create_string_buffer(packed, len(packed) + 8)
        address = ctypes.addressof(storage)
        extents = [Extent(address, address + len(packed), "arguments")]
        extents += extents_of(dict(zip(names, arguments, strict=True)))
        memory = GlobalMemory(extents)
        counts = execution.run(
            kernel,
            memory,
            Grid(grid, metadata.num_warps),
            arguments=address,
            lds_size=lds,
            order=self.order,
        )
        self.launches.append(
            Launch(
                kernel=metadata.name,
                grid=grid,
                num_warps=metadata.num_warps,
                seconds=time.perf_counter() - started,
                lds_bytes=lds,
                resources=kernel.resources,
                counts=counts,
                traffic={b.name: b.traffic() for b in memory.buffers if b.start != address},
                assembly=text,
            )
        )


@contextmanager
def simulated(
    arch: str, *, order: Order = Order.LOCK_STEP, rewrite: Rewrite | None = None
) -> Iterator[Simulator]:
    """Make Triton compile for ``arch`` and run on CPU tensors, until the block ends.

    Args:
        arch: ``"gfx942"`` or ``"gfx950"``.
        order: of the workgroups of a launch.
        rewrite: applied to the assembly of every kernel before it runs.
    """
    simulator = Simulator(arch, order, rewrite)
    config = triton.runtime.driver
    # the public property would look for a GPU where none was used so far
    former = config._active
    config.set_active(Driver(simulator))
    try:
        yield simulator
    finally:
        config.set_active(former)


def pack(names: Mapping[str, Any], arguments: tuple[Any, ...]) -> bytes:
    """Return the arguments as a kernel reads them from memory, each aligned to its size."""
    packed = bytearray()
    for (name, kind), value in zip(names.items(), arguments, strict=True):
        if kind == "constexpr":
            continue
        field = _packed_one(name, kind, value)
        packed += bytes(-len(packed) % len(field)) + field
    return bytes(packed) + bytes(-len(packed) % 8) + HIDDEN_ARGUMENTS


def _packed_one(name: str, kind: Any, value: Any) -> bytes:
    if isinstance(kind, str):
        if kind.startswith("*"):
            return struct.pack("<Q", value.data_ptr() if value is not None else 0)
        if kind == "bf16":
            return struct.pack("<f", float(torch.tensor(value, dtype=torch.bfloat16)))[2:]
        if kind in SCALAR_FORMATS:
            return struct.pack("<" + SCALAR_FORMATS[kind], value)
    raise UnsupportedLaunchError(f"argument {name} has type {kind}, which is not simulated")


def extents_of(arguments: Mapping[str, Any]) -> list[Extent]:
    """Return the addresses that the elements of tensors span."""
    found = []
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.numel():
            last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            start = value.data_ptr()
            found.append(Extent(start, start + (last + 1) * value.element_size(), name))
    return found


class Launcher:
    """What Triton calls to launch a kernel, and keeps with the kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.names: dict[str, Any] = source.signature
        self.metadata = metadata
        self._text: str | None = None

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: object,
        packed_metadata: object,
        launch_metadata: object,
        enter: object,
        leave: object,
        *arguments: Any,
    ) -> None:
        """Run on whatever is simulated at this moment."""
        driver = triton.runtime.driver.active
        if not isinstance(driver, Driver):
            raise UnsupportedLaunchError("a kernel compiled for a simulator is launched outside it")
        driver.simulator.launch(self.text(), self.names, (x, y, z), self.metadata, arguments)

    def text(self) -> str:
        """Return the assembly that Triton emitted."""
        if self._text is None:
            # long names are cut where Triton names files
            name = f"{self.metadata.name[:150]}.json"
            files = get_cache_manager(self.metadata.hash).get_group(name)
            path = next(path for file, path in files.items() if file.endswith(".amdgcn"))
            self._text = Path(path).read_text()
        return self._text


class Utilities:
    """What Triton asks about a device."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, object]:
        """Return those of an MI300X, but for the shared memory."""
        return {
            "arch": self.arch,
            "max_shared_mem": LDS_BYTES[self.arch],
            "warpSize": 64,
            "multiprocessor_count": 304,
            "max_num_regs": 65536,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, name: str, *_: object) -> tuple[None, str, int, int, int]:
        """Return no module, a function, no registers, no spills, and the most threads."""
        return None, name, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Do nothing."""


class Driver(GPUDriver):  # type: ignore[misc]
    """Triton's view of a simulator."""

    def __init__(self, simulator: Simulator) -> None:
        if simulator.arch not in LDS_BYTES:
            raise UnsupportedLaunchError(f"arch is {simulator.arch}, needs {', '.join(LDS_BYTES)}")
        # the base class looks for a GPU in its __init__
        self.simulator = simulator
        self.utils = Utilities(simulator.arch)
        self.launcher_cls = Launcher
        number = DEVICES[simulator.arch]
        self.get_current_device = lambda: number
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: (9, 4)

    @staticmethod
    def is_active() -> bool:
        """Return that Triton never picks this driver by itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("hip", self.simulator.arch, 64)

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Return a type as it is: no launcher is compiled."""
        return kind

    def get_active_torch_device(self) -> torch.device:
        """Return where tensors live."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Return the module of that device."""
        return torch.cpu

    def get_benchmarker(self) -> NoReturn:
        """Refuse: there is no clock to tune by."""
        raise UnsupportedLaunchError("a simulator has no clock, so nothing can be autotuned on it")
