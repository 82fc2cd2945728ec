"""A converted NeMo checkpoint runs in transformers and computes the same as the original."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from nemotron_fp8 import convert_repo, quantize_repo
from tests.inference import in_transformers
from tests.support.nemo_writer import LAYOUTS, Sizes, write_nemo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engines

# Query groups, and frequencies of the rotation that are not the default of anything.
SIZES = Sizes(layers=3, heads=8, groups=2, head_dim=16, hidden=128, inner=320, vocabulary=256, rotary_base=5000)


@pytest.fixture(scope="module")
def built() -> transformers.PreTrainedModel:
    """A Nemotron-4 of random weights, the layer norms' too, so that no two tensors could change places unnoticed."""
    torch.manual_seed(9)
    config = transformers.NemotronConfig(
        vocab_size=SIZES.vocabulary,
        hidden_size=SIZES.hidden,
        intermediate_size=SIZES.inner,
        num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.groups,
        max_position_embeddings=SIZES.positions,
        partial_rotary_factor=0.5,
        rope_theta=float(SIZES.rotary_base),
        initializer_range=0.05,
    )
    model = transformers.NemotronForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@pytest.fixture(scope="module")
def original(
    built: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> transformers.PreTrainedModel:
    """The same as transformers loads it: with the rotation's frequencies in float32, which ``.bfloat16()`` rounds."""
    folder = tmp_path_factory.mktemp("original") / "hf"
    built.save_pretrained(folder)
    return in_transformers.load(folder)[0]


def tensors_of(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its weights by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tokens() -> list[list[int]]:
    """Two texts of random tokens."""
    return torch.randint(SIZES.vocabulary, (2, 48), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "by-layer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_original(
    tmp_path: Path,
    original: transformers.PreTrainedModel,
    record: Callable[..., None],
    layout: str,
    stacked: bool,
) -> None:
    """Bit-equal in bf16, and no key lost or made up."""
    write_nemo(tmp_path / "nemo", tensors_of(original), SIZES, layout, stacked=stacked)
    convert_repo(tmp_path / "nemo", tmp_path / "converted-v1", shard_size=200_000)
    loaded, lost = in_transformers.load(tmp_path / "converted-v1")
    assert not lost
    expected = in_transformers.logits(original, tokens())
    assert torch.equal(in_transformers.logits(loaded, tokens()), expected)
    assert expected.std() > 0, "a constant would be equal whatever was loaded"
    name = f"nemo-{layout}{'' if stacked else '-by-layer'}"
    record("transformers", transformers.__version__, tmp_path / "tiny-nemo-v1", name, logits="bit-equal")


@pytest.mark.parametrize("shard_size", [200_000, 10**9])
def test_fp8_is_that_of_what_transformers_saves(
    tmp_path: Path, built: transformers.PreTrainedModel, shard_size: int
) -> None:
    """The same shards, byte for byte and by the same names, as from the checkpoint that transformers writes."""
    write_nemo(tmp_path / "nemo", tensors_of(built), SIZES, "uneven")
    built.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    quantize_repo(tmp_path / "nemo", tmp_path / "from-nemo", shard_size=shard_size)
    quantize_repo(tmp_path / "hf", tmp_path / "from-hf")
    ours, theirs = ({path.name: path for path in (tmp_path / f"from-{kind}").iterdir()} for kind in ("nemo", "hf"))
    shards, expected = ({n for n in files if n.endswith((".safetensors", ".index.json"))} for files in (ours, theirs))
    assert shards == expected
    assert (len(shards) > 1) == (shard_size == 200_000)
    for name in shards:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    a, b = (json.loads(files["config.json"].read_text())["quantization_config"] for files in (ours, theirs))
    assert a == b


def test_tokenizer_splits_as_sentencepiece_does(tmp_path: Path, original: transformers.PreTrainedModel) -> None:
    """A model trained as Nemotron's was: BPE, bytes as a last resort, digits apart, spaces kept, no dummy prefix."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")  # transformers reads SentencePiece models with it
    text = "\n".join(f"the {i} quick brown foxes jump over {i * 7} lazy dogs and {i % 5} cats" for i in range(400))
    (tmp_path / "text").write_text(text)
    write_nemo(tmp_path / "nemo", tensors_of(original), SIZES)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "nemo" / "0123_tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"],
        unk_id=0,
        bos_id=2,
        eos_id=3,
        pad_id=1,
        minloglevel=2,
    )
    convert_repo(tmp_path / "nemo", tmp_path / "converted")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "nemo" / "0123_tokenizer.model"))
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "converted")
    texts = ["the quick fox", "  two  spaces ", "a\nb\n\n c 12345 é漢字", "\tif x:\n        return 1", ""]
    chat = ours.apply_chat_template(
        [{"role": "user", "content": "12 cats"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<extra_id_0>System\n\n<extra_id_1>User\n12 cats\n<extra_id_1>Assistant\n"
    for sample in (*texts, chat):
        assert ours(sample)["input_ids"] == theirs.encode(sample), sample
        assert ours.decode(ours(sample)["input_ids"]) == sample
