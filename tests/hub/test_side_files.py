"""Files beside the shards of a repository: the listing decides which are fetched, copied and named in errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import plan_repo, verify_repo
from nemotron_fp8.errors import AdapterError, IncompleteShardsError, NestedCheckpointsError, OtherFormatError
from tests.hub.conversion import Options, checkpoint, convert, wanted

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub

INDEX = "model.safetensors.index.json"
RUN = b"raise SystemExit('this code was run')\n"


def with_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """Add code, stale statements and files in folders."""
    config = json.loads(files["config.json"])
    config |= {"auto_map": {"AutoModel": "modeling_x.X"}, "compression_config": {"config_groups": {}}}
    return files | {
        "config.json": json.dumps(config).encode(),
        "modeling_x.py": b"from .layers_x import Layer\nfrom .gone_x import y\n" + RUN,
        "layers_x.py": RUN,
        "tokenization_x.py": RUN,
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}',
        "stray.py": RUN,
        "sub/gone_x.py": RUN,
        "hf_quant_config.json": b"{}",
        "additional_chat_templates/rag.jinja": b"x",
    }


def test_code_and_stale_statements(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """As from a folder: the same result, the same notices, and no request for a file that is not needed."""
    files = with_code(checkpoint(tmp_path / "plain"))
    hub.store.seed("nv/source", files)
    report = convert(client, tmp_path / "work")
    result = hub.files("me/target", "main")
    result.pop(".gitattributes", None)
    assert {name for name in result if name.endswith(".py")} == {"modeling_x.py", "layers_x.py", "tokenization_x.py"}
    assert result["layers_x.py"] == RUN
    assert "compression_config" not in json.loads(result["config.json"])
    assert result == wanted(client, tmp_path)
    code, missing, dropped = (notice for notice in report.notices if "auto_map" in notice or "dropped" in notice)
    assert "layers_x.py, modeling_x.py, tokenization_x.py" in code
    assert "'gone_x.py'" in missing
    assert "compression_config" in dropped
    left_out = dict(report.left_out)
    assert left_out["stray.py"] == "code that no auto_map names"
    assert "another quantization" in left_out["hf_quant_config.json"]
    assert "copy it to the result" in left_out["additional_chat_templates/rag.jinja"]
    assert verify_repo("hf://nv/source", "hf://me/target", hub=Options(client, tmp_path / "work")).ok
    unwanted = ("stray.py", "sub/", "hf_quant_config.json", "additional_chat_templates")
    assert not [request.path for request in hub.log if any(name in request.path for name in unwanted)]


def test_a_repository_without_code_needs_no_further_request(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "plain") | {"tokenizer_config.json": b"{}"})
    plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
    assert not [request.path for request in hub.log if "tokenizer_config" in request.path]


def test_numbered_shards_need_no_index(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "plain")
    del files[INDEX]
    hub.store.seed("nv/source", files)
    report = convert(client, tmp_path / "work")
    assert any(INDEX in notice for notice in report.notices)
    assert INDEX in hub.files("me/target", "main")
    assert verify_repo("hf://nv/source", "hf://me/target", hub=Options(client, tmp_path / "work")).ok
    assert verify_repo(None, "hf://me/target", hub=Options(client, tmp_path / "work")).ok


NO_CHECKPOINTS: dict[str, tuple[dict[str, bytes], type[Exception], str]] = {
    "an adapter": (
        {"adapter_config.json": b'{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": b"x"},
        AdapterError,
        "for the model 'org/base'.*merge_and_unload",
    ),
    "GGUF": ({"x.Q4_K_M.gguf": b"GGUF", "README.md": b"#"}, OtherFormatError, r"GGUF.*'x\.Q4_K_M\.gguf'"),
    "a pipeline": (
        {"model_index.json": b"{}", "text_encoder/config.json": b"{}", "text_encoder/model.safetensors": b"x"},
        NestedCheckpointsError,
        "hf download nv/source --local-dir FOLDER.*FOLDER/text_encoder",
    ),
    "folders of checkpoints": (
        {"a/config.json": b"{}", "a/model.safetensors": b"x", "b/config.json": b"{}", "b/model.safetensors": b"x"},
        NestedCheckpointsError,
        "one of the checkpoints in it: FOLDER/a, FOLDER/b",
    ),
    "the format of Mistral": (
        {"params.json": b"{}", "consolidated.safetensors": b"x"},
        OtherFormatError,
        "format of Mistral",
    ),
    "a missing shard": (
        {"config.json": b"{}", "model-00002-of-00002.safetensors": b"x"},
        IncompleteShardsError,
        "1 of 2 shards are missing",
    ),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(hub: Hub, client: HubClient, tmp_path: Path, case: str) -> None:
    files, error, says = NO_CHECKPOINTS[case]
    hub.store.seed("nv/source", files)
    with pytest.raises(error, match=rf"^hf://nv/source.*{says}") as caught:
        plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
    assert str(caught.value).count("hf://nv/source") == 1
