"""The block ``next:`` after a command: commands that may follow, with the names of the call, on stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import plain_path, shell_word, visible
from nemotron_fp8.checkpoint.inventory import CONFIG, load_config
from nemotron_fp8.checkpoint.local_files import read_small
from nemotron_fp8.cli.streams import write_error
from nemotron_fp8.errors import NemotronFp8Error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.conversion.report import Report
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.verification.verify import Verification

HUB = "hf://"


def after_quantize(source: str, destination: str | None, recipe: Recipe, report: Report) -> None:
    """Print what may follow a quantization: verify, serve with the engines that read the result, evaluate.

    Args:
        source: the source, as it was named in the call.
        destination: the result, as it was named in the call; None for a conversion in place.
        recipe: settings of the quantization.
        report: report of the conversion.
    """
    source, result = plain_path(source), plain_path(source if destination is None else destination)
    if report.destination.startswith(HUB):  # with the branch or the pull request
        result = report.destination
    names = [result] if destination is None else [source, result]  # the source of a conversion in place is gone
    steps = [(_command("verify", *names), "")]
    readers = {each.engine: each.note for each in report.engines if each.reads}
    cache = f" --kv-cache-dtype {_cache_dtype(recipe)}" if _cache_dtype(recipe) else ""
    steps += _serving(result, readers, cache)
    if destination is not None and readers:
        steps.append((_command("evaluate", source, result), "what it cost; needs the extra [evaluate]"))
    _print(steps)


def _cache_dtype(recipe: Recipe) -> str:
    """Return the cache that an engine has to be asked for; empty where it follows the config, or has none."""
    return "fp8_e4m3" if recipe.kv_cache == "fp8" and recipe.format == "fp8" else ""


def _serving(result: str, readers: dict[str, str], options: str = "") -> list[tuple[str, str]]:
    """Return the commands that serve a result; none for a place that engines do not load from."""
    if not _loadable(result):
        return []
    name, revision = _name_and_revision(result)
    config = _config_of(result)
    own_code = bool(config.get("auto_map"))  # code that engines run only if told to
    trust = " --trust-remote-code" * own_code
    at = f" --revision {_word(revision)}" * bool(revision)
    steps = []
    if "vLLM" in readers:
        steps.append((f"vllm serve {_word(name)}{at}{options}{trust}", readers["vLLM"]))
    if "SGLang" in readers:
        steps.append(
            (f"python -m sglang.launch_server --model-path {_word(name)}{at}{options}{trust}", readers["SGLang"])
        )
    if "transformers" in readers:
        more = f", revision={revision!r}" * bool(revision) + ", trust_remote_code=True" * own_code
        generates = "ForCausalLM" in str(config.get("architectures", "ForCausalLM"))
        auto = "AutoModelForCausalLM" if generates else "AutoModel"
        steps.append((f"# in Python: {auto}.from_pretrained({name!r}{more})", ""))
    return steps


def after_demo(source: str, result: str) -> None:
    """Print what may follow the demo: the same by one's own hand, figures, another layout."""
    source, result = plain_path(source), plain_path(result)
    _print(
        [
            (_command("plan", source), "the decision for every tensor"),
            (_command("report", result, "--source", source), "sizes, scales, errors"),
            (_command("quantize", source, f"{result}-tensor", "--granularity", "tensor"), "another layout"),
            (_command("help", "quantize"), ""),
        ]
    )


def after_verify(source: str | None, result: str, verification: Verification) -> None:
    """Print what may follow a verification: serve with the engines for which the result is proved, report, evaluate."""
    result = plain_path(result)
    steps = _serving(result, dict.fromkeys(verification.engines, ""))
    if source is not None and verification.tensors:
        source = plain_path(source)
        steps.append((_command("report", result, "--source", source, "--html", "report.html"), "a page"))
        steps.append((_command("evaluate", source, result), "what it cost; needs the extra [evaluate]"))
    _print(steps)


def after_convert(source: str, result: str) -> None:
    """Print what may follow a conversion from NeMo."""
    source, result = plain_path(source), plain_path(result)
    _print([(_command("verify", source, result), ""), (_command("quantize", result, "FP8"), "")])


def after_dequantize(source: str, result: str) -> None:
    """Print what may follow a dequantization."""
    source, result = plain_path(source), plain_path(result)
    steps = _serving(result, dict.fromkeys(("vLLM", "transformers"), ""))
    _print([(_command("verify", source, result), ""), *steps])


def after_evaluate(source: str, results: Sequence[str], html: str | None) -> None:
    """Print what may follow an evaluation: its page, its place in a model card, a comparison of two results."""
    source, results = plain_path(source), [plain_path(each) for each in results]
    steps = []
    if html is None:
        steps.append((_command("evaluate", source, *results, "--html", "page.html"), "a page"))
    one = results[0]
    if _is_local(one):
        again = f"{_command('evaluate', source, *results, '--json')} > evaluation.json"
        steps.append((again, "runs again, for the next line"))
        steps.append((_command("card", one, "--evaluation", "evaluation.json"), "into its model card"))
    if len(results) > 1 and all(map(_is_local, results[:2])):
        steps.append((_command("compare", *results[:2], "--source", source), ""))
    _print(steps)


def after_calibrate(source: str, file: str, amaxes: Amaxes) -> None:
    """Print what may follow a calibration: the quantization that takes its amaxes."""
    cache = ("--kv-cache", "fp8") if amaxes.k else ()
    words = ("quantize", plain_path(source), "DST", "--activations", "static", "--amaxes", plain_path(file), *cache)
    _print([(_command(*words), "")])


def _word(word: str) -> str:
    """Quote a word for a shell, as the terminal can show it."""
    return shell_word(word, sys.stderr.encoding or "utf-8")


def _command(*words: str) -> str:
    return " ".join(["nemotron-fp8", *map(_word, words)])


def _print(steps: Sequence[tuple[str, str]]) -> None:
    """Print commands. They are not wrapped, because people copy them; control characters of names are escaped."""
    if steps:
        lines = [f"  {visible(command)}{f'  # {remark}' if remark else ''}" for command, remark in steps]
        write_error("\n".join(["next:", *lines]) + "\n")


def _is_local(name: str) -> bool:
    return "://" not in name


def _loadable(name: str) -> bool:
    """Return True for a place that engines load from: a folder, or a repository on the Hub."""
    return _is_local(name) or name.startswith(HUB)


def _name_and_revision(result: str) -> tuple[str, str]:
    """Return the name by which engines load a result, and its revision on the Hub; empty for the main branch."""
    if result.startswith(HUB):
        name, _, revision = result.removeprefix(HUB).partition("@")
        return name, revision
    # A folder without a separator could be a repository on the Hub.
    return (result if os.sep in result or Path(result).is_dir() else f".{os.sep}{result}"), ""


def _config_of(result: str) -> dict[str, Any]:
    """Return the config of a local result; empty for another place, or if it cannot be read."""
    if not _is_local(result):
        return {}
    try:
        return load_config(read_small(Path(result) / CONFIG))
    except (NemotronFp8Error, ValueError):  # a null byte in the name
        return {}
