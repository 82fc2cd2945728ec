"""Derive the small files of a transformers tokenizer from a SentencePiece model.

Source of the format: ``sentencepiece_model.proto`` of SentencePiece. Source of the chat format: the model card of
Nemotron-4-340B-Instruct (``PROMPT_TEMPLATE``, ``add_BOS=False``, answers end with ``<extra_id_1>``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.errors.nemo import MalformedTokenizerError
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator


RESULT = "tokenizer.model"
"""Name of the tokenizer model that transformers expects."""
CONFIG = "tokenizer_config.json"
MAX_BYTES = 64 << 20
CHAT_TEMPLATE = (
    "{{ '<extra_id_0>System\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}"
    "{% if turn['role'] == 'user' %}{{ '\\n<extra_id_1>User\\n' + turn['content'] }}"
    "{% elif turn['role'] == 'assistant' %}{{ '\\n<extra_id_1>Assistant\\n' + turn['content'] }}"
    "{% else %}{{ raise_exception('roles must be system (first only), user or assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<extra_id_1>Assistant\\n' }}{% else %}{{ '\\n' }}{% endif %}"
)
"""Chat template: turns of ``<extra_id_0>System``, ``<extra_id_1>User`` and ``<extra_id_1>Assistant``, each on a
line of its own. Without a system message, the line after ``System`` is empty, as on the card.
"""
MARKERS = ("<extra_id_0>", "<extra_id_1>")

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _KIND = 1, 3
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_DUMMY_PREFIX, _REMOVE_SPACES = 3, 4
_MODEL_TYPE, _UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 3, 40, 41, 42, 43
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """Properties of a SentencePiece model.

    Attributes:
        kind: ``unigram``, ``bpe``, ``word`` or ``char``.
        pieces: number of pieces.
        special: control and user-defined pieces, by id: (text, True for a control piece).
        unk, bos, eos, pad: ids; None if the model has no such token.
        texts: text of those four, by id.
        reshapes: True if the model adds a space before a text or removes superfluous spaces.
    """

    kind: str
    pieces: int
    special: dict[int, tuple[str, bool]]
    unk: int | None
    bos: int | None
    eos: int | None
    pad: int | None
    texts: dict[int, str]
    reshapes: bool


def read_model(data: bytes, file: str) -> SentencePiece:
    """Read a SentencePiece model.

    Raises:
        MalformedTokenizerError: the data is not a SentencePiece model.
    """
    if len(data) > MAX_BYTES:
        raise MalformedTokenizerError(file, f"the file has more than {MAX_BYTES:,} bytes, the limit")
    with guarded(lambda _: MalformedTokenizerError(file, "not a SentencePiece model, or truncated; fetch it again")):
        return _read(data)


def _read(data: bytes) -> SentencePiece:
    texts: list[str] = []
    special: dict[int, tuple[str, bool]] = {}
    ids: dict[int, int] = {_UNK_ID: 0, _BOS_ID: 1, _EOS_ID: 2, _PAD_ID: -1}
    kind, normalizer = 1, {_DUMMY_PREFIX: 1, _REMOVE_SPACES: 1}
    for number, value in _fields(data):
        if number == _PIECE:
            piece = dict(_fields(_bytes(value)))
            text, piece_kind = _bytes(piece[_TEXT]).decode("utf-8"), piece.get(_KIND, 1)
            if piece_kind in (_CONTROL, _USER_DEFINED):
                special[len(texts)] = (text, piece_kind == _CONTROL)
            texts.append(text)
        elif number == _TRAINER:
            for key, setting in _fields(_bytes(value)):
                if key == _MODEL_TYPE:
                    kind = int(setting)
                elif key in ids:
                    ids[key] = int(setting) - (1 << 64 if int(setting) >> 63 else 0)
        elif number == _NORMALIZER:
            normalizer |= {
                key: int(setting) for key, setting in _fields(_bytes(value)) if key in (_DUMMY_PREFIX, _REMOVE_SPACES)
            }
    if not texts:
        raise ValueError
    known = {key: at if 0 <= at < len(texts) else None for key, at in ids.items()}
    return SentencePiece(
        kind=_MODEL_TYPES.get(kind, "unknown"),
        pieces=len(texts),
        special=special,
        unk=known[_UNK_ID],
        bos=known[_BOS_ID],
        eos=known[_EOS_ID],
        pad=known[_PAD_ID],
        texts={at: texts[at] for at in known.values() if at is not None},
        reshapes=any(normalizer.values()),
    )


def _bytes(value: int | bytes) -> bytes:
    if type(value) is not bytes:
        raise ValueError
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protocol-buffers message: number and value (wire types 0, 1, 2 and 5)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError
        if at + length > len(data):
            raise ValueError
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError


def tokenizer_config(model: SentencePiece, positions: int) -> dict[str, Any]:
    """Return tokenizer_config.json for a SentencePiece model.

    The chat template is included if the model has the pieces `MARKERS`. No token is put before a text: the card
    has ``add_BOS=False``.
    """
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(at): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": control,
            }
            for at, (text, control) in sorted(model.special.items())
        },
    }
    for key, at in (("bos", model.bos), ("eos", model.eos), ("unk", model.unk), ("pad", model.pad)):
        config[f"{key}_token"] = None if at is None else model.texts[at]
    texts = {text for text, _ in model.special.values()}
    if all(marker in texts for marker in MARKERS):
        config["chat_template"] = CHAT_TEMPLATE
    config |= {
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": positions,
        "tokenizer_class": "LlamaTokenizer",
    }
    return config


def render(config: dict[str, Any]) -> bytes:
    """Return a small JSON file in the form of transformers."""
    return pretty_json(config)
