"""Jobs of the Hub: what tells two apart, which source shards each step needs whole, what is staged and published."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.hub.address import Address

if TYPE_CHECKING:
    from nemotron_fp8.destinations.run_identity import RunIdentity


FOLDER = ".nemotron-fp8"
"""What a staging branch holds beside shards lies there."""
JOB_FILE = f"{FOLDER}/job.json"


def job_digest(terms: RunIdentity) -> str:
    """What tells jobs apart: a hexadecimal digest of the terms that their runs must agree on."""
    return hashlib.sha256(json.dumps(terms.entry(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Job:
    """What a staging branch is for; a small file on it says so.

    Attributes:
        plan: hash of everything that decides the result's bytes; runs with the same one go on with one job.
        source: the source and its commit, for people.
        base: commit of the destination's branch that the result is published on top of.
        revision: the destination's branch.
    """

    plan: str
    source: str
    base: str
    revision: str


@dataclass(frozen=True, slots=True)
class StagedShard:
    """A shard that is on the staging branch.

    Attributes:
        name: its file name.
        size: its bytes.
        sha256: hexadecimal digest of its content, as the Hub reports it.
        note: what was stored with it in the same commit.
    """

    name: str
    size: int
    sha256: str
    note: bytes


@dataclass(frozen=True, slots=True)
class Published:
    """The result on the Hub.

    Attributes:
        repo, revision: where it is; ``refs/pr/N`` for a pull request.
        commit: the commit that completed it.
    """

    repo: str
    revision: str
    commit: str

    def __str__(self) -> str:
        return str(Address(self.repo, None if self.revision == "main" else self.revision))


def note_path(name: str) -> str:
    """Where the note of a staged shard lies."""
    return f"{FOLDER}/{name}.json"
