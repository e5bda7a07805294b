# SPDX-License-Identifier: Apache-2.0
"""Thin shims that put the ops behind the calls of engines and model code that others wrote."""
