"""The exceptions of TraceIR: one small tree; each message names the value, the place and the remedy."""

from __future__ import annotations


class TraceError(Exception):
    """Base of every error TraceIR raises on purpose; the command line prints it without a traceback."""


class InputError(TraceError, ValueError):
    """A query, item, option or argument cannot be used as given."""


class ImageError(InputError):
    """An image cannot be read safely: missing, truncated, too large, too narrow, or not an image."""


class DataError(TraceError):
    """A data file breaks its format; the message carries `file:line`."""


class ModelError(TraceError):
    """A checkpoint cannot be loaded, saved, or used as asked."""


class StoreError(TraceError):
    """An index is damaged, locked, missing, or was made by another model."""


class TrainError(TraceError):
    """Training cannot start, go on, or resume."""


class TeacherError(TraceError):
    """A teacher cannot be reached, refuses the key or the model, or the limits of a build are spent."""
