"""Identity and records of a job that publishes a result to the Hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.hub.address import Address

if TYPE_CHECKING:
    from nemotron_fp8.destinations.run_identity import RunIdentity


FOLDER = ".nemotron-fp8"
"""Folder of the staging branch for job file and notes."""
JOB_FILE = f"{FOLDER}/job.json"
STAGING = "fp8-staging-"
"""Start of the name of a staging branch."""


def job_digest(identity: RunIdentity) -> str:
    """Return the hexadecimal digest that identifies a job: runs with the same one resume each other."""
    return hashlib.sha256(json.dumps(identity.entry(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Destination and options of one job.

    Attributes:
        repo: destination, ``owner/name``.
        plan: hexadecimal digest of everything that decides the bytes of the result.
        source: source and commit, for the titles of commits.
        revision: branch of the destination, or a pull request.
        private: create a new repository as private; reject an existing public one.
        pull_request: open a pull request instead of writing to the branch; this library never merges it.
        overwrite: replace existing weights, and publish on a branch that moved.
        restart: discard shards that an unfinished run staged. Its pull request is left open, and another one is opened.
    """

    repo: str
    plan: str
    source: str
    revision: str = "main"
    private: bool = False
    pull_request: bool = False
    overwrite: bool = False
    restart: bool = False


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Content of the job file on a staging branch.

    Attributes:
        plan: hexadecimal digest of everything that decides the bytes of the result.
        source: source and commit, for the titles of commits.
        base: commit of the destination's branch that the result is published on.
        revision: branch of the destination.
    """

    plan: str
    source: str
    base: str
    revision: str


@dataclass(frozen=True, slots=True)
class StagedShard:
    """A shard on the staging branch.

    Attributes:
        name: file name.
        size: bytes.
        sha256: hexadecimal digest as the Hub reports it.
        note: small JSON text of the same commit.
    """

    name: str
    size: int
    sha256: str
    note: bytes


@dataclass(frozen=True, slots=True)
class Published:
    """A published result.

    Attributes:
        repo, revision: repository and branch; ``refs/pr/N`` for a pull request.
        commit: the commit that completed the result.
    """

    repo: str
    revision: str
    commit: str

    def __str__(self) -> str:
        return str(Address(self.repo, None if self.revision == "main" else self.revision))


def note_path(name: str) -> str:
    """Return the path of a staged shard's note."""
    return f"{FOLDER}/{name}.json"
