"""Listing of a repository at one commit."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors import SourceError
from nemotron_fp8.errors.hub import UnlistedFileError
from nemotron_fp8.hub.address import SCHEME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a listing.

    Attributes:
        path: path in the repository.
        size: bytes.
        sha256: hexadecimal digest of an LFS or Xet object; None for a file that git stores.
        blob: git blob id; for a file that git stores, a digest of its content.
    """

    path: str
    size: int
    sha256: str | None
    blob: str | None

    def digest(self) -> tuple[Any, str]:
        """Return a new hash object and the hexadecimal digest that it must yield over the content."""
        if self.sha256 is not None:
            return hashlib.sha256(), self.sha256
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False), self.blob or ""


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of a repository at one commit. No other file is ever requested.

    Attributes:
        repo: ``owner/name``.
        sha: the commit.
        files: files by path.
        private, gated: access settings of the repository.
    """

    repo: str
    sha: str
    files: Mapping[str, RemoteFile]
    private: bool = False
    gated: bool = False

    def file(self, path: str) -> RemoteFile:
        """Return a file of the listing.

        Raises:
            UnlistedFileError: the listing has no such file.
        """
        if path not in self.files:
            raise UnlistedFileError(self.repo, path)
        return self.files[path]

    @property
    def label(self) -> str:
        """Name in messages: the repository and the short commit."""
        return f"{SCHEME}{self.repo}@{self.sha[:12]}"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Prefix errors about a file of the listing with the repository and the commit."""
        try:
            yield
        except SourceError as error:
            if not str(error).startswith(f"{SCHEME}{self.repo}"):
                error.add_place(self.label)
            raise
