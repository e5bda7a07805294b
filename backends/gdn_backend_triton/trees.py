# SPDX-License-Identifier: Apache-2.0
"""Trees of drafts given by links: who is whose parent, found on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS, power_of_two
from gdn_backend_triton.launches import Launch
from gdn_portable.metadata import VerifyMetadata
from gdn_portable.spec import Device


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _fill_parents(
    next_token, next_sibling, parents, token_b, token_p, sibling_b, sibling_p, parents_b, parents_p,
    P: tl.constexpr, SIZE: tl.constexpr, DOUBLINGS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    draft = tl.arange(0, SIZE)
    drafted = draft < P
    child = tl.load(next_token + b * token_b + draft * token_p, mask=drafted, other=-1)
    sibling = tl.load(next_sibling + b * sibling_b + draft * sibling_p, mask=drafted, other=-1)
    linked = draft[:, None]
    # links go forward; what is left behind a sequence's last draft may not
    forward = draft[None, :] < linked
    child_of = tl.max(tl.where(forward & (child[None, :] == linked), draft[None, :], -1), 1)
    after = tl.max(tl.where(forward & (sibling[None, :] == linked), draft[None, :], -1), 1)
    # walk to the first sibling, twice as far each time
    first = tl.where(after < 0, draft, after)
    for _ in tl.static_range(DOUBLINGS):
        first = tl.gather(first, first, 0)
    parent = tl.maximum(tl.gather(child_of, first, 0), 0)
    target = parents + b * parents_b + draft * parents_p
    tl.store(target, parent.to(parents.dtype.element_ty), mask=drafted)


def make_fill_parents(device: Device) -> Callable[[VerifyMetadata, int], None]:
    """Return what fills ``metadata.parents`` of a batch from its links, where it has them.

    Written in place where it is a tensor, else allocated as [batch, P] and stored. A draft that
    nothing links to becomes a child of the root; a link back or outside of the tree is none.
    """
    launch = Launch(_fill_parents, device, num_warps=1)

    def fill_parents(metadata: VerifyMetadata, batch: int) -> None:
        token, sibling, P = metadata.next_token, metadata.next_sibling, metadata.max_drafts
        if token is None or sibling is None:
            return
        if metadata.parents is None:
            metadata.parents = torch.empty(batch, P, dtype=token.dtype, device=token.device)
        if batch:
            launch(
                batch,
                (token, sibling, metadata.parents),
                (),
                (*token.stride(), *sibling.stride(), *metadata.parents.stride(), P,
                 power_of_two(P), P.bit_length()),
            )  # fmt: skip

    return fill_parents
