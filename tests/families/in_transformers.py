"""Compare a result in transformers with the result dequantized by hand.

The reference is an ordinary folder under the result's own names, without FP8; its parameters must in turn be near those
of the source, as a name that transformers does not know would be lost from both. Where transformers loads unquantized
experts in stacks only, `dequantize_repo` stacks them again (tests/inference/test_stacked_again.py proves that it does).

Use: ``python -m tests.families.in_transformers SRC DST``
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import compressed_tensors.compressors
import compressed_tensors.quantization  # noqa: F401 - seconds of imports that each fork would repeat
import torch
import transformers
import transformers.quantizers.quantizer_compressed_tensors

from nemotron_fp8 import dequantize_repo
from nemotron_fp8.planning.families import family_of
from tests.families.by_hand import dequantized, distance, product, write_dequantized
from tests.families.forks import one_line
from tests.families.forwards import logits_of
from tests.inference.layouts import config_of

Verdict = dict[str, Any]
State = dict[str, torch.Tensor]

KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")
NEAR = 0.05
"""FP8 with three bits of mantissa: the error of a weight is about 0.026 of its size."""
TOO_NEAR = 0.005
"""Less than the error of FP8: a parameter that should have been left alone."""
DRIFT = 0.5
"""Of the logits of random weights, with activations in FP8; unrelated logits differ by 1.4 of their size."""
ROUNDED = 2**-7
"""Plain loads round scales to the dtype of the model before they multiply: two roundings to bf16 on top of one."""
NAMED = 6


class Loaded:
    """A model as an auto class loads it, with its logits and what the load lost."""

    def __init__(self, folder: Path, auto_class: str, **options: Any) -> None:
        auto: Any = getattr(transformers, auto_class)
        self.model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
        self.model.eval()
        self.lost = {(key, str(name)) for key in KEYS for name in info.get(key) or ()}
        self.logits, self.inputs = logits_of(self.model)
        self.state = parameters(self.model)

    def logits_in_dtypes_of(self, other: Loaded) -> torch.Tensor:
        """Return the logits of this model with parameters in the dtypes of another; the values stay the same.

        A load may leave in bf16 what the model otherwise computes in float32.
        """
        named = dict(other.model.named_parameters())
        own = {name: parameter for name, parameter in self.model.named_parameters() if name in named}
        dtypes = {name: parameter.dtype for name, parameter in own.items()}
        for name, parameter in own.items():
            if named[name].is_floating_point() and named[name].itemsize > 1:
                parameter.data = parameter.data.to(named[name].dtype)
        logits, _ = logits_of(self.model)
        for name, parameter in own.items():
            parameter.data = parameter.data.to(dtypes[name])
        assert logits is not None
        return logits


def parameters(model: torch.nn.Module) -> State:
    """Return parameters and buffers by name, FP8 weights of modules that did not run yet as their products."""
    state: State = dict(model.state_dict())
    for name, value in list(state.items()):
        if value.dtype != torch.float8_e4m3fn:
            continue
        scale = state.get(f"{name}_scale", state.get(f"{name}_scale_inv"))
        if scale is not None and scale.device.type != "meta":
            state[name] = product(value, scale)
    return state


def specimen_of(source: Path) -> dict[str, Any]:
    """Return the record beside a specimen."""
    record: dict[str, Any] = json.loads((source.parent / f"{source.name}.specimen.json").read_text())
    return record


def few(names: list[str]) -> str:
    """Name the first of many, those that differ in numbers alone once."""
    kinds = Counter(re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names)
    named = [kind if count == 1 else f"{kind} x{count}" for kind, count in list(kinds.items())[:NAMED]]
    return ", ".join(named) + (f" and {len(kinds) - NAMED} more" if len(kinds) > NAMED else "")


def same(value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Compare a parameter with the product by hand, value by value."""
    if value.shape != expected.shape or value.device.type == "meta":
        return False
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    # Not the dtypes: some loads leave in bf16 what others keep in float32, with the values of bf16. Products in float32
    # are rounded as those by hand are.
    exact = bool((expected.float() == expected.bfloat16().float()).all())
    value = value.bfloat16().float() if exact else value.float()
    return bool(((value - expected.float()).abs() <= tolerance * expected.float().abs()).all())


def faults_of(read: Loaded, reference: Loaded, source: Loaded, drift: float) -> list[str]:
    """List what is wrong with a model, beside the reference and the source."""
    tolerance = ROUNDED if drift == DRIFT else 0.0
    expected_state = singles(reference.state, read.state)
    lost = sorted(read.lost - source.lost)
    faults = [f"{key}: {few([name for of, name in lost if of == key])}" for key in sorted({key for key, _ in lost})]
    differing = [
        name
        for name, expected in expected_state.items()
        if (value := read.state.get(name)) is not None and not same(value, expected, tolerance)
    ]
    far = max((distance(read.state[name].cpu(), expected_state[name]) for name in differing), default=0.0)
    absent = [name for name in expected_state if name not in read.state]
    if absent:
        faults.append(f"absent: {few(absent)}")
    if differing:
        faults.append(f"not the products (off by {far:.2g}): {few(differing)}")
    if reference.logits is not None and read.logits is not None:
        if not bool(read.logits.isfinite().all()):
            faults.append("logits are not finite")
        elif (off := distance(read.logits, reference.logits)) > drift:
            expected = reference.logits_in_dtypes_of(read)
            if (off := distance(read.logits, expected)) > drift:
                faults.append(f"logits differ by {off:.2g}")
    return faults


def judge(result: Path, auto_class: str, reference: Loaded, source: Loaded, drift: float, **options: Any) -> Verdict:
    """Load a result with ``options`` and judge it."""
    try:
        read = Loaded(result, auto_class, **options)
    except Exception as error:
        return {"verdict": "refused", "detail": one_line(error)}
    if reference.logits is not None and read.logits is None:
        return {"verdict": "refused", "detail": f"forward: {read.inputs}"}
    faults = faults_of(read, reference, source, drift)
    far = None if read.logits is None or reference.logits is None else distance(read.logits, reference.logits)
    return {"verdict": "wrong" if faults else "right", "detail": "; ".join(faults), "drift": far}


def check(source: Path, result: Path) -> Verdict:
    """Judge one result: ``verdict`` is right, wrong (silently), refused (an exception), source, or not read."""
    torch.set_num_threads(1)
    auto_class = specimen_of(source)["auto_class"]
    stated = config_of(result).get("quantization_config", {})
    try:
        origin = Loaded(source, auto_class)
    except Exception as error:
        return {"verdict": "source", "detail": one_line(error)}
    if origin.logits is not None and not bool(origin.logits.isfinite().all()):
        return {"verdict": "source", "detail": "logits of the source are not finite"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            products = write_reference(result, Path(folder, "reference"))
            reference = Loaded(Path(folder, "reference"), auto_class)
        except Exception as error:
            return {"verdict": "wrong", "detail": f"dequantized by hand: {one_line(error)}"}
        if not products:
            return {"verdict": "right", "detail": "nothing is quantized"}
        named = reference_faults(reference, origin)
        if stated.get("quant_method") == "fp8" and not stated.get("weight_block_size"):
            return {"verdict": "wrong" if named else "not read", "detail": named}
        plain = judge(result, auto_class, reference, origin, DRIFT)
        answers = {"plain": plain}
        if stated.get("quant_method") == "compressed-tensors":
            option = transformers.CompressedTensorsConfig(dequantize=True)
            answers["dequantize"] = judge(result, auto_class, reference, origin, 0.02, quantization_config=option)
    return combined(answers, named)


def write_reference(result: Path, target: Path) -> set[str]:
    """Write a result without FP8, and return the names of what was FP8."""
    stacked = family_of(config_of(result)).stacked
    if stacked is None or not stacked.always:
        return write_dequantized(result, target)
    dequantize_repo(result, target)
    return dequantized(result)[1]


def singles(state: State, like: State) -> State:
    """Take stacks of experts apart where another state holds single experts: those of Llama 4, stored [in, out]."""
    found: State = {}
    for name, value in state.items():
        holder, _, part = name.rpartition(".")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(part, ())
        if value.dim() != 3 or not names or f"{holder}.0.{names[0]}.weight" not in like:
            found[name] = value
            continue
        for number, expert in enumerate(value):
            parts = expert.T.chunk(len(names))
            found |= {f"{holder}.{number}.{each}.weight": one for each, one in zip(names, parts, strict=True)}
    return found


def reference_faults(reference: Loaded, source: Loaded) -> str:
    """Say where the reference is not the source with errors of FP8."""
    lost = [f"{key}: {name}" for key, name in sorted(reference.lost - source.lost)]
    far = [
        name
        for name, value in reference.state.items()
        if name not in source.state or not is_near(distance(value, source.state[name]), value.numel())
    ]
    return "; ".join(f"{what}: {few(names)}" for what, names in (("names", lost), ("far from source", far)) if names)


def is_near(far: float, values: int) -> bool:
    """Tell the distance of an untouched parameter, or of one in FP8, from others."""
    return far == 0.0 or (far < NEAR and (far > TOO_NEAR or values < 256))  # few values: the error may be any


def combined(answers: dict[str, Verdict], named: str) -> Verdict:
    """Join the verdicts of the ways to load: the worst one, with the details of all that are not right.

    What ``dequantize=True`` refuses by an exception is a detail: the plain load is what a user meets.
    """
    counted = {way: answer["verdict"] for way, answer in answers.items()}
    if counted.get("dequantize") == "refused":
        del counted["dequantize"]
    verdicts = [*counted.values(), *(["wrong"] if named else [])]
    worst = next((each for each in ("wrong", "refused") if each in verdicts), "right")
    details = [f"{way}: {answer['detail']}" for way, answer in answers.items() if answer["detail"]]
    drifts = {way: answer["drift"] for way, answer in answers.items() if answer.get("drift") is not None}
    ways = {way: answer["verdict"] for way, answer in answers.items()}
    return {"verdict": worst, "detail": " | ".join(([named] if named else []) + details), "ways": ways, "drift": drifts}


if __name__ == "__main__":
    print(json.dumps(check(Path(sys.argv[1]), Path(sys.argv[2])), indent=1))
