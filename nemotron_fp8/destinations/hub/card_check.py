"""What the Hub says of a card's front matter, asked before a job does any work.

The client asks the same as the last commit is made, and a refusal would come after hours then. Source:
huggingface_hub, ``HfApi.create_commit`` and ``RepoCard.validate`` (``POST /api/validate-yaml``).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8.documents.model_card import FRONT_MATTER
from nemotron_fp8.errors.hub import CardRefusedError, HubError
from nemotron_fp8.hub.failures import ConflictError, RefusedError, UnexpectedResponseError, without_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.hub.client import HubClient


SECONDS = 15.0
"""How long to wait for the answer. Without one the job begins all the same."""


def refuse_front_matter(client: HubClient, repo: str, card: bytes) -> None:
    """Make sure that the Hub takes a card's front matter, as far as it says so at the first try.

    Args:
        client: the client.
        repo: the destination, for the message.
        card: README.md; nothing but its front matter is sent, and nothing at all where it has none.

    Raises:
        CardRefusedError: the Hub finds fault with it.
    """
    found = FRONT_MATTER.match(card.decode("utf-8", "replace"))
    if found is None:
        return
    front = found.group()

    def attempt(_progressed: Callable[[], None]) -> str:
        return _fault_of(client, front)

    impatient = replace(client.patience, seconds=0.0, on_wait=None)
    fault = ""
    with suppress(HubError, ConflictError, RefusedError):  # no verdict: the last commit asks again
        fault = impatient.run(client.context(repo, "check the front matter of README.md"), attempt)
    if fault:
        raise CardRefusedError(repo, fault)


def _fault_of(client: HubClient, front: str) -> str:
    """The faults that the Hub finds, in one line; empty where it finds none."""
    from huggingface_hub import hf_raise_for_status

    answer = client.session().post(
        f"{client.base()}/api/validate-yaml",
        json={"content": front, "repoType": "model"},
        headers=client.headers(),
        follow_redirects=False,
        timeout=min(client.timeout, SECONDS),
    )
    if answer.status_code != 400:
        hf_raise_for_status(answer)
        return ""
    try:
        messages = [str(fault["message"]) for fault in answer.json()["errors"]]
    except (ValueError, TypeError, LookupError) as error:
        raise UnexpectedResponseError("an answer that is not the Hub's") from error
    return without_token(" ".join(messages))
