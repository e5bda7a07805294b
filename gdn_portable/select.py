# SPDX-License-Identifier: Apache-2.0
"""Choose kernels once, at model load, and explain the choice."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gdn_portable import steps
from gdn_portable.backend import Backend, Kernel, Launcher
from gdn_portable.errors import InputError, UnknownBackendError, UnsupportedError
from gdn_portable.interface import GdnOps
from gdn_portable.layout import adapt
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.warmup import warmup

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
    launchers: dict[Op, Launcher] = {}
    names: dict[Op, str] = {}
    for op, ladder in _ladders(facts, backend, kernels).items():
        if ladder or op not in steps.COMPOSED:
            kernel = _first_able(op, ladder, spec, facts)
            launcher = kernel.load(spec, facts, deterministic=deterministic)
            launchers[op], names[op] = adapt(launcher, kernel, spec), kernel.name
        else:
            launchers[op], names[op] = steps.compose(op, spec, launchers), _composed(op)

    warm = partial(warmup, spec, facts, dict(launchers))
    if facts.kind == "cpu" if check is None else check:
        from gdn_portable.checks import checked

        launchers = {op: checked(op, launch, spec, facts) for op, launch in launchers.items()}
    bound: dict[str, Any] = {op.value: launch for op, launch in launchers.items()}
    return GdnOps(spec=spec, device=facts, kernels=names, warmup=warm, **bound)


@dataclass(frozen=True, slots=True)
class Choice:
    """One kernel of one op, as ``bind`` sees it."""

    op: Op
    kernel: str
    chosen: bool
    reasons: tuple[str, ...]  # against it; empty when it is able

    def __str__(self) -> str:
        """Say in one line what the kernel does and why."""
        standing = "serves" if self.chosen else "cannot" if self.reasons else "able, not first"
        return ": ".join([f"{self.op.value} {self.kernel} {standing}", *self.reasons])


def explain(
    spec: GdnSpec,
    device: AnyDevice,
    *,
    backend: str | None = None,
    kernels: Mapping[Op | str, str] | None = None,
) -> tuple[Choice, ...]:
    """Return every kernel that ``bind`` would consider, in order, and what speaks against it.

    Args:
        spec: the layer.
        device: a device, or a :class:`Device` that need not be here.
        backend: as ``bind`` takes it.
        kernels: as ``bind`` takes it.

    Raises:
        UnknownBackendError: a backend, op or kernel that was named does not exist.
    """
    facts = detect_device(device)
    choices: list[Choice] = []
    for op, ladder in _ladders(facts, backend, kernels).items():
        taken = False
        for kernel in ladder:
            reasons = tuple(kernel.reasons(spec, facts))
            choices.append(Choice(op, kernel.name, not taken and not reasons, reasons))
            taken = taken or not reasons
        if not ladder and op in steps.COMPOSED:
            choices.append(Choice(op, _composed(op), True, ()))
    return tuple(choices)


def _ladders(
    device: Device, backend: str | None, kernels: Mapping[Op | str, str] | None
) -> dict[Op, tuple[Kernel, ...]]:
    """Return the kernels to consider for each op, in order, with overrides applied."""
    if backend is None and not kernels:
        backend, kernels = _read_override(os.environ.get(OVERRIDE_VARIABLE, ""))
    table = get_backend(backend or default_backend(device))
    ladders = {op: _kernels_of(table, op) for op in Op}
    for name, kernel in (kernels or {}).items():
        op = _op(name)
        composed = op in steps.COMPOSED and kernel == _composed(op)
        ladders[op] = () if composed else (_find_kernel(kernel, op),)
    return ladders


def _composed(op: Op) -> str:
    return f"composed.{op.value}"


def detect_device(device: AnyDevice) -> Device:
    """Return the facts about a device: NVIDIA and AMD are told apart, the architecture named."""
    if isinstance(device, Device):
        return device
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device is {device!r}, needs a torch device: cpu, cuda, cuda:1"
        ) from error
    if device.type == "cpu":
        return Device("cpu", "cpu")
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
    plugin: Backend = plugins[name].load()
    return plugin


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, built in and plugins."""
    return tuple(dict.fromkeys((*BUILTIN, *_plugins())))


def default_backend(device: Device) -> str:
    """Return the name of the backend for a device's vendor."""
    if device.kind in DEFAULT_FOR:
        return DEFAULT_FOR[device.kind]
    for name in _plugins():
        devices = get_backend(name).devices
        if devices is not None and device.kind in devices:
            return name
    return "reference"


def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _kernels_of(table: Backend, op: Op) -> tuple[Kernel, ...]:
    return tuple(kernel for kernel in table.kernels if kernel.op is op)


def _first_able(op: Op, ladder: tuple[Kernel, ...], spec: GdnSpec, device: Device) -> Kernel:
    rejected: dict[str, list[str]] = {}
    for kernel in ladder:
        reasons = kernel.reasons(spec, device)
        if not reasons:
            return kernel
        rejected[kernel.name] = reasons
    lines = [f"no kernel can serve {op.value} on {device} for {spec}"]
    for name, reasons in rejected.items():
        lines += [f"  {name}:", *(f"    - {reason}" for reason in reasons)]
    if not rejected:
        lines += ["  the backend declares none"]
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
    # plugins are looked up only for a name that no built-in backend has
    found = _kernel_of(BUILTIN, op, name) or _kernel_of(_plugins(), op, name)
    if found is None:
        tables = map(get_backend, backend_names())
        known = {kernel.name for table in tables for kernel in _kernels_of(table, op)}
        raise _unknown(f"{op.value} kernel", name, known)
    return found


def _kernel_of(backends: Iterable[str], op: Op, name: str) -> Kernel | None:
    tables = map(get_backend, backends)
    named = (k for table in tables for k in _kernels_of(table, op) if k.name == name)
    return next(named, None)


def _unknown(what: str, name: str, known: set[str]) -> UnknownBackendError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UnknownBackendError(f"no {what} {name!r}; there is {', '.join(sorted(known))}{hint}")
