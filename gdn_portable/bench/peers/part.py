# SPDX-License-Identifier: Apache-2.0
"""What a library has: a part of a layer, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_portable.bench.cases import Case
from gdn_portable.bench.inputs import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One function of a library.

    Attributes:
        name: of the library and of what it does.
        modules: imported before it is used.
        includes: what its time covers.
        make: returns the call on one draw of the inputs. A convolution takes nothing and returns
            rows [T, D]; what comes after it takes these rows, and returns [T, HV, V]; the others
            take nothing.
        refuse: returns why it cannot do a case that it could be asked for.
        tables: whether it keeps its drafts in a slot table.
    """

    name: str
    modules: tuple[str, ...]
    includes: str
    make: Callable[[Batch], Callable[..., Tensor]]
    refuse: Callable[[Case], str | None] | None = None
    tables: bool = False

    def refusal(self, case: Case) -> str | None:
        """Return why it cannot do ``case``."""
        return self.refuse(case) if self.refuse else None


def refuse_other_than_128(case: Case) -> str | None:
    """Refuse what kernels written for (K, V) = (128, 128) and half precision cannot do."""
    spec = case.spec
    dims = (spec.head_k_dim, spec.head_v_dim)
    if dims != (128, 128):
        return f"head dims (K, V) are {dims}, needs (128, 128)"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {spec.dtype}, needs torch.bfloat16 or torch.float16"
    return None
