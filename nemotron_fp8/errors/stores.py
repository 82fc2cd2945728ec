"""Errors of object stores.

No message, attribute or chained exception holds a key, a token or a signed address: an error of the store's client
carries the answer of the server, so it is never chained to one of these.
"""

from __future__ import annotations

from nemotron_fp8.errors.base import DestinationError, NemotronFp8Error, SourceError


class StoreError(NemotronFp8Error):
    """Base of every error about an object store.

    Attributes:
        store: address of the folder in the store, like ``s3://bucket/prefix``.
    """

    store: str


class StoreAddressError(NemotronFp8Error, ValueError):
    """An address does not name a folder of an object store.

    Attributes:
        text: the address; what may be a credential in it is replaced by ``...``.
    """

    text: str
    problem: str
    message = "{text!a}: {problem}; write s3://bucket/folder, gs://bucket/folder or az://container/folder"


class StoreSettingsError(StoreError, ValueError):
    """The environment does not describe a store that can be used.

    Attributes:
        problem: the variable and its fault, with the next step.
    """

    problem: str
    message = "{store}: {problem}"


class NoStoreCredentialsError(StoreError):
    """No credentials are found, or their provider does not answer.

    Attributes:
        action: the action.
        problem: what was looked for.
        advice: where credentials may be set.
    """

    action: str
    problem: str
    advice: str
    message = "{store}: could not {action}: {problem}; {advice}"


class StoreDeniedError(StoreError):
    """The store rejects the credentials, or they do not permit the action.

    Attributes:
        action: the action.
        reason: status and code of the answer.
        advice: variables that hold the credentials.
    """

    action: str
    reason: str
    advice: str
    message = "{store}: could not {action}: the store refuses it ({reason}); {advice}"


class MissingBucketError(StoreError):
    """The bucket or container does not exist.

    Attributes:
        bucket: its name.
    """

    bucket: str
    message = "{store}: there is no bucket {bucket!a} at this store; check the name and the endpoint, or create it"


class MissingObjectError(StoreError, SourceError):
    """A file of the listing is not in the store anymore.

    Attributes:
        file: its name.
    """

    permanent = False
    file: str
    message = "{store}: {file!a} was deleted after it was listed; is something else writing there? Run again"


class UnlistedObjectError(StoreError, SourceError):
    """A file name is not in the listing, so it is not requested from the store.

    Attributes:
        file: the name.
    """

    file: str
    message = "{store}: {file!a}: not in the listing, so the file is not fetched"


class ChangedObjectError(StoreError, SourceError):
    """A file in the store was replaced after it was listed.

    Attributes:
        file: its name.
    """

    permanent = False
    file: str
    message = (
        "{store}: {file!a} was replaced after it was listed; is something else writing there? Run again when it has"
        " ended, with --restart (restart=True) if shards of the files before are finished"
    )


class StoreListingError(StoreError, SourceError):
    """The listing of a folder holds names that no checkpoint has, or too many.

    Attributes:
        problem: the fault.
    """

    problem: str
    message = "{store}: {problem}; name the folder of one checkpoint"


class StoreNoProgressError(StoreError):
    """No request succeeded within the longest wait of a run.

    Attributes:
        action: the action.
        seconds: seconds since the last success.
        reason: the last failure.
    """

    action: str
    seconds: float
    reason: str
    message = (
        "{store}: could not {action}: {reason}, and no request succeeded for {seconds:,.0f} s; check the connection and"
        " the store, then run again: finished shards are kept"
    )


class StoreUnreachableError(StoreError):
    """No connection to the store could be opened within the allowed attempts.

    Attributes:
        action: the action.
        reason: the last failure.
    """

    action: str
    reason: str
    message = (
        "{store}: could not {action}: the store cannot be reached, {reason}; check the connection and the endpoint"
    )


class StoreAnswerError(StoreError):
    """The answer of the server is not an answer of a store.

    Attributes:
        action: the action.
        problem: the fault.
    """

    action: str
    problem: str
    message = "{store}: could not {action}: {problem}; check the endpoint and any proxy in between, then run again"


class StoreRefusedError(StoreError):
    """The store rejects a request as wrong, such as a request to another region than the bucket's.

    Attributes:
        action: the action.
        reason: status and code of the answer.
    """

    action: str
    reason: str
    message = (
        "{store}: could not {action}: the store answers {reason}; check the region (AWS_REGION), the endpoint and the"
        " name"
    )


class StoreConflictError(StoreError, DestinationError):
    """A file exists, or was replaced, where a conditional write expected otherwise.

    Attributes:
        file: its name.
    """

    file: str
    message = "{store}: {file!a} was written by another run; wait for that run to finish, or name another folder"


class UnconditionalStoreError(StoreError, DestinationError):
    """The store has no conditional writes, which keep two runs apart.

    Attributes:
        problem: what the store did instead.
    """

    problem: str
    message = (
        "{store}: the store has no conditional writes ({problem}), so two runs could mix their files; update the store,"
        " or write to a local folder and copy it"
    )


class StoreUploadError(StoreError, DestinationError):
    """An upload ended with another object than the one that was sent.

    Attributes:
        file: its name.
        problem: the difference.
    """

    file: str
    problem: str
    message = "{store}: {file!a}: {problem}; is something else writing there? Run again: finished shards are kept"
