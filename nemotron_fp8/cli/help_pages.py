"""Sections, examples and topics of the help."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND_SECTIONS = {
    "Convert": ("quantize", "plan", "convert", "dequantize", "status"),
    "Check": ("verify", "inspect", "report", "compare"),
    "Measure": ("evaluate", "calibrate", "card"),
    "Learn": ("demo", "help", "completion"),
}
"""Commands by section, in the order of their use."""

_SECTIONS = {
    "Recipe": (
        *("recipe_file", "save_recipe", "granularity", "format", "activations", "scales", "scale_rounding"),
        *("scale_dtype", "kv_cache", "share_scales", "numerics", "nonfinite", "stats", "selection", "select"),
        *("also_select", "force_select", "ignore", "min_share", "dtype"),
    ),
    "Calibration": ("amaxes", "calibrate", "merge", "percentile", "factor"),
    "Sample of text": ("text", "tokens", "sequences", "length"),
    "Result": ("source", "evaluation", "result", "shard_size", "overwrite", "in_place", "no_digests", "base_model"),
    "Run": ("dry_run", "restart", "state_dir", "no_estimate", "evaluate", "real", "keep", "yes"),
    "Resources": ("device", "max_memory", "max_device_memory", "threads", "spill", "cluster"),
    "Hub": ("revision", "token_env", "private", "pull_request", "cache_dir", "retry_seconds"),
    "Output": ("html", "png", "quiet", "verbose", "as_json", "log_json", "metrics", "help"),
}
"""Options by section, in the order of the help."""
OTHER = "Other options"
"""Title of the section of options that are in no other."""
_OF_COMMANDS = {("evaluate", "activations"): "Run", ("card", "remove"): "Result"}
"""Sections of options whose name means something else in another command."""


def sections_of(command: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the options of a command by section, in the order of the help.

    Args:
        command: name of the command.
        names: names of its options.
    """
    found: dict[str, list[str]] = {title: [] for title in (*_SECTIONS, OTHER)}
    for title, known in _SECTIONS.items():
        found[title] += [name for name in known if name in names and _OF_COMMANDS.get((command, name), title) == title]
    for (owner, name), title in _OF_COMMANDS.items():
        if owner == command and name in names:
            found[title].append(name)
    listed = {name for section in found.values() for name in section}
    found[OTHER] += [name for name in names if name not in listed]
    return {title: section for title, section in found.items() if section}


VARIABLES = (
    "Every option has a variable of the environment: NEMOTRON_FP8_MAX_MEMORY=1GiB is --max-memory 1GiB, and"
    " NEMOTRON_FP8_QUANTIZE_MAX_MEMORY is that of quantize alone. nemotron-fp8 help environment lists them."
)

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("create a small checkpoint, quantize and verify it", "nemotron-fp8 demo try"),
        ("the same with a checkpoint of your own", "nemotron-fp8 quantize SRC DST"),
        ("compare the result with its source, byte by byte", "nemotron-fp8 verify SRC DST"),
        ("options and examples of a command", "nemotron-fp8 help quantize"),
    ),
    "quantize": (
        ("a folder; run the same command again to resume", "nemotron-fp8 quantize SRC DST"),
        ("from the Hub to the Hub", "nemotron-fp8 quantize hf://owner/name hf://me/name-FP8"),
        (
            "blocks of 128x128, with the error of every tensor",
            "nemotron-fp8 quantize SRC DST --granularity block --stats",
        ),
        ("what would be done", "nemotron-fp8 quantize SRC DST --dry-run"),
        ("the settings of a file, but for one", "nemotron-fp8 quantize SRC DST --recipe recipe.yaml --ignore o_proj"),
        ("two GPUs, without space for a second copy", "nemotron-fp8 quantize SRC --in-place --device cuda:0,cuda:1"),
        (
            "static scales of activations and of the KV cache",
            "nemotron-fp8 quantize SRC DST --activations static --kv-cache fp8 \\\n    --calibrate text.txt",
        ),
    ),
    "plan": (
        ("every tensor, and memory, disk and time", "nemotron-fp8 plan SRC"),
        ("of a repository: only headers are fetched", "nemotron-fp8 plan hf://owner/name --no-estimate"),
        ("write the recipe to a file", "nemotron-fp8 plan SRC --granularity block --save-recipe recipe.yaml"),
    ),
    "convert": (
        ("a NeMo archive", "nemotron-fp8 convert model.nemo DST"),
        ("shards of 2 GB", "nemotron-fp8 convert NEMO DST --shard-size 2GB"),
    ),
    "dequantize": (
        ("back to bf16", "nemotron-fp8 dequantize SRC DST"),
        ("to fp16", "nemotron-fp8 dequantize SRC DST --dtype float16"),
    ),
    "verify": (
        ("compare a result with its source", "nemotron-fp8 verify SRC DST"),
        ("compare its files with its manifest", "nemotron-fp8 verify DST"),
        ("of the Hub, without storing anything", "nemotron-fp8 verify hf://owner/name hf://me/name-FP8"),
    ),
    "inspect": (
        ("tensors of a folder", "nemotron-fp8 inspect SRC"),
        ("of a repository, as JSON", "nemotron-fp8 inspect hf://owner/name --json"),
    ),
    "report": (
        ("sizes, scales and errors", "nemotron-fp8 report DST --source SRC"),
        ("as a page", "nemotron-fp8 report DST --html report.html"),
    ),
    "compare": (("two results of one source", "nemotron-fp8 compare A B --source SRC --html compare.html"),),
    "evaluate": (
        ("one result or several", "nemotron-fp8 evaluate SRC DST"),
        ("a text of your own, and a page", "nemotron-fp8 evaluate SRC A B --text text.txt --html page.html"),
        ("for card and report", "nemotron-fp8 evaluate SRC DST --json > evaluation.json"),
    ),
    "calibrate": (
        ("measure the amaxes with a text", "nemotron-fp8 calibrate SRC amaxes.json --text text.txt"),
        (
            "use them",
            "nemotron-fp8 quantize SRC DST --activations static --amaxes amaxes.json",
        ),
        ("the amaxes of two texts", "nemotron-fp8 calibrate --merge A.json B.json amaxes.json"),
    ),
    "card": (
        ("write the figures of an evaluation", "nemotron-fp8 card DST --evaluation evaluation.json"),
        ("remove them", "nemotron-fp8 card DST --remove"),
    ),
    "status": (
        ("of a running conversion, or of one that stopped", "nemotron-fp8 status DST"),
        ("for a program", "nemotron-fp8 status DST --json"),
    ),
    "demo": (
        ("keep the files, for the next commands", "nemotron-fp8 demo try"),
        ("a trained model, SmolLM2-135M-Instruct", "nemotron-fp8 demo --real try-real"),
    ),
    "help": (
        ("of a command", "nemotron-fp8 help verify"),
        ("variables of the environment", "nemotron-fp8 help environment"),
    ),
    "completion": (
        ("bash, for this session", 'eval "$(nemotron-fp8 completion bash)"'),
        ("zsh, for every session", "nemotron-fp8 completion zsh >> ~/.zshrc"),
        (
            "fish, for every session",
            "nemotron-fp8 completion fish > ~/.config/fish/completions/nemotron-fp8.fish",
        ),
    ),
}
"""Examples of each command: purpose and command; under the empty name, those of the command without a name."""
