# SPDX-License-Identifier: Apache-2.0
"""The shim is registered by SGLang's plugins where it is named, or by a call, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from sglang.srt import plugins
from sglang.srt.environ import envs
from sglang.srt.layers.attention.linear import gdn_backend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context

from gdn_portable import GdnOps, PrefillMetadata, UnsupportedError, bind
from gdn_portable.engines import sglang
from gdn_portable.engines.sglang.backend import Backend, Dispatcher
from gdn_portable.engines.sglang.steps import StepBackend
from tests.engine_sglang.layer import make_layer, run, run_eagerly
from tests.engine_sglang.package import register

NAMES = ("GDNAttnBackend", "GDNKernelDispatcher", "causal_conv1d_fn", "causal_conv1d_update")
SGLANGS = Backend.__mro__[1]


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the shim out of SGLang until the test ends."""
    for name in NAMES:
        monkeypatch.setattr(gdn_backend, name, getattr(gdn_backend, name))
    monkeypatch.setattr(gdn_backend, "GDNAttnBackend", SGLANGS)
    entry = EntryPoint("gdn_portable", "gdn_portable.engines.sglang:plugin", "sglang.srt.plugins")
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: [entry])
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    yield


def test_sglang_registers_the_plugin_that_is_named(unregistered: None) -> None:
    with envs.SGLANG_PLUGINS.override("gdn_portable"):
        plugins.load_plugins()

    assert gdn_backend.GDNAttnBackend is StepBackend
    assert issubclass(gdn_backend.GDNKernelDispatcher, Dispatcher)


def test_a_plugin_that_is_not_named_changes_nothing(unregistered: None) -> None:
    with envs.SGLANG_PLUGINS.override(""):
        plugins.load_plugins()

    assert gdn_backend.GDNAttnBackend is SGLANGS


def test_a_plugin_that_cannot_be_registered_stops_sglang(
    unregistered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: Any, q: Any, *, novelty: int) -> None: ...

    monkeypatch.setattr(
        "sglang.srt.layers.attention.linear.kernels.gdn_triton.TritonGDNKernel.decode", decode
    )

    with envs.SGLANG_PLUGINS.override("gdn_portable"), pytest.raises(SystemExit, match="novelty"):
        plugins.load_plugins()

    assert gdn_backend.GDNAttnBackend is SGLANGS


def test_an_sglang_without_the_methods_that_are_extended_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [getattr(gdn_backend, name) for name in NAMES]
    monkeypatch.delattr(SGLANGS, "_init_prefill_conv_block_table")

    with pytest.raises(UnsupportedError, match=r"sglang 0\.5\.\d+:\n.*has no _init_prefill_conv"):
        sglang.register()

    assert [getattr(gdn_backend, name) for name in NAMES] == before


def test_every_phase_is_served_by_one_kernel(steps: bool) -> None:
    layer = make_layer(ForwardMode.DECODE, (1, 1, 1))

    dispatcher = layer.backend.linear_attn_backend.kernel_dispatcher

    kernels = {
        dispatcher.decode_kernel,
        dispatcher.extend_kernel,
        dispatcher.verify_kernel,
        dispatcher._get_target_verify_kernel(torch.zeros(1)),
    }
    assert [type(kernel) for kernel in kernels] == [sglang.GdnKernel]


@pytest.mark.parametrize(
    "mode", [ForwardMode.DECODE, ForwardMode.EXTEND], ids=lambda mode: mode.name
)
def test_what_is_registered_binds_once_and_runs(mode: ForwardMode) -> None:
    bound: list[tuple[GdnOps, bool]] = []

    def counted(spec: Any, device: Any, *, deterministic: bool = False) -> GdnOps:
        bound.append((bind(spec, device), deterministic))
        return bound[-1][0]

    register(counted, steps=True)
    layer = make_layer(mode, (1, 1, 1))
    run_eagerly(layer)
    first = len(bound)
    run_eagerly(layer)

    assert 0 < first == len(bound)
    assert not any(deterministic for _, deterministic in bound)


@pytest.mark.parametrize("with_steps", [True, False], ids=["steps", "kernels"])
def test_a_prefill_is_planned_once_for_all_layers(with_steps: bool) -> None:
    planned: list[PrefillMetadata] = []

    def counted(spec: Any, device: Any, *, deterministic: bool = False) -> GdnOps:
        ops = bind(spec, device)

        def plan_prefill(metadata: PrefillMetadata) -> None:
            planned.append(metadata)
            ops.plan_prefill(metadata)

        return dataclasses.replace(ops, plan_prefill=plan_prefill)

    register(counted, steps=with_steps)
    layer = make_layer(ForwardMode.EXTEND, (4, 1, 66))
    run_eagerly(layer)
    run(layer)

    assert len(planned) == 1
    assert planned[0].seq_lens_cpu == [4, 1, 66]


def test_determinism_that_is_asked_for_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[bool] = []

    def noted(spec: Any, device: Any, *, deterministic: bool = False) -> GdnOps:
        bound.append(deterministic)
        return bind(spec, device, deterministic=deterministic)

    register(noted, steps=True)
    layer = make_layer(ForwardMode.DECODE, (1, 1, 1))
    override = get_context().override_server_args(enable_deterministic_inference=True)
    with override:
        gdn_backend.GDNAttnBackend(layer.runner)

    assert bound[-1]
