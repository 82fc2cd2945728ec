"""Description of a sample: the text that models are run on, and the drawn sequences."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_fp8._display import one_line


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """The text that models are run on.

    Attributes:
        name: the file, or the name of the default text.
        sha256: digest of the text, or of the file of tokens.
        sequences: sequences that are run.
        available: sequences in the whole text.
        length: tokens of a sequence.
        indices: numbers of these sequences in the text, increasing.
        excerpts: first words of each sequence; empty if only tokens were given.
    """

    name: str
    sha256: str
    sequences: int
    available: int
    length: int
    indices: tuple[int, ...]
    excerpts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sequences = f"{self.sequences:,} of {self.available:,} sequences of {self.length:,} tokens"
        return one_line("Sample", self.name, [sequences])

    @property
    def predictions(self) -> int:
        """Tokens that are predicted: all but the first of each sequence."""
        return self.sequences * (self.length - 1)
