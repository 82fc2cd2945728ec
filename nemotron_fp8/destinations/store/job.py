"""Records of an unfinished conversion in an object store: the job file, and a receipt for each finished shard."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.inventory import is_plain_name
from nemotron_fp8.checkpoint.json_text import compact_json
from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.planning.receipt import LARGEST_COUNT, ShardReceipt, entry_receipt, receipt_entry
from nemotron_fp8.stores.listing import JOB_FILE, RECORDS
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.stores.listing import StoredFile


SCHEMA = 1
"""Version of both kinds of record."""
RUN_FILE = f"{RECORDS}/run.json"
"""Record of the newest run: its process, its start, and how it ended."""
SHARD = ".safetensors"
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
        source: name of the source, for people.
        files: planned bytes of every file of the result, by name.
        discard: files of a discarded run that are still to be deleted.
    """

    id: str
    terms: dict[str, Any]
    source: str
    files: Mapping[str, int]
    discard: tuple[str, ...] = ()

    @classmethod
    def new(cls, identity: RunIdentity, source: str, files: Mapping[str, int], discard: Iterable[str] = ()) -> Job:
        """Return the job of a run that begins anew."""
        return cls(uuid.uuid4().hex, identity.entry(), source, dict(files), tuple(sorted(set(discard))))

    def render(self) -> bytes:
        """Return the job as JSON."""
        return compact_json({"schema": SCHEMA, **asdict(self)})

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
            if found.keys() != {"schema", *_TYPES} or found.pop("schema") != SCHEMA:
                raise ValueError(f"not a job file of schema {SCHEMA}")
            for key, kind in _TYPES.items():
                if type(found[key]) is not kind:
                    raise ValueError(f"{key} is {excerpt(found[key])}, not {kind.__name__}")
            for name in (*found["files"], *found["discard"]):
                if type(name) is not str or not is_plain_name(name):
                    raise ValueError(f"{excerpt(name)} is not a file name")
            for size in found["files"].values():
                if type(size) is not int or not 0 <= size < LARGEST_COUNT:
                    raise ValueError(f"{excerpt(size)} is not a number of bytes")
            return cls(**{**found, "discard": tuple(found["discard"])})


_TYPES = {"id": str, "terms": dict, "source": str, "files": dict, "discard": list}
"""Fields of a job file, with their types."""


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
