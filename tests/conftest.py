# SPDX-License-Identifier: Apache-2.0
"""Settings of every test."""

from __future__ import annotations

import torch

# threads that wait for each other on a busy machine make small triangular solves 70 times slower
torch.set_num_threads(1)
