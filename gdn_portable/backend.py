# SPDX-License-Identifier: Apache-2.0
"""How a backend declares its kernels, and how a kernel says what it cannot serve."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch

from gdn_portable.spec import ConvLayout, Device, GdnSpec, Op, StateLayout

Launcher = Callable[..., Any]


class MakeLauncher(Protocol):
    """What a kernel's target is: called once, at bind."""

    def __call__(self, spec: GdnSpec, device: Device, *, deterministic: bool) -> Launcher:
        """Return the op for ``spec``; what must live between calls lives in what is returned.

        Args:
            spec: the layer.
            device: where it runs.
            deterministic: whether results must not depend on the composition of the batch.
        """
        ...


class Among(NamedTuple):
    """What a kernel that chooses as it is called chooses from, by what, and how.

    Attributes:
        kernels: names.
        source: where the times come from that decide.
        pick: returns the kernel for a number of sequences and of tokens; None where all run.
    """

    kernels: tuple[str, ...]
    source: str
    pick: Callable[[float, int], str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One implementation of one op, described without importing the library behind it.

    A restriction that does not apply says so with None: up to ``conv_layouts`` none has a default.

    Attributes:
        op: what it implements.
        name: ``library.op``, as logs and overrides spell it.
        target: what makes the launcher, or its ``"module:function"``, imported at bind.
        probe: returns why the library behind it cannot be used, found without importing it.
        devices: kinds of :class:`Device` it runs on.
        archs: architectures it runs on.
        dtypes: of the activations.
        state_dtypes: of the recurrent state.
        head_dims: (K, V) pairs.
        state_layouts: of the engine's memory. The kernel is passed [slots, HV, V, K] always; under
            KV that is a transposed view, in which V is contiguous.
        conv_layouts: of the engine's memory. The kernel is passed [slots, D, L] always; under
            LEN_FIRST that is a transposed view, in which D is contiguous.
        refuse: returns a reason for what the fields above cannot express.
        among: of a kernel that chooses among others by the batch, returns those it chooses from
            where it is able. ``deterministic=True`` passes it over.
    """

    op: Op
    name: str
    target: MakeLauncher | str
    probe: Callable[[], str | None] | None
    devices: Collection[str] | None
    archs: Collection[str] | None
    dtypes: Collection[torch.dtype] | None
    state_dtypes: Collection[torch.dtype] | None
    head_dims: Collection[tuple[int, int]] | None
    state_layouts: Collection[StateLayout] | None
    conv_layouts: Collection[ConvLayout] | None
    refuse: Callable[[GdnSpec, Device], str | None] | None = None
    among: Callable[[GdnSpec, Device], Among] | None = None

    def reasons(self, spec: GdnSpec, device: Device, *, deterministic: bool = False) -> list[str]:
        """Return every reason why it cannot serve ``spec`` on ``device``; empty when it can."""
        found = [
            _unless("device", device.kind, self.devices),
            _unless("arch", device.arch, self.archs),
            _unless("dtype", spec.dtype, self.dtypes),
            _unless("state dtype", spec.state_dtype, self.state_dtypes),
            _unless("head dims (K, V)", (spec.head_k_dim, spec.head_v_dim), self.head_dims),
            _unless("state layout", spec.state_layout.value, _values(self.state_layouts)),
            _unless("conv layout", spec.conv_layout.value, _values(self.conv_layouts)),
            "it chooses by the batch, not deterministic" if deterministic and self.among else None,
            self.probe() if self.probe else None,
            self.refuse(spec, device) if self.refuse else None,
        ]
        return [reason for reason in found if reason]

    def label(self, spec: GdnSpec, device: Device) -> str:
        """Return the name of a kernel that is able, with the names it chooses from."""
        if self.among is None:
            return self.name
        return f"{self.name}: {' | '.join(self.among(spec, device).kernels)}"

    def load(self, spec: GdnSpec, device: Device, *, deterministic: bool) -> Launcher:
        """Import the target and let it make the launcher."""
        make = self.target
        if isinstance(make, str):
            make = pkgutil.resolve_name(make)
        launcher: Launcher = make(spec, device, deterministic=deterministic)
        return launcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A named, ordered table of kernels: of each op, the first that is able is used.

    Attributes:
        name: as ``bind(backend=...)`` spells it.
        devices: kinds of device it is meant for; None for any. A plugin that names a kind no
            built-in backend serves becomes that kind's default.
        kernels: in order of preference.
    """

    name: str
    devices: Collection[str] | None
    kernels: tuple[Kernel, ...]


def needs(module: str, distribution: str) -> Callable[[], str | None]:
    """Return a probe that reports ``distribution`` missing, without importing ``module``.

    Args:
        module: its top-level module; a dotted name would import what is in front of the dot.
        distribution: as pip knows it.
    """

    def probe() -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{distribution} is not installed"
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"module {module!r} is not from {distribution}"
        return None

    return probe


def _values(layouts: Collection[Enum] | None) -> tuple[str, ...] | None:
    return None if layouts is None else tuple(layout.value for layout in layouts)


def _unless(what: str, value: object, allowed: Collection[Any] | None) -> str | None:
    if allowed is None or value in allowed:
        return None
    return f"{what} is {value}, needs {' or '.join(map(str, allowed))}"
