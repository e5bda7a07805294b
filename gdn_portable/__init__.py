# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet for inference engines: one interface, each vendor's kernels."""

from gdn_portable import nn
from gdn_portable.backend import Backend, Kernel
from gdn_portable.deferred import write_deferred
from gdn_portable.errors import (
    GdnError,
    InputError,
    ModelFileError,
    SpecError,
    TunedFileError,
    UnknownBackendError,
    UnsupportedCallError,
    UnsupportedError,
)
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import (
    DeferredUpdates,
    DraftProtocol,
    GdnParams,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
)
from gdn_portable.select import Choice, bind, detect_device, explain, get_backend
from gdn_portable.spec import ConvLayout, Device, GdnSpec, Op, StateLayout
from gdn_portable.state import StatePool

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Choice",
    "ConvLayout",
    "DeferredUpdates",
    "Device",
    "DraftProtocol",
    "GdnError",
    "GdnOps",
    "GdnParams",
    "GdnSpec",
    "InputError",
    "Kernel",
    "ModelFileError",
    "Op",
    "PrefillMetadata",
    "ReplayDrafts",
    "SnapshotDrafts",
    "SpecError",
    "StateLayout",
    "StatePool",
    "TunedFileError",
    "UnknownBackendError",
    "UnsupportedCallError",
    "UnsupportedError",
    "VerifyMetadata",
    "bind",
    "detect_device",
    "explain",
    "get_backend",
    "nn",
    "write_deferred",
]
