# SPDX-License-Identifier: Apache-2.0
"""Verification by replay in one kernel for Hopper, in the CuTe DSL."""
