# SPDX-License-Identifier: Apache-2.0
"""The two state pools of a layer, by slot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_portable.errors import InputError
from gdn_portable.metadata import conv_slot_shape, state_slot_shape
from gdn_portable.spec import GdnSpec

PAGE_ALIGNMENT = 256

Slots = Sequence[int] | Tensor


@dataclass(slots=True, eq=False)
class StatePool:
    """One layer's conv state and recurrent state; wraps an engine's own tensors as they are.

    Attributes:
        conv_state: [slots, D, L] or [slots, L, D], or None where only the recurrence is used.
        state: [slots, HV, V, K] or [slots, HV, K, V], or None where only the conv is used.
    """

    conv_state: Tensor | None
    state: Tensor | None

    @classmethod
    def allocate(
        cls,
        spec: GdnSpec,
        num_slots: int,
        device: torch.device | str,
        *,
        paged: bool = False,
    ) -> StatePool:
        """Allocate zeroed pools in the spec's layouts.

        Args:
            spec: the layer.
            num_slots: how many sequences can be held.
            device: where.
            paged: put both states of a slot side by side in one page, as engines with a unified
                cache do; both pools are then strided views of one allocation.
        """
        if num_slots < 1:
            raise InputError(f"num_slots is {num_slots}, needs at least 1")
        conv_shape = conv_slot_shape(spec, spec.conv_state_len)
        state_shape = state_slot_shape(spec)
        if not paged:
            return cls(
                torch.zeros(num_slots, *conv_shape, dtype=spec.conv_state_dtype, device=device),
                torch.zeros(num_slots, *state_shape, dtype=spec.state_dtype, device=device),
            )
        conv_bytes = _aligned(math.prod(conv_shape) * spec.conv_state_dtype.itemsize)
        page_bytes = conv_bytes + _aligned(math.prod(state_shape) * spec.state_dtype.itemsize)
        # pages are of the states' own dtype where they share one
        same = spec.conv_state_dtype is spec.state_dtype
        unit = spec.state_dtype if same else torch.uint8
        pages = torch.zeros(num_slots, page_bytes // unit.itemsize, dtype=unit, device=device)
        return cls(
            _slice(pages, 0, conv_shape, spec.conv_state_dtype),
            _slice(pages, conv_bytes, state_shape, spec.state_dtype),
        )

    @property
    def num_slots(self) -> int:
        """How many slots both pools have."""
        return min((len(pool) for pool in self._pools()), default=0)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one sequence's states take, padding between slots not counted."""
        return sum(pool[0].numel() * pool.element_size() for pool in self._pools())

    def reset(self, slots: Slots | None = None) -> None:
        """Zero the states of ``slots``, all where None; the others are not touched.

        Slots are checked on the host, so those of a GPU are waited for.

        Raises:
            InputError: a slot does not exist; negative ones are no padding here.
        """
        index = self._index("slots", range(self.num_slots) if slots is None else slots)
        for pool in self._pools():
            pool[index] = 0

    def copy(self, source: Slots, target: Slots) -> None:
        """Copy the states of slot ``source[i]`` to slot ``target[i]``: forks and relocations.

        All sources are read before any target is written, so slots may change places. Slots are
        checked on the host, so those of a GPU are waited for.

        Raises:
            InputError: a slot does not exist, a target is named twice, or the lengths differ.
        """
        sources, targets = self._index("source", source), self._index("target", target)
        if len(sources) != len(targets):
            raise InputError(f"source has {len(sources)} slots, needs {len(targets)} like target")
        if len(targets.unique()) != len(targets):
            raise InputError(f"target is {targets.tolist()}, needs every slot once")
        for pool in self._pools():
            pool[targets] = pool[sources]

    def _pools(self) -> list[Tensor]:
        """Return the pools with the slots first: a layer axis may come before them."""
        axes = ((self.conv_state, 3), (self.state, 4))
        return [pool.movedim(pool.dim() - n, 0) for pool, n in axes if pool is not None]

    def _index(self, name: str, slots: Slots) -> Tensor:
        index = torch.as_tensor(slots)
        if index.numel() and (index.dtype.is_floating_point or index.dtype == torch.bool):
            raise InputError(f"{name} has dtype {index.dtype}, needs slot numbers")
        index = index.to(torch.int64).flatten()
        wrong = index[(index < 0) | (index >= self.num_slots)]
        if wrong.numel():
            raise InputError(
                f"{name} names slot {wrong.tolist()[0]}, needs 0 to {self.num_slots - 1}"
            )
        pools = self._pools()
        return index.to(pools[0].device) if pools else index


def _aligned(size: int) -> int:
    return -(-size // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _slice(pages: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """View the bytes at ``offset`` of every page as a tensor of ``shape``."""
    first, size = offset // pages.itemsize, math.prod(shape) * dtype.itemsize // pages.itemsize
    flat = pages[:, first : first + size]
    # a view as a dtype, even as its own, is what torch compiles no code for
    view: Tensor = (flat if flat.dtype is dtype else flat.view(dtype)).unflatten(1, shape)
    return view
