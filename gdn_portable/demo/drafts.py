# SPDX-License-Identifier: Apache-2.0
"""N-gram drafts: what followed the last time the text stood like this."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_MATCH = 8
SHORTEST_MATCH = 3


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Draft tokens of one sequence; the root is its newest byte, a parent comes before a child."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]  # -1 for the root

    def child(self, draft: int, token: int) -> int | None:
        """Return the child of ``draft`` that holds ``token``."""
        for index in range(draft + 1, len(self.tokens)):
            if self.parents[index] == draft and self.tokens[index] == token:
                return index
        return None


def propose(text: bytes, max_drafts: int, *, branches: int = 1) -> DraftTree:
    """Return drafts for the bytes after ``text``.

    The longest suffix of the text that occurred before, of 8 down to 3 bytes, proposes what came
    after its latest occurrences.

    Args:
        text: prompt and output so far, at least one byte; its last byte is the root.
        max_drafts: the most drafts, root included.
        branches: how many occurrences to follow; 1 gives a chain.
    """
    tokens, parents = [text[-1]], [-1]
    for continuation in _continuations(text, max_drafts - 1, branches):
        at = 0
        for token in continuation:
            known = DraftTree(tuple(tokens), tuple(parents)).child(at, token)
            if known is None:
                if len(tokens) == max_drafts:
                    break
                tokens.append(token)
                parents.append(at)
                known = len(tokens) - 1
            at = known
    return DraftTree(tuple(tokens), tuple(parents))


def _continuations(text: bytes, length: int, count: int) -> list[bytes]:
    """Return up to ``count`` different continuations, those of the latest occurrences first."""
    found: list[bytes] = []
    for size in range(min(LONGEST_MATCH, len(text) - 1), SHORTEST_MATCH - 1, -1):
        end = len(text) - 1
        while len(found) < count:
            at = text.rfind(text[-size:], 0, end)
            if at < 0:
                break
            # a later branch gets half the length, so that a tree holds both
            continuation = text[at + size : at + size + (length if count == 1 else length // 2 + 1)]
            if continuation and continuation not in found:
                found.append(continuation)
            end = at + size - 1
        if found:
            break
    return found
