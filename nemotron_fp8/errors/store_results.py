"""Errors of a result in an object store."""

from __future__ import annotations

from nemotron_fp8.errors.base import DestinationError
from nemotron_fp8.errors.stores import StoreError


class OccupiedPrefixError(StoreError, DestinationError, FileExistsError):
    """The folder holds files that do not belong to this conversion.

    Attributes:
        problem: the files.
    """

    problem: str
    message = "{store}: {problem}; name a new folder, or delete this one first"


class JobLostError(StoreError, DestinationError):
    """The job file of this run is gone, or was replaced.

    Attributes:
        loss: what happened to the file.
    """

    loss: str
    message = (
        "{store}: .nemotron-fp8/job.json {loss}: another run finished this job, started over, or a user removed it;"
        " nothing more was written. End the other run, then run again"
    )


class StagedObjectError(StoreError, DestinationError):
    """A file of an unfinished result is missing, or differs from the one that was uploaded.

    Attributes:
        file: its name.
        problem: the difference.
    """

    file: str
    problem: str
    message = "{store}: {file!a} {problem}; run again: only this file is made again"


class UploadBrokenError(StoreError, DestinationError):
    """The upload of a shard broke, and its parts could not be sent again.

    Attributes:
        file: its name.
        reason: the last failure.
    """

    file: str
    reason: str
    message = (
        "{store}: the upload of {file!a} broke ({reason}); check the connection and the store, then run again: finished"
        " shards are kept"
    )
