# SPDX-License-Identifier: Apache-2.0
"""Argument validation: what an engine gets wrong, said before anything is written.

It reads index tensors on the host, so on a GPU it synchronises; ``bind`` uses it on a CPU, and
elsewhere when asked to.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from gdn_portable.backend import Launcher
from gdn_portable.checks import batches
from gdn_portable.checks.tensors import Rules
from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import PrefillMetadata, VerifyMetadata
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.state import StatePool

_PROTOCOLS = get_type_hints(GdnOps)
SIGNATURES = {op: inspect.signature(_PROTOCOLS[op.value].__call__) for op in Op}


def checked(op: Op, launch: Launcher, spec: GdnSpec, device: Device) -> Launcher:
    """Return ``launch`` behind the checks of ``op``'s arguments."""
    signature, rules = SIGNATURES[op], Rules(spec, device)

    def check_and_launch(*args: Any, **kwargs: Any) -> Any:
        _check(rules, op, signature.bind(None, *args, **kwargs).arguments)
        return launch(*args, **kwargs)

    return check_and_launch


def _check(rules: Rules, op: Op, arguments: Mapping[str, Any]) -> None:
    """Raise InputError for the first argument that breaks the contract."""
    rows = rules.tensors(op, arguments)
    pool = arguments.get("pool")
    pool = StatePool(None, None) if pool is None else pool
    if "params" in arguments:
        rules.params(arguments["params"], arguments.get("gate"))
    state = arguments.get("state", pool.state)
    conv_state = arguments.get("conv_state", pool.conv_state)
    if op is Op.MTP_COMMIT:
        batches.commit(rules, conv_state, state, arguments)
        return
    for name, given, part in (
        ("pool.state", pool.state, "state"),
        ("pool.conv_state", pool.conv_state, "conv_state"),
    ):
        if "pool" in arguments and given is None:
            raise InputError(f"{name} is None, needs a {part} pool for a step")
    slots = rules.pools(conv_state, state)
    metadata = arguments.get("metadata")
    if isinstance(metadata, PrefillMetadata):
        batches.prefill(rules, op, metadata, rows, slots, arguments.get("checkpoint_state"))
    elif isinstance(metadata, VerifyMetadata):
        drafts = arguments.get("drafts")
        batches.verify(rules, metadata, drafts, rows, slots, conv_state, state)
    elif metadata is not None or "metadata" in arguments:
        raise InputError(f"metadata is a {type(metadata).__name__}, needs the one of this op")
    if "state_indices" in arguments:
        source = rules.slots("state_indices", arguments["state_indices"], rows, slots)
        target = rules.targets(arguments.get("out_state_indices"), source, slots)
        rules.exclusive(rules.live(source), source, target)
