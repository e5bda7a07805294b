# SPDX-License-Identifier: Apache-2.0
"""Runs aiter's own kernels through our adapters on simulated GPUs.

aiter is on no registry and wants a GPU to be imported, so its files are taken from a checkout:

    git clone https://github.com/ROCm/aiter
    python -m ci.aiter aiter --arch gfx950

Its Triton kernels need a Triton older than 3.9, its FlyDSL kernels ``pip install flydsl==0.3.1``,
its HIP kernels clang 22, of Debian's package ``clang-22``; what is not there is passed over, and
said.
"""
