# SPDX-License-Identifier: Apache-2.0
"""Argument validation: what an engine gets wrong, said before anything is written.

It reads index tensors on the host, so on a GPU it synchronises; ``bind`` uses it on a CPU, and
elsewhere when asked to.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from gdn_portable.backend import Launcher
from gdn_portable.checks import batches, deferred
from gdn_portable.checks.tensors import INTEGERS, Rules
from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import (
    DeferredUpdates,
    GdnParams,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
)
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.state import StatePool

_PROTOCOLS = {op: get_type_hints(GdnOps)[op.value].__call__ for op in Op}
SIGNATURES = {op: inspect.signature(call) for op, call in _PROTOCOLS.items()}
KINDS = {op: get_type_hints(call) for op, call in _PROTOCOLS.items()}
FIELDS = {
    kind: get_type_hints(kind)
    for kind in (
        DeferredUpdates,
        GdnParams,
        PrefillMetadata,
        ReplayDrafts,
        SnapshotDrafts,
        StatePool,
        VerifyMetadata,
    )
}


def checked(op: Op, launch: Launcher, spec: GdnSpec, device: Device) -> Launcher:
    """Return ``launch`` behind the checks of ``op``'s arguments."""
    signature, rules = SIGNATURES[op], Rules(spec, device)

    def check_and_launch(*args: Any, **kwargs: Any) -> Any:
        try:
            arguments = signature.bind(None, *args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{op.value}: {error}; it takes {_taken(signature)}") from None
        _check(rules, op, arguments)
        return launch(*args, **kwargs)

    check_and_launch.__name__ = op.value
    check_and_launch.__doc__ = _PROTOCOLS[op].__doc__
    check_and_launch.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for name, p in signature.parameters.items() if name != "self"]
    )
    return check_and_launch


def _taken(signature: inspect.Signature) -> str:
    """Write what an op takes, without types: what goes by name stands behind the star."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters[1:]))


def _check(rules: Rules, op: Op, arguments: Mapping[str, Any]) -> None:
    """Raise InputError for the first argument that breaks the contract."""
    if op is Op.MTP_COMMIT and arguments["drafts"] is None:
        raise InputError(
            "drafts is None, needs ReplayDrafts or SnapshotDrafts: a slot table has no commit, its "
            "next verify is told num_accepted"
        )
    _check_kinds(rules, op, arguments)
    rows = rules.tensors(op, arguments)
    if "params" in arguments:
        rules.params(arguments["params"], arguments.get("gate"))
    if "eps" in arguments:
        rules.eps("eps", arguments["eps"])
    pool = arguments.get("pool", StatePool(None, None))
    state = arguments.get("state", pool.state)
    conv_state = arguments.get("conv_state", pool.conv_state)
    if op is Op.MTP_COMMIT:
        batches.commit(rules, conv_state, state, arguments)
        return
    if "pool" in arguments and (state is None or conv_state is None):
        missing = "conv_state" if conv_state is None else "state"
        raise InputError(f"pool.{missing} is None, needs a tensor: a step uses both pools")
    slots = rules.pools(conv_state, state)
    for name, written in (("conv_state", conv_state), ("state", state)):
        if written is not None and arguments.get("out") is not None:
            rules.apart("out", arguments["out"], name, written)
    metadata = arguments.get("metadata")
    if isinstance(metadata, PrefillMetadata):
        kept, g = arguments.get("checkpoint_state"), arguments.get("g")
        batches.prefill(rules, op, metadata, rows, slots, kept, g)
    elif isinstance(metadata, VerifyMetadata):
        drafts = arguments.get("drafts")
        batches.verify(rules, metadata, drafts, rows, slots, conv_state, state)
    elif "state_indices" in arguments:
        source = rules.slots("state_indices", arguments["state_indices"], rows, slots)
        deferred.check(rules, arguments, source, slots)
        target = rules.targets(arguments.get("out_state_indices"), source, slots)
        rules.exclusive(rules.live(source), source, target)


def _check_kinds(rules: Rules, op: Op, arguments: Mapping[str, Any]) -> None:
    """Check of what class each argument is, and the index tensors of metadata."""
    for name, value in arguments.items():
        if name == "self":
            continue
        _check_kind(name, value, KINDS[op][name])
        for field, kind in FIELDS.get(type(value), {}).items():
            part = getattr(value, field)
            _check_kind(field if name == "metadata" else f"{name}.{field}", part, kind)
            if name == "metadata" and isinstance(part, Tensor):
                dtypes = (torch.bool,) if field == "has_initial_state" else INTEGERS
                rules.dtype_and_device(field, part, dtypes)


def _check_kind(name: str, value: object, kind: Any) -> None:
    kinds = get_args(kind) or (kind,)
    if Tensor not in kinds and not FIELDS.keys() & set(kinds):
        return
    if not isinstance(value, kinds):
        words = {Tensor: "a tensor", type(None): "None"}
        needed = " or ".join(words.get(kind, kind.__name__) for kind in kinds)
        got = "None" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{name} is {got}, needs {needed}")
