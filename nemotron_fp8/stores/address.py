"""Addresses of folders in object stores: ``s3://bucket/folder``, ``gs://bucket/folder``, ``az://container/folder``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nemotron_fp8._secrets import masked
from nemotron_fp8.errors.stores import StoreAddressError

SCHEMES = ("s3", "gs", "az")
"""Amazon S3 and stores that speak its protocol, Google Cloud Storage, Azure Blob Storage."""
FILE = "file://"
MAX_KEY = 1024
"""Longest name of an object in bytes, in every one of these stores; the names of files come out of it."""
MAX_NAME = 255
"""Bytes that a folder leaves for the names of files in it."""
_BUCKET = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,220}[A-Za-z0-9])?")
_STORE = re.compile(r"(?:s3|gs|az):/", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Address of a folder in an object store.

    Attributes:
        scheme: one of `SCHEMES`.
        bucket: bucket; at Azure, the container.
        prefix: the folder, without slashes at its ends; empty for the whole bucket.
    """

    scheme: str
    bucket: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def child(self, name: str) -> StoreAddress:
        """Return the address of a folder or file inside.

        Raises:
            StoreAddressError: ``name`` is not a plain name, or several with ``/`` between them.
        """
        return parse_store(f"{self}/{name}")

    def key(self, name: str) -> str:
        """Return the name of a file's object in the bucket."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def parent(self) -> StoreAddress:
        """Return the address of the folder that holds this one."""
        return replace(self, prefix=self.prefix.rpartition("/")[0])


def is_store(text: str) -> bool:
    """Return True if text begins like the address of an object store."""
    return _STORE.match(text) is not None


def local_path(text: str) -> str | None:
    """Return the path of a ``file://`` address; None for any other text.

    Raises:
        StoreAddressError: the address names another machine, or has a query.
    """
    if not text.lower().startswith(FILE):
        return None
    path = text[len(FILE) :]
    if not path.startswith("/") or "?" in path or "#" in path or "\0" in path:
        raise StoreAddressError(masked(text), "a file address begins with file:/// and has no query")
    from urllib.parse import unquote

    return unquote(path)


def parse_store(text: str) -> StoreAddress:
    """Parse an address by the rules that all stores share.

    Raises:
        StoreAddressError: text is not an address, or holds what may be a credential.
    """
    scheme, separator, rest = text.partition("://")
    shown = masked(text)
    if not separator or scheme not in SCHEMES:
        raise StoreAddressError(shown, "not an address of an object store")
    if "?" in rest or "#" in rest:
        raise StoreAddressError(shown, "an address has no query; credentials come from the environment")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise StoreAddressError(shown, "an address has no user and no port; credentials come from the environment")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise StoreAddressError(shown, f"{bucket!a} is not the name of a {_KINDS[scheme]}")
    prefix = prefix.removesuffix("/")
    if prefix and (problem := why_unusable(prefix)) is not None:
        raise StoreAddressError(shown, problem)
    if len(prefix.encode()) > MAX_KEY - MAX_NAME:
        raise StoreAddressError(shown, f"the folder's name has more than {MAX_KEY - MAX_NAME:,} bytes")
    return StoreAddress(scheme, bucket, prefix)


_KINDS = {"s3": "bucket", "gs": "bucket", "az": "container"}


def why_unusable(key: str) -> str | None:
    """Return why a name cannot be that of an object of ours, or a part of it; None if it can."""
    if not key.isprintable():
        return "a name has unprintable characters"
    for part in key.split("/"):
        if not part:
            return "a name has an empty part"
        if part in (".", ".."):
            return f"a name has the part {part!a}"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "a name is not text"
    return None
