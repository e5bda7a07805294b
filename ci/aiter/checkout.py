# SPDX-License-Identifier: Apache-2.0
"""aiter's modules, imported one by one: its packages' own files would look for a GPU."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

BARE_PACKAGES = ("", "ops", "jit", "ops.triton", "ops.flydsl", "ops.flydsl.kernels")


def open_checkout(folder: Path, arch: str) -> None:
    """Make aiter's modules importable from a checkout, and torch say that a GPU is there."""
    for name in BARE_PACKAGES:
        path = str(folder.joinpath("aiter", *filter(None, name.split("."))))
        package = ModuleType(f"aiter.{name}".rstrip("."))
        package.__path__ = [path]
        package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
        package.__spec__.submodule_search_locations = [path]
        sys.modules[package.__name__] = package
    # functions that are compiled when they are called are replaced after the import
    compiler = ModuleType("aiter.jit.core")
    vars(compiler)["compile_ops"] = lambda *args, **kwargs: lambda function: function
    sys.modules[compiler.__name__] = compiler
    facts = SimpleNamespace(gcnArchName=arch)
    vars(torch.cuda).update(
        is_available=lambda: True,
        current_device=lambda: 0,
        get_device_properties=lambda device=None: facts,
        device=lambda index: contextlib.nullcontext(),
        current_stream=lambda device=None: SimpleNamespace(cuda_stream=0),
    )
