# SPDX-License-Identifier: Apache-2.0
"""Write text for several prompts as one continuous batch, plainly or with drafts.

A small engine as a real one is built: rows of a fixed batch, slots of a pool, sequences that
join and leave while others run, padding rows where nobody is.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdn_portable.demo.drafts import DraftTree, propose
from gdn_portable.demo.model import VOCABULARY, ByteLm
from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import (
    DraftProtocol,
    Drafts,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
)
from gdn_portable.spec import torch_device

PADDING = -1
INDEX_DTYPE = torch.int64

OnBytes = Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to speculate.

    Attributes:
        protocol: what becomes of accepted drafts.
        max_drafts: P, the root included.
        branches: continuations that a tree of drafts follows; 1 is a chain.
    """

    protocol: DraftProtocol = DraftProtocol.REPLAY
    max_drafts: int = 6
    branches: int = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next byte is chosen: the likeliest, or drawn with noise of its place alone.

    The noise of a byte depends on seed, sequence and position, never on the batch or on drafts,
    so speculation writes the same text at any temperature.
    """

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a temperature that orders nothing.

        Raises:
            InputError: it is negative or not finite.
        """
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}, needs a number from 0 on")

    def choose(self, logits: Tensor, sequence: int, position: int) -> int:
        """Return the byte at ``position`` of a sequence from its logits [256]."""
        if self.temperature == 0:
            return int(logits.argmax())
        generator = torch.Generator().manual_seed(hash((self.seed, sequence, position)))
        noise = torch.empty(VOCABULARY).exponential_(generator=generator).log()
        return int((logits.cpu() / self.temperature - noise).argmax())


@dataclass(slots=True)
class Generated:
    """What was written, and how fast."""

    texts: list[bytes]
    prompt_bytes: int = 0
    prefill_seconds: float = 0.0
    written_bytes: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    sequence_steps: int = 0

    @property
    def bytes_per_second(self) -> float:
        """Bytes written per second of decoding."""
        return self.written_bytes / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def accepted_length(self) -> float:
        """Bytes that one step wrote for one sequence, on average."""
        return self.written_bytes / self.sequence_steps if self.sequence_steps else 0.0


@dataclass(slots=True)
class _Running:
    number: int
    text: bytearray
    prompt_bytes: int
    limit: int
    accepted: int = 0  # drafts of the last step that count, the root included

    def append(self, token: int) -> bool:
        """Add a byte; return whether that was the last."""
        self.text.append(token)
        return len(self.text) - self.prompt_bytes >= self.limit


@dataclass(slots=True)
class Generator:
    """A model, its ops, and a pool for a batch of sequences.

    Attributes:
        model: what writes.
        ops: bound for the model's spec.
        max_batch: rows; further prompts wait until a row is free.
        sampling: how bytes are chosen.
        speculation: how to speculate; None decodes byte by byte.
    """

    model: ByteLm
    ops: GdnOps
    max_batch: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot run.

        Raises:
            InputError: a count is too small, or a slot table is to hold a tree.
        """
        _at_least(1, max_batch=self.max_batch)
        speculation = self.speculation
        if speculation is None:
            return
        _at_least(2, max_drafts=speculation.max_drafts)  # the root and one draft
        _at_least(1, branches=speculation.branches)
        if speculation.branches > 1 and speculation.protocol is DraftProtocol.SLOT_TABLE:
            raise InputError("a slot table holds a chain, got a tree: needs replay or snapshot")

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[bytes], new_bytes: int, on_bytes: OnBytes | None = None
    ) -> Generated:
        """Continue every prompt by ``new_bytes`` bytes.

        Args:
            prompts: at least one byte each.
            new_bytes: to write for each prompt.
            on_bytes: told the number of a prompt and the bytes just written for it.

        Raises:
            InputError: a prompt is empty, or there is nothing to write.
        """
        check_request(prompts, new_bytes)
        batch = _Batch(self.model, self.ops, self.max_batch, self.sampling, self.speculation)
        waiting = deque(
            _Running(number, bytearray(prompt), len(prompt), new_bytes)
            for number, prompt in enumerate(prompts)
        )
        done = Generated(texts=[b""] * len(prompts), prompt_bytes=sum(map(len, prompts)))
        while waiting or any(batch.rows):
            start = time.perf_counter()
            joined = batch.join(waiting)
            middle = time.perf_counter()
            written = joined if joined else batch.step()
            done.prefill_seconds += middle - start if joined else 0.0
            done.decode_seconds += 0.0 if joined else time.perf_counter() - middle
            done.decode_steps += not joined
            for running, new in written:
                done.written_bytes += 0 if joined else len(new)
                done.sequence_steps += not joined
                done.texts[running.number] += new
                if on_bytes:
                    on_bytes(running.number, new)
        return done


class _Batch:
    """Rows that sequences run in; row i owns the slots from ``i * P`` on."""

    def __init__(
        self,
        model: ByteLm,
        ops: GdnOps,
        size: int,
        sampling: Sampling,
        speculation: Speculation | None,
    ) -> None:
        self.model = model
        self.ops = ops
        self.sampling = sampling
        self.speculation = speculation
        self.device = torch_device(ops.device)
        self.rows: list[_Running | None] = [None] * size
        table = speculation is not None and speculation.protocol is DraftProtocol.SLOT_TABLE
        self.slots_per_row = speculation.max_drafts if speculation and table else 1
        num_slots = size * self.slots_per_row
        self.pools = model.allocate_pools(num_slots, self.device)
        self.drafts: list[Drafts | None] = [None] * len(self.pools)
        if speculation is not None and not table:
            replay = speculation.protocol is DraftProtocol.REPLAY
            kind = ReplayDrafts if replay else SnapshotDrafts
            self.drafts = [
                kind.allocate(model.spec, num_slots, speculation.max_drafts, self.device)
                for _ in self.pools
            ]

    def join(self, waiting: deque[_Running]) -> list[tuple[_Running, bytes]]:
        """Prefill as many waiting sequences as there are free rows."""
        free = [i for i, row in enumerate(self.rows) if row is None][: len(waiting)]
        if not free:
            return []
        joining = [waiting.popleft() for _ in free]
        for i, running in zip(free, joining, strict=True):
            self.rows[i] = running
        lengths = [len(running.text) for running in joining]
        metadata = PrefillMetadata(
            cu_seqlens=self._tensor([0, *lengths]).cumsum(0),
            state_indices=self._tensor([i * self.slots_per_row for i in free]),
            has_initial_state=torch.zeros(len(free), dtype=torch.bool, device=self.device),
            seq_lens_cpu=lengths,
        )
        self.ops.plan_prefill(metadata)
        tokens = self._tensor([byte for running in joining for byte in running.text])
        logits = self.model.prefill(tokens, self.ops, self.pools, metadata=metadata)
        last = logits[metadata.cu_seqlens[1:] - 1].cpu()
        written = []
        for i, scores in zip(free, last, strict=True):
            written.append((self._running(i), bytes([self._write(i, scores)])))
        return written

    def step(self) -> list[tuple[_Running, bytes]]:
        """Advance every running sequence: by one byte, or by all drafts that turn out right."""
        return self._decode() if self.speculation is None else self._verify(self.speculation)

    def _decode(self) -> list[tuple[_Running, bytes]]:
        slots = [PADDING if row is None else i for i, row in enumerate(self.rows)]
        tokens = self._tensor([0 if row is None else row.text[-1] for row in self.rows])
        logits = self.model.decode(
            tokens, self.ops, self.pools, state_indices=self._tensor(slots)
        ).cpu()
        running = [(i, row) for i, row in enumerate(self.rows) if row is not None]
        return [(row, bytes([self._write(i, logits[i])])) for i, row in running]

    def _verify(self, speculation: Speculation) -> list[tuple[_Running, bytes]]:
        trees = [
            None
            if row is None
            else propose(bytes(row.text), speculation.max_drafts, branches=speculation.branches)
            for row in self.rows
        ]
        lengths = [0 if tree is None else len(tree.tokens) for tree in trees]
        metadata = self._verify_metadata(speculation, trees, lengths)
        tokens = self._tensor([token for tree in trees if tree for token in tree.tokens])
        logits = self.model.verify(
            tokens, self.ops, self.pools, metadata=metadata, drafts=self.drafts
        ).cpu()

        written, last = [], [-1] * len(self.rows)
        for i, (tree, scores) in enumerate(zip(trees, logits.split(lengths), strict=True)):
            if tree is not None:
                running = self._running(i)
                new, last[i] = self._accept(i, tree, scores)
                running.accepted = len(new)
                written.append((running, new))
        if speculation.protocol is DraftProtocol.SNAPSHOT or metadata.is_tree:
            self._commit(metadata, last)
        return written

    def _verify_metadata(
        self, speculation: Speculation, trees: Sequence[DraftTree | None], lengths: list[int]
    ) -> VerifyMetadata:
        P, first = speculation.max_drafts, self.slots_per_row
        slots = [PADDING if tree is None else i * first for i, tree in enumerate(trees)]
        indices = self._tensor(slots)
        if speculation.protocol is DraftProtocol.SLOT_TABLE:
            columns = torch.arange(P, device=self.device)
            indices = torch.where(indices[:, None] < 0, PADDING, indices[:, None] + columns)
        parents = None
        if speculation.branches > 1:
            rows = [tree.parents if tree else () for tree in trees]
            parents = self._tensor([[*row, *[0] * (P - len(row))] for row in rows])
        return VerifyMetadata(
            state_indices=indices,
            max_drafts=P,
            cu_seqlens=self._tensor([0, *lengths]).cumsum(0),
            num_accepted=self._tensor([row.accepted if row else 0 for row in self.rows]),
            parents=parents,
        )

    def _accept(self, row: int, tree: DraftTree, logits: Tensor) -> tuple[bytes, int]:
        """Write bytes for as long as drafts foresaw them; return them and the last right draft."""
        at, new = 0, bytearray()
        while True:
            new.append(self._write(row, logits[at]))
            child = tree.child(at, new[-1])
            if child is None or self.rows[row] is None:
                return bytes(new), at
            at = child

    def _commit(self, metadata: VerifyMetadata, last: list[int]) -> None:
        for pool, drafts in zip(self.pools, self.drafts, strict=True):
            if drafts is not None:
                self.ops.mtp_commit(
                    pool, drafts, metadata=metadata, last_accepted=self._tensor(last)
                )
        for row in self.rows:
            if row is not None:
                row.accepted = 0

    def _write(self, row: int, logits: Tensor) -> int:
        """Choose the next byte of a row; free the row when it was the last."""
        running = self._running(row)
        token = self.sampling.choose(logits, running.number, len(running.text))
        if running.append(token):
            self.rows[row] = None
        return token

    def _running(self, row: int) -> _Running:
        running = self.rows[row]
        assert running is not None
        return running

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=INDEX_DTYPE, device=self.device)


def check_request(prompts: Sequence[bytes], new_bytes: int) -> None:
    """Raise InputError where there is nothing to continue, or nothing to write."""
    _at_least(1, new_bytes=new_bytes)
    if not prompts:
        raise InputError("there is no prompt, needs at least one")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise InputError(f"prompt {number} is empty, needs at least one byte")


def _at_least(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise InputError(f"{name} is {count}, needs at least {least}")
