"""Serving of a result: commands, and what to know of each engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.planning.engine_support import EngineSupport
    from nemotron_fp8.planning.recipe import Recipe

COMMANDS = {"vLLM": "vllm serve PATH", "SGLang": "python -m sglang.launch_server --model-path PATH"}
"""Command that serves a folder or a repository, by engine."""
OWN_CODE = (
    "The model's own code is in this folder (`auto_map` of config.json). Engines run it only if told to:",
    "`--trust-remote-code`, in transformers `trust_remote_code=True`.",
)


class Serving(NamedTuple):
    """Commands that serve a result, and what to know of each engine.

    Attributes:
        commands: commands that serve it, with ``PATH`` for its folder or repository.
        notes: sentences about engines that do not load it, caveats, and notices.
        own_code: sentences about the model's own code; empty without such code.
    """

    commands: tuple[str, ...]
    notes: tuple[str, ...]
    own_code: tuple[str, ...] = ()


def serving_of(
    engines: Sequence[EngineSupport], recipe: Recipe, notices: Sequence[str] = (), has_own_code: bool = False
) -> Serving:
    """Return how engines serve a result.

    Args:
        engines: engines, and if they read the result.
        recipe: recipe of the result.
        notices: notices about its layout.
        has_own_code: True if its config names Python code of the model.
    """
    commands = tuple(COMMANDS[each.engine] for each in engines if each.reads and each.engine in COMMANDS)
    notes = [f"{each.engine} {each.note or 'does not load this layout'}." for each in engines if not each.reads]
    notes += [f"{each.engine} serves it {each.note}." for each in engines if each.reads and each.note]
    if any(each.reads and not each.knows_family for each in engines):
        notes.append("The family of this model is not known to nemotron_fp8; look up which engines have it.")
    if any(each.engine == "transformers" and each.reads for each in engines):
        notes.append(f"transformers {recipe.layout.readers[recipe.scheme].transformers_note}.")
    notes += [f"{notice[0].upper()}{notice[1:]}." for notice in notices]
    return Serving(commands, tuple(notes), OWN_CODE if has_own_code else ())
