# SPDX-License-Identifier: Apache-2.0
"""Thin shims: each takes an engine's own calls, metadata and pools to the bound ops."""
