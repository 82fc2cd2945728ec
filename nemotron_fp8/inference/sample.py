"""The sample: sequences of a text, drawn at random and always the same ones, or lists of tokens from a file."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemotron_fp8.errors import SampleError, SourceReadError, excerpt
from nemotron_fp8.inference.sample_record import Sample
from nemotron_fp8.inference.transformers_api import problem_of
from nemotron_fp8.sources.files import side_file_pieces
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    import os

    from nemotron_fp8.inference.transformers_api import Transformers
    from nemotron_fp8.sources.base import Source


DEFAULT_TEXT = "Python language reference"
"""Name of the default text, which comes with every Python (module ``pydoc_data.topics``, PSF license)."""
MAX_TEXT_BYTES = 16 << 20
"""Bytes of a text that are read; more text is not needed, and its tokens would take minutes."""
MAX_TOKENS_BYTES = 256 << 20
MAX_TOKENIZER_BYTES = 256 << 20
"""Size cap of a file of a tokenizer."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "tiktoken.model", "qwen.tiktoken"),
)
SEED = 0
EXCERPT_TOKENS, EXCERPT_CHARACTERS = 24, 80


class Drawn(NamedTuple):
    """A sample and its tokens.

    Attributes:
        sample: description of the sample.
        ids: int64 ``[sequences, length]``.
    """

    sample: Sample
    ids: torch.Tensor


def draw_text(
    source: Source,
    api: Transformers,
    folder: Path,
    text: str | os.PathLike[str] | None,
    sequences: int,
    length: int,
) -> Drawn:
    """Draw sequences of a text.

    The text is divided into sequences of equal length, of which some are drawn at random: neighboring sequences are
    alike, and would make the errors look smaller than they are. The draw is the same in every call. Each sequence
    begins with the token that the tokenizer puts before a text, if it does.

    Args:
        source: the checkpoint, with its tokenizer.
        api: functions of transformers.
        folder: an empty folder, for the files of the tokenizer.
        text: a file, UTF-8; None for the language reference of Python.
        sequences: number of sequences; all of a shorter text.
        length: tokens of a sequence.

    Raises:
        SampleError: the text is unusable or too short, or the source has no tokenizer that transformers reads.
    """
    name, content = _read_text(text)
    tokenizer = _tokenizer(source, api, folder)
    label = source.label
    try:
        with api.quiet():
            tokens: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
            probe: list[int] = tokenizer("a")["input_ids"]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # of any class: the files are a stranger's, and a panic of Rust is no Exception
        problem = problem_of(error, str(folder))
        raise SampleError(label, f"its tokenizer cannot encode the text ({problem}); pass tokens (--tokens)") from error
    begin = [probe[0]] if len(probe) > 1 and probe[0] == tokenizer.bos_token_id else []
    step = length - len(begin)
    available = len(tokens) // step if step > 0 else 0
    if not available:
        raise SampleError(
            name,
            f"{len(tokens):,} tokens are fewer than one sequence of {length:,}; pass a longer text, or a smaller"
            " length (--length)",
        )
    chosen = _choose(available, sequences)
    rows = [begin + tokens[number * step : (number + 1) * step] for number in chosen]
    excerpts = tuple(_excerpt(tokenizer, row[len(begin) : len(begin) + EXCERPT_TOKENS]) for row in rows)
    sample = Sample(name, _digest(content.encode()), len(rows), available, length, tuple(chosen), excerpts)
    return Drawn(sample, torch.tensor(rows, dtype=torch.int64))


def read_tokens(file: str | os.PathLike[str], sequences: int | None, length: int | None) -> Drawn:
    """Read sequences of tokens: JSON, a list of equally long lists of ids.

    Args:
        file: the file.
        sequences: number of lists that are drawn, as `draw_text` draws; None for all.
        length: tokens of each list that are taken; None for all.

    Raises:
        SampleError: the file is no such list, or its lists are too short.
    """
    path = Path(file)
    data = _read(path, MAX_TOKENS_BYTES, "tokens")
    # The strict parser reads objects; a list is the value of one.
    found = strict_json.load_object(
        b'{"":' + data + b"}", str(path), SampleError, max_bytes=MAX_TOKENS_BYTES + 8, max_values=40_000_000
    )
    lists: Any = found.get("")
    if len(found) != 1 or not isinstance(lists, list) or not lists or not all(isinstance(row, list) for row in lists):
        raise SampleError(str(path), "not a list of lists of token ids, like [[1, 2, 3], [4, 5, 6]]")
    sizes = {len(row) for row in lists}
    if len(sizes) > 1:
        raise SampleError(
            str(path), f"its lists have {min(sizes):,} to {max(sizes):,} tokens; all need the same number"
        )
    size = sizes.pop()
    taken = size if length is None else length
    if taken > size or taken < 2:
        raise SampleError(str(path), f"its lists have {size:,} tokens, and a sequence needs {max(taken, 2):,}")
    wrong = [value for row in lists for value in row if type(value) is not int or not 0 <= value < 1 << 31]
    if wrong:
        raise SampleError(str(path), f"{excerpt(wrong[0])} is no token id")
    chosen = _choose(len(lists), len(lists) if sequences is None else sequences)
    rows = [lists[number][:taken] for number in chosen]
    sample = Sample(path.name, _digest(data), len(rows), len(lists), taken, tuple(chosen))
    return Drawn(sample, torch.tensor(rows, dtype=torch.int64))


def check_ids(drawn: Drawn, vocabulary: int) -> None:
    """Raise SampleError if a token is outside of the vocabulary."""
    largest = int(drawn.ids.max())
    if largest >= vocabulary:
        raise SampleError(
            drawn.sample.name, f"token id {largest:,} is outside of the model's vocabulary of {vocabulary:,} words"
        )


def _choose(available: int, wanted: int) -> list[int]:
    """Return the numbers of sequences, increasing."""
    return sorted(random.Random(SEED).sample(range(available), min(wanted, available)))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _excerpt(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(str(tokenizer.decode(ids)).split())[:EXCERPT_CHARACTERS]


def _read(path: Path, most: int, what: str) -> bytes:
    try:
        return read_start(path, most)
    except SourceReadError as error:
        raise SampleError(str(path), f"cannot be read: {error.problem}; pass a file of {what}") from error


def _read_text(text: str | os.PathLike[str] | None) -> tuple[str, str]:
    """Return name and content of a text."""
    if text is None:
        from pydoc_data import topics

        return DEFAULT_TEXT, "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    path = Path(text)
    data = _read(path, MAX_TEXT_BYTES, "text")
    try:
        # The cut may be in the middle of a character.
        return path.name, data.decode("utf-8", "strict" if len(data) < MAX_TEXT_BYTES else "ignore")
    except UnicodeDecodeError as error:
        raise SampleError(str(path), f"not UTF-8 at byte {error.start:,}; pass a text file") from error


def _tokenizer(source: Source, api: Transformers, folder: Path) -> Any:
    """Return the tokenizer of a checkpoint, read from copies of its files, without code of the checkpoint."""
    sides = {side.name: side for side in source.inventory.side_files if side.name in TOKENIZER_FILES}
    made = {name: data for name, data in source.inventory.made if name in TOKENIZER_FILES}
    label = source.label
    if not sides and not made:
        raise SampleError(label, "has no files of a tokenizer; pass tokens (--tokens)")
    for name, side in sides.items():
        if side.size > MAX_TOKENIZER_BYTES:
            raise SampleError(label, f"{name} has {side.size:,} bytes; pass tokens (--tokens)")
        made.setdefault(name, b"".join(side_file_pieces(source.opener, side)()))
    for name, data in made.items():
        (folder / name).write_bytes(_without_code(data, label) if name == TOKENIZER_CONFIG else data)
    try:
        with api.quiet():
            return api.package.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # as above
        problem = problem_of(error, str(folder))
        raise SampleError(
            label, f"transformers {api.version} cannot read its tokenizer ({problem}); pass tokens (--tokens)"
        ) from error


def _without_code(data: bytes, label: str) -> bytes:
    """Return the config of a tokenizer without the names of code in the checkpoint."""
    found = strict_json.load_object(data, f"{label}: {TOKENIZER_CONFIG}", SampleError)
    return json.dumps({key: value for key, value in found.items() if key != "auto_map"}).encode()
