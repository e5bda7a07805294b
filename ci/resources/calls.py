# SPDX-License-Identifier: Apache-2.0
"""The calls that make the launchers compile: a model's steps, and every conformance case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from gdn_portable import (
    ConvLayout,
    DeferredUpdates,
    Device,
    DraftProtocol,
    GdnOps,
    GdnParams,
    GdnSpec,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    StateLayout,
    StatePool,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import cases

P, MOST_P, R = 4, 16, 7
BATCHES = (1, 8, 64, 512)  # a tile each, where tiles depend on the batch
VERIFY_BATCHES = (8, 64)
PACKED = ((2048,), (1024,) * 8)  # on this layer sequences of the first are cut, of the second not
SLOTS = 4  # no kernel runs, so that slots need not be there

QWEN3_NEXT = GdnSpec(
    num_k_heads=16,
    num_v_heads=32,
    head_k_dim=128,
    head_v_dim=128,
    conv_window=2 + P,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
MODELS = {
    "bf16/fp32": QWEN3_NEXT,  # dtypes of activations and of states
    "bf16/bf16": replace(QWEN3_NEXT, state_dtype=torch.bfloat16),
}
CASE_ARCHS = ("gfx942", "gfx950", "sm90")  # whose tables have the conformance cases as well
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = ((16, 16), (32, 32), (64, 64), (256, 256), (128, 64), (64, 256))


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the ops, and what the tables say about it."""

    layer: str
    name: str
    run: Callable[[], object]


def model_calls(device: Device) -> Iterator[Call]:
    """Yield the steps of models at the sizes that they are served with."""
    for layer, spec in MODELS.items():
        for name, run in _Steps(spec, device).all():
            yield Call(layer, name, run)


def table_calls(device: Device) -> Iterator[Call]:
    """Yield the steps of models; of some GPUs also every case, on the layer of the first."""
    yield from model_calls(device)
    if device.arch in CASE_ARCHS:
        layer, spec = next(iter(MODELS.items()))
        yield from _cases(layer, spec, device)


def every_call(device: Device) -> Iterator[Call]:
    """Yield every conformance case on all dtypes, and on other head dims, layouts and windows."""
    small = replace(QWEN3_NEXT, num_k_heads=2, num_v_heads=4)
    layers = {
        f"{dtype}/{state}": replace(small, dtype=DTYPES[dtype], state_dtype=DTYPES[state])
        for dtype, state in product(DTYPES, DTYPES)
    }
    for (dtype, kind), (K, V) in product(DTYPES.items(), HEAD_DIMS):
        layers[f"{dtype}/{dtype} K{K} V{V}"] = replace(
            small, head_k_dim=K, head_v_dim=V, dtype=kind, state_dtype=kind
        )
    layers["KV LEN_FIRST"] = replace(
        small, state_layout=StateLayout.KV, conv_layout=ConvLayout.LEN_FIRST
    )
    layers["W2 no norm of q and k"] = replace(small, conv_width=2, qk_l2norm=False)
    layers["W3 no activation"] = replace(
        small, conv_width=3, activation=None, gate_activation="sigmoid"
    )
    for layer, spec in layers.items():
        yield from _cases(layer, spec, device)


def _cases(layer: str, spec: GdnSpec, device: Device) -> Iterator[Call]:
    ops = _bound(spec, device)
    for case in cases(spec):
        yield Call(layer, case.name, partial(getattr(ops, case.op.value), **case.arguments))


def _bound(spec: GdnSpec, device: Device) -> GdnOps:
    return bind(spec, device, backend="triton", check=False)


class _Steps:
    """The steps of one layer as an engine calls them, with a gate."""

    def __init__(self, spec: GdnSpec, device: Device) -> None:
        self.spec = spec
        self.ops = _bound(spec, device)
        self.pool = StatePool.allocate(spec, SLOTS, "cpu")
        HV, W = spec.num_v_heads, spec.conv_width
        self.params = GdnParams(
            conv_weight=torch.zeros(spec.conv_dim, W, dtype=spec.dtype),
            A_log=torch.zeros(HV),
            dt_bias=torch.zeros(HV),
            norm_weight=torch.zeros(spec.head_v_dim, dtype=spec.dtype),
        )

    def all(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield calls and their names; every kernel is in one of them."""
        for batch in BATCHES:
            yield f"decode_step B{batch}", partial(self.decode, batch)
        yield f"decode_step B64 deferred R{R}", partial(self.decode, 64, deferred=R)
        for lengths in PACKED:
            name = f"prefill_step {len(lengths)}x{lengths[0]}"
            yield name, partial(self.prefill, lengths)
        for batch in VERIFY_BATCHES:
            for protocol in DraftProtocol:
                name = f"verify_step B{batch}xP{P} {protocol.value}"
                yield name, partial(self.verify, batch, protocol, tree=False)
        for protocol in (DraftProtocol.REPLAY, DraftProtocol.SNAPSHOT):
            name = f"verify_step B8xP{P} {protocol.value} tree"
            yield name, partial(self.verify, 8, protocol, tree=True)
        name = f"verify_step B8xP{MOST_P} replay"
        yield name, partial(self.verify, 8, DraftProtocol.REPLAY, tree=False, P=MOST_P)
        yield "ops alone", self.alone

    def decode(self, batch: int, *, deferred: int = 0) -> None:
        updates = None
        if deferred:
            updates = DeferredUpdates.allocate(self.spec, SLOTS, deferred, "cpu")
        self.ops.decode_step(
            *self._projected(batch),
            state_indices=_indices(batch),
            deferred=updates,
            num_deferred=_indices(batch) if deferred else None,
            gate=self._gate(batch),
        )

    def prefill(self, lengths: tuple[int, ...]) -> None:
        metadata, T = _prefill(lengths), sum(lengths)
        self.ops.plan_prefill(metadata)
        self.ops.prefill_step(*self._projected(T), metadata=metadata, gate=self._gate(T))

    def verify(self, batch: int, protocol: DraftProtocol, *, tree: bool, P: int = P) -> None:
        """Run a verify and its commit."""
        slots = _indices(batch)
        drafts: ReplayDrafts | SnapshotDrafts | None = None
        if protocol is DraftProtocol.REPLAY:
            drafts = ReplayDrafts.allocate(self.spec, SLOTS, P, "cpu")
        elif protocol is DraftProtocol.SNAPSHOT:
            drafts = SnapshotDrafts.allocate(self.spec, SLOTS, P, "cpu")
        else:
            slots = slots[:, None].repeat(1, P)
        links = {}
        if tree:
            names = ("parents", "next_token", "next_sibling")
            links = {name: torch.zeros(batch, P, dtype=torch.int32) for name in names}
        metadata = VerifyMetadata(slots, P, num_accepted=_indices(batch), **links)
        T = batch * P
        self.ops.verify_step(
            *self._projected(T), metadata=metadata, drafts=drafts, gate=self._gate(T)
        )
        if drafts is not None:
            last = _indices(batch)
            self.ops.mtp_commit(self.pool, drafts, metadata=metadata, last_accepted=last)

    def alone(self) -> None:
        """Call the ops that no step consists of."""
        mixed, a, b, params, pool = self._projected(2048)
        assert pool.conv_state is not None
        self.ops.gating(a, b, params.A_log, params.dt_bias)
        metadata = _prefill((2048,))
        self.ops.conv1d_prefill(mixed, params.conv_weight, None, pool.conv_state, metadata=metadata)

    def _projected(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, GdnParams, StatePool]:
        """Return what every step takes, as parts of one projection."""
        D, HV = self.spec.conv_dim, self.spec.num_v_heads
        packed = torch.empty(tokens, D + 2 * HV, dtype=self.spec.dtype)
        mixed, b, a = packed.split([D, HV, HV], dim=-1)
        return mixed, a, b, self.params, self.pool

    def _gate(self, tokens: int) -> Tensor:
        width = self.spec.num_v_heads * self.spec.head_v_dim
        return torch.empty(tokens, width, dtype=self.spec.dtype)


def _indices(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def _prefill(lengths: tuple[int, ...]) -> PrefillMetadata:
    return PrefillMetadata(
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        state_indices=_indices(len(lengths)),
        has_initial_state=torch.zeros(len(lengths), dtype=torch.bool),
    )
