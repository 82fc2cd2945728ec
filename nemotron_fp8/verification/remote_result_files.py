"""Files of a result that is in a repository or an object store: headers and tensors are read by range."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.documents.manifest import parse_manifest
from nemotron_fp8.errors import SourceError
from nemotron_fp8.progress import ignore_progress
from nemotron_fp8.sources.remote import read_headers, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.local_files import FileDigest
    from nemotron_fp8.documents.manifest import Manifest
    from nemotron_fp8.progress import Advance
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8.sources.remote import RemoteFiles


@dataclass(slots=True)
class RemoteResultFiles(ABC):
    """A result whose files are listed once (`nemotron_fp8.verification.result_files.ResultFiles`).

    Every method may raise the errors of the client.

    Attributes:
        listed: the files.
    """

    listed: RemoteFiles
    _manifest: Manifest | None = field(default=None, init=False)
    _headers: dict[str, tuple[Header, str] | SourceError] = field(default_factory=dict, init=False)

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def opener(self) -> Opener: ...

    @abstractmethod
    def inventory(self) -> Inventory: ...

    @abstractmethod
    def digest_of(self, name: str, advance: Advance) -> str:
        """Return the SHA-256 of a file; ``advance`` is called with the bytes that were read for it."""

    def names(self) -> list[str]:
        return sorted(path for path in self.listed.names() if "/" not in path)

    def paths(self) -> list[str]:
        return sorted(self.listed.names())

    def manifest(self) -> Manifest | None:
        if self._manifest is None and MANIFEST in self.listed.names():
            self._manifest = parse_manifest(self.read(MANIFEST))
        return self._manifest

    def read(self, name: str) -> bytes:
        return read_json(self.listed, name)

    def header(self, name: str) -> tuple[Header, int]:
        if name not in self._headers:
            shards = [name, *(path for path in self.names() if path.endswith(".safetensors") and path != name)]
            self._headers = read_headers(self.listed, shards)
        found = self._headers[name]
        if isinstance(found, SourceError):
            raise found
        return found[0], self.listed.size(name)

    def differing(
        self, files: Mapping[str, FileDigest], threads: int, advance: Advance = ignore_progress
    ) -> dict[str, str]:
        wrong: dict[str, str] = {}

        def one(name: str) -> None:
            if problem := self._differs(name, files[name], advance):
                wrong[name] = problem

        parallel_for(max(1, min(threads, len(files))), sorted(files), one)
        return dict(sorted(wrong.items()))

    def _differs(self, name: str, expected: FileDigest, advance: Advance) -> str | None:
        if name not in self.listed.names():
            return "missing"
        if (wrong := expected.wrong_size(self.listed.size(name))) or expected.sha256 is None:
            return wrong
        return expected.wrong_sha256(self.digest_of(name, advance))
