# SPDX-License-Identifier: Apache-2.0
"""Prefill kernels chosen by measured times: which is fastest depends on sequences and tokens.

``measured`` makes three entries for the front of a table. ``measured.chunk_prefill`` and
``measured.prefill_step`` choose as they are called, by T and the number of sequences;
``measured.plan_prefill`` lets the planners of all kernels plan, once a step, and finds the number
of sequences that tells most. The device is asked nothing: shapes and hints alone decide.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdn_portable.backend import Among, Kernel, Launcher, MakeLauncher
from gdn_portable.interface import PlanPrefill
from gdn_portable.metadata import Plans, PrefillMetadata
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.tuned import OPS, Found, Times, find

LIBRARY = "measured"
NEVER = 1e12  # microseconds, of a kernel that failed
ROWS = {Op.CHUNK_PREFILL: "q", Op.PREFILL_STEP: "mixed_qkv"}  # the first argument, [T, ...]


def measured(kernels: Sequence[Kernel], shipped: Path | None = None) -> tuple[Kernel, ...]:
    """Return the entries that choose among ``kernels``; all are passed over where deterministic.

    Args:
        kernels: the table that they go in front of, and that serves where there are no times.
        shipped: folder of the times that come with the backend.
    """
    entries = [_choosing(op, _of(op, kernels), shipped) for op in OPS]
    return (*entries, _planning(_of(Op.PLAN_PREFILL, kernels), entries))


class Choice(NamedTuple):
    """The able kernels that are the fastest of some batch, in the order of their table."""

    kernels: tuple[Kernel, ...]
    found: Found

    def fastest(self, spec: GdnSpec) -> Fastest:
        """Return which is the fastest, for a layer that may not be the one that was timed."""
        names = [kernel.name for kernel in self.kernels]
        return Fastest.of(
            self.found.times, names, share=spec.num_v_heads / self.found.layer.num_v_heads
        )


def _choosing(op: Op, ladder: Sequence[Kernel], shipped: Path | None) -> Kernel:
    """Return the entry that chooses the kernel of ``op``."""

    def look(spec: GdnSpec, device: Device) -> Choice | str:
        able = _able(ladder, spec, device)
        names = [kernel.name for kernel in able]
        if len(able) < 2:
            return f"fewer than two kernels to choose from: {', '.join(names) or 'none'}"
        found = find(spec, device, op, frozenset(names), shipped)
        if found is None:
            where = f"{device.name or device.kind} ({device.arch})"
            return f"no times of {' and '.join(names)} on {where}: tune measures them"
        timed = {name for cell in found.times.values() for name in cell}
        all_timed = Choice(tuple(kernel for kernel in able if kernel.name in timed), found)
        fastest = {place for _, choices in all_timed.fastest(spec).rows for place in choices}
        return Choice(tuple(all_timed.kernels[place] for place in sorted(fastest)), found)

    def refuse(spec: GdnSpec, device: Device) -> str | None:
        choice = look(spec, device)
        return choice if isinstance(choice, str) else None

    def among(spec: GdnSpec, device: Device) -> Among:
        choice = look(spec, device)
        assert isinstance(choice, Choice)  # asked of an able kernel alone
        names = tuple(kernel.name for kernel in choice.kernels)
        fastest = choice.fastest(spec)
        source = choice.found.source(spec)
        return Among(names, source, lambda n, tokens: names[fastest.pick(n, tokens)])

    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> Launcher:
        choice = look(spec, device)
        assert isinstance(choice, Choice)
        launchers = [k.load(spec, device, deterministic=deterministic) for k in choice.kernels]
        return launch_fastest(launchers, choice.fastest(spec), ROWS[op])

    return _entry(op, make, refuse, among)


def _planning(ladder: Sequence[Kernel], choosing: Sequence[Kernel]) -> Kernel:
    """Return the entry that plans for all kernels, able where an op is chosen."""

    def refuse(spec: GdnSpec, device: Device) -> str | None:
        reasons = [kernel.reasons(spec, device) for kernel in choosing]
        return None if [] in reasons else reasons[0][0]

    def among(spec: GdnSpec, device: Device) -> Among:
        names = tuple(kernel.name for kernel in _able(ladder, spec, device))
        return Among(names, "each of them plans")

    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> PlanPrefill:
        able = _able(ladder, spec, device)
        return plan_all([k.load(spec, device, deterministic=deterministic) for k in able])

    return _entry(Op.PLAN_PREFILL, make, refuse, among)


def _entry(
    op: Op,
    make: MakeLauncher,
    refuse: Callable[[GdnSpec, Device], str | None],
    among: Callable[[GdnSpec, Device], Among],
) -> Kernel:
    return Kernel(
        op=op,
        name=f"{LIBRARY}.{op.value}",
        target=make,
        probe=None,
        devices=None,
        archs=None,
        dtypes=None,
        state_dtypes=None,
        head_dims=None,
        state_layouts=None,
        conv_layouts=None,
        refuse=refuse,
        among=among,
    )


def _of(op: Op, kernels: Sequence[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.op is op]


def _able(ladder: Sequence[Kernel], spec: GdnSpec, device: Device) -> list[Kernel]:
    return [kernel for kernel in ladder if not kernel.reasons(spec, device)]


def plan_all(planners: Sequence[PlanPrefill]) -> PlanPrefill:
    """Return ``plan_prefill`` for several kernels."""

    def plan_prefill(metadata: PrefillMetadata) -> None:
        old, parts = metadata.plan, list[object | None]()
        own = old.parts if isinstance(old, Plans) else ()
        for place, plan in enumerate(planners):
            metadata.plan = own[place] if place < len(own) else None
            plan(metadata)
            parts.append(metadata.plan)
        metadata.plan = Plans(telling_sequences(metadata), tuple(parts))

    return plan_prefill


def telling_sequences(metadata: PrefillMetadata) -> float:
    """Return how many sequences as long as the longest would make up the batch.

    One long sequence beside many short ones takes as long as it does alone.
    """
    lengths = metadata.seq_lens_cpu
    longest = 0 if lengths is None or len(lengths) == 0 else int(max(lengths))
    if lengths is None or longest == 0:
        return metadata.cu_seqlens.shape[0] - 1
    return sum(map(int, lengths)) / longest


class Fastest(NamedTuple):
    """Which kernel is fastest, by sequences and tokens.

    Attributes:
        sequences: where a row ends and the next begins.
        rows: of each, the tokens at which the choice changes, and the choices between.
    """

    sequences: tuple[float, ...]
    rows: tuple[tuple[tuple[float, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, times: Times, kernels: Sequence[str], *, share: float = 1.0) -> Fastest:
        """Find the boundaries: between measured sequences their geometric mean decides.

        Args:
            times: of every kernel in every cell.
            kernels: their names; a choice is a place in it.
            share: value heads for each that was there when the times were measured. A batch is
                looked up as one whose sequences are as long and have as many heads in all.
        """
        counts = sorted({cell.sequences for cell in times})
        rows = []
        for count in counts:
            cells = sorted(cell for cell in times if cell.sequences == count)
            at = {c.tokens: [times[c][name] or NEVER for name in kernels] for c in cells}
            limits, choices = _row(at)
            rows.append((tuple(limit / share for limit in limits), choices))
        between = tuple(math.sqrt(a * b) / share for a, b in zip(counts, counts[1:], strict=False))
        return cls(between, tuple(rows))

    def pick(self, sequences: float, tokens: int) -> int:
        """Return the place of the fastest kernel."""
        limits, choices = self.rows[bisect_right(self.sequences, sequences)]
        return choices[bisect_right(limits, tokens)]


def _row(at: dict[int, list[float]]) -> tuple[list[float], tuple[int, ...]]:
    """Return the tokens at which the fastest kernel changes, and the fastest between them."""
    limits, choices, before = list[float](), list[int](), 0
    for tokens, taken in at.items():
        best = min(range(len(taken)), key=taken.__getitem__)
        if choices and best != choices[-1]:
            limits.append(_crossing(before, tokens, choices[-1], best, at))
        if not choices or best != choices[-1]:
            choices.append(best)
        before = tokens
    return limits, tuple(choices)


def _crossing(low: int, high: int, a: int, b: int, at: dict[int, list[float]]) -> float:
    """Return the tokens at which kernel ``a`` stops being faster, both times being powers of T."""
    gained, lost = (math.log(at[tokens][b] / at[tokens][a]) for tokens in (low, high))
    share = gained / (gained - lost)
    return low * math.pow(high / low, share)


def launch_fastest(launchers: Sequence[Launcher], fastest: Fastest, rows: str) -> Launcher:
    """Return the op that launches what is fastest for its batch.

    Args:
        launchers: in the order of the choices.
        fastest: chooses.
        rows: name of the first argument, [T, ...].
    """
    pick = fastest.pick

    def launch(*args: Any, metadata: PrefillMetadata, **kwargs: Any) -> Any:
        tokens = (args[0] if args else kwargs[rows]).shape[0]
        plan = metadata.plan
        if not isinstance(plan, Plans):
            sequences: float = metadata.cu_seqlens.shape[0] - 1
        elif plan.runs_all:
            return [run(*args, metadata=metadata, **kwargs) for run in launchers][-1]
        else:
            sequences = plan.sequences
        return launchers[pick(sequences, tokens)](*args, metadata=metadata, **kwargs)

    return launch
