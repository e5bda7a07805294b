# SPDX-License-Identifier: Apache-2.0
"""The support tables of README and docs, out of what the backends declare.

``python -m ci.support --write`` puts them between their markers; without it, it prints them. A
kernel is asked what it takes, not what is installed here: probes are left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gdn_backend_triton import ARCHS

from gdn_portable.backend import Kernel
from gdn_portable.select import default_backend, get_backend
from gdn_portable.spec import Device, GdnSpec, Op, StateLayout

ROOT = Path(__file__).parents[1]
GPUS = tuple(Device("cuda" if arch.startswith("sm") else "rocm", arch) for arch in ARCHS)
CPU = Device("cpu", "cpu")
BASE = GdnSpec(
    num_k_heads=16,
    num_v_heads=32,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
HEAD_DIMS = (8, 16, 32, 48, 64, 128, 256, 512)
WIDTHS = (2, 3, 4, 5, 6)
ANY = "any"
AS_ACTIVATIONS = "as activations"
VENDORS = {"cuda": "NVIDIA", "rocm": "AMD", "cpu": "any device"}
GROUPS = {
    "decode": (Op.DECODE_STEP, Op.RECURRENT_DECODE, Op.CONV1D_UPDATE),
    "prefill": (Op.PREFILL_STEP, Op.CHUNK_PREFILL, Op.CONV1D_PREFILL),
    "drafts": (Op.VERIFY_STEP, Op.MTP_VERIFY, Op.CONV1D_VERIFY, Op.MTP_COMMIT),
    "gates": (Op.GATING, Op.GATED_RMS_NORM),
}
LIBRARIES = {"triton": "Triton", "cute": "CuTe", "flashinfer": "FlashInfer", "aiter": "aiter"}


def able(kernel: Kernel, spec: GdnSpec, device: Device) -> bool:
    """Return whether a kernel takes a layer, its library being there."""
    return not replace(kernel, probe=None).reasons(spec, device)


def ladder(device: Device, op: Op) -> list[Kernel]:
    """Return the kernels of an op in a device's own table, in order."""
    return [k for k in get_backend(default_backend(device)).kernels if k.op is op]


@dataclass(frozen=True)
class Served:
    """What stands in a table for an op: what serves by default, and what by name alone."""

    serving: tuple[str, ...]
    by_name: tuple[str, ...]

    def __str__(self) -> str:
        """Return a cell of a table."""
        text = " or ".join(self.serving)
        if len(self.serving) > 1:
            text += ", [by times](selection.md#chosen-by-measured-times)"
        return "; by name: ".join(filter(None, (text, ", ".join(self.by_name))))


def served(device: Device, op: Op) -> Served:
    """Return what serves an op of Qwen3-Next's layer on a device, and what could by name."""
    kernels = ladder(device, op)
    own = [k for k in kernels if k.among is None and any(able(k, s, device) for s in layers())]
    if not own:
        return Served(("composed",), ())
    names = tuple(short(kernel) for kernel in own)
    is_measured = any(kernel.among is not None for kernel in kernels)
    count = sum(able(k, BASE, device) for k in own) if is_measured else 1
    return Served(names[:count], names[count:])


def short(kernel: Kernel) -> str:
    """Return a kernel's name, its library's alone where the rest is the op."""
    return kernel.name.removesuffix(f".{kernel.op.value}")


@cache
def layers() -> tuple[GdnSpec, ...]:
    """Return layers one of which every kernel takes."""
    heads = ((16, 32), (8, 32))
    return tuple(
        replace(
            BASE,
            dtype=dtype,
            state_dtype=state,
            num_k_heads=H,
            num_v_heads=HV,
            scratch_slot=scratch,
        )
        for (H, HV), scratch, dtype, state in product(heads, (None, 0), DTYPES, DTYPES)
    )


@dataclass(frozen=True)
class Takes:
    """What a kernel takes, in words; the columns of a table."""

    devices: str
    activations: str
    states: str
    windows: str
    head_dims: str
    conv_width: str
    state_layouts: str
    besides: str


def takes(kernel: Kernel, devices: Sequence[Device]) -> Takes:
    """Ask a kernel, one thing at a time."""
    found = [(spec, d) for d in devices for spec in layers() if able(kernel, spec, d)]
    spec, device = found[0]

    def accepted(name: str, values: Iterable[Any]) -> list[Any]:
        return [v for v in values if able(kernel, replace(spec, **{name: v}), device)]

    dims = [tuple(accepted(name, HEAD_DIMS)) for name in ("head_k_dim", "head_v_dim")]
    windows = accepted("conv_dtype", DTYPES)
    besides = []
    if all(s.scratch_slot is not None for s, _ in found):
        besides.append("`scratch_slot`")
    if len({(s.num_k_heads, s.num_v_heads) for s, _ in found}) == 1:
        besides.append(f"H = {spec.num_k_heads}, HV = {spec.num_v_heads}")
    return Takes(
        devices=_joined([*dict.fromkeys(d.arch for _, d in found)], devices, VENDORS[device.kind]),
        activations=_dtypes(s.dtype for s, _ in found),
        states=_dtypes(s.state_dtype for s, _ in found),
        windows=AS_ACTIVATIONS if windows == [spec.dtype] else _dtypes(windows),
        head_dims=" / ".join(_joined(each, HEAD_DIMS) for each in dict.fromkeys(dims)),
        conv_width=_joined(accepted("conv_width", WIDTHS), WIDTHS),
        state_layouts=_joined(
            [v.value for v in accepted("state_layout", StateLayout)], [*StateLayout], "both"
        ),
        besides=", ".join(besides),
    )


def _dtypes(values: Iterable[torch.dtype]) -> str:
    found = set(values)
    return ", ".join(name for dtype, name in DTYPES.items() if dtype in found)


def _joined(values: Sequence[object], all_of: Sequence[object], everything: str = ANY) -> str:
    return everything if len(values) == len(all_of) else ", ".join(map(str, values))


def by_op() -> str:
    """Return the table of what serves each op."""
    columns: dict[tuple[Served, ...], list[str]] = {}
    for device in (*GPUS, CPU):
        columns.setdefault(tuple(served(device, op) for op in Op), []).append(device.arch)
    heads = [", ".join(archs).replace("cpu", "CPU and other devices") for archs in columns.values()]
    rows = [[f"`{op.value}`", *map(str, cells)] for op, *cells in zip(Op, *columns, strict=True)]
    return table(["op", *heads], rows)


def by_kernel() -> str:
    """Return the table of what each kernel takes; those that take the same share a row."""
    rows: dict[tuple[str, Takes], list[str]] = {}
    for kind in VENDORS:
        devices = [device for device in (*GPUS, CPU) if device.kind == kind]
        for op in Op:
            for kernel in ladder(devices[0], op):
                if kernel.among is None:
                    library = kernel.name.partition(".")[0]
                    rows.setdefault((library, takes(kernel, devices)), []).append(kernel.name)
    merged: dict[tuple[str, ...], list[str]] = {}
    for (library, found), names in rows.items():
        label = f"`{library}.*`" if len(names) > 4 else ", ".join(f"`{n}`" for n in names)
        devices_of, *rest = astuple(found)
        merged.setdefault((label, *rest), []).append(devices_of)
    lines = [[label, ", ".join(where), *rest] for (label, *rest), where in merged.items()]
    heads = ["kernel", "on", "activations", "states", "windows", "K, V", "W", "state layouts"]
    return table([*heads, "needs"], lines)


def at_a_glance() -> str:
    """Return README's table: a line for what is called together, a column for a vendor."""
    vendors: dict[str, list[Device]] = {}
    for gpu in GPUS:
        vendors.setdefault("NVIDIA" if gpu.kind == "cuda" else "AMD", []).append(gpu)
    heads = [f"{name} {', '.join(d.arch for d in gpus)}" for name, gpus in vendors.items()]
    columns = [*vendors.values(), [CPU]]
    rows = [
        [f"{name}: {_quoted(ops)}", *(_libraries(ops, column) for column in columns)]
        for name, ops in GROUPS.items()
    ]
    shared = [takes(ladder(gpus[0], Op.GATING)[0], gpus) for gpus in columns]
    rows += [
        ["activations, state, conv window: each", *(t.activations for t in shared)],
        ["head dims K, V", *(t.head_dims for t in shared)],
        ["conv width", *(t.conv_width for t in shared)],
        ["gradients", "no", "no", "yes"],
        [
            "seen running on",
            "one H200 (sm90)",
            "no GPU: its machine code, [simulated](docs/amd-simulator.md)",
            "CPUs, one H200",
        ],
    ]
    return table(["", *heads, "CPU, other torch devices"], rows)


def _quoted(ops: Iterable[Op]) -> str:
    return ", ".join(f"`{op.value}`" for op in ops)


def _libraries(ops: Iterable[Op], devices: Sequence[Device]) -> str:
    """Name the libraries that serve, and first the architectures where there are more."""
    found: dict[tuple[str, ...], list[str]] = {}
    for device in devices:
        names = [name.partition(".")[0] for op in ops for name in served(device, op).serving]
        named = (LIBRARIES.get(name, name) for name in names if name != "composed")
        unique = tuple(dict.fromkeys(named))
        found.setdefault(unique, []).append(device.arch)
    if len(found) == 1:
        return " and ".join(next(iter(found)))
    parts = [f"{', '.join(archs)}: {' and '.join(names)}" for names, archs in found.items()]
    return "; ".join(parts)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BLOCKS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "at-a-glance"): at_a_glance,
    ("docs/support.md", "by-op"): by_op,
    ("docs/support.md", "by-kernel"): by_kernel,
}


def blocks() -> Iterator[tuple[Path, str, str]]:
    """Yield the page of each table, the pattern that finds it there, and the text to be there."""
    for (page, name), write in BLOCKS.items():
        opening, closing = f"<!-- {name}: python -m ci.support --write -->", f"<!-- /{name} -->"
        pattern = rf"{re.escape(opening)}.*?{re.escape(closing)}"
        yield ROOT / page, pattern, f"{opening}\n\n{write()}\n\n{closing}"


def written(page: Path) -> str:
    """Return a page with its tables as they have to be."""
    text = page.read_text()
    for path, pattern, block in blocks():
        if path == page:
            before, _, after = re.split(f"({pattern})", text, flags=re.DOTALL)
            text = before + block + after
    return text


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into their pages")
    if not parser.parse_args().write:
        print("\n\n".join(block for *_, block in blocks()))
        return
    for page in dict.fromkeys(path for path, *_ in blocks()):
        page.write_text(written(page))


if __name__ == "__main__":
    main()
