"""Validation of a card's front matter by the Hub, before a job does any work.

The client validates it again with the last commit, hours later, where a rejection would waste the work. Source:
huggingface_hub, ``HfApi.create_commit`` and ``RepoCard.validate`` (``POST /api/validate-yaml``).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8.documents.front_matter import front_matter
from nemotron_fp8.errors.hub import CardRefusedError, HubError
from nemotron_fp8.hub.answers import CardFaults, parse
from nemotron_fp8.hub.failures import mask_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.hub.client import HubClient


SECONDS = 15.0
"""Maximal wait for the response. Without a response the job begins anyway."""


def refuse_front_matter(client: HubClient, repo: str, card: bytes) -> None:
    """Ask the Hub once to validate a card's front matter.

    Args:
        client: the client.
        repo: the destination, for the message.
        card: README.md; only its front matter is sent, and no request is made without one.

    Raises:
        CardRefusedError: the Hub rejects the front matter.
    """
    text = card.decode("utf-8", "replace")
    found = front_matter(text)
    if found is None:
        return
    front = text[: found[1]]

    def attempt(_progressed: Callable[[], None]) -> str:
        return _fault_of(client, front)

    once = client.with_options(policy=replace(client.policy, seconds=0.0))
    fault = ""
    with suppress(HubError):  # no verdict: the last commit validates again
        fault = once.retry(client.context(repo, "check the front matter of README.md"), attempt)
    if fault:
        raise CardRefusedError(repo, fault)


def _fault_of(client: HubClient, front: str) -> str:
    """Return the faults that the Hub finds, in one line; empty if it finds none."""
    from huggingface_hub import hf_raise_for_status

    value = {"content": front, "repoType": "model"}
    answer = client.post_json("/api/validate-yaml", value, min(client.timeout, SECONDS))
    if answer.status_code != 400:
        hf_raise_for_status(answer)
        return ""
    found = parse(CardFaults, answer.content)
    return mask_tokens(" ".join(fault.message for fault in found.errors), client.token())
