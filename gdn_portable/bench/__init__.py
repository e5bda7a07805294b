# SPDX-License-Identifier: Apache-2.0
"""Time the ops and the libraries beside them on a GPU; the command is ``bench``."""
