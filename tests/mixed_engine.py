# SPDX-License-Identifier: Apache-2.0
"""An engine in small: requests with slots, batches with the metadata of vLLM or ATOM, an oracle.

However a request was served, in chunks, token by token, by drafts, forked or moved: its tokens'
outputs, its state and its window are those of one prefill of all of them, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import GdnOps, GdnSpec, InputError, PrefillMetadata, StatePool, bind
from gdn_portable.engines.protocols import layer_params
from gdn_portable.testing import ABSOLUTE
from tests.cases import F64, bits, generator, random

NUM_SLOTS = 16
LENGTH = 24  # tokens of a sequence that are there to be served
BEYOND = 2  # rows of the output past the batch


@dataclass(frozen=True)
class Place:
    """Where a test runs: the CPU, a simulated AMD GPU, or the GPU that is here."""

    device: str
    spec: GdnSpec
    bind: Callable[[GdnSpec], GdnOps]


@cache
def simulated_ops(spec: GdnSpec) -> GdnOps:
    from ci.amdgcn import bind_simulated

    return bind_simulated(spec, "gfx942")


@cache
def _cuda(spec: GdnSpec) -> GdnOps:
    return bind(spec, "cuda")


BF16 = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=16,
    head_v_dim=16,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
DOUBLE = replace(BF16, head_v_dim=12, dtype=F64, state_dtype=F64)


@pytest.fixture(params=["cpu", "gfx942", "cuda"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "cpu":
        return Place("cpu", DOUBLE, lambda spec: bind(spec, "cpu"))
    if request.param == "gfx942":
        request.getfixturevalue("amd_gpu")
        return Place("cpu", BF16, simulated_ops)
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, torch sees none")
    return Place("cuda", BF16, _cuda)


@dataclass
class Request:
    """A sequence of tokens, and where it stands.

    Attributes:
        inputs: mixed_qkv, b, a and gate of its tokens.
        slots: a slot for every draft, the root included.
        served: tokens that its state holds.
        accepted: drafts of the last verify that were, the root included; else 1.
        outputs: of the tokens served.
    """

    inputs: tuple[Tensor, ...]
    slots: list[int]
    served: int = 0
    accepted: int = 1
    outputs: list[Tensor] = field(default_factory=list)

    def forked(self, served: int, *slots: int) -> Request:
        """Return another that begins as this one did."""
        outputs = [torch.cat(self.outputs)[:served]]
        return replace(self, slots=list(slots), served=served, outputs=outputs)


@dataclass
class Row:
    """What a batch does for a request.

    Attributes:
        request: that is served.
        count: of its tokens, or of its drafts, the root included.
        right: drafts that will be accepted; None where it has no drafts.
        read: the slot to read, where that is not its own.
        keeps: after how many of its tokens its states are kept as well, and the slot for them.
    """

    request: Request
    count: int = 1
    right: int | None = None
    read: int | None = None
    keeps: tuple[int, int] | None = None

    @property
    def written(self) -> list[int]:
        own = self.request.slots[: 1 if self.right is None else self.count]
        return own if self.keeps is None else [*own, self.keeps[1]]


def metadata_fields(rows: Sequence[Row], device: str, pad_slot: int, pad_to: int) -> dict[str, Any]:
    """Return the fields that both engines' metadata have, as their builders fill them.

    Args:
        rows: of the batch; of those without drafts, decodes first.
        device: of the index tensors.
        pad_slot: that pads them.
        pad_to: sequences that a batch of decodes, or of drafts, is padded to for a graph.
    """
    drafted = [row for row in rows if row.right is not None]
    others = [row for row in rows if row.right is None]
    decodes = [row for row in others if row.count == 1 and row.request.served]
    if drafted:  # next to drafts, one token is a prefill
        decodes = []
    assert others[: len(decodes)] == decodes
    padding = max(pad_to - len(rows), 0)
    draft_slots = [row.request.slots for row in drafted]
    num_drafts = len(rows[0].request.slots)
    tokens = sum(row.count for row in rows) + padding * (num_drafts if drafted else 1)

    def ints(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def offsets(of: list[Row]) -> Tensor:
        ends = [sum(row.count for row in of[:n]) for n in range(len(of) + 1)]
        return ints(ends + ends[-1:] * padding)

    prefills = len(others) - len(decodes)
    fields: dict[str, Any] = {
        "num_prefills": prefills,
        "num_prefill_tokens": sum(row.count for row in others) - len(decodes),
        "num_decodes": len(decodes) + (0 if drafted or prefills else padding),
        "num_spec_decodes": len(drafted) + (padding if drafted else 0),
        "num_spec_decode_tokens": sum(row.count for row in drafted),
        "num_actual_tokens": tokens,
    }
    fields["num_decode_tokens"] = fields["num_decodes"]
    if prefills:
        started = [row.request.served > 0 for row in others]
        fields["has_initial_state"] = torch.tensor(started, device=device)
    if others:
        own = [row.request.slots[0] for row in others]
        fields["non_spec_query_start_loc"] = offsets(others)
        fields["non_spec_state_indices_tensor"] = ints(own + [pad_slot] * padding)
    if drafted:
        fields["spec_query_start_loc"] = offsets(drafted)
        padded = draft_slots + [[pad_slot] * num_drafts] * padding
        fields["spec_state_indices_tensor"] = ints(padded)
        accepted = [row.request.accepted for row in drafted]
        fields["num_accepted_tokens"] = ints(accepted + [1] * padding)
        fields["spec_sequence_masks"] = torch.tensor([row.right is not None for row in rows])
    if drafted and others:
        of_draft = [row.right is not None for row in rows for _ in range(row.count)]
        order = torch.tensor(of_draft, device=device).int().argsort(stable=True)
        fields["non_spec_token_indx"], fields["spec_token_indx"] = order.split(
            [of_draft.count(False), of_draft.count(True)]
        )
    return fields


@dataclass
class Engine:
    """Pools, a layer, and the sequences that a test serves.

    Attributes:
        place: where it runs.
        spec: with the engine's layouts.
        pool: the caches, seen as [slots, D, L] and [slots, HV, V, K].
        metadata: returns the engine's for a batch, padded to so many sequences.
        forward: called with mixed_qkv, b, a, gate, out, layer and metadata.
        copy: takes slots, or what the engine counts, from one list to another.
        gated: whether ``forward`` ends with the gated RMSNorm.
    """

    place: Place
    spec: GdnSpec
    pool: StatePool
    metadata: Callable[[Sequence[Row], int], Any]
    forward: Callable[..., Tensor]
    copy: Callable[..., None]
    gated: bool = False
    layer: Any = field(init=False)
    rng: torch.Generator = field(init=False, default_factory=generator)

    def __post_init__(self) -> None:
        spec, D, HV = self.spec, self.spec.conv_dim, self.spec.num_v_heads

        def weight(*shape: int, dtype: torch.dtype = spec.dtype) -> Tensor:
            return random(self.rng, *shape, dtype=dtype).to(self.place.device)

        self.layer = SimpleNamespace(
            conv1d=SimpleNamespace(weight=weight(D, 1, spec.conv_width) / 2, bias=weight(D)),
            A_log=weight(HV, dtype=spec.compute_dtype),
            dt_bias=weight(HV),
            norm=SimpleNamespace(
                weight=weight(spec.head_v_dim), eps=1e-5, activation=spec.gate_activation
            ),
        )

    def request(self, *slots: int) -> Request:
        return Request(self._draw(LENGTH), list(slots))

    def serve(self, *rows: Row, pad_to: int = 0, metadata: Any = None) -> None:
        """Run a batch; what it must not write has to stay, what pads it has to give zeros."""
        before = self.bits()

        out = self.run(rows, metadata or self.metadata(rows, pad_to))

        written = {slot for row in rows for slot in row.written}
        others = [slot for slot in range(NUM_SLOTS) if slot not in written]
        for old, new in zip(before, self.bits(), strict=True):
            assert torch.equal(old[others], new[others])
        counts = [row.count for row in rows]
        assert not out[sum(counts) :].any()
        for row, part in zip(rows, out[: sum(counts)].split(counts), strict=True):
            kept = row.count if row.right is None else row.right
            row.request.outputs.append(part[:kept].cpu())
            row.request.served += kept
            row.request.accepted = 1 if row.right is None else row.right

    def run(self, rows: Sequence[Row], metadata: Any) -> Tensor:
        """Call the shim once."""
        return self.call(rows, metadata)()

    def call(self, rows: Sequence[Row], metadata: Any) -> Callable[[], Tensor]:
        """Return a call of the shim, with NaN in rows of padding and in the output."""
        inputs = [torch.cat(parts) for parts in zip(*map(self._inputs, rows), strict=True)]
        padding = max(metadata.num_actual_tokens - len(inputs[0]), 0)
        holes = [x.new_full((padding, *x.shape[1:]), torch.nan) for x in inputs]
        pairs = zip(inputs, holes, strict=True)
        mixed_qkv, b, a, gate = (torch.cat(pair).to(self.place.device) for pair in pairs)
        out = gate.new_full((len(gate) + BEYOND, *gate.shape[1:]), torch.nan)
        return partial(self.forward, mixed_qkv, b, a, gate, out, self.layer, metadata)

    def check(self, *requests: Request) -> None:
        """Compare what sequences gave, and what is kept of them, with one prefill of all."""
        for request in requests:
            slot = request.slots[request.accepted - 1]
            columns = slice(request.accepted - 1, request.accepted + 2)
            window = self.pool.conv_state[request.slots[0], :, columns].cpu()
            inputs = request.inputs[0][: request.served]
            history = torch.cat([torch.zeros_like(inputs[:3]), inputs])[-3:].mT
            assert torch.equal(window, history)
            (exact, exact_state), (twin, twin_state) = (
                self._prefill(request, double) for double in (True, False)
            )
            self._close(torch.cat(request.outputs), exact, twin)
            self._close(self.pool.state[slot].cpu(), exact_state, twin_state)

    def _close(self, got: Tensor, exact: Tensor, twin: Tensor) -> None:
        absolute = ABSOLUTE[self.spec.dtype] * exact.abs().max()
        bound = 2 * (twin.double() - exact).abs().max() + absolute
        assert (got.double() - exact).abs().max() <= bound

    def _prefill(self, request: Request, double: bool) -> tuple[Tensor, Tensor]:
        spec = replace(self.place.spec, dtype=F64, state_dtype=F64) if double else self.place.spec
        params = layer_params(self.layer)
        gate = request.inputs[3][: request.served] if self.gated else None
        params = replace(params, norm_weight=self.layer.norm.weight, norm_eps=self.layer.norm.eps)
        values = {name: getattr(params, name) for name in params.__slots__}
        kind = (lambda x: x.cpu().double()) if double else (lambda x: x.cpu())
        cast = {k: kind(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        pool = StatePool.allocate(spec, 1, "cpu")
        mixed_qkv, b, a, _ = (kind(x[: request.served]) for x in request.inputs)
        y = bind(spec, "cpu").prefill_step(
            mixed_qkv,
            a,
            b,
            replace(params, **cast),
            pool,
            metadata=PrefillMetadata(
                torch.tensor([0, request.served]), torch.tensor([0]), torch.tensor([False])
            ),
            gate=None if gate is None else kind(gate),
        )
        assert pool.state is not None
        return y, pool.state[0]

    def _draw(self, count: int) -> tuple[Tensor, ...]:
        HV, V = self.spec.num_v_heads, self.spec.head_v_dim
        shapes = ((self.spec.conv_dim,), (HV,), (HV,), (HV, V))
        return tuple(random(self.rng, count, *shape, dtype=self.spec.dtype) for shape in shapes)

    def _inputs(self, row: Row) -> tuple[Tensor, ...]:
        """Return a row's tokens; drafts that are not right are other ones."""
        right = row.count if row.right is None else row.right
        first = row.request.served
        own = (x[first : first + right] for x in row.request.inputs)
        pairs = zip(own, self._draw(row.count - right), strict=True)
        return tuple(torch.cat(pair) for pair in pairs)

    def bits(self) -> tuple[Tensor, Tensor]:
        conv_state, state = self.pool.conv_state, self.pool.state
        assert conv_state is not None and state is not None
        return bits(conv_state.contiguous()).clone(), bits(state.contiguous()).clone()


def refusal(engine: Engine, message: str, *rows: Row, **changes: Any) -> None:
    """Run a batch with other metadata, which must be refused with every slot as it was."""
    before = engine.bits()

    with pytest.raises(InputError, match=message):
        engine.run(rows, replace(engine.metadata(rows, 0), **changes))

    for old, new in zip(before, engine.bits(), strict=True):
        assert torch.equal(old, new)
