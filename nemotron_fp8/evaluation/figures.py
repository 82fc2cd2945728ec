"""Figures of one checkpoint in an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_fp8._display import one_line

MOST_CLIPPED = 10
"""Modules for which clipped values are stated."""


@dataclass(frozen=True, slots=True)
class ClippedModule:
    """Values beyond the range of a stored scale: inputs of a module, or its cached keys or values.

    Attributes:
        name: the module, or the one that engines merge it into.
        clipped: values beyond the range.
        values: all values that were cast with this scale.
    """

    name: str
    clipped: int
    values: int


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointFigures:
    """Figures of one checkpoint. All errors are standard errors over sequences.

    Attributes:
        name: the checkpoint, as it was named in the call.
        weights: number format and layout of its weights.
        activations: treatment of activations that was emulated.
        perplexity: exp of the mean negative log-likelihood of a token, in nats.
        perplexity_change: change of the perplexity against the source, as a fraction.
        perplexity_error: standard error of that change.
        kl: mean KL divergence of the predicted distribution from that of the source, in nats.
        kl_error: standard error of the divergence.
        top1: fraction of positions at which source and checkpoint predict the same token.
        top1_error: standard error of that fraction.
        layers: relative L2 error of the hidden states after each layer.
        sequence_kl: mean KL divergence of each sequence.
        sequence_nll: mean negative log-likelihood of each sequence, in nats.
        position_kl: mean KL divergence of each group of neighboring positions, the first position first.
        notices: caveats for the user.
        digest: digest of the shards that its manifest records (`shards_digest`); empty without one.
        static_values: activations, keys and values that were cast with a stored scale.
        clipped_values: those beyond the range of their scale.
        clipped: modules with most of them, the worst first, at most `MOST_CLIPPED`.
    """

    name: str
    weights: str
    activations: str
    perplexity: float
    perplexity_change: float
    perplexity_error: float
    kl: float
    kl_error: float
    top1: float
    top1_error: float
    layers: tuple[float, ...]
    sequence_kl: tuple[float, ...]
    sequence_nll: tuple[float, ...]
    position_kl: tuple[float, ...]
    notices: tuple[str, ...] = ()
    digest: str = ""
    static_values: int = 0
    clipped_values: int = 0
    clipped: tuple[ClippedModule, ...] = ()

    def __repr__(self) -> str:
        figures = [f"perplexity {self.perplexity:.6g}", f"KL {self.kl:.4g} nats", f"{self.top1:.1%} same top token"]
        return one_line("CheckpointFigures", self.name, figures)

    def worst_layers(self, count: int) -> list[tuple[int, float]]:
        """Return the layers that add most to the error: number and increase over the layer before."""
        before = (0.0, *self.layers)
        steps = [(number, error - before[number]) for number, error in enumerate(self.layers)]
        return sorted(steps, key=lambda step: (-step[1], step[0]))[:count]
