# SPDX-License-Identifier: Apache-2.0
"""Other libraries, called as an engine would call them, and chained where they have only parts."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

from torch import Tensor

from gdn_portable.bench.cases import Case
from gdn_portable.bench.inputs import Batch
from gdn_portable.bench.ours import Call, Contender, with_norms
from gdn_portable.bench.peers import fla, flash_qla, flashinfer, sglang, sglang_rings
from gdn_portable.bench.peers.part import Part
from gdn_portable.bench.timing import first_line
from gdn_portable.metadata import DraftProtocol
from gdn_portable.steps import split_qkv

LIBRARIES = ("flashinfer", "fla", "flash_qla", "sglang")

DECODES = (*flashinfer.DECODES, *sglang.DECODES, *fla.DECODES)
DEFERRING = sglang_rings.DEFERRING
VERIFIES = (*flashinfer.VERIFIES, *sglang.VERIFIES)
CHUNKS = (*flashinfer.CHUNKS, *flash_qla.CHUNKS, *fla.CHUNKS, *sglang.CHUNKS)
CONV_UPDATES = (*sglang.CONV_UPDATES, *fla.CONV_UPDATES)
CONV_PREFILLS = (*sglang.CONV_PREFILLS, *fla.CONV_PREFILLS)
CONV_VERIFIES = (*sglang.CONV_VERIFIES, *fla.CONV_VERIFIES)
PREFILLS = (*flashinfer.PREFILLS, *fla.PREFILLS, *sglang.PREFILLS)
COMMITS = sglang.COMMITS
ALONE = {  # parts that are called with nothing
    "conv1d_update": CONV_UPDATES,
    "conv1d_prefill": CONV_PREFILLS,
    "chunk_prefill": CHUNKS,
    "gated_rms_norm": (*sglang.NORMS, *fla.NORMS),
}
PARTS = (
    *DECODES,
    *DEFERRING,
    *VERIFIES,
    *sglang_rings.FOLDING,
    *sglang_rings.FOLDS,
    *CONV_VERIFIES,
    *PREFILLS,
    *COMMITS,
    *(part for parts in ALONE.values() for part in parts),
)


@cache
def missing(module: str) -> str | None:
    """Return why a module cannot be imported; None if it was."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # what a library raises when it is imported is its own affair
        return f"cannot be imported: {first_line(error)}"
    return None


def libraries() -> dict[str, str | None]:
    """Return why each library cannot be used, or a part of it; None where all of it can."""
    return {
        library: _reasons(sorted({m for part in PARTS for m in part.modules if _is_of(m, library)}))
        for library in LIBRARIES
    }


def _is_of(module: str, library: str) -> bool:
    return module.partition(".")[0] == library


def _reasons(modules: Sequence[str]) -> str | None:
    reasons = {module: reason for module in modules if (reason := missing(module))}
    if len(reasons) == len(modules) and len(set(reasons.values())) == 1:
        return reasons[modules[0]]
    return "; ".join(f"{module} {reason}" for module, reason in reasons.items()) or None


def peers(case: Case) -> list[Contender]:
    """Return the peers of a case whose libraries can be imported."""
    tables = case.protocol is DraftProtocol.SLOT_TABLE
    verifies = [part for part in _usable(VERIFIES) if part.tables is tables]
    decodes = _usable(DEFERRING if case.deferred else DECODES)
    match case.op:
        case "recurrent_decode":
            return [_on_rows(part, case) for part in decodes]
        case "mtp_verify":
            return [_on_rows(part, case) for part in verifies]
        case "decode_step":
            return _chains(_usable(CONV_UPDATES), decodes, case)
        case "prefill_step":
            return _chains(_usable(CONV_PREFILLS), _usable(PREFILLS), case)
        case "verify_step":
            convs = [part for part in _usable(CONV_VERIFIES) if part.tables or not tables]
            commits = [*_usable(COMMITS), TORCH_COMMIT]
            found = _chains(convs, verifies, case, None if tables else commits)
            if case.protocol is DraftProtocol.REPLAY:
                found += _chains(
                    convs, _usable(sglang_rings.FOLDING), case, _usable(sglang_rings.FOLDS)
                )
            return found
        case "front_end":
            return [_with_copies(part, case) for part in _usable(CONV_PREFILLS)]
        case op:
            return [_contender(part, case, part.make) for part in _usable(ALONE[op])]


def _usable(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if not any(map(missing, part.modules))]


def _contender(part: Part, case: Case, make: Callable[[Batch], Call]) -> Contender:
    return Contender(
        name=part.name,
        ours=False,
        includes=with_norms(part.includes, case),
        prepare=make,
        compares=_compares(case),
        refusal=part.refusal(case),
    )


def _compares(case: Case) -> bool:
    """Say whether peers compute what our kernels do: they replay drafts of this step, if any."""
    return case.protocol is not DraftProtocol.REPLAY


def _on_rows(part: Part, case: Case) -> Contender:
    """Give a part the rows of a convolution that is not timed."""

    def prepare(batch: Batch) -> Call:
        rule = part.make(batch)
        return lambda: rule(batch.mixed)

    return _contender(part, case, prepare)


def _with_copies(part: Part, case: Case) -> Contender:
    """Follow a convolution with copies of q, k and v, which prefill kernels want contiguous."""

    def prepare(batch: Batch) -> Call:
        conv = part.make(batch)

        return lambda: [x.contiguous() for x in split_qkv(batch.spec, conv())]

    copied = _contender(part, case, prepare)
    includes = f"{part.includes}; copies of q, k and v, no norms, no gating"
    return replace(copied, name=f"{part.name} + split", includes=includes)


def _chains(
    convs: Sequence[Part],
    rules: Sequence[Part],
    case: Case,
    commits: Sequence[Part] | None = None,
) -> list[Contender]:
    """Chain the first convolution there is with every rule, and the first commit if one is due."""
    if not convs or commits == []:
        return []
    commit = None if commits is None else commits[0]
    return [_chain([convs[0], rule], commit, case) for rule in rules]


def _chain(parts: Sequence[Part], commit: Part | None, case: Case) -> Contender:
    conv, rule = parts
    named = [*parts, commit] if commit else parts

    def prepare(batch: Batch) -> Call:
        convolve, apply = conv.make(batch), rule.make(batch)
        keep = commit.make(batch) if commit else None

        def step() -> Tensor:
            o = apply(convolve())
            if keep is not None:
                keep()
            return o

        return step

    return Contender(
        name=" + ".join(part.name for part in named),
        ours=False,
        includes="; then ".join(part.includes for part in named),
        prepare=prepare,
        compares=_compares(case),
        refusal=conv.refusal(case) or rule.refusal(case),
    )


def _commit_with_torch(batch: Batch) -> Callable[[], Tensor]:
    kept, slots = batch.snapshots, batch.slots.slots.long()
    rows, last = batch.slots.rows.long(), batch.slots.last_accepted.long()
    pairs = ((batch.state, kept.state), (batch.conv_state, kept.conv_state))

    def commit() -> Tensor:
        for pool, snapshots in pairs:
            assert snapshots is not None
            pool.index_copy_(0, slots, snapshots[rows, last])
        return batch.state

    return commit


TORCH_COMMIT = Part(
    name="torch commit", modules=(), includes="commit by indexing", make=_commit_with_torch
)
