"""Small files of a NeMo checkpoint: tokenizer, model card, copied files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import code
from nemotron_fp8.checkpoint.inventory import CARD, SideFile, is_card, sort_side_files
from nemotron_fp8.errors import printable
from nemotron_fp8.sources.nemo import sentencepiece

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.sources.nemo.files import Files
    from nemotron_fp8.sources.nemo.model_config import Model


MODEL_CONFIG = "model_config.yaml"
OWN_TOKENIZER = ("sentencepiece.json", sentencepiece.CONFIG, sentencepiece.RESULT)
"""Files of a transformers tokenizer; any of them means that the checkpoint has one already."""


@dataclass(slots=True)
class Beside:
    """Small files of a result.

    Attributes:
        side: files to copy.
        left_out: files not to copy, each with the reason.
        card: model card of the source plus additions; None if there is neither.
        made: derived files, by name.
        notices: notices for the user.
        bos, eos: ids of the tokenizer's tokens for the beginning and the end of a text; those of Nemotron if there
            is no tokenizer.
    """

    side: tuple[SideFile, ...]
    left_out: list[tuple[str, str]]
    made: dict[str, bytes]
    notices: list[str]
    card: bytes | None = None
    bos: int | None = 2
    eos: int | None = 3


def small_files(files: Files, loaded: Mapping[str, Any], model: Model, vocabulary: int) -> Beside:
    """Decide for each file in the top folder of a checkpoint: copy it, derive files from it, or leave it out.

    Args:
        files: files of the checkpoint.
        loaded: the parsed model config.
        model: dimensions and settings of the model.
        vocabulary: rows of the embedding.

    Raises:
        MalformedTokenizerError: the tokenizer is not a SentencePiece model.
    """
    places = {name: place for name, place in files.places.items() if "/" not in name and name != MODEL_CONFIG}
    found = _sentencepiece(places, loaded)
    models = [name for name in places if name.endswith(".model") and name not in OWN_TOKENIZER]
    side, left_out = sort_side_files(
        {name: place.size for name, place in places.items() if found is None or name not in models}, ()
    )
    beside = Beside(tuple(_placed(files, file.name) for file in side), list(left_out), {}, [])
    if CARD in places and is_card(CARD, places[CARD].size):
        beside.card = files.read(CARD)
    beside.left_out.append((MODEL_CONFIG, "converted to config.json"))
    if found is None:
        if not any(name in places for name in OWN_TOKENIZER):
            beside.notices.append("the checkpoint has no SentencePiece model: the result has no tokenizer")
        return beside
    beside.left_out += [(name, "not the tokenizer that the model config names") for name in models if name != found]
    beside.side = (*beside.side, _placed(files, found, sentencepiece.RESULT))
    _tokenizer(files, found, model, vocabulary, beside)
    return beside


def _sentencepiece(places: Mapping[str, Any], loaded: Mapping[str, Any]) -> str | None:
    """Return the name of the SentencePiece model: the one that the config names, else the only one."""
    settings = loaded.get("tokenizer")
    named = [settings.get(key) for key in ("model", "tokenizer_model")] if isinstance(settings, dict) else []
    for value in named:
        name = value.removeprefix("nemo:").rpartition("/")[2] if isinstance(value, str) else ""
        if name in places:
            return name
    models = [name for name in places if name.endswith(".model")]
    return models[0] if len(models) == 1 else None


def _placed(files: Files, name: str, result: str | None = None) -> SideFile:
    """Return a file to copy, from its place."""
    place = files.places[name]
    return SideFile(result or name, place.size, place.file, place.offset)


def _tokenizer(files: Files, name: str, model: Model, vocabulary: int, beside: Beside) -> None:
    """Derive the files that belong to a SentencePiece model, unless they exist."""
    pieces = sentencepiece.read_model(files.read(name, length=sentencepiece.MAX_BYTES + 1), name)
    beside.bos, beside.eos = pieces.bos, pieces.eos
    config = sentencepiece.tokenizer_config(pieces, model.positions)
    if sentencepiece.CONFIG not in files.places:
        beside.made[sentencepiece.CONFIG] = sentencepiece.render(config)
        if "chat_template" in config:
            beside.notices.append(
                "the chat template is that of Nemotron-4-340B-Instruct; a base model was not trained on it"
            )
    if pieces.reshapes:
        beside.notices.append(
            f"{printable(name)} normalizes spaces, and transformers may not do the same: compare the tokens of a text"
        )
    if pieces.pieces > vocabulary:
        beside.notices.append(f"the tokenizer has {pieces.pieces:,} tokens, the embedding {vocabulary:,} rows")


def explain(extra: list[TensorView], beside: Beside) -> None:
    """Warn about tensors that engines do not know, in the model card and in the notices."""
    if not extra:
        return
    names = "\n".join(f"- `{code(view.name)}`, {view.dtype} {list(view.shape)}" for view in extra)
    text = (
        "## Tensors outside the architecture\n\n"
        "These arrays of the NeMo checkpoint have no place in `NemotronForCausalLM` and keep their own names."
        " Engines and libraries need support for them: otherwise they ignore the arrays or reject the checkpoint:\n\n"
        f"{names}\n"
    )
    before = (beside.card or b"").rstrip(b"\n")
    beside.card = before + (b"\n\n" if before else b"") + text.encode()
    beside.notices += [
        f"array {printable(view.name)} is not a tensor of NemotronForCausalLM and keeps its own name: engines need"
        " support for it"
        for view in extra
    ]
