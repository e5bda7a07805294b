# SPDX-License-Identifier: Apache-2.0
"""An example of a backend: its own decode, and the reference for all other ops."""

import torch

from gdn_portable import Backend, Kernel, Op, StateLayout, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

RECURRENT_DECODE = Kernel(
    op=Op.RECURRENT_DECODE,
    name="einsum.recurrent_decode",
    target="gdn_einsum.decode:make_recurrent_decode",  # imported where it is bound, not before
    probe=None,  # or gdn_portable.backend.needs("mylib", "my-distribution")
    devices=("cpu",),
    archs=None,
    dtypes=FLOATS,
    state_dtypes=FLOATS,
    head_dims=None,
    state_layouts=(StateLayout.VK,),  # a KV pool is refused
    conv_layouts=None,
)
BACKEND = Backend(
    name="einsum", devices=None, kernels=(RECURRENT_DECODE, *reference.BACKEND.kernels)
)
