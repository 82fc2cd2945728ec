"""Memory and time of evaluations: ``python -m benchmarks.measure.evaluate [--work DIR] [--layers 6 24 48] [--whole]``.

With ``--calibrate``, those of calibrations, with the largest values and with a percentile of them.

Random Nemotron checkpoints that differ in the number of their layers are run by the command line, each in its own
process, which is watched from outside: anonymous memory (``RssAnon``) and resident memory (``VmRSS``) every 10 ms. A
file of the page cache that a process has mapped counts as resident, but the system can take it back at any time. With
``--whole``, the forward of the whole model in transformers is watched beside it. Needs the extra [evaluate].
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine

if TYPE_CHECKING:
    from benchmarks.checkpoints import Shapes

MIB = 1 << 20
HIDDEN, INNER, HEADS, GROUPS, WORDS = 2048, 8192, 16, 8, 32000
SEQUENCES, LENGTH = 4, 128
WHOLE = """
import sys, torch
from transformers import AutoModelForCausalLM
import json
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.tensor(json.load(open(sys.argv[2])))
with torch.no_grad():
    for row in ids:
        model(row[None], use_cache=False)
"""
CALIBRATIONS = {"calibrate": (), "calibrate, percentile": ("--percentile", "99.99")}
"""Options of the calibrations by case."""
IDLE = "import transformers, torch, nemotron_fp8.evaluation.evaluate; transformers.AutoModelForCausalLM"
"""Script that loads all modules and evaluates nothing."""


def shapes(layers: int, shards: int) -> Shapes:
    """Return the tensors of a Nemotron model."""
    groups: Shapes = [[] for _ in range(shards)]
    groups[0].append(("model.embed_tokens.weight", (WORDS, HIDDEN)))
    kv = HIDDEN // HEADS * GROUPS
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        groups[layer * shards // layers] += [
            *(
                (f"{stem}{norm}_layernorm.{kind}", (HIDDEN,))
                for norm in ("input", "post_attention")
                for kind in ("weight", "bias")
            ),
            (f"{stem}self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
            (f"{stem}self_attn.k_proj.weight", (kv, HIDDEN)),
            (f"{stem}self_attn.v_proj.weight", (kv, HIDDEN)),
            (f"{stem}self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
            (f"{stem}mlp.up_proj.weight", (INNER, HIDDEN)),
            (f"{stem}mlp.down_proj.weight", (HIDDEN, INNER)),
        ]
    groups[-1] += [(f"model.norm.{kind}", (HIDDEN,)) for kind in ("weight", "bias")]
    groups[-1].append(("lm_head.weight", (WORDS, HIDDEN)))
    return groups


def write_model(folder: Path, layers: int) -> int:
    """Write a random Nemotron checkpoint; return its bytes."""
    size = write_checkpoint(folder, shapes(layers, max(1, layers // 6)))
    config = {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": WORDS,
        "max_position_embeddings": 4096,
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def write_tokens(path: Path) -> None:
    """Write random tokens."""
    draw = random.Random(0)
    path.write_text(json.dumps([[draw.randrange(WORDS) for _ in range(LENGTH)] for _ in range(SEQUENCES)]))


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command; return its output, its seconds and its peaks of memory."""
    started = time.monotonic()
    peaks = {"RssAnon": 0, "VmRSS": 0}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                break
            for line in lines:
                key = line.partition(":")[0]
                if key in peaks:
                    peaks[key] = max(peaks[key], int(line.split()[1]) * 1024)
            time.sleep(0.01)
        if process.wait():
            raise SystemExit(f"error: {' '.join(command)} failed")
        out.seek(0)
        text = out.read()
    seconds = time.monotonic() - started
    return {"anonymous_bytes": peaks["RssAnon"], "resident_bytes": peaks["VmRSS"], "seconds": seconds, "output": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept; else a temporary one")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24, 48])
    parser.add_argument("--whole", action="store_true", help="watch the whole model in transformers, too")
    parser.add_argument("--calibrate", action="store_true", help="calibrate the checkpoints instead")
    parser.add_argument("--output", type=Path, help="file of records; else one of benchmarks/results")
    given = parser.parse_args()
    output = given.output or RESULTS / ("calibrate-cpu.jsonl" if given.calibrate else "evaluate-cpu.jsonl")
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        tokens = work / "tokens.json"
        write_tokens(tokens)
        import transformers

        record = Recorder(output, {**machine("cpu"), "transformers": transformers.__version__})
        idle = watched([sys.executable, "-c", IDLE])
        common = {"sequences": SEQUENCES, "length": LENGTH, "idle_anonymous_bytes": idle["anonymous_bytes"]}
        for layers in given.layers:
            source, result = work / f"source-{layers}", work / f"result-{layers}"
            size = write_model(source, layers)
            common |= {"layers": layers, "source_bytes": size}
            command = [sys.executable, "-m", "nemotron_fp8"]
            options = ["--tokens", tokens, "--device", "cpu", "--state-dir", work / "state", "--json", "-q"]
            for case, margin in CALIBRATIONS.items() if given.calibrate else ():
                words = [*command, "calibrate", source, work / "amaxes.json", *margin, *options]
                found = watched(list(map(str, words)))
                record.write(case=case, modules=json.loads(found.pop("output"))["inputs"], **common, **found)
            if not given.calibrate:
                if not result.exists():
                    subprocess.run([*command, "quantize", source, result, "-q"], check=True, stdout=subprocess.DEVNULL)
                found = watched(list(map(str, [*command, "evaluate", source, result, *options])))
                record.write(case="evaluate", kl=json.loads(found.pop("output"))["results"][0]["kl"], **common, **found)
            if given.whole:
                found = watched([sys.executable, "-c", WHOLE, str(source), str(tokens)])
                del found["output"]
                record.write(case="whole model", **common, **found)
            if given.work is None:
                shutil.rmtree(source)
                shutil.rmtree(result, ignore_errors=True)


if __name__ == "__main__":
    main()
