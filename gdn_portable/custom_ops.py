# SPDX-License-Identifier: Apache-2.0
"""The ops as custom ops of torch, for code that is compiled: a node of the graph each.

    ops = gdn_portable.custom_ops.register(gdn_portable.bind(spec, device), "my_model")

What is returned is used as what ``bind`` returned, inside ``torch.compile`` and outside. A custom
op takes tensors and numbers alone, so every call is flattened: the fields of parameters, pool,
metadata and drafts become arguments, declared as written where the op may write them, and are put
together again where it runs. ``out`` is allocated in front of the op, and written by it.
torch compiles no function that writes two inputs in one allocation of different dtypes: the pools
of a layer may be slices of tensors with a layer axis, but not share pages.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gdn_portable.backend import Launcher
from gdn_portable.checks import FIELDS, KINDS, SIGNATURES
from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps, PlanPrefill
from gdn_portable.measured import telling_sequences
from gdn_portable.metadata import Plans, PrefillMetadata, VerifyMetadata
from gdn_portable.spec import GdnSpec, Op

NAMESPACE = "gdn_portable"
# arguments that an op may write, all fields of those that have some
WRITTEN = ("out", "conv_state", "state", "checkpoint_state", "pool", "drafts", "deferred")
SAME_SHAPE_OUT = (Op.CONV1D_PREFILL, Op.CONV1D_UPDATE, Op.CONV1D_VERIFY, Op.GATED_RMS_NORM)
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt"}


def register(ops: GdnOps, name: str) -> GdnOps:
    """Return ``ops`` as custom ops ``torch.ops.gdn_portable.<name>_<op>``, which are never removed.

    Call ``plan_prefill`` of what is returned in front of the compiled code, not in it. They have no
    backward, whatever ``ops`` are.

    Args:
        ops: what ``bind`` returned.
        name: an identifier; the same in every run lets torch find what it compiled before.

    Raises:
        InputError: ``name`` is no identifier, or was registered before.
    """
    if not name.isidentifier():
        raise InputError(f"name is {name!r}, needs an identifier")
    if _is_registered(name):
        raise InputError(f"name is {name!r}, which is registered already, needs another")
    plans = _NumberedPlans(ops.plan_prefill, zlib.crc32(name.encode()) << 24)
    launchers: dict[str, Any] = {
        op.value: _custom_op(op, getattr(ops, op.value), name, ops.spec, plans)
        for op in Op
        if op is not Op.PLAN_PREFILL
    }
    return GdnOps(
        spec=ops.spec,
        device=ops.device,
        kernels=ops.kernels,
        warmup=ops.warmup,
        plan_prefill=plans.plan_prefill,
        **launchers,
    )


def free_name(prefix: str) -> str:
    """Return the first of ``<prefix>_0``, ``<prefix>_1``, ... that is not registered."""
    names = (f"{prefix}_{number}" for number in itertools.count())
    return next(name for name in names if not _is_registered(name))


def _is_registered(name: str) -> bool:
    return hasattr(getattr(torch.ops, NAMESPACE), f"{name}_{Op.GATING.value}")


class NumberedPlan(Plans):
    """A plan that compiled code knows by its number, with the lengths that the host knows."""

    def __init__(
        self,
        sequences: float,
        parts: tuple[object | None, ...],
        number: int,
        seq_lens_cpu: Sequence[int] | None,
    ) -> None:
        """Take the contents of a plan."""
        super().__init__(sequences, parts)
        self.number = number
        self.seq_lens_cpu = seq_lens_cpu


class _NumberedPlans:
    """Makes plans, and finds one by its number while a metadata holds it."""

    def __init__(self, plan_prefill: PlanPrefill, first_number: int) -> None:
        self._plan_prefill = plan_prefill
        self._plans = WeakValueDictionary[int, NumberedPlan]()
        self._next = first_number

    def plan_prefill(self, metadata: PrefillMetadata) -> None:
        """Plan; a plan that is there keeps its number."""
        if torch.compiler.is_compiling():
            raise InputError("plan_prefill was compiled, needs a call in front of compiled code")
        old = metadata.plan
        self._plan_prefill(metadata)
        plan, lengths = metadata.plan, metadata.seq_lens_cpu
        own = old if isinstance(old, NumberedPlan) and self._plans.get(old.number) is old else None
        if plan is None and lengths is None:
            return
        if plan is not None and plan is old:
            if own is not None:
                own.seq_lens_cpu = lengths
            return
        if isinstance(plan, Plans):
            sequences, parts = plan.sequences, plan.parts
        else:
            sequences, parts = telling_sequences(metadata), () if plan is None else (plan,)
        if own is not None:
            number = own.number
        else:
            number = self._next
            self._next += 1
        metadata.plan = self._plans[number] = NumberedPlan(sequences, parts, number, lengths)

    def find(self, number: int) -> NumberedPlan | None:
        """Return the plan of a number; of -1, none."""
        if number == -1:
            return None
        if number not in self._plans:
            raise InputError("metadata.plan was made by other ops, needs plan_prefill of these")
        return self._plans[number]


class _Part(NamedTuple):
    """An argument of a custom op: one of the op's, or a field of one."""

    argument: str
    owner: type | None  # whose field it is
    field: str
    kind: str  # as schemas spell it
    is_written: bool

    @property
    def name(self) -> str:
        """Name it in the schema."""
        return f"{self.argument}_{self.field}" if self.owner else self.argument


def _parts(op: Op) -> tuple[_Part, ...]:
    """Return the arguments of an op, flattened."""
    found = []
    for argument, hint in KINDS[op].items():
        if argument == "return":
            continue
        owners = [kind for kind in get_args(hint) or (hint,) if kind in FIELDS]
        written = argument in WRITTEN and not (op is Op.MTP_COMMIT and argument == "drafts")
        if not owners:
            found.append(_Part(argument, None, "", SCHEMA_TYPES[hint], written))
        for owner in owners:
            for field, kind in FIELDS[owner].items():
                if field == "seq_lens_cpu":  # the plan brings it
                    continue
                if field == "plan":
                    kind = int
                elif len(owners) > 1:
                    kind = Tensor | None
                # links of a tree are made parents by the op
                filled = owner is VerifyMetadata and field == "parents"
                part = _Part(argument, owner, field, SCHEMA_TYPES[kind], written or filled)
                found.append(part)
    return tuple(found)


def _schema(parts: Sequence[_Part], returns: str) -> str:
    written = [i for i, part in enumerate(parts) if part.is_written]
    kinds = [
        part.kind.replace("Tensor", f"Tensor(a{i}!)") if i in written else part.kind
        for i, part in enumerate(parts)
    ]
    arguments = (f"{kind} {part.name}" for kind, part in zip(kinds, parts, strict=True))
    return f"({', '.join(arguments)}) -> {returns}"


def _custom_op(op: Op, launch: Launcher, name: str, spec: GdnSpec, plans: _NumberedPlans) -> Any:
    """Return ``launch`` behind a custom op."""
    parts, returns_gates = _parts(op), op is Op.GATING

    def run(*values: Any) -> Any:
        result = launch(**_joined(parts, values, plans))
        return result if returns_gates else None

    custom_op = torch.library.custom_op(
        f"{NAMESPACE}::{name}_{op.value}",
        run,
        mutates_args=[part.name for part in parts if part.is_written],
        schema=_schema(parts, "(Tensor, Tensor)" if returns_gates else "()"),
    )
    if returns_gates:
        custom_op.register_fake(lambda a, *rest: _gates(spec, a))
    names = [parameter for parameter in SIGNATURES[op].parameters if parameter != "self"]
    defaults = {
        name: parameter.default
        for name, parameter in SIGNATURES[op].parameters.items()
        if parameter.default is not parameter.empty
    }

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        twice = any(name in kwargs for name in names[: len(args)])
        if twice or len(args) > len(names) or arguments.keys() != set(names):
            given = f"{len(args)} by position, and by name {', '.join(kwargs) or 'none'}"
            raise TypeError(f"{op.value} takes {', '.join(names)}, got {given}")
        if "out" in names and arguments["out"] is None:
            arguments["out"] = _empty_out(op, spec, arguments[names[0]])
        values = _flattened(parts, arguments)
        if torch.is_grad_enabled() and any(_requires_grad(value) for value in values):
            raise InputError("an input requires a gradient, custom ops need torch.no_grad()")
        result = custom_op(*values)
        return result if returns_gates else arguments.get("out")

    return call


def _flattened(parts: Sequence[_Part], arguments: Mapping[str, Any]) -> list[Any]:
    """Return the values of ``parts``; of a plan its number."""
    metadata = arguments.get("metadata")
    if isinstance(metadata, VerifyMetadata):
        _allocate_parents(metadata)
    values = []
    for part in parts:
        value = arguments[part.argument]
        if part.field == "plan":
            value = _number(value.plan)
        elif part.owner is not None:
            value = getattr(value, part.field) if isinstance(value, part.owner) else None
        values.append(value)
    return values


def _allocate_parents(metadata: VerifyMetadata) -> None:
    """Allocate what a tree's links are made to: the op cannot hand out memory of its own."""
    if metadata.parents is None and metadata.next_token is not None:
        metadata.parents = torch.empty_like(metadata.next_token)


def _joined(parts: Sequence[_Part], values: Sequence[Any], plans: _NumberedPlans) -> dict[str, Any]:
    """Return the arguments that were flattened to ``values``."""
    arguments: dict[str, Any] = {}
    fields: dict[tuple[str, type], dict[str, Any]] = {}
    for part, value in zip(parts, values, strict=True):
        if part.owner is None:
            arguments[part.argument] = value
        else:
            of_owner = fields.setdefault((part.argument, part.owner), {})
            if part.field == "plan":
                value = plans.find(value)
                of_owner["seq_lens_cpu"] = None if value is None else value.seq_lens_cpu
            of_owner[part.field] = value
    for (argument, owner), of_owner in fields.items():
        given = any(value is not None for value in of_owner.values())
        if given or argument not in arguments:
            arguments[argument] = owner(**of_owner) if given else None
    return arguments


def _number(plan: object | None) -> int:
    if plan is None:
        return -1
    if not isinstance(plan, NumberedPlan):
        raise InputError("metadata.plan was made by other ops, needs plan_prefill of these")
    return plan.number


def _empty_out(op: Op, spec: GdnSpec, x: Tensor) -> Tensor:
    """Return memory for what ``op`` makes of ``x``, its first argument."""
    shape = x.shape if op in SAME_SHAPE_OUT else (x.shape[0], spec.num_v_heads, spec.head_v_dim)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _gates(spec: GdnSpec, a: Tensor) -> tuple[Tensor, Tensor]:
    g, beta = (a.new_empty(a.shape, dtype=spec.compute_dtype) for _ in range(2))
    return g, beta


def _requires_grad(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
