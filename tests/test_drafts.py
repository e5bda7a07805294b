# SPDX-License-Identifier: Apache-2.0
"""N-gram drafts: what is proposed followed the same bytes before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_portable.demo.drafts import SHORTEST_MATCH, DraftTree, propose

# few letters, so that much repeats
texts = st.one_of(
    st.text(alphabet="abc", min_size=1, max_size=60).map(str.encode),
    st.binary(min_size=1, max_size=40),
)


def _path(tree: DraftTree, draft: int) -> bytes:
    """Return the bytes between the root and a draft, the draft's included."""
    path = bytearray()
    while draft > 0:
        path.insert(0, tree.tokens[draft])
        draft = tree.parents[draft]
    return bytes(path)


@settings(deadline=None)
@given(text=texts, max_drafts=st.integers(1, 9), branches=st.integers(1, 4))
def test_a_tree_starts_at_the_last_byte_and_parents_come_first(
    text: bytes, max_drafts: int, branches: int
) -> None:
    tree = propose(text, max_drafts, branches=branches)

    assert tree.tokens[0] == text[-1]
    assert tree.parents[0] == -1
    assert 1 <= len(tree.tokens) == len(tree.parents) <= max_drafts
    assert all(0 <= parent < t for t, parent in enumerate(tree.parents) if t > 0)


@settings(deadline=None)
@given(text=texts, max_drafts=st.integers(1, 9))
def test_one_branch_is_a_chain(text: bytes, max_drafts: int) -> None:
    tree = propose(text, max_drafts)

    assert tree.parents == tuple(range(-1, len(tree.tokens) - 1))


@settings(deadline=None)
@given(text=texts, max_drafts=st.integers(1, 9), branches=st.integers(1, 4))
def test_every_path_continues_an_earlier_occurrence(
    text: bytes, max_drafts: int, branches: int
) -> None:
    tree = propose(text, max_drafts, branches=branches)

    paths = [_path(tree, draft) for draft in range(1, len(tree.tokens))]
    assert all(text[-SHORTEST_MATCH:] + path in text for path in paths)


@settings(deadline=None)
@given(text=texts, max_drafts=st.integers(1, 9), branches=st.integers(1, 4))
def test_no_two_children_of_a_draft_are_alike(text: bytes, max_drafts: int, branches: int) -> None:
    tree = propose(text, max_drafts, branches=branches)

    children = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(children)) == len(children)
    assert all(tree.child(*children[t]) == t for t in range(1, len(children)))


@settings(deadline=None)
@given(text=texts, max_drafts=st.integers(2, 9))
def test_a_repeated_suffix_is_continued(text: bytes, max_drafts: int) -> None:
    doubled = text + b"xyz" + text + b"xyz"

    assert len(propose(doubled, max_drafts).tokens) > 1


def test_a_chain_follows_the_latest_occurrence() -> None:
    tree = propose(b" abcde1 abcfg2 abc", 4)

    assert tree == DraftTree(tokens=tuple(b"cfg2"), parents=(-1, 0, 1, 2))


def test_a_tree_follows_two_occurrences() -> None:
    tree = propose(b" abcde1 abcfg2 abc", 6, branches=2)

    assert tree == DraftTree(tokens=tuple(b"cfg2de"), parents=(-1, 0, 1, 2, 0, 4))


def test_occurrences_that_agree_at_first_share_drafts() -> None:
    tree = propose(b" abcde1 abcdf2 abc", 6, branches=2)

    assert tree == DraftTree(tokens=tuple(b"cdf2e1"), parents=(-1, 0, 1, 2, 1, 4))


def test_the_longest_match_decides() -> None:
    tree = propose(b"zabcX--yabcY--zabc", 2)

    assert bytes(tree.tokens) == b"cX"


def test_a_text_without_repetition_has_no_drafts() -> None:
    assert propose(b"abcdefgh", 6) == DraftTree(tokens=(ord("h"),), parents=(-1,))


def test_a_byte_alone_has_no_drafts() -> None:
    assert propose(b"a", 6, branches=3) == DraftTree(tokens=(ord("a"),), parents=(-1,))


def test_a_child_is_found_by_its_byte() -> None:
    tree = DraftTree(tokens=tuple(b"cfgd"), parents=(-1, 0, 1, 0))

    assert [tree.child(0, ord(byte)) for byte in "fdg"] == [1, 3, None]
    assert tree.child(1, ord("g")) == 2
