# SPDX-License-Identifier: Apache-2.0
"""Every exception that a caller may see."""

from __future__ import annotations

from collections.abc import Mapping


class GdnError(Exception):
    """Base class, so that an engine can catch all of them at once."""


class SpecError(GdnError, ValueError):
    """A layer description contradicts itself, or a model config does not describe one."""


class InputError(GdnError, ValueError):
    """An argument of an op has the wrong shape, dtype, stride, device or value."""


class UnsupportedCallError(InputError):
    """A call is in order, and the kernel that is bound for its op cannot do it."""


class UnknownBackendError(GdnError, LookupError):
    """No backend or kernel has the requested name."""


class UnsupportedError(GdnError, NotImplementedError):
    """No kernel can serve an op for this layer on this device.

    ``rejected`` maps the name of each kernel that was considered to the reasons against it.
    """

    def __init__(self, message: str, rejected: Mapping[str, list[str]]) -> None:
        """Keep ``rejected`` for callers that want more than the message."""
        super().__init__(message)
        self.rejected = dict(rejected)


class ModelFileError(GdnError, ValueError):
    """A file of weights is missing, damaged, or belongs to another model."""


class TunedFileError(GdnError, ValueError):
    """A file of measured times is damaged, or of another format."""


class DeviceLostError(GdnError):
    """The device answers to nothing any more."""
