"""Inputs of a Hugging Face checkpoint: headers, JSON files, model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.fuzz.commands import reading
from tests.fuzz.json_mutations import Members, hostile, mutate_json, places, put
from tests.fuzz.shards import change_tensors, mutate_shard
from tests.fuzz.values import is_big, mutate_bytes, pick, text
from tests.fuzz.yaml_mutations import mutate_yaml

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds
    from tests.fuzz.tree import Input

CARD_KEYS = (
    "license", "license_name", "license_link", "language", "tags", "base_model", "base_model_relation", "library_name",
    "pipeline_tag", "datasets", "metrics", "model-index", "quantized_by", "extra_gated_prompt", "widget", "inference",
    "<<", "'a b'", "? a", "1", "null", "[a]", "{a: b}", "!!str a", "true", "2001-01-01", "=", "'\\ud800'",
)  # fmt: skip
BEGIN, END = "<!-- nemotron_fp8: begin -->", "<!-- nemotron_fp8: end -->"


def header(chance: Random, seeds: Seeds) -> Input:
    """Change the header, the length or the data of a shard."""
    source = dict(pick(chance, (seeds.source, seeds.source, seeds.moe)))
    name = pick(chance, [name for name in source if name.endswith(".safetensors")])
    data = source[name]
    assert isinstance(data, bytes)
    source[name] = mutate_shard(chance, data) if chance.random() < 0.6 else change_tensors(chance, data)
    if chance.random() < 0.3:  # so that the header alone decides
        source.pop("model.safetensors.index.json", None)
    return reading(chance, source, seeds)


JSON_FILES = {
    "config.json": None,
    "model.safetensors.index.json": ("metadata", "weight_map", "total_size", "x"),
    "tokenizer_config.json": ("auto_map", "tokenizer_class", "chat_template", "added_tokens_decoder"),
    "generation_config.json": ("eos_token_id",),
    "adapter_config.json": ("peft_type", "base_model_name_or_path", "auto_map"),
}


def json_file(chance: Random, seeds: Seeds) -> Input:
    """Change one of the JSON files."""
    source = dict(pick(chance, (seeds.source, seeds.source, seeds.moe, seeds.tensor_result)))
    name = pick(chance, [*JSON_FILES, "config.json", "config.json", "model.safetensors.index.json"])
    old = source.get(name, b'{"peft_type": "LORA", "base_model_name_or_path": "owner/name", "a": [1]}')
    assert isinstance(old, bytes)
    if name == "adapter_config.json" and chance.random() < 0.5:
        source = {key: node for key, node in source.items() if "safetensors" not in key}
        source["adapter_model.safetensors"] = b"\x02" + bytes(7) + b"{}"
    if name == "model.safetensors.index.json":
        old = seeds.source[name]  # type: ignore[assignment]  # a file
        source.pop("model.safetensors", None)

    def rename(tree: Any) -> None:
        shards = [place for place in places(tree) if isinstance(_value(place), str)]
        put(pick(chance, shards), text(chance) if chance.random() < 0.8 else hostile(chance))

    change = rename if name.endswith("index.json") else None
    keys = JSON_FILES[name]
    source[name] = mutate_json(chance, old, keys, change) if keys else mutate_json(chance, old)
    return reading(chance, source, seeds)


def _value(place: Any) -> Any:
    parent, at = place
    return parent[at][1] if isinstance(parent, Members) else parent[at]


def card(chance: Random, seeds: Seeds) -> Input:
    """Change the model card: its front matter, its text, the marks in it."""
    source = dict(seeds.source)
    old = source["README.md"]
    assert isinstance(old, bytes)
    _, front, rest = old.decode().split("---\n", 2)
    kind = chance.random()
    if kind < 0.75:
        front = mutate_yaml(chance, front, CARD_KEYS)
        fence = pick(
            chance, ("---\n",) * 8 + ("--- \n", "---\t\n", "---\r\n", "--- x\n", "----\n", "---", "...\n", "\n---\n")
        )
        made = f"{pick(chance, ('',) * 6 + (' ', chr(10) * 3, chr(0xFEFF), 'x'))}{fence}{front}{fence}{rest}"
    elif kind < 0.9:
        count = pick(chance, (1, 2, 10, 3000, 20_000))
        made = pick(
            chance,
            (
                lambda: old.decode() + f"{BEGIN}\n" * count,
                lambda: f"{BEGIN}x{END}\n" * count + old.decode(),
                lambda: old.decode() + f"{END}{BEGIN}" * count,
                lambda: "\n" * count + old.decode(),
                lambda: "---\n" * count,
                lambda: "---\n" + "---\n\n" * count,
                lambda: "---\n" + " " * count + "\n" + "--- " * count,
                lambda: "---\na: b\n" + ("--- " * 3 + "\n") * count,
                lambda: "---" + " " * count + "\n---" + "\t" * count,
                lambda: "{" * 200_000,
                lambda: "---\n" + "{" * 200_000 + "\n---\n",
                lambda: old.decode() + "x" * (1 << 22 if is_big(chance) else count),
                lambda: old.decode() + (BEGIN[:-1] + " ") * count,
                lambda: old.decode() + "\x1b[2J\u202e\0" * count,
            ),
        )()
    else:
        source["README.md"] = mutate_bytes(chance, old)
        return reading(chance, source, seeds)
    source["README.md"] = made.encode("utf-8", "surrogateescape" if chance.random() < 0.5 else "surrogatepass")
    return reading(chance, source, seeds)
