# SPDX-License-Identifier: Apache-2.0
"""The conformance cases that every backend must pass, and the tolerances they pass with.

A case is a call of one op with hard inputs. It is run three times on copies of them: by the
reference in float64 (the oracle), by the reference in the spec's dtypes, and by the ops under
test. The last may err at most twice as much as the second, plus a small absolute term; what the
oracle leaves alone, they must leave bit for bit, and what it makes zero has to be zero. Every
buffer starts as NaN where nothing is set.

    for case in gdn_portable.testing.cases(spec):
        case.check(ops)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from gdn_portable.interface import GdnOps
from gdn_portable.metadata import (
    DeferredUpdates,
    Drafts,
    GdnParams,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
)
from gdn_portable.select import bind
from gdn_portable.spec import GdnSpec, Op, torch_device
from gdn_portable.state import StatePool
from gdn_portable.steps import split_qkv

# added to twice the reference's error, relative to the largest value: that of the coarsest dtype a
# result may have gone through, which is its own, the activations' where matrix products round
# their operands, and the state's in a tree of drafts
ABSOLUTE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
MATRIX_PRODUCTS = (Op.CHUNK_PREFILL, Op.PREFILL_STEP)
SLOTS = 24
MAX_DRAFTS = 5
MAX_DEFERRED = 5

Arguments = dict[str, Any]
KeptT = TypeVar("KeptT", ReplayDrafts, SnapshotDrafts, DeferredUpdates)


@dataclass(frozen=True, slots=True)
class Case:
    """One call of one op; ``arguments`` live on the CPU and are never written."""

    name: str
    op: Op
    spec: GdnSpec
    arguments: Arguments

    def check(self, ops: GdnOps) -> float:
        """Run ``ops`` against the oracle and return the largest error, relative to its bound.

        Raises:
            AssertionError: an output or a state is off, or a slot changed that must not.
        """
        double = dataclasses.replace(
            self.spec, dtype=torch.float64, state_dtype=torch.float64, conv_dtype=None
        )
        oracle = self.results(bind(double, "cpu", backend="reference", check=False), torch.float64)
        twin = self.results(bind(self.spec, "cpu", backend="reference", check=False), None)
        before = _tensors(self.arguments)
        start = _tensors(_copied(self.arguments, None, torch.float64))
        worst = 0.0
        for name, value in self.results(ops).items():
            if not value.is_floating_point():
                assert torch.equal(value, twin[name]), f"{self.name}: {name} differs"
                continue
            if name in before:
                kept = _rows_equal(oracle[name], start[name])
                moved = ~_rows_equal(value, before[name])
                if name in ("state", "pool.state") and self.spec.scratch_slot is not None:
                    moved[self.spec.scratch_slot] = False  # anyone may write it
                assert not (kept & moved).any(), (
                    f"{self.name}: {name}[{(kept & moved).nonzero()[0].tolist()}] was written"
                )
                if kept.all():
                    continue
                value, exact, reference = (x[~kept] for x in (value, oracle[name], twin[name]))
            else:
                exact, reference = oracle[name], twin[name]
            worst = max(worst, self._compare(name, value, exact, reference))
        return worst

    def _compare(self, name: str, value: Tensor, exact: Tensor, reference: Tensor) -> float:
        """Return the error over its bound."""
        name = f"{self.name}: {name}"
        assert value.shape == exact.shape, f"{name} has shape {tuple(value.shape)}"
        got, twin = value.double(), reference.double()
        # NaN stands where a part of a slot was not written
        assert torch.equal(got.isnan(), exact.isnan()), f"{name} has NaN where the oracle has none"
        got, twin, exact = (x.nan_to_num() for x in (got, twin, exact))
        if not exact.numel():
            return 0.0
        # padding, and what is left of nothing
        assert not got[exact == 0].any(), f"{name} is not zero where the oracle is"
        absolute = ABSOLUTE[value.dtype]
        if self.op in MATRIX_PRODUCTS:
            absolute = max(absolute, ABSOLUTE[self.spec.dtype])
        metadata = self.arguments.get("metadata")
        if isinstance(metadata, VerifyMetadata) and metadata.is_tree:
            # a branch may be run from its parent's snapshot
            absolute = max(absolute, ABSOLUTE[self.spec.state_dtype])
        bound = 2 * (twin - exact).abs().max() + absolute * exact.abs().max()
        error = (got - exact).abs().max()
        assert error <= bound, f"{name} is off by {error:.3g}, needs at most {bound:.3g}"
        return float(error / bound) if bound else 0.0

    def results(self, ops: GdnOps, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Call the op on copies; return its outputs and every tensor it may have written.

        Args:
            ops: what is called.
            dtype: given to all floats before; None leaves them as they are.
        """
        arguments = _copied(self.arguments, torch_device(ops.device), dtype)
        out = getattr(ops, self.op.value)(**arguments)
        outputs = {f"output {i}": x for i, x in enumerate(out)} if isinstance(out, tuple) else {}
        if isinstance(out, Tensor):
            outputs = {"output": out}
        return {name: x.cpu() for name, x in {**outputs, **_tensors(arguments)}.items()}


def cases(spec: GdnSpec, *, seed: int = 0) -> Iterator[Case]:
    """Yield every case of a spec whose ``conv_window`` fits a slot table of 5 drafts."""
    spec = dataclasses.replace(
        spec, conv_window=max(spec.conv_state_len, spec.conv_width - 2 + MAX_DRAFTS)
    )
    make = _Inputs(spec, torch.Generator().manual_seed(seed))
    edge = torch.tensor([-90.0, 19.9, 20.0, 20.1, 30.0])[:, None].repeat(1, spec.num_v_heads)
    zeros = torch.zeros(spec.num_v_heads)
    gates = {"a": edge, "b": edge, "A_log": zeros, "dt_bias": zeros}
    yield Case("gating at softplus's threshold", Op.GATING, spec, gates)
    for name, step in make.prefills():
        yield from _with_parts(name, Op.PREFILL_STEP, spec, step)
    for name, step in make.decodes():
        yield from _with_parts(name, Op.DECODE_STEP, spec, step)
    for name, step in make.verifies():
        yield from _with_parts(name, Op.VERIFY_STEP, spec, step)
        if step["drafts"] is None:
            continue
        ragged = step["metadata"].cu_seqlens is not None
        last = torch.tensor([-1, 0, -1, 2] if ragged else [-1, 0, 2, 4])
        commit = {"pool": step["pool"], "drafts": make.filled(step["drafts"])}
        commit |= {"metadata": step["metadata"], "last_accepted": last}
        yield Case(f"commit of {name}", Op.MTP_COMMIT, spec, commit)
        commit = {**commit, "out_state_indices": torch.tensor([20, -1, 21, 22])}
        yield Case(f"commit to other slots of {name}", Op.MTP_COMMIT, spec, commit)
    for name, norm in make.norms():
        yield Case(name, Op.GATED_RMS_NORM, spec, norm)


class _Inputs:
    """Draws arguments of the steps."""

    def __init__(self, spec: GdnSpec, generator: torch.Generator) -> None:
        self.spec = spec
        self.generator = generator
        self.num_slots = max(SLOTS, (spec.scratch_slot or 0) + 1)

    def prefills(self) -> Iterator[tuple[str, Arguments]]:
        lengths = [0, 1, 2, 3, 0, 63, 64, 65, 7, 130, 0]
        slots = [5, 6, 7, SLOTS - 1, 9, 0, 11, 12, -1, 14, 15]
        fresh = [i % 3 != 0 for i in range(len(lengths))]
        base = PrefillMetadata(_offsets(lengths), torch.tensor(slots), torch.tensor(fresh))
        yield "prefill", self.step(sum(lengths) + 3, [*slots], gate=False, metadata=base)
        yield (
            "prefill with a gate and no flags",
            self.step(
                sum(lengths),
                slots,
                gate=True,
                metadata=dataclasses.replace(base, has_initial_state=None),
            ),
        )
        # the last one has no tokens either: a kernel may copy its state, and must not
        target = torch.tensor([16, 17, -1, 18, 19, 20, 21, 22, 23, 1, self.spec.pad_slot])
        forked = dataclasses.replace(
            base,
            out_state_indices=target.int(),
            checkpoint_offsets=torch.tensor([0, 0, 2, 2, -1, 0, 63, 64, 3, 129, 0]),
            checkpoint_indices=torch.tensor([-1, 3, 4, -2, 8, -1, 10, 13, 8, 8, -1]),
        )
        yield "prefill to other slots", self.step(sum(lengths), slots, gate=False, metadata=forked)
        repeated = self.step(130, [3], gate=False, metadata=None)
        repeated["mixed_qkv"] = repeated["mixed_qkv"][:1].repeat(130, 1)
        repeated["a"] = torch.full_like(repeated["a"], -30)
        repeated["b"] = torch.full_like(repeated["b"], 12)
        repeated["metadata"] = PrefillMetadata(_offsets([130]), torch.tensor([3]))
        yield "prefill of one token repeated", repeated
        # long enough to be cut; the first head remembers all, the last forgets within a chunk
        lengths, slots = [5, 1100, 0, 330], [8, 2, 13, 0]
        long = PrefillMetadata(_offsets(lengths), torch.tensor(slots))
        step = self.step(sum(lengths) + 2, slots, gate=False, metadata=long)
        rates = torch.linspace(-9, 2, self.spec.num_v_heads)
        step["params"] = dataclasses.replace(step["params"], A_log=rates)
        yield "prefill of long sequences", step

    def decodes(self) -> Iterator[tuple[str, Arguments]]:
        slots = torch.tensor([0, -1, SLOTS - 1, -2, 7, 8, 1, 1, 1])[:6]
        step = self.step(6, slots.tolist(), gate=False)
        yield "decode", {**step, "state_indices": slots}
        step = self.step(6, [4, 4, 9], gate=True)
        read = torch.tensor([4, 4, -1, 9, 4, 9, 1, 1], dtype=torch.int32)
        write = torch.tensor([10, -1, 12, 13, 14, 15])
        yield (
            "decode to other slots with a gate",
            {**step, "state_indices": read, "out_state_indices": write},
        )
        slots = torch.tensor([0, 3, -1, SLOTS - 1, 8, 7])
        step = self.step(6, slots.tolist(), gate=False)
        step |= {"state_indices": slots, "deferred": self.deferred()}
        count = torch.tensor([MAX_DEFERRED, 2, 1, 0, MAX_DEFERRED - 1, 3], dtype=torch.int32)
        yield "decode that defers", {**step, "num_deferred": count}
        step = self.step(6, slots.tolist(), gate=True)
        step |= {"state_indices": slots, "deferred": self.deferred(), "num_deferred": count}
        flush = torch.tensor([False, True, True, True, False, False, True])
        step["a"][1] = step["b"][1] = -torch.inf  # a token that changes no state
        yield "decode that defers and flushes with a gate", {**step, "flush": flush}
        step = self.step(6, [4, 9], gate=False)
        step |= {"state_indices": read, "out_state_indices": write, "deferred": self.deferred()}
        yield "decode to other slots of what is deferred", {**step, "num_deferred": count}
        zero_keys = self.step(2, [3, 5], gate=False)
        zero_keys["mixed_qkv"] = torch.zeros_like(zero_keys["mixed_qkv"])
        zero_keys["pool"].conv_state[:] = 0
        yield "decode of zero keys", {**zero_keys, "state_indices": torch.tensor([3, 5])}

    def verifies(self) -> Iterator[tuple[str, Arguments]]:
        P, slots = MAX_DRAFTS, [3, -1, SLOTS - 1, 0]
        parents = torch.tensor([[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
        ragged, accepted = _offsets([P, 2, 0, 3]), torch.tensor([3, 1, 2, 0])
        base = VerifyMetadata(torch.tensor(slots), P, num_accepted=accepted)
        for shape, cu_seqlens, tree in (
            ("chain", None, None),
            ("ragged chain", ragged, None),
            ("tree", None, parents),
        ):
            rows = 4 * P if cu_seqlens is None else 12
            for protocol in ("replay", "snapshot"):
                metadata = dataclasses.replace(base, cu_seqlens=cu_seqlens, parents=tree)
                if protocol == "snapshot":
                    metadata.rows = torch.tensor([2, 0, 1, 5])
                step = self.step(rows, slots, gate=shape == "tree", metadata=metadata)
                yield (
                    f"verify of a {shape} by {protocol}",
                    {**step, "drafts": self.drafts(protocol)},
                )
            if tree is None:
                table = torch.arange(4 * P).view(4, P)
                table[1] = -1
                metadata = dataclasses.replace(base, cu_seqlens=cu_seqlens, state_indices=table)
                read = [*range(P), *range(2 * P, 4 * P)]
                step = self.step(rows, read, gate=False, metadata=metadata)
                yield f"verify of a {shape} by slot table", {**step, "drafts": None}

    def norms(self) -> Iterator[tuple[str, Arguments]]:
        HV, V, dtype = self.spec.num_v_heads, self.spec.head_v_dim, self.spec.dtype
        x, weight = self.normal(37, HV, V).to(dtype), self.normal(V).to(dtype)
        wide = self.normal(37, HV * V + 3).to(dtype)
        # a head of zeros is padding, whatever its gate
        x[5, -1], wide[5] = 0, torch.nan
        given = {"x": x, "weight": weight, "out": torch.full_like(x, torch.nan)}
        yield "norm with a gate in wider rows", {**given, "gate": wide[:, : HV * V]}
        gate = wide[:, 3:].unflatten(-1, (HV, V)).contiguous()
        yield "norm with an epsilon", {**given, "gate": gate, "eps": 0.1}

    def step(self, tokens: int, slots: list[int], *, gate: bool, **more: Any) -> Arguments:
        """Return what every step takes; slots that are not named hold NaN."""
        spec = self.spec
        D, HV, V = spec.conv_dim, spec.num_v_heads, spec.head_v_dim
        parts = [D, HV * V, HV, HV]
        # without a gate rows start at multiples of 16 numbers, as in models: kernels for such rows
        # load vectors
        gap = 0 if gate else -sum(parts) % 16
        packed = self.normal(tokens, sum(parts) + gap).to(spec.dtype)
        mixed, z, b, a, _ = packed.split([*parts, gap], dim=-1)
        pool = StatePool.allocate(spec, self.num_slots, "cpu", paged=True)
        assert pool.conv_state is not None and pool.state is not None
        for tensor in (pool.conv_state, pool.state):
            live = sorted({slot for slot in slots if slot >= 0})
            values = self.normal(len(live), *tensor.shape[1:]).to(tensor.dtype)
            tensor.fill_(torch.nan)
            tensor[live] = values
        params = GdnParams(
            conv_weight=self.normal(D, spec.conv_width).to(spec.dtype) * 0.5,
            A_log=self.normal(HV) * 0.5,
            # as checkpoints hold it, or widened
            dt_bias=(self.normal(HV) - 2).to(torch.float32 if gate else spec.dtype),
            conv_bias=self.normal(D).to(spec.dtype) * 0.1,
            norm_weight=self.normal(V).to(spec.dtype),
        )
        out = torch.full((tokens, HV, V), torch.nan, dtype=spec.dtype)
        named = {"mixed_qkv": mixed, "a": a, "b": b, "params": params, "pool": pool}
        return {**named, "gate": z.unflatten(-1, (HV, V)) if gate else None, "out": out, **more}

    def drafts(self, protocol: str) -> Drafts:
        if protocol == "replay":
            return self.filled(ReplayDrafts.allocate(self.spec, self.num_slots, MAX_DRAFTS, "cpu"))
        drafts = SnapshotDrafts.allocate(self.spec, 6, MAX_DRAFTS + 1, "cpu")
        for tensor in (drafts.conv_state, drafts.state):
            assert tensor is not None
            tensor.fill_(torch.nan)
        return drafts

    def deferred(self) -> DeferredUpdates:
        return self.filled(DeferredUpdates.allocate(self.spec, self.num_slots, MAX_DEFERRED, "cpu"))

    def filled(self, kept: KeptT) -> KeptT:
        """Return drafts or updates like these that hold numbers, as a call leaves them."""
        kept = copy.deepcopy(kept)
        for part in dataclasses.fields(kept):
            tensor = getattr(kept, part.name)
            tensor.copy_(self.normal(*tensor.shape))
        if isinstance(kept, (ReplayDrafts, DeferredUpdates)):
            kept.g.copy_(-kept.g.abs())
        if isinstance(kept, ReplayDrafts):
            kept.beta.copy_(kept.beta.sigmoid())
        return kept

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _with_parts(name: str, op: Op, spec: GdnSpec, step: Arguments) -> Iterator[Case]:
    """Yield a step, and the ops it is made of on the same inputs."""
    yield Case(name, op, spec, step)
    pool, params, out = step["pool"], step["params"], step["out"]
    batch: Arguments = {
        key: step[key]
        for key in ("metadata", "drafts", "state_indices", "out_state_indices")
        if key in step
    }
    updates: Arguments = {x: step[x] for x in ("deferred", "num_deferred", "flush") if x in step}
    mixed = step["mixed_qkv"]
    conv = {"x": mixed, "weight": params.conv_weight, "bias": params.conv_bias}
    conv |= {"conv_state": pool.conv_state, "out": torch.full(mixed.shape, torch.nan).to(mixed)}
    q, k, v = split_qkv(spec, mixed)
    rule: Arguments = {"q": q, "k": k, "v": v, "state": pool.state, "out": out}
    gates = {"a": step["a"], "b": step["b"], "A_log": params.A_log, "dt_bias": params.dt_bias}
    conv_op, rule_op = {
        Op.PREFILL_STEP: (Op.CONV1D_PREFILL, Op.CHUNK_PREFILL),
        Op.DECODE_STEP: (Op.CONV1D_UPDATE, Op.RECURRENT_DECODE),
        Op.VERIFY_STEP: (Op.CONV1D_VERIFY, Op.MTP_VERIFY),
    }[op]
    if op is Op.PREFILL_STEP:
        g, beta = bind(spec, "cpu", backend="reference", check=False).gating(**gates)
        gates = {"g": g, "beta": beta}
    yield Case(f"conv of {name}", conv_op, spec, {**conv, **batch})
    yield Case(f"rule of {name}", rule_op, spec, {**rule, **gates, **batch, **updates})


def _rows_equal(x: Tensor, y: Tensor) -> Tensor:
    """Return which rows of a pool hold the same, NaN for NaN."""
    same = (x == y) | (x.isnan() & y.isnan())
    return same.flatten(1).all(1)


def _copied(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Return a deep copy on ``device``, floats in ``dtype``, strides kept and gaps NaN."""
    if isinstance(value, Tensor):
        kind = dtype if dtype and value.is_floating_point() else value.dtype
        extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
        memory = torch.zeros(max(extent, 0), dtype=kind, device=device)
        if kind.is_floating_point:
            memory.fill_(torch.nan)
        if value.numel() == 0:
            return torch.empty(value.shape, dtype=kind, device=device)
        return memory.as_strided(value.shape, value.stride()).copy_(value)
    if isinstance(value, Mapping):
        return {key: _copied(item, device, dtype) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(**_copied(parts, device, dtype))
    return value


def _tensors(arguments: Arguments) -> dict[str, Tensor]:
    """Return the tensors that an op may write, by name; ``out`` is returned by the op itself."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if name in ("state", "conv_state"):
            found[name] = value
        elif name in ("pool", "drafts", "deferred") and value is not None:
            for part in dataclasses.fields(value):
                found[f"{name}.{part.name}"] = getattr(value, part.name)
    return {name: value for name, value in found.items() if value is not None}


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
