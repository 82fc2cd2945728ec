"""What a caller may say about the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.hub.client import HubClient


_VARIABLE = re.compile(r"(?!hf_)[A-Za-z_][A-Za-z0-9_]*")
"""Names of variables, but for what begins as a token of the Hub does."""


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to read from the Hub and how to write to it.

    Attributes:
        revision: branch, tag, commit or ``refs/pr/N`` of the source, where its address names none.
        private: whether to make a new repository private; one that is public already is refused.
        token_env: environment variable that holds the token; None for the login of ``hf auth login`` or ``HF_TOKEN``.
        pull_request: whether to leave a pull request instead of writing to the branch. It is never merged from here.
        cache_dir: folder for shards on their way; None for ``nemotron_fp8`` in ``HF_HOME``. Each run has a folder of
            its own in it, which is gone at the end.
        told: called before a request is tried again, with the reason and the seconds until then. While a conversion is
            carried out, its progress tells instead.
    """

    revision: str | None = None
    private: bool = False
    token_env: str | None = None
    pull_request: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    on_wait: Callable[[str, float], None] | None = field(default=None, repr=False, compare=False)

    def client(self) -> HubClient:
        """A client for these options.

        Raises:
            RecipeError: the token's variable is not set, or what is given is no name of one.
        """
        from nemotron_fp8.hub.client import HubClient
        from nemotron_fp8.hub.retry import RetryPolicy

        if self.token_env is not None and not os.environ.get(self.token_env):
            if not _VARIABLE.fullmatch(self.token_env):  # it may well be the token itself: not repeated
                raise RecipeError("--token-env takes the name of the variable that holds the token, and this is none")
            raise RecipeError(f"the variable {self.token_env!a} (--token-env) is not set, and should hold a token")
        return HubClient(self.token_env, patience=RetryPolicy(on_wait=self.on_wait))

    def require_token(self, repo: str) -> None:
        """Make sure, before any work is done, that there is something to write to a repository with.

        Raises:
            OfflineError: the client was told to stay off the network.
            NoTokenError: there is no token.
            RecipeError: the token's variable is not set.
        """
        from huggingface_hub import constants

        from nemotron_fp8.errors.hub import NoTokenError, OfflineError

        if constants.HF_HUB_OFFLINE:
            raise OfflineError(repo, "write to the repository")
        if self.client().token() is None:
            raise NoTokenError(repo)

    def folder(self) -> Path:
        """Where the folders of runs are made."""
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        from huggingface_hub import constants

        return Path(constants.HF_HOME) / "nemotron_fp8"
