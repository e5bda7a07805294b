# SPDX-License-Identifier: Apache-2.0
"""Choose kernels once, at model load, and explain the choice."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gdn_portable import steps
from gdn_portable.backend import Among, Backend, Kernel, Launcher
from gdn_portable.errors import InputError, UnknownBackendError, UnsupportedError
from gdn_portable.interface import GdnOps
from gdn_portable.layout import adapt
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.warmup import warmup

BUILTIN = {
    "reference": "gdn_portable.reference:BACKEND",
    "triton": "gdn_backend_triton:BACKEND",
    "cuda": "gdn_backend_cuda:BACKEND",
    "rocm": "gdn_backend_rocm:BACKEND",
}
DEFAULT_FOR = {"cpu": "reference", "cuda": "cuda", "rocm": "rocm"}
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

    Unless ``backend`` is given, the environment variable ``GDN_PORTABLE_KERNELS`` is read: a
    comma-separated list of a backend's name and of ``op=kernel`` pairs, for example ``reference``
    or ``chunk_prefill=reference.chunk_prefill``; ``kernels`` goes before it.

    Args:
        spec: the layer, as one rank sees it.
        device: where the tensors will live.
        backend: name of the backend to use; by default the one for the device's vendor.
        kernels: kernels to use for single ops, by name, from any backend.
        check: validate the arguments of every call before anything is written. It reads index
            tensors on the host, so on a GPU it synchronises. None: on a CPU only. Without it a
            call adds no Python frame to the kernel's launcher, or one where a layout is adapted.
        deterministic: pin tilings and choice so that results do not depend on the batch.

    Raises:
        InputError: there is no such device.
        UnknownBackendError: a backend, op or kernel that was named does not exist.
        UnsupportedError: an op has no kernel that is able; every kernel's reasons are given.
        TunedFileError: a file of measured times cannot be used.
    """
    facts = detect_device(device)
    chosen = _choose(_ladders(facts, backend, kernels), spec, facts, deterministic=deterministic)
    launchers: dict[Op, Launcher] = {}
    for op, kernel in chosen.items():
        if kernel is steps.COMPOSED.get(op):
            launchers[op] = steps.compose(op, spec, launchers)
        else:
            launcher = kernel.load(spec, facts, deterministic=deterministic)
            launchers[op] = adapt(launcher, op, spec)
    names = {op: kernel.label(spec, facts) for op, kernel in chosen.items()}

    warm = partial(warmup, spec, facts, dict(launchers))
    if check is None:
        check = facts.kind == "cpu"
    if check:
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
    among: Among | None = None  # of a kernel that is able: what it chooses from as it is called

    def __str__(self) -> str:
        """Say in one line what the kernel does and why."""
        standing = "serves" if self.chosen else "cannot" if self.reasons else "able, not first"
        by = (self.among.source,) if self.among else ()
        return ": ".join([f"{self.op.value} {self.kernel} {standing}", *self.reasons, *by])


def explain(
    spec: GdnSpec,
    device: AnyDevice,
    *,
    backend: str | None = None,
    kernels: Mapping[Op | str, str] | None = None,
    deterministic: bool = False,
) -> tuple[Choice, ...]:
    """Return every kernel that ``bind`` would consider, in order, and what speaks against it.

    Args:
        spec: the layer.
        device: a device, or a :class:`Device` that need not be here.
        backend: as ``bind`` takes it.
        kernels: as ``bind`` takes it.
        deterministic: as ``bind`` takes it.

    Raises:
        InputError: there is no such device.
        UnknownBackendError: a backend, op or kernel that was named does not exist.
        TunedFileError: a file of measured times cannot be used.
    """
    facts = detect_device(device)
    ladders = _ladders(facts, backend, kernels)
    first = {
        op: _first_able(ladder, spec, facts, deterministic=deterministic)
        for op, ladder in ladders.items()
    }
    choices: list[Choice] = []
    for op, ladder in ladders.items():
        for kernel in ladder:
            reasons = kernel.reasons(spec, facts, deterministic=deterministic)
            if kernel is steps.COMPOSED.get(op):
                missing = [part.value for part in steps.PARTS[op][1] if first[part] is None]
                reasons += [f"no kernel can serve {part}" for part in missing]
            chosen = kernel is first[op] and not reasons
            label = kernel.name if reasons else kernel.label(spec, facts)
            among = kernel.among(spec, facts) if kernel.among and not reasons else None
            choices.append(Choice(op, label, chosen, tuple(reasons), among))
    return tuple(choices)


def _ladders(
    device: Device, backend: str | None, kernels: Mapping[Op | str, str] | None
) -> dict[Op, tuple[Kernel, ...]]:
    """Return the kernels to consider for each op, in order, with overrides applied."""
    named = dict(kernels or {})
    if backend is None:
        backend, from_environment = _read_override(os.environ.get(OVERRIDE_VARIABLE, ""))
        named = {**from_environment, **named}
    own = backend or default_backend(device)
    table = get_backend(own)
    ladders = {op: _kernels_of(table, op) for op in Op}
    for op, step in steps.COMPOSED.items():
        ladders[op] += (step,)
    by_op = {_op(name): kernel for name, kernel in named.items()}
    ladders.update({op: (_find_kernel(kernel, op, own),) for op, kernel in by_op.items()})
    if Op.CHUNK_PREFILL in by_op and Op.PLAN_PREFILL not in by_op:
        library = by_op[Op.CHUNK_PREFILL].partition(".")[0]
        planner = _kernel_of((own, *BUILTIN), Op.PLAN_PREFILL, f"{library}.plan_prefill")
        if planner is not None:
            ladders[Op.PLAN_PREFILL] = (planner, *ladders[Op.PLAN_PREFILL])
    return ladders


def _choose(
    ladders: Mapping[Op, tuple[Kernel, ...]],
    spec: GdnSpec,
    device: Device,
    *,
    deterministic: bool,
) -> dict[Op, Kernel]:
    """Return the first able kernel of each op, or raise with every reason of every kernel."""
    chosen: dict[Op, Kernel] = {}
    rejected: dict[str, list[str]] = {}
    lines: list[str] = []
    for op, ladder in ladders.items():
        kernel = _first_able(ladder, spec, device, deterministic=deterministic)
        if kernel is not None:
            chosen[op] = kernel
            continue
        lines.append(f"no kernel can serve {op.value} on {device}")
        for refused in ladder:
            rejected[refused.name] = refused.reasons(spec, device, deterministic=deterministic)
            lines += [f"  {refused.name}:", *(f"    - {r}" for r in rejected[refused.name])]
        if not ladder:
            lines.append("  the backend declares none")
    if lines:
        raise UnsupportedError("\n".join([*lines, f"the layer is {spec}"]), rejected)
    return chosen


def _first_able(
    ladder: tuple[Kernel, ...], spec: GdnSpec, device: Device, *, deterministic: bool
) -> Kernel | None:
    for kernel in ladder:
        if not kernel.reasons(spec, device, deterministic=deterministic):
            return kernel
    return None


def detect_device(device: AnyDevice) -> Device:
    """Return the facts about a device: NVIDIA and AMD are told apart, the architecture named.

    Raises:
        InputError: torch knows no such device, or it is not here.
    """
    if isinstance(device, Device):
        return device
    try:
        device = torch.device(device)
        if device.type == "cpu":
            return Device("cpu", "cpu")
        if device.type != "cuda":
            torch.empty(0, device=device)  # raises where it is not here
            return Device(device.type, device.type, device.index)
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, TypeError, ModuleNotFoundError) as error:
        reason = str(error).splitlines()[0]
        if str(device).partition(":")[0] == "rocm":
            reason = "it calls AMD's GPUs cuda"
        raise InputError(f"device is {device}, needs one that torch can use: {reason}") from error
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
        return Device("rocm", arch, device.index, properties.name)
    arch = f"sm{properties.major}{properties.minor}"
    return Device("cuda", arch, device.index, properties.name)


def get_backend(name: str) -> Backend:
    """Return the backend called ``name``, built in or from an installed plugin."""
    if name in BUILTIN:
        backend: Backend = pkgutil.resolve_name(BUILTIN[name])
        return backend
    plugins = _plugins()
    if name not in plugins:
        raise _unknown("backend", name, {*BUILTIN, *plugins})
    try:
        plugin: Backend = plugins[name].load()
    except (ImportError, AttributeError) as error:
        raise UnknownBackendError(f"backend {name!r} cannot be loaded: {error}") from error
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


def _find_kernel(name: str, op: Op, own: str) -> Kernel:
    """Return the kernel called ``name``, from the backend ``own`` where it has one."""
    step = steps.COMPOSED.get(op)
    if step is not None and step.name == name:
        return step
    # plugins are looked up only for a name that no built-in backend has
    found = _kernel_of((own, *BUILTIN), op, name) or _kernel_of(_plugins(), op, name)
    if found is None:
        tables = map(get_backend, backend_names())
        known = {kernel.name for table in tables for kernel in _kernels_of(table, op)}
        raise _unknown(f"{op.value} kernel", name, known | ({step.name} if step else set()))
    return found


def _kernel_of(backends: Iterable[str], op: Op, name: str) -> Kernel | None:
    tables = map(get_backend, backends)
    named = (k for table in tables for k in _kernels_of(table, op) if k.name == name)
    return next(named, None)


def _unknown(what: str, name: str, known: set[str]) -> UnknownBackendError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UnknownBackendError(f"no {what} {name!r}; there is {', '.join(sorted(known))}{hint}")
