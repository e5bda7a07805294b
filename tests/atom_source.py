# SPDX-License-Identifier: Apache-2.0
"""ATOM, imported from its sources so that its Triton kernels run on simulated AMD GPUs.

A mock stands in for aiter, which needs a GPU to be imported; nothing of it is called here. Where
ATOM cannot be imported, the tests that import this are skipped.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("atom") is None:
    pytest.skip("needs ATOM", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("is for machines without a GPU", allow_module_level=True)

from ci.amdgcn import simulated


class Aiter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a mock for every module of aiter."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "aiter":
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]


sys.meta_path.insert(0, Aiter())
try:
    with simulated("gfx942"):
        from atom.model_ops import attention_gdn
        from atom.model_ops.attentions import gdn_attn
finally:
    sys.meta_path.pop(0)
    _forget()

__all__ = ["attention_gdn", "gdn_attn"]
