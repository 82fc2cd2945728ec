"""Every mistake on the command line gives one ``error:`` line with cause, place and advice, and leaves no files."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import quantize_repo
from nemotron_fp8.cli.main import main
from tests.support.breaks import pointer, put
from tests.support.checkpoints import INDEX, edit_json, model, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

FIRST = "model-00001-of-00002.safetensors"


POINTERS = {"lfsshard": FIRST, "lfsindex": INDEX, "lfsconfig": "config.json", "lfstokenizer": "tokenizer.json"}
QUANTIZED = ("awq", "gptq", "bitsandbytes")
SHA = "0123456789abcdef0123456789abcdef01234567"


def no_checkpoints(root: Path) -> None:
    """Make files and folders that are taken for checkpoints."""
    one = {"model.safetensors": model()[FIRST]}
    write_checkpoint(root / "pipeline" / "text_encoder", one)
    (root / "pipeline" / "model_index.json").write_text("{}")
    (root / "pipeline" / "unet").mkdir()
    (root / "pipeline" / "unet" / "config.json").write_text("{}")
    (root / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    write_checkpoint(root / "models--org--one" / "snapshots" / SHA, one)
    for revision in ("aaa", "bbb"):
        write_checkpoint(root / "models--org--two" / "snapshots" / revision, one)
        write_checkpoint(root / "runs" / revision, one)
    (root / "models--org--two" / "refs").mkdir()
    (root / "models--org--two" / "refs" / "main").write_text("bbb")
    (root / "models--org--none" / "blobs").mkdir(parents=True)
    (root / "models--org--none" / "snapshots").mkdir()
    for folder, files in {
        "adapter": {
            "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
            "adapter_model.safetensors": b"",
        },
        "gguf": {"model-Q4_K_M.gguf": b"GGUF"},
        "mistral": {"params.json": b"{}", "consolidated.safetensors": b""},
        "tensorflow": {"config.json": b"{}", "tf_model.h5": b""},
    }.items():
        (root / folder).mkdir()
        for name, data in files.items():
            (root / folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, its result, and damaged copies; made once."""
    root = tmp_path_factory.mktemp("wrong") / "world"
    source = write_checkpoint(root / "good", model())
    quantize_repo(source, root / "made", device="cpu")
    for name in ("noindex", "halfindex", "cut", "missing", "badconfig", "badindex", *POINTERS, *QUANTIZED):
        shutil.copytree(source, root / name)
    (root / "noindex" / INDEX).unlink()
    (root / "noindex" / FIRST).rename(root / "noindex" / "first.safetensors")
    (root / "halfindex" / INDEX).unlink()
    (root / "halfindex" / FIRST).unlink()
    for folder, name in POINTERS.items():
        (root / folder / name).write_bytes(pointer(4_976_698_672))
    for method in QUANTIZED:
        edit_json(root / method / "config.json", quantization_config={"quant_method": method})
        put(root / method, FIRST, **{"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)})
    no_checkpoints(root)
    (root / "missing" / FIRST).unlink()
    (root / "badconfig" / "config.json").write_text("{")
    (root / "badindex" / INDEX).write_text('{"weight_map": ')
    with (root / "cut" / FIRST).open("r+b") as file:
        file.truncate(1000)
    for name in ("empty", "full", "pickled"):
        (root / name).mkdir()
    (root / "full" / "note.txt").write_text("mine")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (root / "file.txt").write_text("hello")
    return root


@pytest.fixture
def world(_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is the current folder of the commands."""
    shutil.copytree(_world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


# The command, and parts of its error line: the place, and the advice.
WRONG = [
    ("quantze good D", "'quantze'", "mean 'quantize'?"),
    ("vrify good D", "'vrify'", "mean 'verify'?"),
    ("xyzzy", "'xyzzy'", "--help"),
    ("--versoin", "'--versoin'", "--version"),
    ("quantize good D --granularty block", "--granularty", "'--granularity'?"),
    ("quantize good D --in-plce", "--in-plce", "'--in-place'?"),
    ("quantize good D --granularity chanel", "--granularity", "mean 'channel'?"),
    ("quantize good D --format compressed-tensor", "--format", "mean 'compressed-tensors'?"),
    ("quantize good D --numerics orignal", "--numerics", "mean 'original'?"),
    ("quantize good D --nonfinite kep", "--nonfinite", "mean 'keep'?"),
    ("dequantize made D --dtype bf16", "--dtype", "mean 'bfloat16'?"),
    ("quantize good D --threads 0", "--threads", "x>=1"),
    ("quantize good", "destination", "DST"),
    ("quantize good D --in-place", "--in-place", "no DST"),
    ("quantize good D E", "E", "quantize --help"),
    ("convert good", "'DST'", "convert --help"),
    ("quantize good {empty}", "empty", "variable unset"),
    ("quantize good D --format fp8 --granularity channel", "'fp8'", "use format 'compressed-tensors'"),
    ("quantize good D --format fp8 --activations none", "'fp8'", "use format 'compressed-tensors'"),
    ("quantize good D --share-scales", "share_scales", "needs granularity 'tensor'"),
    ("quantize good D --force-select", "force_select", "name the weights with select"),
    ("quantize good D --selection nvidia", "selection", "use selection 'default'"),
    ("quantize good D --selection nvida", "--selection", "mean 'nvidia'?"),
    ("quantize good D --share-scales --granularity block", "share_scales", "needs granularity 'tensor'"),
    ("quantize good D --select (", "'('", "regular expression"),
    ("quantize good D --select nothing_like_it", "--select 'nothing_like_it'", "names look like"),
    ("quantize good D --also-select ffn.dwn_proj", "--also-select 'ffn.dwn_proj'", "did you mean down_proj"),
    ("quantize good D --ignore k_prj", "--ignore 'k_prj'", "did you mean k_proj"),
    ("quantize good D --select lm_head", "good", "check the --select patterns"),
    ("quantize NONE D", "NONE", "hf://owner/name"),
    ("quantize goood D", "goood", "mean good?"),
    ("verify goood", "goood", "mean good?"),
    ("verify file.txt", "file.txt", "a file, not a folder; name the folder that contains it"),
    ("inspect goood", "goood", "mean good?"),
    ("report goood", "goood", "mean good?"),
    ("quantize empty D", "empty", "name a checkpoint folder"),
    ("quantize file.txt D", "file.txt", "neither a folder nor a .safetensors or .nemo file"),
    ("inspect file.txt", "file.txt", "at least 8"),
    ("quantize pickled D", "pytorch_model.bin", "convert them to safetensors"),
    ("quantize noindex D", INDEX, "fetch the index again"),
    ("quantize halfindex D", f"1 of 2 shards are missing ('{FIRST}')", "fetch the checkpoint again"),
    ("quantize missing D", FIRST, "fetch the shard again"),
    (f"quantize good/{FIRST} D", "one of 2 shards", "pass the folder good"),
    ("quantize good/config.json D", "good/config.json", "pass the folder that contains it"),
    *((f"quantize {folder} D", f"{name!r}: a Git LFS pointer", "git lfs pull") for folder, name in POINTERS.items()),
    (f"inspect lfsshard/{FIRST}", "4,976,698,672 bytes", "git lfs pull"),
    ("quantize adapter D", "an adapter", "merge_and_unload()"),
    ("quantize adapter/adapter_model.safetensors D", "for the model 'org/base'", "merge_and_unload()"),
    ("dequantize adapter D", "an adapter", "merge_and_unload()"),
    ("quantize gguf D", "GGUF files of llama.cpp ('model-Q4_K_M.gguf')", "pass the checkpoint"),
    ("quantize gguf/model-Q4_K_M.gguf D", "a GGUF file of llama.cpp", "pass the checkpoint"),
    ("quantize pipeline D", "a diffusers pipeline", "pass the checkpoint in it: pipeline/text_encoder"),
    ("quantize models--org--one D", "Hub cache", f"pass the checkpoint in it: models--org--one/snapshots/{SHA}"),
    ("quantize models--org--one/snapshots D", "Hub cache", f"in it: models--org--one/snapshots/{SHA}"),
    ("plan models--org--two", "Hub cache", "pass one of the checkpoints in it: models--org--two/snapshots/bbb, models"),
    ("quantize models--org--none D", "Hub cache", "holds no checkpoint"),
    ("quantize runs D", "runs", "pass one of the checkpoints in it: runs/aaa, runs/bbb"),
    ("quantize mistral D", "weights in the format of Mistral", "convert_mistral_weights_to_hf.py"),
    ("quantize tensorflow D", "'tf_model.h5'", "save_pretrained"),
    *((f"quantize {method} D", f"quant_method '{method}'", "undo it with") for method in QUANTIZED),
    *((f"dequantize {method} D", f"quant_method '{method}'", "start from the original") for method in QUANTIZED),
    ("quantize cut D", FIRST, "fetch the file again"),
    ("quantize badconfig D", "config.json", "fetch the file again"),
    ("quantize badindex D", INDEX, "fetch the file again"),
    ("quantize made --in-place --ignore down_proj", "made", "nemotron-fp8 dequantize"),
    ("quantize made D --nonfinite keep", "nonfinite 'keep'", "--nonfinite error"),
    ("dequantize good D", "good", "nothing to dequantize"),
    ("quantize good full", "full", "(--overwrite)"),
    ("quantize good made --granularity tensor --format fp8", "made", "(--overwrite)"),
    ("quantize good good", "good", "choose a separate folder"),
    ("quantize good good/inside", "good", "choose a separate folder"),
    ("quantize good file.txt/inside", "file.txt", "choose another destination"),
    ("quantize good /proc/D", "/proc/D", "choose a destination"),
    ("quantize good D --max-memory 10", "_proj.weight'", "raise max_memory (--max-memory)"),
    ("quantize good D --max-memory lots", "'lots'", "256MiB"),
    ("quantize good D --device gpu", "'gpu'", "cuda:N"),
    ("quantize good D --shard-size 5GB", "shard size", "NeMo"),
    ("quantize good D --revision main", "--revision", "address"),
    ("quantize good D --base-model foo", "'foo'", "owner/name"),
    ("quantize hf://owner D", "'hf://owner'", "hf://owner/name"),
    ("quantize hf://owner/name D --token-env NO_SUCH_VARIABLE", "'NO_SUCH_VARIABLE'", "not set"),
    ("quantize good hf://owner/name/more", "'hf://owner/name/more'", "hf://owner/name"),
    ("report made --html full", "full", "name a file"),
    ("report made --html none/report.html", "none/report.html", "create it first"),
    ("report made --html made/config.json", "made/config.json", "name another file"),
    ("compare made made --html none/report.html", "none/report.html", "create it first"),
    ("verify made good", "are source and destination swapped?", "nemotron-fp8 verify good made"),
    ("report good", "not a result", "to quantize it use quantize"),
    ("compare made good", "good: not a result", "inspect"),
    ("demo full", "full", "name a folder that does not"),
]


@pytest.mark.parametrize(("command", "where", "advice"), WRONG, ids=[command for command, *_ in WRONG])
def test_one_line_says_what_is_wrong_and_nothing_is_left(
    command: str,
    where: str,
    advice: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = everything(world)
    monkeypatch.setattr(sys, "argv", ["nemotron-fp8", *(word.format(empty="") for word in command.split())])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert where in lines[0]
    assert advice in lines[0]
    assert everything(world) == before


def test_without_words_the_help_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nemotron-fp8"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "quantize" in err
    assert "error:" not in err


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_report_that_cannot_be_written_is_refused_before_it_is_made(
    option: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring with a source may take hours, so the files are checked first."""

    def read_summary(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("nemotron_fp8.report.read_summary", read_summary)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = "none/file.html" if option == "--html" else "pictures"
    monkeypatch.setattr(sys, "argv", ["nemotron-fp8", "report", "made", "--source", "good", option, target])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert not (world / target).exists()
