# SPDX-License-Identifier: Apache-2.0
"""The calls of this library that are timed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from gdn_portable.bench.cases import FRONT_END, Case
from gdn_portable.bench.inputs import Batch
from gdn_portable.errors import UnsupportedError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import DraftProtocol, SnapshotDrafts
from gdn_portable.select import BUILTIN, bind
from gdn_portable.spec import Device, Op
from gdn_portable.steps import split_qkv

Result = Tensor | Sequence[Tensor]  # of a front end q, k, v and more
Call = Callable[[], Result]

FRONT_END_BACKEND = BUILTIN["triton"].partition(":")[0]
INCLUDES = {
    "decode_step": "conv, norms, gating, recurrence",
    "recurrent_decode": "norms, gating, recurrence",
    "conv1d_update": "conv",
    "verify_step": "conv, norms, gating, recurrence",
    "mtp_verify": "norms, gating, recurrence",
    "conv1d_prefill": "conv",
    "chunk_prefill": "recurrence; q and k are given as unit vectors; g and beta ready",
    "prefill_step": "conv, norms, gating, recurrence",
    "gated_rms_norm": "norm and gate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Something to time in a case.

    Attributes:
        name: of a kernel, or of a peer's parts.
        ours: whether it is of this library.
        includes: what the time covers.
        prepare: returns the call on one draw of the inputs; its result is compared.
        compares: whether that result is the same as that of the others.
        refusal: why it cannot do the case; then it is not called.
    """

    name: str
    ours: bool
    includes: str
    prepare: Callable[[Batch], Call]
    compares: bool = True
    refusal: str | None = None


def with_norms(includes: str, case: Case) -> str:
    """Add the norms to what a chunk prefill includes, where its layer applies them."""
    if case.op == "chunk_prefill" and case.spec.qk_l2norm:
        return f"norms, {includes}"
    return includes


def contenders(case: Case, device: Device, named: Mapping[Op, tuple[str, ...]]) -> list[Contender]:
    """Return this library's kernels for a case.

    Args:
        case: what is timed.
        device: where.
        named: kernels to use, by op. Several of the case's own op are timed side by side; of the
            ops it is composed of, the first.

    Raises:
        UnsupportedError: no kernel is able.
        UnknownBackendError: a kernel that was named does not exist.
    """
    first: dict[Op | str, str] = {op: names[0] for op, names in named.items()}
    if case.op == FRONT_END:
        return [_conv_alone(case, device, first), *_front_ends(case, device)]
    op = Op(case.op)
    includes = with_norms(INCLUDES[case.op], case)
    if case.op == "verify_step" and case.protocol is DraftProtocol.SNAPSHOT:
        includes += ", commit"
    if op not in named:
        return [_contender(case, device, first, includes)]
    return [
        _contender(case, device, {**first, op: name}, includes, name=name) for name in named[op]
    ]


def _contender(
    case: Case,
    device: Device,
    kernels: Mapping[Op | str, str],
    includes: str,
    *,
    name: str | None = None,
) -> Contender:
    """Bind ``kernels``; where ``name`` is one of several, a refusal leaves the others alone."""
    try:
        ops = bind(case.spec, device, kernels=kernels, check=False)
    except UnsupportedError as error:
        if name is None:
            raise
        refused = Contender(name=name, ours=True, includes=includes, prepare=_cannot)
        return replace(refused, refusal=str(error))
    return Contender(
        name=ops.kernels[Op(case.op)].partition(":")[0],  # without those it chooses from
        ours=True,
        includes=includes,
        prepare=partial(prepare, ops),
    )


def _cannot(batch: Batch) -> Call:
    raise NotImplementedError(batch.case.name)


def prepare(ops: GdnOps, batch: Batch) -> Call:
    """Return the call of a case's op on one draw of its inputs."""
    match batch.case.op:
        case "decode_step" | "conv1d_update" | "recurrent_decode":
            return _decode(ops, batch)
        case "verify_step" | "mtp_verify":
            return _verify(ops, batch)
        case "gated_rms_norm":
            weight = batch.params.norm_weight
            assert weight is not None
            return lambda: ops.gated_rms_norm(batch.x, batch.gate, weight)
        case _:
            return _prefill(ops, batch)


def _decode(ops: GdnOps, batch: Batch) -> Call:
    x, params, slots = batch.mixed, batch.params, batch.slots.slots
    a, b = batch.a, batch.b
    updates: dict[str, Any] = {}
    if batch.deferred is not None:
        updates = {"deferred": batch.deferred, "num_deferred": batch.slots.num_deferred}
    if batch.case.op == "decode_step":
        return lambda: ops.decode_step(x, a, b, params, batch.pool, state_indices=slots, **updates)
    if batch.case.op == "conv1d_update":
        state = batch.conv_state
        return lambda: ops.conv1d_update(x, params.conv_weight, None, state, state_indices=slots)
    q, k, v = split_qkv(batch.spec, x)
    rates = (params.A_log, params.dt_bias)
    return lambda: ops.recurrent_decode(
        q, k, v, a, b, *rates, batch.state, state_indices=slots, **updates
    )


def _verify(ops: GdnOps, batch: Batch) -> Call:
    x, a, b, params = batch.mixed, batch.a, batch.b, batch.params
    metadata, drafts = batch.verify, batch.drafts
    if batch.case.op == "mtp_verify":
        q, k, v = split_qkv(batch.spec, x)
        rates = (params.A_log, params.dt_bias)
        return lambda: ops.mtp_verify(
            q, k, v, a, b, *rates, batch.state, metadata=metadata, drafts=drafts
        )

    def step() -> Tensor:
        return ops.verify_step(x, a, b, params, batch.pool, metadata=metadata, drafts=drafts)

    def step_and_commit() -> Tensor:
        y, kept = step(), batch.snapshots
        last = batch.slots.last_accepted
        ops.mtp_commit(batch.pool, kept, metadata=metadata, last_accepted=last)
        return y

    return step_and_commit if isinstance(drafts, SnapshotDrafts) else step


def _prefill(ops: GdnOps, batch: Batch) -> Call:
    metadata, params = batch.prefill, batch.params
    ops.plan_prefill(metadata)  # once a step, for all layers: not timed
    if batch.case.op == "chunk_prefill":
        tensors = (batch.q, batch.k, batch.v, batch.g, batch.beta, batch.state)
        return lambda: ops.chunk_prefill(*tensors, metadata=metadata)
    x, a, b = batch.mixed, batch.a, batch.b
    if batch.case.op == "prefill_step":
        return lambda: ops.prefill_step(x, a, b, params, batch.pool, metadata=metadata)
    conv = (params.conv_weight, None, batch.conv_state)
    return lambda: ops.conv1d_prefill(x, *conv, metadata=metadata)


def _conv_alone(case: Case, device: Device, parts: Mapping[Op | str, str]) -> Contender:
    ops = bind(case.spec, device, kernels=parts, check=False)

    def prepare_conv(batch: Batch) -> Call:
        conv = _prefill(ops, batch)

        def conv_and_views() -> Result:
            rows = conv()
            assert isinstance(rows, Tensor)
            return split_qkv(batch.spec, rows)

        return conv_and_views

    return Contender(
        name=ops.kernels[Op.CONV1D_PREFILL],
        ours=True,
        includes="conv alone: no norms, no gating, q, k and v as views",
        prepare=prepare_conv,
    )


def _front_ends(case: Case, device: Device) -> list[Contender]:
    """Return the front end of the shared kernels; it is no op, so no table has it."""
    if device.kind == "cpu" or importlib.util.find_spec(FRONT_END_BACKEND) is None:
        return []

    def prepare_front_end(batch: Batch) -> Call:
        module = importlib.import_module(f"{FRONT_END_BACKEND}.conv1d")
        launch = module.make_front_end(case.spec, device)
        x, a, b, state, metadata = batch.mixed, batch.a, batch.b, batch.conv_state, batch.prefill

        return lambda: cast(Result, launch(x, a, b, batch.params, state, metadata=metadata))

    return [
        Contender(
            name="triton.front_end",
            ours=True,
            includes="conv, split, norms, gating",
            prepare=prepare_front_end,
        )
    ]
