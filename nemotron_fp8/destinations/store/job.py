"""Records of an unfinished conversion in an object store: the job file, and a receipt for each finished shard."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.inventory import is_plain_name
from nemotron_fp8.checkpoint.json_text import compact_json
from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.planning.receipt import ShardReceipt, entry_receipt, receipt_entry
from nemotron_fp8.stores.listing import JOB_FILE, RECORDS
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.stores.listing import StoredFile


SCHEMA = 1
"""Version of both kinds of record."""
MAX_JOB_BYTES = 64 << 20
"""Size cap of a job file, in bytes; it has a name and a fingerprint for each file."""
MAX_RECEIPT_BYTES = 64 << 20
"""Size cap of a receipt, in bytes; it takes some hundred bytes for each tensor."""


@dataclass(frozen=True, slots=True)
class Job:
    """Content of a job file.

    Attributes:
        id: random; a run that starts over gets another one, and receipts of the earlier one do not count.
        terms: identity of the conversion (`RunIdentity.entry`).
        files: names of all files that the job may write or delete.
        clean: False while files of a discarded run are being deleted.
    """

    id: str
    terms: dict[str, Any]
    files: tuple[str, ...]
    clean: bool = True

    @classmethod
    def new(cls, identity: RunIdentity, files: Iterable[str], *, clean: bool = True) -> Job:
        """Return the job of a run that begins anew."""
        return cls(uuid.uuid4().hex, identity.entry(), tuple(sorted(set(files))), clean)

    def render(self) -> bytes:
        """Return the job as JSON."""
        return compact_json(
            {"schema": SCHEMA, "id": self.id, "terms": self.terms, "files": list(self.files), "clean": self.clean}
        )

    @classmethod
    def parse(cls, data: bytes, path: str) -> Job:
        """Parse a job file.

        Args:
            data: the file, from outside.
            path: its address, for the message.

        Raises:
            DamagedJournalError: the file is malformed.
        """

        def refuse(_file: str, problem: str) -> DamagedJournalError:
            return DamagedJournalError(path, 1, problem)

        found = strict_json.load_object(data, JOB_FILE, refuse, max_bytes=MAX_JOB_BYTES)
        with guarded(lambda problem: refuse(JOB_FILE, problem)):
            if found.keys() != {"schema", "id", "terms", "files", "clean"} or found["schema"] != SCHEMA:
                raise ValueError(f"not a job file of schema {SCHEMA}")
            job_id, terms, files = found["id"], found["terms"], found["files"]
            clean = found["clean"]
            if (type(job_id), type(terms), type(files), type(clean)) != (str, dict, list, bool):
                raise ValueError("a field of another type")
            for name in files:
                if type(name) is not str or not is_plain_name(name):
                    raise ValueError(f"{excerpt(name)} is not a file name")
            return cls(job_id, terms, tuple(files), clean)


def receipt_path(name: str) -> str:
    """Return the path of a shard's receipt."""
    return f"{RECORDS}/{name}.json"


@dataclass(frozen=True, slots=True)
class StoreReceipt:
    """Receipt of a shard in a store.

    Attributes:
        receipt: the receipt.
        etag: entity tag of the object, which changes with each write; None at a store without tags.
    """

    receipt: ShardReceipt
    etag: str | None

    def matches(self, file: StoredFile) -> bool:
        """Return True if an object is the one that was uploaded."""
        return self.etag is not None and (file.etag, file.size) == (self.etag, self.receipt.size)


def render_receipt(job: str, receipt: ShardReceipt, file: StoredFile) -> bytes:
    """Return a receipt as JSON.

    Args:
        job: id of the job.
        receipt: the receipt.
        file: the uploaded object.
    """
    return compact_json({"schema": SCHEMA, "job": job, "etag": file.etag, **receipt_entry(receipt)})


def parse_receipt(data: bytes, job: str) -> StoreReceipt | None:
    """Parse a receipt; return None if it belongs to another job or is malformed: its shard is made again."""
    try:
        entry = strict_json.load_object(
            data, "receipt", lambda _, problem: ValueError(problem), max_bytes=MAX_RECEIPT_BYTES
        )
        with guarded(ValueError):
            etag = entry.get("etag")
            if entry.get("schema") != SCHEMA or entry.get("job") != job or type(etag) not in (str, type(None)):
                return None
            return StoreReceipt(entry_receipt(entry), etag)
    except ValueError:
        return None
