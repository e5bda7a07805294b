# SPDX-License-Identifier: Apache-2.0
"""A small language model on the library's ops, which reads prompts and writes text."""
