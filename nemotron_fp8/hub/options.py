"""Options for the Hub as source and destination."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import space_needed_and_free
from nemotron_fp8._retry import NO_PROGRESS_SECONDS, RetryPolicy
from nemotron_fp8._utils import check_arguments, shortened
from nemotron_fp8.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.hub.client import HubClient


_VARIABLE = re.compile(r"(?!hf_)[A-Za-z_][A-Za-z0-9_]*")
"""Names of environment variables, except those that begin like a token of the Hub."""


@dataclass(frozen=True, slots=True)
class HubOptions:
    """Options for reading from the Hub and writing to it.

    Attributes:
        revision: branch, tag, commit or ``refs/pr/N`` of the source, if its address names none.
        private: create a new repository as private; an existing public one is rejected.
        token_env: environment variable that holds the token; None for the login of ``hf auth login`` or ``HF_TOKEN``.
        pull_request: open a pull request instead of writing to the branch; this library never merges it.
        cache_dir: folder for downloads and uploads in transit; None for ``nemotron_fp8`` in ``HF_HOME``. Each run
            creates a private folder in it and removes that folder at its end.
        retry_seconds: time without any progress after which a request fails; 0 to try each request once.
        on_wait: called before a request is retried, with the reason and the seconds until then. During a
            conversion, the progress callback reports waits instead.

    Raises:
        RecipeError: a value has another type.
    """

    revision: str | None = None
    private: bool = False
    token_env: str | None = None
    pull_request: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    retry_seconds: float = NO_PROGRESS_SECONDS
    on_wait: Callable[[str, float], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_arguments(
            revision=self.revision, cache_dir=self.cache_dir, retry_seconds=self.retry_seconds, on_wait=self.on_wait
        )
        if self.token_env is not None and not isinstance(self.token_env, str):  # kept out of the message
            raise RecipeError("token_env must be the name of a variable (a string), or None", ("token_env",))

    def client(self) -> HubClient:
        """Return a client for these options.

        Raises:
            RecipeError: `token_env` is not the name of a variable, or that variable is not set.
        """
        from nemotron_fp8.hub.client import HubClient

        if self.token_env is not None and not os.environ.get(self.token_env):
            if not _VARIABLE.fullmatch(self.token_env):  # it may be the token itself: keep it out of the message
                raise RecipeError(
                    "token_env (--token-env) is not a name; pass the name of the variable that holds the token"
                )
            raise RecipeError(f"the variable {self.token_env!a} (--token-env) is not set; set it to a token")
        return HubClient(self.token_env, policy=self.retry_policy(), on_wait=self.on_wait)

    def retry_policy(self) -> RetryPolicy:
        """Return the limits of retries."""
        return RetryPolicy(seconds=self.retry_seconds)

    def require_token(self, repo: str) -> None:
        """Check before any work that a token is available, which every write needs.

        Raises:
            OfflineError: ``HF_HUB_OFFLINE`` is set.
            NoTokenError: no token is found.
            RecipeError: the variable `token_env` is not set.
        """
        from huggingface_hub import constants

        from nemotron_fp8.errors.hub import NoTokenError, OfflineError

        if constants.HF_HUB_OFFLINE:
            raise OfflineError(repo, "write to the repository")
        if self.client().token() is None:
            raise NoTokenError(repo)

    def folder(self) -> Path:
        """Return the folder in which runs create their private folders.

        Raises:
            RecipeError: `cache_dir` is not set, and this user has no home folder.
        """
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        from huggingface_hub import constants

        if str(constants.HF_HOME).startswith("~"):  # the system knows no home of this user
            raise RecipeError("there is no home folder; set HF_HOME, or name a folder for transfers (--cache-dir)")
        return Path(constants.HF_HOME) / "nemotron_fp8"


def require_space(repo: str, folder: Path, needed: int) -> None:
    """Check before any transfer that a work folder has enough free space.

    Args:
        repo: the repository, for the message.
        folder: the private folder of the run.
        needed: bytes that must be free.

    Raises:
        LocalDiskError: less is free.
    """
    from nemotron_fp8.errors.hub import LocalDiskError

    needed, free = space_needed_and_free(folder, [needed], small_blocks=0)
    if free < needed:
        problem = f"{needed:,} bytes are needed in {folder.parent}, {free:,} are free, {needed - free:,} are missing"
        raise LocalDiskError(repo, "begin", problem)


def as_hub_options(value: object) -> HubOptions:
    """Return the options that a caller passed; None stands for the defaults.

    Raises:
        RecipeError: the value is not a `HubOptions`.
    """
    if value is None:
        return HubOptions()
    if isinstance(value, HubOptions):
        return value
    raise RecipeError(f"hub is {shortened(value)}; pass HubOptions, for example HubOptions(revision='main')", ("hub",))
