"""What a repository on the Hub holds at one commit."""

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
    """One file of a listing.

    Attributes:
        path: its path in the repository.
        size: its bytes.
        sha256: digest of its content where it is an LFS or Xet object; None for a file that git holds.
        blob: its git blob id, which for a file that git holds is a digest of its content.
    """

    path: str
    size: int
    sha256: str | None
    blob: str | None

    def digest(self) -> tuple[Any, str]:
        """A fresh hash object, and what it must come to over the content."""
        if self.sha256 is not None:
            return hashlib.sha256(), self.sha256
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False), self.blob or ""


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit: the only files that anything is asked of the server for.

    Attributes:
        repo: ``owner/name``.
        sha: the commit.
        files: its files by path.
        private, gated: as the Hub says.
    """

    repo: str
    sha: str
    files: Mapping[str, RemoteFile]
    private: bool = False
    gated: bool = False

    def file(self, path: str) -> RemoteFile:
        """Return a file of the listing.

        Raises:
            UnlistedFileError: it is not in it.
        """
        if path not in self.files:
            raise UnlistedFileError(self.repo, path)
        return self.files[path]

    @property
    def label(self) -> str:
        """What it is called in messages: the repository, and the commit in short."""
        return f"{SCHEME}{self.repo}@{self.sha[:12]}"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let an error about one of the files, which names the file alone, say what repository it lies in."""
        try:
            yield
        except SourceError as error:
            if not str(error).startswith(f"{SCHEME}{self.repo}"):
                error.add_place(self.label)
            raise
