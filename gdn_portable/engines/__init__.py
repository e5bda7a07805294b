# SPDX-License-Identifier: Apache-2.0
"""Thin shims that put the ops behind the interfaces of inference engines, one module for each."""
