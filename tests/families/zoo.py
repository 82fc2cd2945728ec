"""A tiny checkpoint with random weights of every language model that transformers knows.

Each is made by transformers' own class and saved by it, under the names of that family's checkpoints. Beside the
folder ``NAME`` stands ``NAME.specimen.json``: the class, and whether the folder was built and loaded back, or why not.

Use: ``python -m tests.families.zoo FOLDER [--only a,b] [--list]``
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto

from tests.families.forks import forked
from tests.families.forwards import logits_of
from tests.families.tiny_configs import PUBLISHED, TRANSPOSED, VARIANTS, tiny_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUILD_SECONDS = 60
LARGEST = 64 * 2**20
AUTO_CLASSES = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Specimen:
    """One class of transformers with the auto class and the ``model_type`` that lead to it."""

    name: str
    model_type: str
    class_name: str
    auto_class: str
    variant: str = ""


def specimens() -> list[Specimen]:
    """List every class once; the first class of a model type has its name, the others that of the class behind it."""
    types: dict[str, list[str]] = {}
    autos: dict[str, str] = {}
    for auto, mapping in AUTO_CLASSES.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                autos.setdefault(name, auto)
                types.setdefault(name, [])
                if model_type not in types[name]:
                    types[name].append(model_type)
    found: list[Specimen] = []
    taken: set[str] = set()
    for class_name, model_types in types.items():
        model_type = own_type(class_name, model_types)
        name = f"{model_type}-{class_name}" if model_type in taken else model_type
        taken.add(name)
        found.append(Specimen(name, model_type, class_name, autos[class_name]))
        found += [
            Specimen(f"{name}-{variant}", model_type, class_name, autos[class_name], variant)
            for variant in {**VARIANTS.get(name, {}), **({"published": {}} if name in PUBLISHED else {})}
        ]
    return sorted(found, key=lambda specimen: specimen.name)


def own_type(class_name: str, model_types: list[str]) -> str:
    """Choose among the model types of a class the one of its own config class."""
    if len(model_types) == 1:
        return model_types[0]
    own: str = getattr(transformers, class_name).config_class.model_type
    return own if own in model_types else model_types[0]


def fill(model: PreTrainedModel) -> None:
    """Give every parameter values that tell it from a newly initialized one.

    Zeros and ones get noise: a bias or a norm that is lost, or lands elsewhere, then shows in the numbers.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        values = parameter.data.float()
        constant = bool((values == values.flatten()[0]).all())
        if constant and float(values.flatten()[0]) in {0.0, 1.0}:
            values = values + 0.02 * torch.randn(values.shape, generator=generator)
        elif not bool(values.isfinite().all()) or float(values.abs().max()) > 1e4:  # memory nobody initialized
            values = 0.02 * torch.randn(values.shape, generator=generator)
        parameter.data.copy_(values)


def build(specimen: Specimen, folder: Path) -> dict[str, Any]:
    """Build one checkpoint in ``folder`` and load it back."""
    torch.set_num_threads(1)
    made: Any = getattr(transformers, specimen.class_name)
    config = tiny_config(specimen.model_type, specimen.variant)
    with torch.device("meta"):
        sizes = {name: 2 * parameter.numel() for name, parameter in made(config).named_parameters()}
    if sum(sizes.values()) > LARGEST:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:8]
        raise ValueError(f"{sum(sizes.values()) >> 20} MiB: " + ", ".join(f"{n} {sizes[n] >> 20}" for n in largest))
    torch.manual_seed(0)
    model = made._from_config(config, dtype=torch.bfloat16).eval()
    fill(model)
    model.tie_weights()
    logits, inputs = logits_of(model)
    if model.can_generate():
        default: Any = transformers.GenerationConfig
        model.generation_config = default()  # a tiny vocabulary lacks the tokens of some defaults
    model.save_pretrained(folder)
    if specimen.variant == "published":
        rename(folder, specimen.model_type)
    again, info = getattr(transformers, specimen.auto_class).from_pretrained(folder, output_loading_info=True)
    lost = {key: sorted(map(str, value)) for key, value in info.items() if value and key != "error_msgs"}
    state, read = model.state_dict(), again.state_dict()
    differing = [name for name in state if name not in read or not torch.equal(state[name], read[name])]
    notes: dict[str, Any] = {"class_again": type(again).__name__} if type(again) is not type(model) else {}
    if lost:
        notes["lost"] = lost
    if differing:
        notes["differing"] = differing
    if logits is None:
        notes["no_forward"] = inputs
    elif not bool(logits.isfinite().all()):
        notes["nonfinite"] = True
    return {
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "inputs": inputs if logits is not None else "",
        "spread": float(logits.std()) if logits is not None else 0.0,
        **notes,
    }


def rename(folder: Path, model_type: str) -> None:
    """Give the tensors of a checkpoint the names and the order of sides of published ones."""
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        published = name
        for pattern, replacement in PUBLISHED[model_type].items():
            published = re.sub(pattern, replacement, published)
        turned = re.search(TRANSPOSED.get(model_type, "$^"), name) is not None
        state[published] = tensor.transpose(1, 2).contiguous() if turned else tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def build_all(folder: Path, chosen: list[Specimen], *, again: bool) -> None:
    """Build what ``folder`` lacks, and print one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    for specimen in chosen:
        target, record = folder / specimen.name, folder / f"{specimen.name}.specimen.json"
        if target.is_dir() and not again:
            continue
        begun = time.monotonic()
        draft = folder / f".{specimen.name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        answer = forked(partial(build, specimen, draft), BUILD_SECONDS)
        trace = answer.pop("trace", "")
        wrong = verdict(answer)
        record.write_text(json.dumps({**asdict(specimen), "ok": not wrong, "reason": wrong, **answer}, indent=1) + "\n")
        seconds = time.monotonic() - begun
        print(f"{'no ' if wrong else 'yes'} {specimen.name} {seconds:.1f}s {wrong[:400]} {answer.get('inputs', '')}")
        if wrong:
            shutil.rmtree(draft, ignore_errors=True)
            (folder / ".traces").mkdir(exist_ok=True)
            (folder / ".traces" / f"{specimen.name}.txt").write_text(trace)
        else:
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)


def built(folder: Path, specimen: Specimen) -> Path:
    """Return the checkpoint of one specimen, which must be one that transformers builds."""
    build_all(folder, [specimen], again=False)
    record = json.loads((folder / f"{specimen.name}.specimen.json").read_text())
    assert record["ok"], record["reason"]
    return folder / specimen.name


def verdict(answer: dict[str, Any]) -> str:
    """Say in one line why a specimen is of no use; empty if it is."""
    if "raised" in answer:
        return str(answer["raised"])
    if "differing" in answer or "lost" in answer:
        return f"not loaded back: {answer.get('lost', '')} {answer.get('differing', [])[:4]}"
    if "nonfinite" in answer:
        return "logits are not finite"
    return ""


def main() -> None:
    """Build the zoo, or list it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="names of specimens, with commas")
    parser.add_argument("--list", action="store_true", help="print every specimen and what its record says")
    parser.add_argument("--again", action="store_true", help="build also what exists")
    given = parser.parse_args()
    only = set(given.only.split(",")) - {""}
    chosen = [specimen for specimen in specimens() if not only or specimen.name in only]
    if given.list:
        for specimen in chosen:
            record = given.folder / f"{specimen.name}.specimen.json"
            said = json.loads(record.read_text()) if record.exists() else {"reason": "not built"}
            print(specimen.name, specimen.class_name, specimen.auto_class, "ok" if said.get("ok") else said["reason"])
        return
    build_all(given.folder, chosen, again=given.again)


if __name__ == "__main__":
    main()
