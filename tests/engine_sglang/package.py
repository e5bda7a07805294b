# SPDX-License-Identifier: Apache-2.0
"""Makes the sglang package importable without what it needs to serve; registers the shim.

A plugin of pytest that has to be named, ``pytest -p tests.engine_sglang.package``: as a conftest.py
it would change what other tests import wherever all of them are collected.

``SGLANG_PATH`` is where ``pip install --no-deps --target`` put it, by default ``sglang`` beside the
interpreter's own packages. What is imported from ``STUBS``, if it is not there, is a stand-in: none
of it has to do with attention.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.utils import is_torchvision_available

from gdn_portable import bind
from gdn_portable.engines import sglang

STUBS = ("IPython", "sgl_kernel", "torchvision")
SGLANG = Path(os.environ.get("SGLANG_PATH", Path(sys.prefix) / "sglang"))


class _StandIn(type):
    """A class with any class attribute, another of its kind."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (), {})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (), {})


class _Finder:
    """Finds what is not installed, after all other finders."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] not in STUBS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def pytest_configure() -> None:
    sys.path.insert(0, str(SGLANG))
    is_torchvision_available()  # transformers remembers: it shall not see a stand-in
    sys.meta_path.append(_Finder())
    if not torch.cuda.is_available():
        # the kit saves the state of the GPU's random numbers, wherever its tensors are
        torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
        torch.cuda.set_rng_state = lambda state, device=None: None
    _register_full_attention()


def register(bind: Any = bind, *, steps: bool) -> None:
    """Register the shim, also with the kit, which imports SGLang's backend by name."""
    sglang.register(bind, steps=steps)
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.test.kits.attention_unittest.attention_methods import gdn_attention

    gdn_attention.GDNAttnBackend = gdn_backend.GDNAttnBackend


def _register_full_attention() -> None:
    """Register a backend for full attention, which no layer here has: its hooks do nothing."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    @register_attention_backend("none")
    class NoFullAttention(TorchNativeAttnBackend):
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            pass

        def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
            pass

        def get_cuda_graph_seq_len_fill_value(self) -> int:
            return 1


@pytest.fixture(params=[True, False], ids=["steps", "kernels"])
def steps(request: pytest.FixtureRequest) -> bool:
    """Register the shim with steps, then with SGLang's own methods above single kernels."""
    register(steps=request.param)
    return request.param


@pytest.fixture
def deterministic(steps: bool) -> None:
    """Register anew, with kernels whose results do not depend on what else is in the batch."""
    register(partial(bind, deterministic=True), steps=steps)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
