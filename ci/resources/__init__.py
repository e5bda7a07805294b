# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for every GPU, and compares what it needs with committed tables.

    python -m ci.resources            # compare
    python -m ci.resources --write    # write the tables again
    python -m ci.resources --every    # more layers: limits alone, no tables

See ``docs/resources.md``.
"""
