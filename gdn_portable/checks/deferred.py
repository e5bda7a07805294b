# SPDX-License-Identifier: Apache-2.0
"""Rules for what a decode does not write to its states yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gdn_portable.checks.tensors import INTEGERS, Rules
from gdn_portable.errors import InputError
from gdn_portable.metadata import check_deferred


def check(rules: Rules, arguments: Mapping[str, Any], source: list[int], slots: int) -> None:
    """Check the updates, how many there are of each, and which are carried out."""
    kept, count, flush = (arguments.get(x) for x in ("deferred", "num_deferred", "flush"))
    check_deferred(kept, count, flush)
    if kept is None:
        return
    spec, room = rules.spec, kept.k.shape[1] if kept.k.dim() > 1 else 0
    floats = rules.double_or_float()
    kinds = {
        "k": ((spec.num_k_heads, spec.head_k_dim), (spec.dtype,)),
        "u": ((spec.num_v_heads, spec.head_v_dim), (*floats, spec.dtype)),
        "g": ((spec.num_v_heads,), floats),
    }
    for name, (shape, dtypes) in kinds.items():
        rules.kept(f"deferred.{name}", getattr(kept, name), slots, (room, *shape), dtypes)
    live = rules.live(source)
    if count is not None:
        for i, number in enumerate(rules.indices("num_deferred", count, len(source))):
            if live[i] and not 0 <= number <= room:
                raise InputError(f"num_deferred[{i}] is {number}, needs 0 to {room}")
    if flush is not None:
        rules.indices("flush", flush, len(source), (torch.bool, *INTEGERS))
