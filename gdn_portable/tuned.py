# SPDX-License-Identifier: Apache-2.0
"""Times of kernels, measured on a GPU and kept in files: what ``tune`` writes and ``bind`` reads.

A file is named after its GPU and the versions of the libraries behind the kernels. Some are shipped
with a backend; those in the user's cache folder go before them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import gdn_portable
from gdn_portable.errors import TunedFileError
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.versions import version_of

FORMAT = 1
OPS = (Op.CHUNK_PREFILL, Op.PREFILL_STEP)
LIBRARIES = (
    "amd-aiter",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "triton",
    "triton-rocm",
)


class Cell(NamedTuple):
    """A batch of sequences of one length."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length

    def __str__(self) -> str:
        return f"{self.sequences}x{self.length}"


Times = dict[Cell, dict[str, float | None]]  # microseconds by kernel; None: it failed


class Layer(NamedTuple):
    """What times depend on besides the batch."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    dtype: str
    state_dtype: str
    qk_l2norm: bool

    @classmethod
    def of(cls, spec: GdnSpec) -> Layer:
        """Return the layer of a spec."""
        dtype, state_dtype = (str(x).removeprefix("torch.") for x in (spec.dtype, spec.state_dtype))
        heads = (spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim)
        return cls(*heads, dtype, state_dtype, spec.qk_l2norm)

    def __str__(self) -> str:
        norms = "" if self.qk_l2norm else " without norms"
        return f"H={self.num_k_heads} HV={self.num_v_heads} {self.dtype}{norms}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What one file holds.

    Attributes:
        path: the file.
        device: where the times were measured.
        versions: of the libraries behind the kernels, by distribution.
        layers: the times of every layer, by op.
    """

    path: Path
    device: Device
    versions: Mapping[str, str]
    layers: dict[Layer, dict[Op, Times]] = field(default_factory=dict)

    def times(self, layer: Layer, op: Op) -> Times:
        """Return the times of an op, to be read and added to."""
        return self.layers.setdefault(layer, {}).setdefault(op, {})

    def write(self) -> None:
        """Write the file as a whole: a reader finds the old one or the new one."""
        text = json.dumps(_document(self), indent=1)
        # one line for every cell
        text = re.sub(r"\{[^{}]*\}", lambda inner: " ".join(inner[0].split()), text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(text + "\n")
        partial.replace(self.path)


class Found(NamedTuple):
    """Times that serve a spec on a device, though they may be of another."""

    tuned: Tuned
    layer: Layer
    times: Times

    def source(self, spec: GdnSpec) -> str:
        """Say where the times were measured, and what was different there."""
        parts = [self.tuned.device.name or self.tuned.device.arch]
        if self.layer != Layer.of(spec):
            parts.append(f"for {self.layer}")
        here = versions()
        for name in sorted({*here, *self.tuned.versions}):
            there = self.tuned.versions.get(name)
            if there != here.get(name):
                parts.append(f"with {name} {there or 'absent'}, here {here.get(name, 'absent')}")
        return f"times of {', '.join(parts)} ({self.tuned.path.name})"


def user_folder() -> Path | None:
    """Return where ``tune`` writes; None where there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "gdn_portable" / "tuned"


@functools.cache
def versions() -> Mapping[str, str]:
    """Return the versions of the libraries that are here."""
    installed = {name: version for name in LIBRARIES if (version := version_of(name))}
    return {"gdn-portable": gdn_portable.__version__, **installed}


def file_name(device: Device, installed: Mapping[str, str]) -> str:
    """Return the name of the file for a device under those versions of libraries."""
    parts = [device.name or device.arch, *(f"{name}-{v}" for name, v in installed.items())]
    return "_".join(re.sub(r"[^a-z0-9.+]+", "-", part.lower()) for part in parts) + ".json"


def open_file(folder: Path, device: Device) -> Tuned:
    """Return what the file for a device in ``folder`` holds; nothing yet where there is none.

    Raises:
        TunedFileError: there is one that cannot be used.
    """
    path = folder / file_name(device, versions())
    if path.exists():
        return read(path)
    return Tuned(path=path, device=device, versions=versions())


def find(
    spec: GdnSpec, device: Device, op: Op, kernels: frozenset[str], shipped: Path | None
) -> Found | None:
    """Return the times to choose by among ``kernels``, of which at least two have to be timed.

    They are of the same architecture and head dims. Of several, those of this very GPU go first,
    then those that apply norms or do not as ``spec`` has it, then those with the nearest number of
    value heads and of key heads, then of the same dtypes, then of the same versions, then the
    user's own.

    Raises:
        TunedFileError: a file cannot be used.
    """
    wanted, here = Layer.of(spec), versions()
    best: tuple[tuple[object, ...], Found] | None = None
    for is_shipped, tuned in _files(shipped):
        if (tuned.device.kind, tuned.device.arch) != (device.kind, device.arch):
            continue
        for layer, by_op in tuned.layers.items():
            times = _complete(by_op.get(op, {}), kernels)
            if times is None or layer[2:4] != wanted[2:4]:
                continue
            rank = (
                tuned.device.name != device.name,
                layer.qk_l2norm != wanted.qk_l2norm,
                abs(math.log2(layer.num_v_heads / wanted.num_v_heads)),
                abs(math.log2(layer.num_k_heads / wanted.num_k_heads)),
                layer[4:6] != wanted[4:6],
                tuned.versions != here,
                is_shipped,
                tuned.path.name,
            )
            if best is None or rank < best[0]:
                best = rank, Found(tuned, layer, times)
    return best and best[1]


def _complete(times: Times, kernels: frozenset[str]) -> Times | None:
    """Return the times of those ``kernels`` that were tried in every cell; None of fewer than two.

    ``tune`` writes down all cells before it times the first: what it has not finished is not used.
    """
    tried = kernels.intersection(*times.values()) if times else frozenset()
    timed = {name for name in tried if any(by_kernel[name] for by_kernel in times.values())}
    if len(timed) < 2:
        return None
    return {cell: {name: by_kernel[name] for name in timed} for cell, by_kernel in times.items()}


def _files(shipped: Path | None) -> Iterator[tuple[bool, Tuned]]:
    for is_shipped, folder in ((False, user_folder()), (True, shipped)):
        for path in sorted(folder.glob("*.json")) if folder else ():
            yield is_shipped, _read_once(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _read_once(path: Path, changed: int) -> Tuned:
    """Return what a file holds, to be read alone: a bind looks at it several times."""
    return read(path)


def read(path: Path) -> Tuned:
    """Read a file.

    Raises:
        TunedFileError: it cannot be read, or is not what ``tune`` writes.
    """
    try:
        return _parse(path, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        reason = f"{path} cannot be used: {error}"
        raise TunedFileError(f"{reason}; delete it, or have tune write it again") from error


def _document(tuned: Tuned) -> dict[str, object]:
    device = tuned.device
    return {
        "format": FORMAT,
        "unit": "microseconds",
        "device": {"kind": device.kind, "arch": device.arch, "name": device.name},
        "versions": dict(tuned.versions),
        "layers": [
            {
                "layer": layer._asdict(),
                **{
                    op.value: {str(cell): times[cell] for cell in sorted(times, key=_by_sequences)}
                    for op, times in by_op.items()
                },
            }
            for layer, by_op in sorted(tuned.layers.items())
        ],
    }


def _by_sequences(cell: Cell) -> tuple[int, int]:
    return cell


def _parse(path: Path, document: object) -> Tuned:
    fields = _mapping("the file", document)
    if fields.get("format") != FORMAT:
        raise ValueError(f"format is {fields.get('format')!r}, needs {FORMAT}")
    device, found = _mapping("device", fields.get("device")), fields.get("layers")
    if not isinstance(found, list):
        raise ValueError(f"layers is {found!r}, needs a list")
    layers: dict[Layer, dict[Op, Times]] = {}
    for entry in (_mapping("a layer", item) for item in found):
        layers[_layer(entry.get("layer"))] = {
            op: _times(entry[op.value]) for op in OPS if op.value in entry
        }
    return Tuned(
        path=path,
        device=Device(_text(device, "kind"), _text(device, "arch"), name=_text(device, "name")),
        versions={k: str(v) for k, v in _mapping("versions", fields.get("versions")).items()},
        layers=layers,
    )


def _text(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, needs a text")
    return value


def _mapping(what: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}, needs an object")
    return value


def _layer(value: object) -> Layer:
    fields = _mapping("layer", value)
    kinds = Layer.__annotations__
    if fields.keys() != kinds.keys():
        raise ValueError(f"layer has {sorted(fields)}, needs {sorted(kinds)}")
    layer = Layer(**fields)  # type: ignore[arg-type]
    if not all(isinstance(count, int) and count > 0 for count in layer[:4]):
        raise ValueError(f"layer is {fields}, needs positive numbers of heads and dims")
    if not all(isinstance(getattr(torch, str(d), None), torch.dtype) for d in layer[4:6]):
        raise ValueError(f"layer is {fields}, needs the names of torch dtypes")
    if not isinstance(layer.qk_l2norm, bool):
        raise ValueError(f"layer is {fields}, needs true or false for qk_l2norm")
    return layer


def _times(value: object) -> Times:
    times: Times = {}
    for name, by_kernel in _mapping("times", value).items():
        counts = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if counts is None:
            raise ValueError(f"cell is {name!r}, needs sequences x length, as 8x1024")
        cell = _mapping(f"cell {name}", by_kernel)
        for kernel, time in cell.items():
            is_time = isinstance(time, (int, float)) and 0 < time < math.inf
            if time is not None and not is_time:
                raise ValueError(f"time of {kernel} at {name} is {time!r}, needs microseconds")
        times[Cell(*map(int, counts.groups()))] = dict(cell)  # type: ignore[arg-type]
    return times
