"""The model card of a result: front matter for the Hub, recipe, engines, errors, digests.

Two runs on the same source with the same recipe write the same card: it contains no times, paths or host names. Source
of the keys and values of the front matter: "Model Cards" in the Hub's documentation.
"""

from __future__ import annotations

import math
import re
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._utils import code, format_bytes
from nemotron_fp8._version import RELEASED, REPOSITORY, __version__
from nemotron_fp8.checkpoint.inventory import AMAXES, CARD, MANIFEST, STATS
from nemotron_fp8.documents.expected_error import CLAMPED, expected_text
from nemotron_fp8.documents.front_matter import BEGIN, END, split_card
from nemotron_fp8.documents.manifest import NO_DIGEST
from nemotron_fp8.documents.serving import serving_of
from nemotron_fp8.documents.stats_json import Figures, figures_of
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.kv_cache import has_cache_scales
from nemotron_fp8.planning.layouts import layouts
from nemotron_fp8.planning.linear_share import NAMES_SHOWN, percent
from nemotron_fp8.planning.quantize import recipe_notices
from nemotron_fp8.planning.receipt import Recoded, recoded_of
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.yaml_text import dump_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.linear_share import LinearShare
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt
    from nemotron_fp8.planning.tasks import ShardTask


OURS = ("fp8", "nemotron_fp8", "vllm", "sglang")
"""Tags that this library adds, beside those of the layout; they are removed from the card of a result without FP8."""
WORST = 5
"""Number of tensors in the table of the largest errors."""


def render_card(plan: Plan, receipts: Mapping[str, ShardReceipt], bytes_out: int) -> bytes:
    """Return README.md of a result.

    Args:
        plan: plan of the conversion.
        receipts: receipts of the shards, by name; a shard without a receipt counts as planned.
        bytes_out: bytes of all tensors of the result.
    """
    metadata, text = split_card(plan.inventory.card or dict(plan.inventory.made).get(CARD, b""))
    if plan.task:
        metadata = plain_metadata(metadata, plan)
        block = _task_block(plan)
    else:
        unquantized = frozenset().union(*(receipt.unquantized for receipt in receipts.values()))
        metadata = fp8_metadata(metadata, plan)
        block = _quantized_block(plan, receipts, unquantized, bytes_out)
    front = "---\n" + dump_mapping(metadata) + "---\n" if metadata else ""
    card = f"{front}{BEGIN}\n{block}\n{END}\n"
    if text.strip():
        card += f"\n{text}"
    # Replace bytes of the author's text that are not UTF-8: the Hub rejects a card with such a byte.
    return card.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()


def fp8_metadata(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the front matter of an FP8 result: the source's, with updated base model, library, task and tags.

    License (with its name and link), languages, data sets and all other keys are unchanged.
    """
    metadata, layout = dict(source), plan.recipe.layout
    reads = {each.engine.lower(): each.reads for each in plan.engines}
    if plan.inventory.origin:
        metadata["base_model"] = plan.inventory.origin
    if metadata.get("base_model"):
        metadata["base_model_relation"] = "quantized"
    # The Hub shows how to load a model with its library: never name a library that loads the result incorrectly.
    if not reads["transformers"] or "library_name" not in metadata:
        library = next((library for library in ("transformers", "vllm", "sglang") if reads[library]), None)
        if library is None:
            metadata.pop("library_name", None)
        else:
            metadata["library_name"] = library
    _name_task(metadata, plan)
    tags = _tags(metadata)
    own = ["fp8", "nemotron_fp8", *(library for library in ("vllm", "sglang") if reads[library])]
    own += layout.tags
    metadata["tags"] = [*tags, *(tag for tag in own if tag not in tags)]
    return metadata


def _name_task(metadata: dict[str, Any], plan: Plan) -> None:
    """Add the task of the model, if the config shows it and the card has none."""
    architectures = (plan.inventory.config or {}).get("architectures")
    if "pipeline_tag" not in metadata and str(architectures).find("ForCausalLM") >= 0:
        metadata["pipeline_tag"] = "text-generation"


def plain_metadata(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the front matter of a result without FP8: the source's, without the marks of quantization."""
    metadata = dict(source)
    if plan.inventory.origin:
        metadata["base_model"] = plan.inventory.origin
    metadata.pop("base_model_relation", None)
    if metadata.get("library_name", "vllm") == "vllm":
        metadata["library_name"] = "transformers"
    _name_task(metadata, plan)
    ours = {*OURS, *(tag for layout in layouts() for tag in layout.tags)}
    tags = [tag for tag in _tags(metadata) if tag not in ours]
    return {key: tags if key == "tags" else value for key, value in metadata.items() if key != "tags" or tags}


def _tags(metadata: Mapping[str, Any]) -> list[str]:
    tags = metadata.get("tags") or []
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags])]


def name_of(plan: Plan) -> str:
    """Return the name of the source in a card: its name on the Hub, or its architecture; never a path."""
    if plan.inventory.origin:
        return plan.inventory.origin
    architectures = (plan.inventory.config or {}).get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return f"a {code(first)} checkpoint" if isinstance(first, str) else "a checkpoint"


def command_of(plan: Plan) -> str:
    """Return the command that reproduces the result."""
    source = f"hf://{plan.inventory.origin}" if plan.inventory.origin else "SRC"
    if plan.inventory.origin and plan.inventory.commit:
        source += f"@{plan.inventory.commit}"
    amaxes = [f"{AMAXES_OPTION} {AMAXES}"] if plan.amaxes is not None else []
    return " ".join(["nemotron-fp8 quantize", shlex.quote(source), "DST", *recipe_options(plan.recipe), *amaxes])


def install_lines(version: str, repository: str, *, released: bool) -> list[str]:
    """Return the lines of a card that install this library: never the number of a version that nobody has published.

    Whoever registers such a name on a package index would run code on the machines of a card's readers.

    Args:
        version: version of this library.
        repository: address of its public repository, or nothing.
        released: True if the version can be installed by its number.
    """
    if released:
        return [f"pip install nemotron_fp8=={version}"]
    if not repository:
        return [f"# nemotron_fp8 {version}"]
    source = f"git+{repository}"
    return [
        f"# nemotron_fp8 {version}, from its repository:",
        f"pip install '{source}#subdirectory=kernels' '{source}'",
    ]


def recipe_options(recipe: Recipe) -> list[str]:
    """Return the command-line options of a recipe, without those at their defaults."""
    words: list[str] = []
    given = recipe.model_dump()
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        option = "--" + name.replace("_", "-")
        if _is_implied(name, value, field.default, given):
            del given[name]
            continue
        if isinstance(value, bool):
            words.append(option)
        elif isinstance(value, tuple):
            words += [f"{option} {shlex.quote(pattern)}" for pattern in value]
        else:
            words.append(f"{option} {value}")
    return words


class StatedRecipe(NamedTuple):
    """Recipe that the command in a card states.

    Attributes:
        version: version of the library that wrote the card.
        recipe: the recipe without its patterns.
        patterns: fields of the recipe that hold patterns, or depend on them, as they are stated.
    """

    version: str
    recipe: Recipe
    patterns: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """Return all fields, as a manifest records them."""
        return {**self.recipe.model_dump(mode="json"), **self.patterns}

    @property
    def has_patterns(self) -> bool:
        """True if a pattern is stated."""
        return any(self.patterns.values())


_MADE_BY = re.compile(
    r"^(?:pip install nemotron_fp8==|# nemotron_fp8 )([0-9A-Za-z.+!-]{1,40})"
    r"(?:, from its repository:\npip install .{1,400})?\n(nemotron-fp8 quantize .{1,65536})$",
    re.MULTILINE,
)
AMAXES_OPTION = "--amaxes"
"""Option for the file of amaxes. The file of a result is beside its card."""
PATTERN_FIELDS = ("select", "also_select", "force_select", "ignore")
"""Fields of a recipe that hold patterns, or need them. Patterns in a card are a stranger's, and not compiled."""


def stated_recipe(card: bytes) -> StatedRecipe | None:
    """Return the recipe that the text of this library in a card states; None if there is none.

    This is the inverse of `command_of`.
    """
    text = card.decode("utf-8", "replace")
    found = _MADE_BY.search(text[text.find(BEGIN) :][: text.find(END)]) if BEGIN in text and END in text else None
    if found is None:
        return None
    with suppress(_UnstatedError), guarded(_UnstatedError):
        return _parse_command(*found.groups())
    return None


class _UnstatedError(Exception):
    """A command states no recipe of this version."""


def _parse_command(version: str, command: str) -> StatedRecipe:
    fields: dict[str, Any] = {}
    patterns: dict[str, Any] = {name: False if name == "force_select" else [] for name in PATTERN_FIELDS}
    words = iter(shlex.split(command)[4:])
    for word in words:
        if word == AMAXES_OPTION:
            next(words)
            continue
        name = word.removeprefix("--").replace("-", "_")
        default = Recipe.model_fields[name].default
        if isinstance(default, bool):
            (patterns if name in patterns else fields)[name] = True
        elif name in patterns:
            patterns[name].append(next(words))
        else:
            fields[name] = next(words)
    try:
        return StatedRecipe(version, Recipe(**fields), patterns)
    except RecipeError as error:
        raise _UnstatedError from error


def _is_implied(name: str, value: object, default: object, given: Mapping[str, Any]) -> bool:
    """Return True if the other fields imply the value of a field."""
    if name not in ("format", "granularity", "scale_rounding", "scale_dtype"):
        return value == default
    try:
        implied: object = getattr(Recipe(**{key: given[key] for key in given if key != name}), name)
    except RecipeError:
        return False
    return implied == value


def _quantized_block(
    plan: Plan, receipts: Mapping[str, ShardReceipt], unquantized: frozenset[str], bytes_out: int
) -> str:
    quantized = len(plan.quantized(unquantized))
    recipe, numbers = plan.recipe, plan.recipe.weight_format.numbers
    lines = [
        f"# FP8 of {name_of(plan)}",
        "",
        f"{quantized:,} of {len(plan.tensors):,} tensors are {numbers.element.title} with one"
        f" {numbers.scale.title} scale for each {numbers.coverage.title}; {_others(plan)}"
        f" {format_bytes(plan.bytes_in)} of tensors became {format_bytes(bytes_out)}.",
        "",
        *_recoding(plan, receipts),
        *_recipe_table(recipe),
        "",
        *_calibration(plan.amaxes),
        *_coverage(plan.share_without(unquantized)),
        *_serving(plan),
        "## Reproduction",
        "",
        "```sh",
        *install_lines(__version__, REPOSITORY, released=RELEASED),
        command_of(plan),
        "```",
        "",
        f"The same source and options produce the same bytes. `{MANIFEST}` holds the recipe and the SHA-256 of every"
        " file; `nemotron-fp8 verify PATH` checks the files, and `nemotron-fp8 verify SRC PATH` compares every weight"
        " with its source.",
        "",
    ]
    figures = figures_of(receipts)
    lines += _figures(figures) if recipe.stats and figures.tensors else []
    lines += _nonfinite(figures.nonfinite)
    return "\n".join([*lines, *_digests(plan.shard_tasks, receipts)])


def _others(plan: Plan) -> str:
    """Return what happened to the tensors that are not FP8."""
    tasks = [task for shard_task in plan.shard_tasks for task in shard_task.tensor_tasks]
    dequantized = sum(task.decode is not None for task in tasks)
    others = "the others are copied byte for byte from the source."
    if len(tasks) < len(plan.tensors):
        others = "scales of activations are dropped, the others are copied byte for byte from the source."
    return f"{dequantized:,} are dequantized, {others}" if dequantized else others


def _recoding(plan: Plan, receipts: Mapping[str, ShardReceipt]) -> list[str]:
    """Render what happened to the FP8 tensors of a quantized source; as planned without receipts."""
    tasks = [task for shard_task in plan.shard_tasks for task in shard_task.tensor_tasks if task.group is not None]
    encoded = [task for task in tasks if task.view.encoding is not None]
    if not encoded:
        return []
    kept = sum(task.carry for task in encoded)
    recoded = recoded_of(receipts.values()) if receipts else Recoded(kept, 0, len(encoded) - kept)
    return [f"The source is quantized itself: {recoded.sentence}.", ""]


def _calibration(amaxes: Amaxes | None) -> list[str]:
    """Render where the stored scales come from; nothing for a result without them."""
    if amaxes is None:
        return []
    runs = [
        f"{run.tokens:,} tokens of `{code(run.text)}` (SHA-256 `{run.sha256[:16]}...`) in `{code(run.source)}`"
        for run in amaxes.runs
    ]
    what = "largest values" if amaxes.percentile is None else f"values at the percentile {amaxes.percentile:g}"
    more = "" if amaxes.factor == 1 else f", times {amaxes.factor:g}"
    return [f"Stored scales come from the {what}{more} of a calibration: {'; '.join(runs)}; `{AMAXES}` has all.", ""]


def _recipe_table(recipe: Recipe) -> list[str]:
    """Render the fields of a recipe, without flags that are off and empty lists."""
    rows = [
        f"| {name} | {_setting(getattr(recipe, name))} | {field.description} |"
        for name, field in Recipe.model_fields.items()
        if getattr(recipe, name)
    ]
    return ["| recipe | | |", "|---|---|---|", *rows]


def _setting(value: str | bool | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "on"
    return ", ".join(f"`{code(text)}`" for text in ((value,) if isinstance(value, str) else value))


def _coverage(share: LinearShare) -> list[str]:
    """Render the share of the linear weights that is FP8, and what is left."""
    if share.share is None:
        return []
    lines = ["## Weights", "", f"{percent(share.share)} of the bytes of the decoder's linear weights are FP8.", ""]
    if share.left:
        lines += ["| unquantized | bytes | why |", "|---|---:|---|"]
        lines += [
            f"| {', '.join(f'`{code(name)}`' for name in left.names[:NAMES_SHOWN])}"
            f"{f' and {len(left.names) - NAMES_SHOWN} more' if len(left.names) > NAMES_SHOWN else ''} |"
            f" {left.bytes:,} | {code(left.reason)} |"
            for left in share.left
        ]
        lines.append("")
    return lines


def _serving(plan: Plan) -> list[str]:
    config = plan.inventory.config
    has_own_code = isinstance(config, dict) and bool(config.get("auto_map"))
    serving = serving_of(plan.engines, plan.recipe, _notices(plan), has_own_code)
    lines = ["## Serving", ""]
    if serving.commands:
        lines += ["With `PATH` for this folder or repository:", "", "```sh", *serving.commands, "```", ""]
    lines += serving.notes
    if serving.own_code:
        lines += ["", *serving.own_code]
    return [*lines, ""]


def _notices(plan: Plan) -> tuple[str, ...]:
    calibrated = plan.amaxes is not None or has_cache_scales(tensor.name for tensor in plan.tensors)
    return recipe_notices(plan.recipe, plan.inventory.config, calibrated)


def _figures(figures: Figures) -> list[str]:
    clamped = sum(t.clamped for t in figures.tensors)
    flushed = sum(t.flushed_to_zero for t in figures.tensors)
    lines = ["## Quantization error", ""]
    if figures.typical is not None:
        lines += [f"Signal-to-quantization-noise ratio of the weights: {figures.typical:.2f} dB in the median tensor."]
        lines += [expected_text(figures), ""]
    lines += [
        f"{clamped:,} values were clamped to the largest FP8 number, {flushed:,} values other than 0 became 0."
        f"{f' {CLAMPED}' if clamped else ''} `{STATS}` lists every tensor.",
        "",
        "| the worst tensors | SQNR (dB) | largest error | clamped | became 0 |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{code(t.name)}` | {_number(t.sqnr_db, '.2f')} | {_number(t.max_abs_error, '.3g')} | {t.clamped:,} |"
        f" {t.flushed_to_zero:,} |"
        for t in figures.worst(WORST)
    ]
    return [*lines, ""]


def _number(value: float, form: str) -> str:
    if math.isinf(value) and value > 0:
        return "exact"
    return format(value, form) if math.isfinite(value) else "none"


def _nonfinite(found: tuple[NonFinite, ...]) -> list[str]:
    if not found:
        return []
    lines = [
        "## NaN and Inf in the source",
        "",
        "These weights, and the weights that engines fuse with them, are not FP8:",
        "",
    ]
    lines += [
        f"* `{code(f.tensor)}`: {f.count:,} values, the first ({f.value}) at [{', '.join(map(str, f.position))}]"
        for f in found
    ]
    return [*lines, ""]


def _digests(shard_tasks: tuple[ShardTask, ...], receipts: Mapping[str, ShardReceipt]) -> list[str]:
    lines = ["## Files", "", "| file | bytes | SHA-256 |", "|---|---:|---|"]
    for shard_task in shard_tasks:
        receipt = receipts.get(shard_task.name)
        size = receipt.size if receipt else shard_task.layout.file_size
        digest = (receipt.sha256 or "not taken") if receipt else NO_DIGEST
        lines.append(f"| {code(shard_task.name)} | {size:,} | `{digest}` |")
    return lines


def _task_block(plan: Plan) -> str:
    """Return the text of the card of a result without FP8."""
    asked = dict(plan.task)
    what = ", ".join(f"{key} {value}" for key, value in asked.items())
    if asked.get("task") == "dequantize":
        text = f"FP8 weights of {name_of(plan)} were multiplied by their scales and rounded to {asked.get('dtype')}."
    else:
        text = f"Made from {name_of(plan)}; every tensor keeps its dtype."
    return f"{text} Made by nemotron_fp8 {__version__} ({what}); `{MANIFEST}` holds the SHA-256 of every file."
