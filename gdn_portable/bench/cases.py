# SPDX-License-Identifier: Apache-2.0
"""What is timed: an op, a layer, and the sequences of one call."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase

import torch

from gdn_portable.errors import InputError
from gdn_portable.metadata import DraftProtocol
from gdn_portable.spec import GdnSpec

FRONT_END = "front_end"  # all of a prefill before its recurrence: conv, split, norms and gating
OPS = (
    "decode_step",
    "recurrent_decode",
    "conv1d_update",
    "verify_step",
    "mtp_verify",
    FRONT_END,
    "conv1d_prefill",
    "chunk_prefill",
    "prefill_step",
    "gated_rms_norm",
)
DECODE_OPS = ("decode_step", "recurrent_decode", "conv1d_update")
VERIFY_OPS = ("verify_step", "mtp_verify")

BATCHES = (1, 8, 32, 128, 512)
VERIFY_BATCHES = (8, 32, 128)
MORE_VERIFY_BATCHES = (1, *VERIFY_BATCHES)
TOKENS = (2048, 8192, 16384)
CONV_LENGTHS: tuple[tuple[int, ...], ...] = (
    (512,),
    (1024,) * 8,
    (100, 3000, 17, 5000, 1, 75),
)  # and those of TOKENS
PACKED = ((2048,), (8192,), (32768,), (2048,) * 4, (4096,) * 8)
PACKED_FEW_HEADS = ((8192,), (32768,), (1024,) * 8)
PACKED_UNEVENLY = (24576, 8192)

DRAFTS = 4  # of a sequence, root included
DEFERRED, MORE_DEFERRED = 7, 15  # updates that a decode has room for

LAYER = GdnSpec(
    num_k_heads=16,
    num_v_heads=32,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
FEW_HEADS = replace(LAYER, num_k_heads=2, num_v_heads=8)
MANY_HEADS = replace(LAYER, num_v_heads=64)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Gates(str, Enum):
    """How fast the state decays.

    ``real`` is what the checkpoints start from: A uniform in [0.01, 16], dt_bias 1, a and b as a
    projection gives them, N(0, 1). ``slow`` has A uniform in [1e-4, 1e-3]: g is near 0, so that
    nothing decays and nothing can be skipped.
    """

    REAL = "real"
    SLOW = "slow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call to time.

    Attributes:
        op: of :data:`OPS`.
        spec: the layer.
        lengths: tokens of every sequence.
        gates: what the decay is drawn from.
        protocol: of a verify.
        deferred: updates that a decode has room to defer, R; 0 where it writes every state.
    """

    op: str
    spec: GdnSpec
    lengths: tuple[int, ...]
    gates: Gates = Gates.REAL
    protocol: DraftProtocol | None = None
    deferred: int = 0

    @property
    def num_sequences(self) -> int:
        """B or N."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def drafts(self) -> int:
        """P of a verify, root included."""
        return self.lengths[0]

    @property
    def num_accepted(self) -> int:
        """How many of them the step before accepted, root included: all but one."""
        return max(1, self.drafts - 1)

    @property
    def num_deferred(self) -> tuple[int, ...]:
        """How many updates of each sequence are deferred: as if they had started one by one."""
        R = self.deferred
        return tuple((n + R // 2) % (R + 1) for n in range(self.num_sequences))

    @property
    def layer(self) -> str:
        """Name the heads, and the head dims where they are not 128."""
        spec = self.spec
        heads = f"H{spec.num_k_heads}-HV{spec.num_v_heads}"
        dims = (spec.head_k_dim, spec.head_v_dim)
        return heads if dims == (128, 128) else f"{heads}-K{dims[0]}-V{dims[1]}"

    @property
    def shape(self) -> str:
        """Name the sequences: B32, B32xP4, 4x2048, 24576+8192."""
        if self.op in DECODE_OPS:
            return f"B{self.num_sequences}"
        if self.op in VERIFY_OPS:
            return f"B{self.num_sequences}xP{self.drafts}"
        if len(set(self.lengths)) == 1:
            return f"{self.num_sequences}x{self.lengths[0]}"
        return "+".join(map(str, self.lengths))

    @property
    def variant(self) -> str:
        """Name all but the op and the sequences; cases that share it lie on one curve."""
        parts = [self.layer, SHORT.get(self.spec.state_dtype, str(self.spec.state_dtype))]
        parts += [self.protocol.value] if self.protocol else []
        parts += [f"deferred{self.deferred}"] if self.deferred else []
        parts += [self.gates.value]
        parts += ["norms"] if self.op == "chunk_prefill" and self.spec.qk_l2norm else []
        return "/".join(parts)

    @property
    def name(self) -> str:
        """Name the case as ``--case`` matches it."""
        layer, _, rest = self.variant.partition("/")
        return "/".join((self.op, layer, self.shape, rest))


def default_cases() -> tuple[Case, ...]:
    """Return what is timed when nothing is asked for."""
    both = (LAYER, _bf16_state(LAYER))
    cases = [case for spec in both for case in _decodes("decode_step", spec)]
    cases += [case for spec in both for case in _decodes("decode_step", spec, DEFERRED)]
    for spec in both:
        cases += _verifies("verify_step", spec, DraftProtocol.REPLAY)
    cases += _verifies("verify_step", LAYER, DraftProtocol.SNAPSHOT)
    cases += _verifies("verify_step", LAYER, DraftProtocol.SLOT_TABLE)
    cases += [Case(op=FRONT_END, spec=LAYER, lengths=(tokens,)) for tokens in TOKENS]
    cases += _chunks(LAYER, PACKED, norms=True)
    cases += _chunks(FEW_HEADS, PACKED_FEW_HEADS, norms=True)
    return tuple(cases)


def all_cases() -> tuple[Case, ...]:
    """Return the default cases, and those that are only timed when named."""
    layers = (LAYER, _bf16_state(LAYER), FEW_HEADS, _bf16_state(FEW_HEADS), MANY_HEADS)
    return tuple(dict.fromkeys((*default_cases(), *(c for spec in layers for c in cases_of(spec)))))


def cases_of(spec: GdnSpec) -> Iterator[Case]:
    """Yield every op of a layer at the usual sizes."""
    for op in DECODE_OPS:
        yield from _decodes(op, spec)
    for deferred in (DEFERRED, MORE_DEFERRED):
        yield from _decodes("decode_step", spec, deferred)
    for op in VERIFY_OPS:
        for protocol in DraftProtocol:
            yield from _verifies(op, spec, protocol, MORE_VERIFY_BATCHES)
    for op in (FRONT_END, "conv1d_prefill", "gated_rms_norm"):
        for tokens in TOKENS:
            yield Case(op=op, spec=spec, lengths=(tokens,))
    for lengths in CONV_LENGTHS:
        yield Case(op="conv1d_prefill", spec=spec, lengths=lengths)
    packed = tuple(dict.fromkeys((*PACKED, *PACKED_FEW_HEADS, PACKED_UNEVENLY)))
    yield from _chunks(spec, packed, norms=True)
    yield from _chunks(spec, packed, norms=False)
    for gates in Gates:
        for lengths in packed:
            yield Case(op="prefill_step", spec=spec, lengths=lengths, gates=gates)


def with_drafts(case: Case, drafts: int) -> Case:
    """Return a case whose sequences verify so many drafts each; one of another op as it is."""
    if case.op not in VERIFY_OPS:
        return case
    spec = case.spec
    if case.protocol is DraftProtocol.SLOT_TABLE:
        spec = replace(spec, conv_window=spec.conv_width - 2 + drafts)
    return replace(case, spec=spec, lengths=(drafts,) * case.num_sequences)


def select_cases(
    cases: Sequence[Case], ops: Sequence[str] | None, patterns: Sequence[str] | None
) -> tuple[Case, ...]:
    """Return the cases of ``ops`` whose names match one of ``patterns``; None takes all.

    Raises:
        InputError: an op does not exist, or a pattern matches nothing.
    """
    for op in ops or ():
        if op not in OPS:
            raise InputError(f"op is {op!r}, needs one of {', '.join(OPS)}")
    kept = [case for case in cases if not ops or case.op in ops]
    for pattern in patterns or ():
        if not any(fnmatchcase(case.name, pattern) for case in kept):
            near = difflib.get_close_matches(pattern, [case.name for case in kept], n=1, cutoff=0.1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"no case matches {pattern!r}{hint}; --list shows all")
    if not patterns:
        return tuple(kept)
    return tuple(c for c in kept if any(fnmatchcase(c.name, pattern) for pattern in patterns))


def _bf16_state(spec: GdnSpec) -> GdnSpec:
    return replace(spec, state_dtype=torch.bfloat16)


def _decodes(op: str, spec: GdnSpec, deferred: int = 0) -> list[Case]:
    return [Case(op=op, spec=spec, lengths=(1,) * batch, deferred=deferred) for batch in BATCHES]


def _verifies(
    op: str, spec: GdnSpec, protocol: DraftProtocol, batches: Sequence[int] = VERIFY_BATCHES
) -> list[Case]:
    return [
        with_drafts(Case(op=op, spec=spec, lengths=(1,) * batch, protocol=protocol), DRAFTS)
        for batch in batches
    ]


def _chunks(spec: GdnSpec, packed: Sequence[tuple[int, ...]], *, norms: bool) -> list[Case]:
    """Return the cases; unit vectors are given, whether norms are applied to them or not."""
    spec = replace(spec, qk_l2norm=norms)
    return [
        Case(op="chunk_prefill", spec=spec, lengths=lengths, gates=gates)
        for gates in Gates
        for lengths in packed
    ]
