"""Classify failures of requests to object stores.

obstore reports a failure as text: the status and the body of an answer, or the kind of a broken connection. Only the
status and the code of an answer are shown, since a body may repeat keys and signatures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemotron_fp8._retry import CanceledError, Retry
from nemotron_fp8.errors import NemotronFp8Error, printable
from nemotron_fp8.errors.stores import (
    ChangedObjectError,
    MissingBucketError,
    NoStoreCredentialsError,
    StoreAnswerError,
    StoreDeniedError,
    StoreError,
    StoreListingError,
    StoreNoProgressError,
    StoreRefusedError,
    StoreUnreachableError,
    StoreUploadError,
    UnconditionalStoreError,
)

SCANNED = 20_000
"""Characters of a failure's text that are searched."""
_STATUS = re.compile(r"non-2xx status code: (\d{3})\b", re.ASCII)
_CODE = re.compile(r"<Code>([A-Za-z][A-Za-z0-9._]{0,60})</Code>", re.ASCII)
_KIND = re.compile(r"\bkind: (Connect|Timeout|Interrupted|Request|Decode|Unknown)\b", re.ASCII)
_BUSY = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "ServerBusy", "InternalError")
_OF_PROVIDER = re.compile(r"169\.254\.|metadata[./]|instance_profile|oauth2", re.IGNORECASE)
"""Addresses that give credentials to a machine."""
_CREDENTIALS = re.compile(r"credential|token request", re.IGNORECASE)
_NO_DATE = re.compile(r"year -?\d+ is out of range")
"""Python's error about a time of a file, as obstore hands it on."""
_DAMAGED = "XAmzContentSHA256Mismatch"
"""S3's code for a body with another digest than the request was signed with."""
_UNEXPECTED = (
    "NotPartial",
    "UnexpectedRange",
    "InvalidListResponse",
    "InvalidContentRange",
    "NoContentRange",
    "Header {",
)
"""Names of obstore's errors about an answer that contradicts its request."""
_ADVICE = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE, and what they may do",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, and what its account may do",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, and what they may do",
}


class UnexpectedAnswerError(Exception):
    """An answer that contradicts its request; retried a few times."""


class ExistsError(Exception):
    """A conditional write found another object than it expected."""


class AbsentError(Exception):
    """The object does not exist."""


@dataclass(frozen=True, slots=True)
class StoreContext:
    """Subject of a request to a store (`nemotron_fp8._retry.Subject`).

    Attributes:
        store: address of the folder.
        scheme, bucket: parts of the address.
        action: verb phrase that follows "could not" in a message.
        file: the object's name; None for a listing.
        writes: True if the request writes, so that a failed condition means another writer.
    """

    store: str
    scheme: str
    bucket: str
    action: str
    file: str | None = None
    writes: bool = False

    @property
    def name(self) -> str:
        return self.store

    def classify(self, error: Exception) -> Retry | Exception:
        return classify(error, self)

    def unusable(self, reason: str) -> StoreError:
        return StoreAnswerError(self.store, self.action, reason)

    def unreachable(self, reason: str) -> StoreError:
        return StoreUnreachableError(self.store, self.action, reason)

    def no_progress(self, seconds: float, reason: str) -> StoreError:
        return StoreNoProgressError(self.store, self.action, seconds, reason)

    def rate_limited(self, seconds: float, reason: str, wait: float | None) -> StoreError:
        return StoreNoProgressError(self.store, self.action, seconds, reason)


def classify(error: Exception, context: StoreContext) -> Retry | Exception:
    """Map a failure to `Retry` or to the error to raise.

    Source: the names and texts of obstore 0.12 and object_store 0.14; the codes of the S3, GCS and Azure APIs.
    """
    if isinstance(error, (NemotronFp8Error, CanceledError, ExistsError, AbsentError)):
        return error
    if isinstance(error, UnexpectedAnswerError):
        return Retry(str(error), unexpected=True)
    if not is_of_store(error):
        if isinstance(error, ValueError) and _NO_DATE.fullmatch(str(error)[:SCANNED]):
            return Retry("a time that no calendar has", unexpected=True)
        raise error
    text = str(error)[:SCANNED]
    kind = type(error).__name__
    code = match[1] if (match := _CODE.search(text)) else ""
    status = int(match[1]) if (match := _STATUS.search(text)) else None
    return _by_name(kind, code, text, context) or _by_status(status, code, text, context)


def is_of_store(error: Exception) -> bool:
    """Return True for an error of obstore, one of which is a built-in class."""
    return type(error).__module__.partition(".")[0] == "obstore" or (
        isinstance(error, (FileNotFoundError, ValueError, NotImplementedError)) and "\n\nDebug source:\n" in str(error)
    )


def _by_name(kind: str, code: str, text: str, context: StoreContext) -> Exception | None:
    """Return the error of a failure that obstore or the store names; None for others."""
    if code in ("NoSuchBucket", "ContainerNotFound") or "The specified bucket does not exist" in text:
        return MissingBucketError(context.store, context.bucket)
    if code == "NoSuchUpload":
        return StoreUploadError(context.store, context.file or "a file", "its upload was removed")
    if kind == "FileNotFoundError" or code in ("NoSuchKey", "BlobNotFound"):
        if context.file is None:
            return MissingBucketError(context.store, context.bucket)
        # A condition on the version of an object that is gone.
        return ExistsError() if context.writes else AbsentError()
    if kind == "AlreadyExistsError":
        return ExistsError()
    if kind == "PreconditionError":
        return ExistsError() if context.writes else ChangedObjectError(context.store, context.file or "a file")
    if "conditional put is disabled" in text:
        return UnconditionalStoreError(context.store, "AWS_CONDITIONAL_PUT switches them off")
    if kind in ("NotSupportedError", "NotImplementedError") or code == "NotImplemented":
        return UnconditionalStoreError(context.store, f"it answers {code or 'that it cannot'}")
    if kind == "InvalidPathError":
        return StoreListingError(context.store, "the folder holds a name that no file has, such as one with ..")
    return None


def _by_status(status: int | None, code: str, text: str, context: StoreContext) -> Retry | Exception:
    reason = " ".join(str(part) for part in (status, code) if part)
    if status is None:
        return _without_status(text, context)
    if code == _DAMAGED:
        return Retry(f"the store answers {reason}: the bytes were damaged on their way", unexpected=True)
    if status in (401, 403) and code not in _BUSY:
        if _OF_PROVIDER.search(text.partition("status code")[0]):
            return _no_credentials(context)
        return StoreDeniedError(context.store, context.action, reason, _ADVICE[context.scheme])
    if status in (408, 409, 425, 429) or status >= 500 or code in _BUSY:
        return Retry(f"the store answers {reason}", limited=status == 429 or code in ("SlowDown", "ServerBusy"))
    return StoreRefusedError(context.store, context.action, reason)


def _without_status(text: str, context: StoreContext) -> Retry | Exception:
    """Classify a failure without an answer, or with one that obstore could not read."""
    first, _, rest = text.partition("\n\nDebug source:\n")
    if any(name in rest for name in _UNEXPECTED):
        return Retry("an answer that does not fit its request", unexpected=True)
    if "redirect without LOCATION" in first:
        return StoreRefusedError(context.store, context.action, "that the bucket is in another region")
    if _CREDENTIALS.search(first) or _OF_PROVIDER.search(first):
        return _no_credentials(context)
    kinds = _KIND.findall(rest)
    if "Connect" in kinds:
        return Retry("the connection failed", unreached=True)
    if "Timeout" in kinds or "TimedOut" in rest:
        return Retry("no answer within the time limit")
    if kinds or "HTTP error" in first or "error sending request" in first:
        return Retry("the connection broke")
    return StoreAnswerError(
        context.store, context.action, f"an answer that cannot be read ({printable(_kind_of(rest))})"
    )


def _kind_of(rest: str) -> str:
    """Return the innermost name of an error of obstore, which holds no data of the answer."""
    names = re.findall(r"\bsource: ([A-Z][A-Za-z]{0,40})\b", rest)
    return names[-1] if names else "unknown"


def _no_credentials(context: StoreContext) -> StoreError:
    problem = "no credentials are set, and none are given to this machine"
    return NoStoreCredentialsError(context.store, context.action, problem, _ADVICE[context.scheme])
