# SPDX-License-Identifier: Apache-2.0
"""vLLM, imported so that its kernels run on simulated AMD GPUs; its sources are enough.

Where it cannot be imported, the tests that import this are skipped.
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("is for machines without a GPU", allow_module_level=True)

from triton.backends import backends

from ci.amdgcn import simulated

with ExitStack() as stack:
    # vLLM looks for the one driver that is active
    for name, backend in backends.items():
        active = mock.Mock(return_value=name == "amd")
        stack.enter_context(mock.patch.object(backend.driver, "is_active", active))
    stack.enter_context(simulated("gfx942"))
    from vllm import forward_context
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers.mamba import checkpoint
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as layers
    from vllm.utils import torch_utils
    from vllm.v1.attention import backend as attention
    from vllm.v1.attention.backends import gdn_attn, utils

for module in (torch_utils, utils):
    module.PIN_MEMORY = False  # nothing could pin it

__all__ = ["attention", "checkpoint", "custom_op", "forward_context", "gdn_attn", "layers"]
