"""Compare the small files of a result with those that its source gives: copies, statistics, model card, other files.

A manifest alone proves nothing against somebody who can write a new one: every file that an engine or a person reads is
therefore derived from the source again. Patterns in the recipe of a manifest are not run, since a regular expression of
a stranger can run for years; without them the text of the card cannot be derived as a whole, and its commands are
checked instead.
"""

from __future__ import annotations

import math
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8._version import RELEASED, REPOSITORY, __version__
from nemotron_fp8.checkpoint.inventory import AMAXES, CARD, CONFIG, INDEX, MANIFEST, STATS
from nemotron_fp8.checkpoint.json_text import same_json
from nemotron_fp8.checkpoint.local_files import FileDigest
from nemotron_fp8.documents.evaluation_section import is_evaluation_section, split_evaluation
from nemotron_fp8.documents.front_matter import BEGIN, END, split_card
from nemotron_fp8.documents.manifest import render_manifest
from nemotron_fp8.documents.model_card import install_lines, stated_recipe
from nemotron_fp8.documents.render import digests_of, render_documents
from nemotron_fp8.documents.stats_json import parse_figures
from nemotron_fp8.errors import NemotronFp8Error, SourceError, printable
from nemotron_fp8.planning.convert import plan_convert
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.receipt import NOT_RECODED, ShardReceipt
from nemotron_fp8.sources.files import side_file_pieces
from nemotron_fp8.verification.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.documents.model_card import StatedRecipe
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import NonFinite, Recoded, TensorStats
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.verification.recorded import Recorded
    from nemotron_fp8.verification.result_files import ResultFiles


HARMLESS = re.compile(
    r"(?:^|/)(?:\.git(?:/.*|attributes|ignore|keep)?|\.cache/huggingface/.*|\.DS_Store|Thumbs\.db)$"
    r"|\.(?:png|jpe?g|gif|svg|webp|html|pdf|log|csv|tsv)$",
    re.IGNORECASE | re.DOTALL,
)
"""Paths of files that no engine loads: of git and of a download, pictures, pages, tables."""
TOLERANCE = 1e-9
"""Largest relative difference of a figure of the statistics: sums of doubles in another order."""
MAX_COMMAND = 1 << 16
"""Longest command in a card, in characters; splitting takes the square of the length."""
_COMMANDS = (
    re.compile(r"pip install nemotron_fp8==[0-9A-Za-z.+!-]{1,40}"),
    re.compile(r"# nemotron_fp8 [0-9A-Za-z.+!-]{1,40}"),
    re.compile(r"vllm serve PATH"),
    re.compile(r"python -m sglang\.launch_server --model-path PATH"),
)
_INSTALLED = install_lines(__version__, REPOSITORY, released=RELEASED)
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"@([0-9a-f]{40})\b")
_DIGEST = re.compile(rb"^\| ([\w.-]+\.safetensors) \| [0-9,]+ \| `([0-9a-f]{64})` \|$", re.MULTILINE)
_OPTION = re.compile(r"--[a-z-]+")


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts that the comparison of the tensors has shown.

    Attributes:
        quantized: names of the FP8 tensors; empty for a result without FP8.
        stats: quantization error of each FP8 tensor that was compared.
        shards: file name and bytes of the shards of the result.
        sound: True if no difference was found so far.
        recipe: recipe that the config of the result describes.
        plan: plan of a dequantization; None for any other result.
        recoded: FP8 tensors of a quantized source, and the values that changed.
        beside: names of the files that must state the quantization beside config.json.
        amaxes: amaxes of the calibration whose scales the result stores; None without one.
    """

    quantized: frozenset[str]
    stats: tuple[TensorStats, ...]
    shards: Mapping[str, int]
    sound: bool
    recipe: Recipe
    plan: Plan | None = None
    recoded: Recoded = NOT_RECODED
    beside: frozenset[str] = frozenset()
    amaxes: Amaxes | None = None


def check_small_files(
    source: Source, files: ResultFiles, record: Recorded, facts: Facts, budget: int, threads: int
) -> list[Problem]:
    """Compare the small files of a result with those that its source gives; config and index are checked elsewhere.

    Args:
        source: the source.
        files: files of the result.
        record: what the manifest of the result records.
        facts: what the comparison of the tensors has shown.
        budget: bytes that all working buffers together may take.
        threads: files to compare at a time.
    """
    card, unread = _read_card(files)
    if card is not None:
        card, section = split_evaluation(card)
        if section is not None and not is_evaluation_section(section):
            unread.append(Problem(CARD, "its section Evaluation is none that the command card writes"))
    expected = _expect(source, record, facts, card, budget, threads)
    pieces = {side.name: side_file_pieces(source.opener, side) for side in source.inventory.side_files}
    copies = digests_of({}, dict(source.inventory.made), pieces, digests=True)
    problems = [
        Problem(name, f"{what}; in the source it is another file" if what != "missing" else "missing")
        for name, what in files.differing(copies, threads).items()
    ]
    calibrated = {AMAXES} if facts.quantized else set[str]()  # its contents are checked with the stored scales
    problems += _check_names(source, files, {*copies, *facts.shards, *facts.beside, *calibrated})
    problems += _check_record(files, expected)
    problems += _check_statistics(files, expected, facts)
    problems += unread
    if card is not None:
        problems += _check_card(card, expected)
        problems += _check_digests(files, card, expected, threads) if facts.sound else []
    elif not unread and (record.manifest is not None or source.inventory.card is not None):
        # Without a manifest, a folder without a card may have been made by hand.
        problems.append(Problem(CARD, "missing"))
    return problems


def _read_card(files: ResultFiles) -> tuple[bytes | None, list[Problem]]:
    """Return the model card of a result; None and a problem if it cannot be read."""
    if CARD not in files.names():
        return None, []
    try:
        return files.read(CARD), []
    except SourceError as error:
        return None, [Problem(CARD, str(error))]


def _check_names(source: Source, files: ResultFiles, copies: Iterable[str]) -> list[Problem]:
    """Report the files that the source does not give."""
    given = {*copies, CARD, MANIFEST, STATS, *(shard.name for shard in source.inventory.shards)}
    given |= {CONFIG} if source.inventory.config is not None else set()
    given |= {INDEX} if source.inventory.index_metadata is not None else set()
    return [Problem(name, "not a file that the source gives") for name in unexpected(files, given)]


def unexpected(files: ResultFiles, given: set[str]) -> list[str]:
    """Return the paths of a result that are not given and that an engine may load, or that cannot be read.

    Args:
        files: files of the result.
        given: names of the expected files.
    """
    return [path for path in files.paths() if path not in given and not HARMLESS.search(path)]


@dataclass(frozen=True, slots=True)
class _Expected:
    """Plan that the source gives with the recipe of the manifest, as far as it is known.

    Attributes:
        source: the source.
        record: what the manifest records.
        facts: what the comparison of the tensors has shown.
        stated: the recipe that the card states; None without one.
        plan: the plan, without the patterns of the recipe; None if the recipe does not fit the source.
        certain: True if the documents of the result must equal those of the plan.
    """

    source: Source
    record: Recorded
    facts: Facts
    stated: StatedRecipe | None
    plan: Plan | None
    certain: bool

    @property
    def with_stats(self) -> bool | None:
        """True or False if the result must, or must not, have a file of statistics; None if that is not known."""
        if self.record.manifest is not None:
            return self.record.asked.get("stats") is True
        return self.stated.recipe.stats if self.stated is not None else None

    def receipts(self) -> dict[str, ShardReceipt]:
        """Return the receipts of a run that made this result."""
        assert self.plan is not None  # the callers check it
        if self.plan.task:
            return {}
        family = family_of(self.plan.inventory.config)
        left = self.plan.quantized() - self.facts.quantized
        unquantized = frozenset(map(family.fused_module_of, left))
        stats = {each.name: each for each in self.facts.stats} if self.plan.recipe.stats else {}
        files = self.record.manifest.files if self.record.manifest else {}
        found: dict[str, ShardReceipt] = {}
        recoded = self.facts.recoded
        for shard_task in self.plan.shard_tasks:
            tensors = [task.view.name for task in shard_task.tensor_tasks]
            name = shard_task.name
            found[name] = ShardReceipt(
                name,
                self.facts.shards.get(name, 0),
                files[name].sha256 if name in files else None,
                unquantized,
                self._nonfinite([tensor for tensor in tensors if tensor in left]),
                stats=tuple(stats[tensor] for tensor in tensors if tensor in stats),
                recoded=recoded,
            )
            recoded = NOT_RECODED  # the documents state sums only
        return found

    def _nonfinite(self, names: list[str]) -> tuple[NonFinite, ...]:
        """Count NaN and Inf of tensors that are left unquantized."""
        if not names:
            return ()
        from nemotron_fp8.engines.nonfinite import count_all
        from nemotron_fp8.sources.reader import Reader

        assert self.plan is not None
        views = {view.name: view for view in self.plan.inventory.views}
        with Reader(self.source.opener) as reader:
            found = [count_all(views[name], reader) for name in names]
        return tuple(finding for finding in found if finding is not None)


def _expect(source: Source, record: Recorded, facts: Facts, card: bytes | None, budget: int, threads: int) -> _Expected:
    """Plan the conversion again, with the recipe of the manifest; without a manifest, with that of the card."""
    plan, asked, stated = facts.plan, record.asked, stated_recipe(card or b"")
    recipe, known = record.recipe, record.current and not record.has_patterns
    if record.manifest is None and stated is not None and stated.version == __version__:
        recipe, known = stated.recipe, not stated.has_patterns
    if plan is not None and record.manifest is None:
        known = f"Made by nemotron_fp8 {__version__} (".encode() in (card or b"")
    if plan is None:
        with suppress(NemotronFp8Error):  # not a recipe, or one that does not fit this source
            if asked.get("task") == "convert":
                plan = plan_convert(source.inventory, budget, threads)
            elif "task" not in asked:
                plan = make_plan(source.inventory, recipe or facts.recipe, budget, threads, amaxes=facts.amaxes)
    return _Expected(source, record, facts, stated, plan, known and plan is not None)


def _check_record(files: ResultFiles, expected: _Expected) -> list[Problem]:
    """Compare the manifest with the one that the source and its recipe give."""
    record, facts, plan, stated = expected.record, expected.facts, expected.plan, expected.stated
    if record.manifest is None:
        if stated is None or stated.recipe.on_disk == facts.recipe.on_disk:
            return []
        return [Problem(CONFIG, f"its quantization_config is not that of the recipe in {CARD}")]
    if facts.plan is not None and not same_json(dict(facts.plan.task), dict(record.asked)):
        return [Problem(MANIFEST, "does not record the task that made this result")]
    if record.invalid:
        return [Problem(MANIFEST, f"its recipe is none: {record.invalid}")]
    if (
        record.current
        and stated is not None
        and stated.version == __version__
        and not same_json(stated.fields(), dict(record.asked))
    ):
        return [Problem(MANIFEST, f"its recipe is not the one in {CARD}")]
    if record.current and plan is None and not record.has_patterns:
        return [Problem(MANIFEST, "its recipe cannot be carried out on this source")]
    if not expected.certain or plan is None:
        return []
    if not plan.task and plan.recipe.nonfinite == "error" and plan.quantized() != facts.quantized:
        left = sorted(plan.quantized() ^ facts.quantized)
        what = "is unquantized" if left[0] in plan.quantized() else "is FP8"
        return [Problem(left[0], f"{what}, other than by the recipe in {MANIFEST} ({len(left):,} tensors)")]
    if render_manifest(plan, record.manifest.files, record.manifest.has_digests) != files.read(MANIFEST):
        return [Problem(MANIFEST, "its recipe or its source is not that of this result")]
    return []


def _check_statistics(files: ResultFiles, expected: _Expected, facts: Facts) -> list[Problem]:
    """Compare the recorded quantization errors with those that the comparison has measured."""
    if STATS not in files.names():
        return [Problem(STATS, "missing")] if expected.with_stats else []
    if expected.with_stats is False:
        return [Problem(STATS, "not a file that the recipe gives")]
    try:
        figures = parse_figures(files.read(STATS))
    except SourceError as error:
        return [Problem(STATS, str(error))]
    measured = {each.name: each for each in facts.stats}
    recorded = {each.name: each for each in figures.tensors}
    wrong = [name for name in recorded if name not in measured or not _agree(recorded[name], measured[name])]
    wrong += [name for name in measured if name not in recorded]
    problems = [Problem(name, f"its figures in {STATS} are not those of this result") for name in wrong]
    if not wrong and [each.name for each in figures.tensors] != list(measured):
        problems.append(Problem(STATS, "lists the tensors in another order, or one of them twice"))
    if expected.plan is not None and expected.certain:
        known = {finding.tensor: finding for receipt in expected.receipts().values() for finding in receipt.nonfinite}
        if {finding.tensor: finding for finding in figures.nonfinite} != known:
            problems.append(Problem(STATS, "its list of NaN and Inf is not that of the source"))
    return problems


def _agree(one: TensorStats, other: TensorStats) -> bool:
    """Return True if two measurements of a tensor agree."""
    floats = ((one.sqnr_db, other.sqnr_db), (one.max_abs_error, other.max_abs_error))
    return (one.clamped, one.flushed_to_zero) == (other.clamped, other.flushed_to_zero) and all(
        a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=TOLERANCE) for a, b in floats
    )


def _check_card(card: bytes, expected: _Expected) -> list[Problem]:
    """Compare the model card with that of the source and of the plan."""
    if expected.plan is not None:
        expected = _with_origin(expected, card)
        wanted = _rendered(expected, taken=b"`not taken`" not in card)
        if wanted is not None and _plain(card, expected) == _plain(wanted, expected):
            return []
        if wanted is not None and expected.certain:
            return [Problem(CARD, f"not the model card that the source and the recipe give: {_where(card, wanted)}")]
    return _check_card_parts(card, expected)


def _check_digests(files: ResultFiles, card: bytes, expected: _Expected, threads: int) -> list[Problem]:
    """Compare the digests in a card with the shards, if no manifest has them."""
    manifest = expected.record.manifest
    if manifest is not None and manifest.has_digests:
        return []  # the card is compared as a whole
    stated = {name.decode(): digest.decode() for name, digest in _DIGEST.findall(card)}
    wanted = {name: FileDigest(size, stated[name]) for name, size in expected.facts.shards.items() if name in stated}
    different = files.differing(wanted, threads)
    return [Problem(name, f"not the file of the digest in {CARD}: {what}") for name, what in different.items()]


def _rendered(expected: _Expected, *, taken: bool) -> bytes | None:
    """Return the card that the plan gives; None if it cannot be rendered."""
    assert expected.plan is not None
    try:
        receipts = expected.receipts()
        if not taken:
            receipts = {name: replace(receipt, sha256=None) for name, receipt in receipts.items()}
        return render_documents(expected.plan, receipts)[CARD]
    except NemotronFp8Error:
        return None


def _with_origin(expected: _Expected, card: bytes) -> _Expected:
    """Return the same with the name of the source on the Hub, and its commit, that a card states.

    A source may have been fetched from the Hub, or have got its name from the option ``--base-model``.
    """
    assert expected.plan is not None
    plan, text = expected.plan, card.decode("utf-8", "replace")
    named = split_card(card)[0].get("base_model")
    origin, commit = None, _COMMIT.search(text)
    if isinstance(named, str) and _REPO.fullmatch(named) and re.search(rf"\b(?:of|from) {re.escape(named)}\b", text):
        origin = str(named)
    changed = replace(plan.inventory, origin=origin, commit=commit.group(1) if commit and origin else None)
    return replace(expected, plan=replace(plan, inventory=changed))


def _plain(card: bytes, expected: _Expected) -> bytes:
    """Return a card for a comparison: without digests if no manifest records them, and with ends of lines of Unix."""
    manifest = expected.record.manifest
    if manifest is not None and manifest.has_digests:
        return card
    return re.sub(rb"`(?:[0-9a-f]{64}|not taken)`", b"`digest`", card)


def _where(data: bytes, wanted: bytes) -> str:
    """Return which part of a card differs."""
    (front, text), (wanted_front, wanted_text) = split_card(data), split_card(wanted)
    if front != wanted_front:
        keys = sorted(key for key in {*front, *wanted_front} if front.get(key) != wanted_front.get(key))
        return f"its front matter differs in {', '.join(map(printable, keys[:3])) or 'the order of keys'}"
    return "the text of the author differs" if text != wanted_text else "the text between the marks differs"


def _check_card_parts(data: bytes, expected: _Expected) -> list[Problem]:
    """Check the parts of a card that follow from the source alone, and the commands in the rest."""
    front, text = split_card(data)
    theirs, author = split_card(expected.source.inventory.card or dict(expected.source.inventory.made).get(CARD, b""))
    problems = []
    if text.strip() != author.strip():
        problems.append("the text of the author differs")
    own = {"library_name", "tags", "base_model", "base_model_relation", "pipeline_tag"}
    if {k: v for k, v in front.items() if k not in own} != {k: v for k, v in theirs.items() if k not in own}:
        problems.append("its front matter differs from the source's in more than what a conversion changes")
    whole = data.decode("utf-8", "replace")
    block = whole.partition(BEGIN)[2].partition(END)[0]
    if not block or whole.count(BEGIN) != 1:
        problems.append("the text of this library is missing, or is there twice")
    if f"{_INSTALLED[0]}\n" in block and expected.stated is None:
        problems.append("the command between the marks is none of this version")
    if strange := next((line for line in _suspicious(block)), None):
        problems.append(f"the text between the marks has a line that no conversion writes: {printable(strange, 80)}")
    return [Problem(CARD, f"not the model card that the source gives: {problem}") for problem in problems]


def _suspicious(block: str) -> Iterable[str]:
    """Yield the lines of a block that no conversion writes: commands, links, HTML."""
    fenced = False
    for line in block.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            known = line in _INSTALLED or any(form.fullmatch(line) for form in _COMMANDS)
            if not known and not _is_conversion(line):
                yield line
        elif "](" in line or "<" in line or "://" in line.replace("hf://", ""):
            yield line


def _is_conversion(line: str) -> bool:
    """Return True if a line is a command that converts a checkpoint, without anything that a shell would expand."""
    if len(line) > MAX_COMMAND:
        return False
    try:
        words = shlex.split(line)
    except ValueError:
        return False
    if words[:2] != ["nemotron-fp8", "quantize"] or words[3:4] != ["DST"] or shlex.join(words) != line:
        return False
    return all(_OPTION.fullmatch(word) for word in words[4:] if word.startswith("-"))
