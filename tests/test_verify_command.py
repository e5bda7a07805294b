# SPDX-License-Identifier: Apache-2.0
"""``verify``: what it reports of kernels that pass, fail, break, or are not there."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn_portable import Op, UnsupportedCallError, bind
from gdn_portable.testing import cases
from tests.command import Command
from tests.fakes import backend_of, install, kernel_of, reference_kernel

# the package has the command under the name of its module
verify = importlib.import_module("gdn_portable.cli.verify")
conformance = importlib.import_module("gdn_portable.cli.conformance")
LAST = "rule of decode of zero keys"
DECODES = ("--layer", "fp32", "--op", "recurrent_decode")


def _backend(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., Any]) -> str:
    return install(monkeypatch, backend_of(kernel_of(Op.RECURRENT_DECODE, "broken.decode", launch)))


def _right(*args: Any, **kwargs: Any) -> torch.Tensor:
    spec = next(iter(cases(verify.LAYERS["fp32"]))).spec
    return bind(spec, "cpu", check=False).recurrent_decode(*args, **kwargs)


def test_every_case_of_a_layer_passes_on_the_cpu(command: Command) -> None:
    document = command.document("verify", "--device", "cpu", "--layer", "fp32")

    layer = verify.LAYERS["fp32"]
    assert [outcome["case"] for outcome in document["outcomes"]] == [c.name for c in cases(layer)]
    assert document["cases"] == len(document["outcomes"])
    assert document["passed"] == document["cases"] and document["interrupted"] is None
    assert document["refused"] == document["failed"] == 0
    assert 0 < document["worst_error"] <= 1
    assert document["device"]["kind"] == "cpu" and document["device"]["name"]
    assert document["versions"]["torch"] == torch.__version__
    assert {o["kernel"] for o in document["outcomes"] if o["op"] == "mtp_verify"} == {
        "reference.mtp_verify"
    }
    assert document["layers"] == {"fp32": str(layer)}


def test_in_words_it_names_the_device_every_kernel_and_the_verdict(command: Command) -> None:
    outcome = command("verify", "--device", "cpu", *DECODES)

    assert outcome.code == 0
    for shown in ("cpu", torch.__version__, "reference.recurrent_decode", "6 of 6 cases passed"):
        assert shown in outcome.stdout
    assert "6/6" in outcome.stderr


def test_layers_ops_and_cases_can_be_chosen(command: Command) -> None:
    chosen = ("--layer", "fp32", "--layer", "ratio-8", "--case", "*zero keys", "--case", "gating*")

    document = command.document("verify", "--device", "cpu", *chosen)

    assert {(o["layer"], o["case"]) for o in document["outcomes"]} == {
        (layer, case)
        for layer in ("fp32", "ratio-8")
        for case in (
            "gating at softplus's threshold",
            "decode of zero keys",
            "conv of decode of zero keys",
            LAST,
        )
    }


def test_processes_that_share_the_device_report_the_same(command: Command) -> None:
    documents = [
        command.document("verify", "--device", "cpu", *DECODES, "--jobs", jobs)
        for jobs in ("1", "2")
    ]

    alone, shared = (
        [{**outcome, "seconds": None} for outcome in document["outcomes"]] for document in documents
    )
    assert shared == alone and len(shared) == 6


def test_what_a_process_finds_before_it_loses_the_device_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look_after(target: torch.device) -> None:
        raise verify.DeviceLostError("it fell off")

    monkeypatch.setattr(conformance, "_look_after", look_after)
    name = _backend(monkeypatch, lambda *args, **kwargs: _right(*args, **kwargs).mul_(1.01))

    outcome, loss = conformance._run_apart("fp32", "rule of decode", torch.device("cpu"), name)

    assert "output is off by" in outcome.failure
    assert loss == "it fell off"


def test_a_process_that_dies_ends_the_run(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "_prepare_worker", _dies)

    outcome = command("verify", "--device", "cpu", *DECODES, "--jobs", "2", "--json")

    assert outcome.code == 1
    assert json.loads(outcome.stdout)["interrupted"] == "a process ended before its case"


def _dies() -> None:
    os._exit(1)


def test_every_layer_has_another_demand() -> None:
    layers = list(verify.LAYERS.values())

    assert len(set(layers)) == len(layers)
    for name in ("dtype", "state_dtype", "conv_layout", "state_layout", "conv_width", "pad_slot"):
        assert len({getattr(layer, name) for layer in layers}) > 1
    assert {layer.num_v_heads // layer.num_k_heads for layer in layers} >= {2, 3, 8}


def test_a_kernel_that_is_wrong_fails_with_what_is_off(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _backend(monkeypatch, lambda *args, **kwargs: _right(*args, **kwargs).mul_(1.01))

    outcome = command("verify", "--device", "cpu", "--backend", name, *DECODES, "--json")

    document = json.loads(outcome.stdout)
    assert outcome.code == 1
    failed = {o["case"]: o["failure"] for o in document["outcomes"] if o["failure"]}
    assert set(failed) == {
        "rule of decode",
        "rule of decode to other slots with a gate",
        "rule of decode that defers",
        "rule of decode that defers and flushes with a gate",
        "rule of decode to other slots of what is deferred",
    }
    assert "output is off by" in failed["rule of decode"]
    assert (document["passed"], document["failed"]) == (1, 5)
    assert document["outcomes"][-1]["case"] == LAST and document["outcomes"][-1]["error"] < 1


def test_a_kernel_that_raises_is_a_failure_and_the_rest_is_run(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("the compiler gave up")

    outcome = command(
        "verify", "--device", "cpu", "--backend", _backend(monkeypatch, raises), *DECODES
    )

    assert outcome.code == 1
    assert "6 failed in fp32: ZeroDivisionError: the compiler gave up" in outcome.stdout
    assert "0 of 6 cases passed, 0 refused, 6 failed" in outcome.stdout


def test_a_call_that_a_kernel_cannot_do_is_refused_and_no_failure(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(*args: Any, out_state_indices: Any = None, **kwargs: Any) -> torch.Tensor:
        if out_state_indices is not None:
            raise UnsupportedCallError("the kernel works in place")
        return _right(*args, **kwargs)

    name = _backend(monkeypatch, in_place)

    outcome = command("verify", "--device", "cpu", "--backend", name, *DECODES)

    assert outcome.code == 0
    assert "2 refused in fp32: the kernel works in place" in outcome.stdout
    assert "4 of 6 cases passed, 2 refused, 0 failed" in outcome.stdout


def test_a_layer_that_no_kernel_serves_is_refused_and_nothing_passes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = replace(reference_kernel(Op.RECURRENT_DECODE), name="picky", dtypes=(torch.half,))
    table = backend_of()
    rest = [kernel for kernel in table.kernels if kernel.op is not Op.RECURRENT_DECODE]
    name = install(monkeypatch, replace(table, kernels=(picky, *rest)))

    outcome = command("verify", "--device", "cpu", "--backend", name, *DECODES)

    assert outcome.code == 1
    reason = "6 refused in fp32: picky: dtype is torch.float32, needs torch.float16"
    assert reason in outcome.stdout


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped from the keyboard"),
        (verify.DeviceLostError("the device is lost: it fell off"), 1, "it fell off"),
    ],
    ids=["interrupt", "lost"],
)
def test_what_was_run_before_the_end_is_reported(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    end: BaseException,
    code: int,
    said: str,
) -> None:
    def look_after(target: torch.device) -> None:
        raise end

    monkeypatch.setattr(conformance, "_look_after", look_after)
    calls = SimpleNamespace(count=0)

    def second_fails(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.count += 1
        if calls.count == 2:
            raise RuntimeError("an illegal access")
        return _right(*args, **kwargs)

    name = _backend(monkeypatch, second_fails)

    outcome = command("verify", "--device", "cpu", "--backend", name, *DECODES, "--json")

    document = json.loads(outcome.stdout)
    assert outcome.code == code
    assert said in document["interrupted"]
    assert [o["failure"] is None for o in document["outcomes"]] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layer", "tiny"), "layer is 'tiny', needs model, bf16-state"),
        (("--op", "decode"), "op is 'decode', needs conv1d_prefill"),
        (("--case", "nothing*"), "no case of these ops is called nothing*, needs one"),
        (("--op", "plan_prefill"), "there is no case of plan_prefill, needs an op that has one"),
        (("--backend", "referense"), "did you mean 'reference'?"),
    ],
)
def test_a_mistake_is_one_line(command: Command, arguments: tuple[str, ...], said: str) -> None:
    assert said in command.mistake("verify", "--device", "cpu", *arguments).splitlines()[-1]
