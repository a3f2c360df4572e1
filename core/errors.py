"""Errors meant for people. Each message says what is wrong, which value, and what to do.

FuseboxError
 +-- InvalidRequest            a value the user gave is out of range or of the wrong kind
 |    +-- PromptTooLong        prompt and answer do not fit the model's context
 +-- ModelLoadError            a model could not be loaded
 |    +-- ModelNotFound        no such folder or hub repository
 |    +-- HubUnavailable       offline, rate limited, gated or a network fault
 |    +-- UnsafeCheckpoint     pickle-only weights, remote code, or broken tensors
 +-- UnsupportedModel          a technique refuses this architecture
 +-- IncompatibleTechniques    these techniques do not go together
 +-- CalibrationError          calibration or training data is not usable
 +-- OutOfMemory               the request needs more memory than there is
 +-- MissingDependency         an optional package or program is not installed
 +-- EngineBusy                the engine's queue is full
"""

from __future__ import annotations


class FuseboxError(Exception):
    """Base of every error whose text is shown to a person."""


class InvalidRequest(FuseboxError):
    """A value the user gave is out of range or of the wrong kind."""


class PromptTooLong(InvalidRequest):
    """The prompt and the requested answer do not fit the model's context."""


class ModelLoadError(FuseboxError):
    """A model could not be loaded."""


class ModelNotFound(ModelLoadError):
    """There is no such folder, embedded model or hub repository."""


class HubUnavailable(ModelLoadError):
    """The hub cannot be used now: offline, refused, gated, rate limited."""


class UnsafeCheckpoint(ModelLoadError):
    """The checkpoint would need code or pickle to load, or its tensors are broken."""


class UnsupportedModel(FuseboxError):
    """A technique does not admit this architecture."""


class IncompatibleTechniques(FuseboxError):
    """Two techniques cannot be applied together, or not in this order."""


class CalibrationError(FuseboxError):
    """Calibration or training data is missing, too short or not text."""


class OutOfMemory(FuseboxError):
    """The request needs more memory than the machine or the budget has."""


class MissingDependency(FuseboxError):
    """An optional package or program is not installed."""


class EngineBusy(FuseboxError):
    """Too many requests wait for this engine."""
