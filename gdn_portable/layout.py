# SPDX-License-Identifier: Apache-2.0
"""Layout adapters: kernels are passed [slots, HV, V, K] and [slots, D, L], whatever is kept.

An engine that keeps the axes the other way round is served through transposed views. They copy
nothing, so in place stays in place; where the layouts agree there is no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gdn_portable.backend import Launcher
from gdn_portable.metadata import SnapshotDrafts
from gdn_portable.spec import ConvLayout, GdnSpec, Op, StateLayout
from gdn_portable.state import StatePool

# the arguments of each op that hold states, with their position where they have one
STATE_ARGUMENTS: Mapping[Op, Mapping[str, int | None]] = {
    Op.CONV1D_PREFILL: {"conv_state": 3},
    Op.CONV1D_UPDATE: {"conv_state": 3},
    Op.CONV1D_VERIFY: {"conv_state": 3, "drafts": None},
    Op.CHUNK_PREFILL: {"state": 5, "checkpoint_state": None},
    Op.RECURRENT_DECODE: {"state": 7},
    Op.MTP_VERIFY: {"state": 7, "drafts": None},
    Op.MTP_COMMIT: {"pool": 0, "drafts": 1},
    Op.PREFILL_STEP: {"pool": 4, "checkpoint_state": None},
    Op.DECODE_STEP: {"pool": 4},
    Op.VERIFY_STEP: {"pool": 4, "drafts": None},
}


CONV_OPS = (Op.CONV1D_PREFILL, Op.CONV1D_UPDATE, Op.CONV1D_VERIFY)
RULE_OPS = (Op.CHUNK_PREFILL, Op.RECURRENT_DECODE, Op.MTP_VERIFY)


def adapt(launch: Launcher, op: Op, spec: GdnSpec) -> Launcher:
    """Return ``launch`` of ``op`` taking states in the layouts of ``spec``."""
    arguments = STATE_ARGUMENTS.get(op, {})
    turns_state = op not in CONV_OPS and spec.state_layout is StateLayout.KV
    turns_conv = op not in RULE_OPS and spec.conv_layout is ConvLayout.LEN_FIRST
    if not arguments or not (turns_state or turns_conv):
        return launch

    def turn(name: str, value: Any) -> Any:
        if isinstance(value, (StatePool, SnapshotDrafts)):
            return type(value)(
                _swapped(value.conv_state, turns_conv), _swapped(value.state, turns_state)
            )
        turns = turns_conv if name == "conv_state" else turns_state
        return _swapped(value, turns) if isinstance(value, Tensor) else value

    def launch_on_views(*args: Any, **kwargs: Any) -> Any:
        values = list(args)
        for name, position in arguments.items():
            if position is not None and position < len(values):
                values[position] = turn(name, values[position])
            elif name in kwargs:
                kwargs[name] = turn(name, kwargs[name])
        return launch(*values, **kwargs)

    return launch_on_views


def _swapped(pool: Tensor | None, turns: bool) -> Tensor | None:
    return pool.transpose(-1, -2) if pool is not None and turns else pool
