# SPDX-License-Identifier: Apache-2.0
"""Trees of drafts: who is whose parent, and the path to a draft."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_portable.metadata import VerifyMetadata


def parents_of(metadata: VerifyMetadata, batch: int) -> Tensor | None:
    """Return [B, P] parents, filled from child and sibling links where those are given."""
    P = metadata.max_drafts
    if metadata.next_token is not None and metadata.next_sibling is not None:
        parents = parents_from_links(
            metadata.next_token[:batch, :P], metadata.next_sibling[:batch, :P]
        )
        if metadata.parents is None:
            metadata.parents = parents
        else:
            metadata.parents[:batch, :P].copy_(parents)
    if metadata.parents is None:
        return None
    return metadata.parents[:batch, :P].to(torch.int64).clamp(0, P - 1)


def parents_from_links(next_token: Tensor, next_sibling: Tensor) -> Tensor:
    """Return the parent of every draft of a tree given by first children and next siblings.

    Args:
        next_token: [B, P] first child, -1 for none.
        next_sibling: [B, P] next child of the same parent, -1 for none.

    Returns:
        [B, P] parents, 0 for the root and for a draft that nothing links to.
    """
    P = next_token.shape[1]
    draft = torch.arange(P, device=next_token.device).expand(next_token.shape)

    def linked_from(links: Tensor) -> Tensor:
        """Return which draft links to each, P for none; links back, behind the end, are none."""
        target = torch.where((links > draft) & (links < P), links.to(torch.int64), P)
        found = torch.full((len(links), P + 1), P, device=links.device)
        return found.scatter(1, target, draft)[:, :P]

    first_child_of, sibling_before = linked_from(next_token), linked_from(next_sibling)
    # walk to the first sibling, twice as far each time
    first = torch.where(sibling_before < P, sibling_before, draft)
    for _ in range(P.bit_length()):
        first = first.gather(1, first)
    parents = first_child_of.gather(1, first)
    return torch.where(parents < P, parents, 0).to(next_token.dtype)


def path_to(metadata: VerifyMetadata, last: Tensor) -> Tensor:
    """Return which drafts [B, P] lie between the root and ``last``, both included."""
    P, parents = metadata.max_drafts, parents_of(metadata, len(last))
    draft = torch.arange(P, device=last.device)
    if parents is None:
        return draft <= last[:, None]
    on_path, at = draft == last[:, None], last
    for _ in range(P):
        parent = parents.gather(1, at.clamp(0, P - 1)[:, None])[:, 0]
        at = torch.where(at > 0, parent, -1)
        on_path = on_path | (draft == at[:, None])
    return on_path
