"""Every error this library raises on purpose, under one base class.

Each class stands for one violation and carries the names and numbers of it as attributes, so that a caller
can react without parsing a message. The message itself says what, where and what to do next.
"""

from __future__ import annotations

from nemotron_fp8.errors.base import (
    BudgetError,
    DestinationError,
    DeviceError,
    MissingExtraError,
    NemotronFp8Error,
    RecipeError,
    SourceError,
    WorkerDiedError,
    printable,
)
from nemotron_fp8.errors.checkpoint_files import (
    IndexMismatchError,
    MalformedConfigError,
    MalformedHeaderError,
    MalformedIndexError,
    MalformedManifestError,
    MissingShardError,
    PickledWeightsError,
    SourceChangedError,
    SourceLinkError,
    SourceNotFoundError,
    SourceReadError,
    UnknownDtypeError,
)
from nemotron_fp8.errors.destination import DestinationBusyError, DestinationExistsError, OverlapError, WriteError
from nemotron_fp8.errors.tensors import (
    AlreadyQuantizedError,
    LayoutError,
    NonFiniteError,
    NothingSelectedError,
    NotQuantizedError,
    StackedExpertsError,
    UnfinishedError,
    UnrepresentableError,
    UnsteadyReadError,
)

__all__ = [
    "AlreadyQuantizedError",
    "BudgetError",
    "DestinationBusyError",
    "DestinationError",
    "DestinationExistsError",
    "DeviceError",
    "IndexMismatchError",
    "LayoutError",
    "MalformedConfigError",
    "MalformedHeaderError",
    "MalformedIndexError",
    "MalformedManifestError",
    "MissingExtraError",
    "MissingShardError",
    "NemotronFp8Error",
    "NonFiniteError",
    "NotQuantizedError",
    "NothingSelectedError",
    "OverlapError",
    "PickledWeightsError",
    "RecipeError",
    "SourceChangedError",
    "SourceError",
    "SourceLinkError",
    "SourceNotFoundError",
    "SourceReadError",
    "StackedExpertsError",
    "UnfinishedError",
    "UnknownDtypeError",
    "UnrepresentableError",
    "UnsteadyReadError",
    "WorkerDiedError",
    "WriteError",
    "is_hopeless",
    "printable",
]


def is_hopeless(error: BaseException | None) -> bool:
    """Whether a source can never be converted: running again would end the same way."""
    return isinstance(error, SourceError) and not isinstance(
        error, (SourceReadError, SourceChangedError, UnsteadyReadError)
    )
