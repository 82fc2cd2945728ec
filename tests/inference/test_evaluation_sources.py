"""Source and results are read wherever they are: on the Hub by range, and from NeMo checkpoints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import evaluate_repo, quantize_repo
from nemotron_fp8.errors import SampleError
from nemotron_fp8.hub.client import HubClient
from nemotron_fp8.hub.options import HubOptions
from tests.hub_server.fixtures import TOKEN, hub, server  # noqa: F401  # fixtures
from tests.inference.test_evaluation_device import figures
from tests.inference.test_nemo import SIZES, built, tensors_of  # noqa: F401  # a fixture
from tests.support.nemo_writer import write_nemo

if TYPE_CHECKING:
    from pathlib import Path

    import transformers

    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

pytestmark = pytest.mark.engines


def write_tokens(path: Path, words: int) -> Path:
    draw = torch.Generator().manual_seed(5)
    path.write_text(json.dumps(torch.randint(3, words, (3, 32), generator=draw).tolist()))
    return path


def without_names(evaluation: Any) -> dict[str, Any]:
    found = figures(evaluation)
    for each in (found["source"], *found["results"]):
        del each["name"], each["digest"]
    return found


def test_on_the_hub(
    hub: Hub,  # noqa: F811  # the fixture of this name
    server: HubServer,  # noqa: F811  # the fixture of this name
    nemotron: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By range, without a file on disk: the figures of folders."""
    monkeypatch.setenv("TEST_HUB_TOKEN", TOKEN)

    class Options(HubOptions):
        def client(self) -> HubClient:
            return HubClient("TEST_HUB_TOKEN", server.endpoint)

    quantize_repo(nemotron, tmp_path / "fp8")
    for name, folder in (("nv/source", nemotron), ("me/fp8", tmp_path / "fp8")):
        hub.store.seed(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    tokens = write_tokens(tmp_path / "tokens.json", 500)
    arguments: dict[str, Any] = {"tokens": tokens, "state_dir": tmp_path / "state", "device": "cpu"}
    expected = without_names(evaluate_repo(nemotron, tmp_path / "fp8", **arguments))
    options = Options(cache_dir=tmp_path / "cache", revision="main")  # the revision is that of the source
    for result in ("hf://me/fp8", tmp_path / "fp8"):
        assert without_names(evaluate_repo("hf://nv/source", result, hub=options, **arguments)) == expected
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("layout", ["whole", "uneven"])
def test_of_nemo(
    layout: str,
    built: transformers.PreTrainedModel,  # noqa: F811  # the fixture of this name
    tmp_path: Path,
) -> None:
    """A NeMo checkpoint has the figures of the Hugging Face checkpoint that it converts to."""
    write_nemo(tmp_path / "nemo", tensors_of(built), SIZES, layout)
    built.save_pretrained(tmp_path / "hf")
    quantize_repo(tmp_path / "nemo", tmp_path / "fp8")
    tokens = write_tokens(tmp_path / "tokens.json", SIZES.vocabulary)
    arguments: dict[str, Any] = {"tokens": tokens, "state_dir": tmp_path / "state", "device": "cpu"}
    found = evaluate_repo(tmp_path / "nemo", [tmp_path / "fp8", tmp_path / "hf"], **arguments)
    assert without_names(found)["results"][1]["kl"] == 0
    assert found.results[0].kl > 0


def test_without_a_tokenizer(nemotron: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"has no files of a tokenizer; pass tokens \(--tokens\)"):
        evaluate_repo(nemotron, nemotron, state_dir=tmp_path / "state")
