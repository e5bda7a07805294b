# SPDX-License-Identifier: Apache-2.0
"""Choose kernels once, at model load, and explain the choice."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gdn_portable import steps
from gdn_portable.backend import Backend, Kernel
from gdn_portable.errors import UnknownBackendError, UnsupportedError
from gdn_portable.interface import GdnOps
from gdn_portable.layout import adapt
from gdn_portable.spec import Device, GdnSpec, Op

BUILTIN = {"reference": "gdn_portable.reference:BACKEND"}
DEFAULT_FOR = {"cpu": "reference", "cuda": "reference", "rocm": "reference"}
ENTRY_POINT_GROUP = "gdn_portable.backends"
OVERRIDE_VARIABLE = "GDN_PORTABLE_KERNELS"

AnyDevice = torch.device | str | Device


def bind(
    spec: GdnSpec,
    device: AnyDevice,
    *,
    backend: str | None = None,
    kernels: Mapping[Op | str, str] | None = None,
    check: bool | None = None,
    deterministic: bool = False,
) -> GdnOps:
    """Return the ops for ``spec`` on ``device``, ready to call.

    Without ``backend`` and ``kernels`` the environment variable ``GDN_PORTABLE_KERNELS`` is read:
    a comma-separated list of a backend's name and of ``op=kernel`` pairs, for example
    ``reference`` or ``chunk_prefill=reference.chunk_prefill``.

    Args:
        spec: the layer, as one rank sees it.
        device: where the tensors will live.
        backend: name of the backend to use; by default the one for the device's vendor.
        kernels: kernels to use for single ops, by name, from any backend.
        check: validate the arguments of every call before anything is written. It reads index
            tensors on the host, so on a GPU it synchronises. None: on a CPU only.
        deterministic: pin tilings and choice so that results do not depend on the batch.

    Raises:
        UnknownBackendError: a backend, op or kernel that was named does not exist.
        UnsupportedError: an op has no kernel that is able; every kernel's reasons are given.
    """
    facts = detect_device(device)
    if backend is None and not kernels:
        backend, kernels = _read_override(os.environ.get(OVERRIDE_VARIABLE, ""))
    table = get_backend(backend or default_backend(facts))
    named = {_op(op): _find_kernel(name, _op(op)) for op, name in (kernels or {}).items()}

    launchers: dict[Op, Callable[..., Any]] = {}
    names: dict[Op, str] = {}
    for op in Op:
        candidates = (named[op],) if op in named else _candidates(table, op)
        if not candidates and op in steps.COMPOSED:
            launchers[op] = steps.compose(op, spec, launchers)
            names[op] = f"composed.{op.value}"
            continue
        kernel = _first_able(op, candidates, table, spec, facts)
        launcher = kernel.load(spec, facts, deterministic=deterministic)
        launchers[op] = adapt(launcher, kernel, spec)
        names[op] = kernel.name

    bound = {op.value: launchers[op] for op in Op}
    if facts.kind == "cpu" if check is None else check:
        from gdn_portable.checks import checked

        bound = {op.value: checked(op, launchers[op], spec, facts) for op in Op}
    from gdn_portable.warmup import warmup

    return GdnOps(
        spec=spec,
        device=facts,
        kernels=names,
        warmup=partial(warmup, spec, facts, launchers),
        **bound,
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """One kernel of one op, as ``bind`` sees it."""

    op: Op
    kernel: str
    chosen: bool
    reasons: tuple[str, ...]  # against it; empty when it is able


def explain(spec: GdnSpec, device: AnyDevice, *, backend: str | None = None) -> tuple[Choice, ...]:
    """Return every kernel of a backend's table in order, and why it would serve or not.

    Args:
        spec: the layer.
        device: a device, or a :class:`Device` that need not be present.
        backend: its name; by default the one for the device's vendor.
    """
    facts = detect_device(device)
    table = get_backend(backend or default_backend(facts))
    choices: list[Choice] = []
    for op in Op:
        taken = False
        for kernel in _candidates(table, op):
            reasons = tuple(kernel.reasons(spec, facts))
            choices.append(Choice(op, kernel.name, not taken and not reasons, reasons))
            taken = taken or not reasons
        if op in steps.COMPOSED and not _candidates(table, op):
            choices.append(Choice(op, f"composed.{op.value}", True, ()))
    return tuple(choices)


def detect_device(device: AnyDevice) -> Device:
    """Return the facts about a device: NVIDIA and AMD are told apart, the architecture named."""
    if isinstance(device, Device):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        return Device(device.type, device.type, device.index)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device("rocm", properties.gcnArchName.partition(":")[0], device.index)
    return Device("cuda", f"sm{properties.major}{properties.minor}", device.index)


def get_backend(name: str) -> Backend:
    """Return the backend called ``name``, built in or from an installed plugin."""
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        backend: Backend = getattr(importlib.import_module(module), attribute)
        return backend
    plugins = _plugins()
    if name not in plugins:
        raise _unknown("backend", name, {*BUILTIN, *plugins})
    return plugins[name]


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, built in and plugins."""
    return tuple(BUILTIN) + tuple(name for name in _plugins() if name not in BUILTIN)


def default_backend(device: Device) -> str:
    """Return the name of the backend for a device's vendor."""
    if device.kind in DEFAULT_FOR:
        return DEFAULT_FOR[device.kind]
    for name, backend in _plugins().items():
        if backend.devices is not None and device.kind in backend.devices:
            return name
    return "reference"


def _plugins() -> dict[str, Backend]:
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {entry.name: entry.load() for entry in entries}


def _candidates(table: Backend, op: Op) -> tuple[Kernel, ...]:
    return tuple(kernel for kernel in table.kernels if kernel.op is op)


def _first_able(
    op: Op, candidates: tuple[Kernel, ...], table: Backend, spec: GdnSpec, device: Device
) -> Kernel:
    rejected: dict[str, list[str]] = {}
    for kernel in candidates:
        reasons = kernel.reasons(spec, device)
        if not reasons:
            return kernel
        rejected[kernel.name] = reasons
    lines = [f"backend {table.name!r} has no able {op.value} kernel on {device} for {spec}"]
    for name, reasons in rejected.items():
        lines += [f"  {name}:", *(f"    - {reason}" for reason in reasons)]
    raise UnsupportedError("\n".join(lines), rejected)


def _read_override(text: str) -> tuple[str | None, dict[Op | str, str]]:
    backend, kernels = None, dict[Op | str, str]()
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, equals, kernel = part.partition("=")
        if equals:
            kernels[op.strip()] = kernel.strip()
        else:
            backend = part
    return backend, kernels


def _op(name: Op | str) -> Op:
    try:
        return Op(name)
    except ValueError:
        raise _unknown("op", str(name), {op.value for op in Op}) from None


def _find_kernel(name: str, op: Op) -> Kernel:
    known = {
        kernel.name: kernel
        for backend in backend_names()
        for kernel in _candidates(get_backend(backend), op)
    }
    if name not in known:
        raise _unknown(f"{op.value} kernel", name, set(known))
    return known[name]


def _unknown(what: str, name: str, known: set[str]) -> UnknownBackendError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UnknownBackendError(f"no {what} {name!r}; there is {', '.join(sorted(known))}{hint}")
