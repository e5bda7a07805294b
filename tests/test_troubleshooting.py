# SPDX-License-Identifier: Apache-2.0
"""Every message on the page of troubleshooting is one that the code still gives, word for word."""

from __future__ import annotations

import doctest
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import gdn_backend_triton
import pytest
import torch

from gdn_portable import (
    Device,
    GdnError,
    GdnParams,
    GdnSpec,
    PrefillMetadata,
    StatePool,
    VerifyMetadata,
    bind,
    explain,
    select,
    tuned,
)
from tests.command import QWEN3_NEXT, Command

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
# a heading, and the message below it; an entry without one has nothing to go stale
ENTRIES = dict(re.findall(r"^### (.+?)\n\n```text\n(.*?)```", PAGE.read_text(), re.M | re.S))
SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=16,
    head_v_dim=16,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
D, SLOTS, P = SPEC.conv_dim, 8, 4
H200 = Device("cuda", "sm90", name="NVIDIA H200")

Call = Callable[[], object]


def _rows(count: int) -> tuple[Any, ...]:
    """Return what every step takes first, for ``count`` tokens."""
    params = GdnParams(torch.zeros(D, 4), torch.zeros(2), torch.zeros(2))
    a = torch.zeros(count, 2, dtype=torch.bfloat16)
    return torch.zeros(count, D, dtype=torch.bfloat16), a, a, params


def _pool(**layouts: Any) -> StatePool:
    return StatePool.allocate(replace(SPEC, **layouts), SLOTS, "cpu")


def _decode(*slots: int, pool: StatePool | None = None, **arguments: Any) -> Call:
    def call() -> object:
        indices = torch.tensor(slots)
        rows = _rows(len(slots))
        ops = bind(SPEC, "cpu")
        return ops.decode_step(*rows, pool or _pool(), state_indices=indices, **arguments)

    return call


def _prefill(*lengths: int, rows: int = 8) -> Call:
    def call() -> object:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        metadata = PrefillMetadata(offsets, torch.arange(len(lengths)))
        return bind(SPEC, "cpu").prefill_step(*_rows(rows), _pool(), metadata=metadata)

    return call


def _stale_plan() -> object:
    ops = bind(SPEC, "cpu")
    metadata = PrefillMetadata(torch.tensor([0, 5, 8]), torch.tensor([2, 6]))
    ops.plan_prefill(metadata)
    metadata.cu_seqlens = torch.tensor([0, 4, 8])
    return ops.prefill_step(*_rows(8), _pool(), metadata=metadata)


def _verify(slots: Any, **fields: Any) -> Call:
    def call() -> object:
        metadata = VerifyMetadata(torch.tensor(slots), P, **fields)
        return bind(SPEC, "cpu").verify_step(*_rows(P * len(slots)), _pool(), metadata=metadata)

    return call


def _gradient() -> object:
    ops = bind(SPEC, H200, backend="triton")
    rows = _rows(1)
    rows[0].requires_grad_()
    return ops.decode_step(*rows, _pool(), state_indices=torch.tensor([0]))


def _against(kernel: str, device: Device, spec: GdnSpec = SPEC, **options: Any) -> Call:
    """Return what prints the reasons against a kernel as ``explain`` and ``doctor`` do."""
    return lambda: next(c for c in explain(spec, device, **options) if c.kernel == kernel)


def _turned_state() -> StatePool:
    pool = _pool(state_layout="KV")
    assert pool.state is not None
    return StatePool(pool.conv_state, pool.state.mT)


def _bind(device: Device | str = "cpu", spec: GdnSpec = SPEC, **options: Any) -> Call:
    return lambda: bind(spec, device, **options)


PRODUCED: dict[str, Call] = {
    "A device that is not there": _bind("cuda:99"),
    "No kernel for a GPU": _bind(Device("cuda", "sm80")),
    "No kernel for a dtype": _bind(
        Device("rocm", "gfx942"), replace(SPEC, dtype=torch.float64, conv_dtype=torch.float32)
    ),
    "No kernel for head dims": _bind(H200, replace(SPEC, head_k_dim=48)),
    "No kernel for a conv width": _bind(H200, replace(SPEC, conv_width=5)),
    "A backend that does not exist": _bind(backend="refrence"),
    "A kernel that does not exist": _bind(kernels={"recurrent_decode": "trition.recurrent_decode"}),
    "A config of another model": lambda: GdnSpec.from_config({"model_type": "llama"}),
    "Ranks that do not divide the heads": lambda: GdnSpec.from_config(QWEN3_NEXT, tp_size=3),
    "FlashInfer's decode without a scratch slot": _against("flashinfer.recurrent_decode", H200),
    "Nothing to choose from by measured times": _against(
        "measured.chunk_prefill", Device("cuda", "sm100")
    ),
    "A choice by the batch, and deterministic=True": _against(
        "measured.prefill_step", H200, deterministic=True
    ),
    "A pool in another layout": _decode(0, pool=_pool(conv_layout="LEN_FIRST")),
    "A state seen through a transposed view": _decode(0, pool=_turned_state()),
    "A slot that is not in the pool": _decode(0, SLOTS),
    "Two rows that write one slot": _decode(3, 3),
    "Offsets past the tokens": _prefill(5, 4),
    "A plan for another batch": _stale_plan,
    "A gate without a norm": _decode(0, gate=torch.zeros(1, 2, 16, dtype=torch.bfloat16)),
    "Windows too short for a slot table": _verify([[0, 1, 2, 3]]),
    "A verify that names no protocol": _verify([0]),
    "A gradient through a kernel of a GPU": _gradient,
}


@pytest.fixture(autouse=True)
def _nothing_is_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)


def _message(call: Call) -> str:
    """Return what is raised, or what is explained."""
    try:
        return str(call())
    except GdnError as error:
        return f"{type(error).__name__}: {error}"


def _is_on_the_page(heading: str, message: str) -> bool:
    printed = ENTRIES[heading]
    return doctest.OutputChecker().check_output(printed, f"{message.strip()}\n", doctest.ELLIPSIS)


@pytest.mark.parametrize("heading", PRODUCED)
def test_a_message_on_the_page_is_what_the_library_says(heading: str) -> None:
    message = _message(PRODUCED[heading])

    assert _is_on_the_page(heading, message), message


def test_a_missing_package_of_the_commands(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("gdn_portable.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)

    assert _is_on_the_page("A command needs a package", command.mistake("doctor"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_command_for_a_gpu_where_there_is_none(command: Command) -> None:
    assert _is_on_the_page("A command needs a GPU", command.mistake("bench"))


def test_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gdn_backend_triton, "installed_triton", lambda: ("triton", "3.2.0"))

    message = _message(_against("triton.conv1d_update", H200))

    assert _is_on_the_page("No Triton, or one too old", message)


def test_a_backend_whose_entry_point_names_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mylib", "mylib:BACKEND", select.ENTRY_POINT_GROUP)
    monkeypatch.setattr(select, "_plugins", lambda: {"mylib": entry})

    message = _message(_bind(backend="mylib"))

    assert _is_on_the_page("A backend that cannot be loaded", message)


def test_a_damaged_file_of_times(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text("{")

    message = _message(lambda: tuned.read(path))

    assert _is_on_the_page("A file of measured times that cannot be read", message)


def test_every_message_on_the_page_is_tested() -> None:
    by_name = {
        "A command needs a package",
        "A command needs a GPU",
        "No Triton, or one too old",
        "A backend that cannot be loaded",
        "A file of measured times that cannot be read",
    }

    assert set(ENTRIES) == {*PRODUCED, *by_name}
