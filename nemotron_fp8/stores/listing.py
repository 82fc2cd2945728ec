"""Listing of a folder in an object store."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.errors import SourceError
from nemotron_fp8.errors.stores import StoreError, UnlistedObjectError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nemotron_fp8.stores.address import StoreAddress


RECORDS = ".nemotron-fp8"
"""Folder of the records of an unfinished conversion, inside that of its result."""
JOB_FILE = f"{RECORDS}/job.json"
"""First file of a conversion; its last one is the manifest."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An object of a listing, at one version.

    Attributes:
        name: name inside the folder, with ``/`` between its parts.
        size: bytes.
        etag: entity tag, which another content changes; None if the store sends none.
        version: version or generation, of a store that has them.
        modified: time of the last modification, in seconds since 1970.
    """

    name: str
    size: int
    etag: str | None
    version: str | None = None
    modified: float = 0.0

    @property
    def stamp(self) -> str:
        """Fingerprint for a journal: entity tag and size."""
        return f"{self.etag or f'modified {self.modified:.0f}'} {self.size}"


@dataclass(frozen=True, slots=True)
class StoreListing:
    """Files of a folder at one time. No other file is ever requested from it.

    Attributes:
        address: address of the folder.
        files: files by name.
    """

    address: StoreAddress
    files: Mapping[str, StoredFile]

    def file(self, name: str) -> StoredFile:
        """Return a file of the listing.

        Raises:
            UnlistedObjectError: the listing has no such file.
        """
        if name not in self.files:
            raise UnlistedObjectError(self.label, name)
        return self.files[name]

    @property
    def label(self) -> str:
        """Name in messages."""
        return str(self.address)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Prefix errors about a file of the listing with the address of the folder."""
        try:
            yield
        except SourceError as error:
            if not isinstance(error, StoreError) and not str(error).startswith(self.label):
                error.add_place(self.label)
            raise
