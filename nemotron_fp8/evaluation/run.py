"""An evaluation of a session: all layers of all checkpoints, then the comparison of what they predict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import peak_resident_bytes
from nemotron_fp8._version import __version__
from nemotron_fp8.documents.manifest import shards_digest
from nemotron_fp8.errors import NonFiniteOutputError
from nemotron_fp8.evaluation.comparison import Comparison, by_position, change_of, mean_of
from nemotron_fp8.evaluation.figures import MOST_CLIPPED, CheckpointFigures, ClippedModule
from nemotron_fp8.evaluation.result import LARGEST, Evaluation
from nemotron_fp8.evaluation.serving import Serving
from nemotron_fp8.inference.layer_loop import LayerLoop
from nemotron_fp8.inference.needs import head_words
from nemotron_fp8.inference.weights import all_finite, read_elements

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nemotron_fp8.evaluation.comparison import TokenFigures
    from nemotron_fp8.evaluation.serving import Clipping
    from nemotron_fp8.inference.session import Session, Stream


class Run:
    """One evaluation.

    Args:
        session: the checkpoints, the source first, and the sample.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._skeleton, self._streams = session, session.skeleton, session.streams
        self._ids = session.drawn.ids
        self._loop = LayerLoop(session, predicts=True)
        self._serving = Serving(session)

    def evaluate(self) -> Evaluation:
        """Run all checkpoints, and return their figures."""
        hidden = self._loop.run(self._serving)
        return self._figures(self._compare(hidden), self._serving.errors)

    def _compare(self, hidden: torch.Tensor) -> Comparison:
        """Compare the predictions of all checkpoints, word by word of the vocabulary; hidden states are overwritten."""
        skeleton, streams = self._skeleton, self._streams
        self._loop.finish(hidden)
        target = self._loop.target
        comparison = Comparison(self._ids, len(streams) - 1)
        total, width = streams[0].weights.head.shape
        words = min(head_words(self._ids.shape[1]), total)
        buffers = [torch.empty((words, width), dtype=skeleton.dtype) for _ in streams]
        for first in range(0, total, words):
            last = min(first + words, total)
            parts = []
            for buffer, stream in zip(buffers, streams, strict=True):
                part = buffer[: last - first]
                read_elements(stream.label, stream.reader, stream.weights.head, first * width, part.view(-1))
                bias = stream.outside.get(f"{skeleton.head_name.removesuffix('weight')}bias")
                moved = None if bias is None else bias[first:last].to(target)
                parts.append((part.to(target), moved))
            for number, ids in enumerate(self._ids):
                logits = [
                    skeleton.logits(ids[None], states[number][None].to(target), _head(*part))[0, :-1].float()
                    for states, part in zip(hidden, parts, strict=True)
                ]
                for stream, values in zip(streams, logits, strict=True):
                    if not all_finite(values):
                        raise NonFiniteOutputError(stream.label, f"its logits of words {first:,} to {last - 1:,}")
                comparison.add(number, first, logits)
            for stream in streams:
                size = stream.weights.head_bytes
                self._loop.advance(size * last // total - size * first // total, "output layer")
        return comparison

    def _figures(self, comparison: Comparison, errors: Sequence[Sequence[float]]) -> Evaluation:
        source, layers, device = comparison.source(), len(self._skeleton.layers), self._session.device
        figures = [
            self._checkpoint_figures(stream, source, own, rows)
            for stream, own, rows in zip(
                self._streams, (source, *comparison.results()), ([0.0] * layers, *errors), strict=True
            )
        ]
        return Evaluation(
            source=figures[0],
            results=tuple(figures[1:]),
            sample=self._session.drawn.sample,
            version=__version__,
            libraries={"torch": torch.__version__, "transformers": self._session.api.version},
            device="cpu" if device is None else device.name,
            seconds=self._loop.seconds,
            peak_resident_bytes=peak_resident_bytes(),
        )

    def _checkpoint_figures(
        self, stream: Stream, source: TokenFigures, own: TokenFigures, errors: Sequence[float]
    ) -> CheckpointFigures:
        for name, values in (("perplexities", own.nll), ("KL divergences", own.kl)):
            most = math.log(LARGEST) if values is own.nll else LARGEST
            if not float(values.mean().abs()) < most:  # NaN is not, either
                raise NonFiniteOutputError(stream.label, f"its {name}")
        change, kl, same = change_of(source, own), mean_of(own.kl), mean_of(own.same)
        clipping = self._serving.clipping[self._streams.index(stream)]
        return CheckpointFigures(
            name=stream.label,
            weights=stream.weights.title,
            activations=stream.weights.activations_title,
            perplexity=float(own.nll.mean().exp()),
            perplexity_change=change.value,
            perplexity_error=change.error,
            kl=kl.value,
            kl_error=kl.error,
            top1=same.value,
            top1_error=same.error,
            layers=tuple(errors),
            sequence_kl=tuple(own.kl.mean(1).tolist()),
            sequence_nll=tuple(own.nll.mean(1).tolist()),
            position_kl=by_position(own.kl),
            notices=self._notices(stream),
            digest=shards_digest(root) if (root := stream.weights.source.root) and root.is_dir() else "",
            static_values=sum(each.values for each in clipping.values()),
            clipped_values=sum(each.clipped for each in clipping.values()),
            clipped=_worst(clipping),
        )

    def _notices(self, stream: Stream) -> tuple[str, ...]:
        notices = []
        notice = self._skeleton.too_long(self._ids.shape[1])
        if stream is self._streams[0] and notice:
            notices.append(notice)
        if unused := stream.weights.unused:
            shown = ", ".join(unused[:3])
            notices.append(
                f"{len(unused):,} {'tensors are' if len(unused) > 1 else 'tensor is'} not part of the model that"
                f" transformers {self._session.api.version} builds, and {'were' if len(unused) > 1 else 'was'} not"
                f" evaluated ({shown})"
            )
        if stream.weights.has_fp8_cache and not self._serving.has_cached(self._streams.index(stream)):
            notices.append("keys and values were left in 16 bits: no attention was seen that its FP8 cache could serve")
        if unseen := self._serving.unseen[self._streams.index(stream)]:
            shown = ", ".join(sorted(unseen)[:3])
            notices.append(f"the activations of {shown} were left in 16 bits: no product with these weights was seen")
        return tuple(notices)


def _worst(clipping: Mapping[str, Clipping]) -> tuple[ClippedModule, ...]:
    """Return the modules with most clipped values."""
    found = [ClippedModule(name, *each) for name, each in clipping.items() if each.clipped]
    return tuple(sorted(found, key=lambda each: (-each.clipped, each.name))[:MOST_CLIPPED])


def _head(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: torch.nn.functional.linear(states.to(weight.dtype), weight, bias)
