"""The section "Evaluation" of a model card, which is added to a finished result.

The section is the last one between the marks of this library, behind a mark of its own. The card without it is the one
that source and recipe give, byte by byte.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import code
from nemotron_fp8.checkpoint.inventory import CARD, MANIFEST
from nemotron_fp8.checkpoint.local_files import FileDigest
from nemotron_fp8.documents.front_matter import BEGIN, END, front_matter
from nemotron_fp8.documents.manifest import with_file

if TYPE_CHECKING:
    from collections.abc import Mapping


MARK = "<!-- nemotron_fp8: evaluation -->"
"""Line before the section."""
LONGEST = 200
"""Characters of a name in the section."""
VERDICTS = {
    "equal": "predicts exactly as the source does",
    "few": "too few sequences to judge",
    "unclear": "predictions changed, but the change of the perplexity is within the noise of the sample",
    "higher": "the perplexity is clearly higher than that of the source",
    "lower": "the perplexity is clearly lower than that of the source on this text",
}
"""Words for each outcome of a comparison with the source."""


class CardFigures(NamedTuple):
    """Figures of a result as text, for the section.

    Attributes:
        source_perplexity: perplexity of the source.
        perplexity: perplexity of the result.
        change: change of the perplexity, with its error.
        kl: KL divergence in nats, with its error.
        top1: share of positions with the same top token, with its error.
        verdict: one of the words of `VERDICTS`.
        text: name of the text, without folders.
        digest: SHA-256 of the text.
        sample: number and length of the sequences.
        errors: meaning of the errors.
        source_weights, source_activations: number format of the source, and treatment of its activations.
        weights, activations: the same of the result.
        clipped: values beyond the range of a stored scale, after "; "; empty without one.
        layers: layers that add most to the error, with the increase.
        version: version of this library that measured.
        device: device that computed.
        libraries: libraries that computed, with their versions.
    """

    source_perplexity: str
    perplexity: str
    change: str
    kl: str
    top1: str
    verdict: str
    text: str
    digest: str
    sample: str
    errors: str
    source_weights: str
    source_activations: str
    weights: str
    activations: str
    clipped: str
    layers: str
    version: str
    device: str
    libraries: str


_NUMBER = r"[-+]?[0-9][0-9,.]*(?:e[-+][0-9]+)?"
_FIGURE = rf"{_NUMBER}%?(?: \N{{PLUS-MINUS SIGN}}{_NUMBER})?"
_NAME = r"[^`|<>\[\]\n]*"
_FORMS = {
    **dict.fromkeys(("source_perplexity", "perplexity", "change", "kl", "top1"), _FIGURE),
    "verdict": "|".join(map(re.escape, VERDICTS.values())),
    "sample": r"[0-9,]+(?: of [0-9,]+)? sequences? of [0-9,]+ tokens, [0-9,]+ predictions",
    "errors": "\N{PLUS-MINUS SIGN} is one standard error over [0-9,]+ sequences|one sequence has no standard error",
    "clipped": r"(?:; [0-9,]+ of [0-9,]+ activations, keys and values beyond the range of a stored scale)?",
    "layers": rf"none|[0-9]+ \({_NUMBER}\)(?:, [0-9]+ \({_NUMBER}\))*",
}
"""Patterns of the fields that are not names."""


def render_evaluation_section(figures: CardFigures) -> list[str]:
    """Return the lines of the section."""
    names = {field: code(text[:LONGEST]) for field, text in figures._asdict().items() if field not in _FORMS}
    return _lines(figures._replace(**names))


def _lines(shown: CardFigures) -> list[str]:
    return [
        MARK,
        "## Evaluation",
        "",
        "Source and result ran on the same text, layer by layer, with dequantized weights. Each prediction of the"
        " result is compared with that of the source.",
        "",
        "| | perplexity | change | KL divergence (nats) | same top token |",
        "|---|---:|---:|---:|---:|",
        f"| source | {shown.source_perplexity} | | | |",
        f"| this result | {shown.perplexity} | {shown.change} | {shown.kl} | {shown.top1} |",
        "",
        f"Verdict: {shown.verdict}.",
        "",
        f"- Text: `{shown.text}` (SHA-256 `{shown.digest}`), {shown.sample}; {shown.errors}.",
        f"- Source: weights `{shown.source_weights}`, activations `{shown.source_activations}`.",
        f"- This result: weights `{shown.weights}`, activations `{shown.activations}`{shown.clipped}.",
        f"- Layers that add most to the relative error of the hidden states: {shown.layers}.",
        f"- Measured by nemotron_fp8 `{shown.version}` on `{shown.device}`, with `{shown.libraries}`.",
    ]


def _pattern() -> re.Pattern[str]:
    """Return the pattern of all sections: that of one whose fields are replaced by their patterns."""
    fields = {field: f"field{number}end" for number, field in enumerate(CardFigures._fields)}
    text = re.escape("\n".join(_lines(CardFigures(**fields))))
    for field, word in fields.items():
        text = text.replace(word, f"(?:{_FORMS.get(field, _NAME)})")
    return re.compile(text)


_SECTION = _pattern()


def is_evaluation_section(lines: list[str]) -> bool:
    """Return True if lines have the form of a section that `render_evaluation_section` writes.

    The figures in it cannot be derived from source and recipe, so that they may be a stranger's.
    """
    return _SECTION.fullmatch("\n".join(lines)) is not None


def split_evaluation(card: bytes) -> tuple[bytes, list[str] | None]:
    """Return a card without its section, and the lines of the section; None without one."""
    text = _decoded(card)
    end = _end_of_block(text)
    at = text.find(f"\n\n{MARK}\n", 0, end) if end is not None else -1
    if end is None or at < 0:
        return card, None
    return _encoded(text[:at] + text[end:]), text[at + 2 : end].split("\n")


def with_evaluation(card: bytes, lines: list[str]) -> bytes | None:
    """Return a card with another section; None for a card without the marks of this library."""
    text = _decoded(split_evaluation(card)[0])
    end = _end_of_block(text)
    return None if end is None else _encoded(text[:end] + "\n\n" + "\n".join(lines) + text[end:])


def carded(documents: Mapping[str, bytes], lines: list[str]) -> dict[str, bytes]:
    """Return the documents of a result with a section in the card, which the manifest records."""
    card = with_evaluation(documents[CARD], lines)
    if card is None:
        return dict(documents)
    return {**documents, CARD: card, MANIFEST: with_card(documents[MANIFEST], card)}


def with_card(manifest: bytes, card: bytes) -> bytes:
    """Return a manifest that records this card.

    Raises:
        MalformedManifestError: the bytes are no manifest, or it records no card.
    """
    return with_file(manifest, CARD, FileDigest(len(card), hashlib.sha256(card).hexdigest()))


def _decoded(card: bytes) -> str:
    return card.decode("utf-8", "surrogateescape")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _end_of_block(text: str) -> int | None:
    """Return the position after the text of this library; None for a card without its marks."""
    front = front_matter(text)
    start = front[1] if front else 0
    if not text.startswith(BEGIN, start):
        return None
    end = text.find(f"\n{END}", start)
    return end if end >= 0 else None
