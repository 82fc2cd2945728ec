"""Files of a checkpoint: shards, tensors, index, config and side files."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint import model_code, tensor_view
from nemotron_fp8.checkpoint.stated_quantization import (
    are_unquantized,
    is_remnant,
    method_of,
    stated,
    states_quantization,
    without_statements,
)
from nemotron_fp8.errors import (
    IncompleteShardsError,
    IndexMismatchError,
    MalformedConfigError,
    MalformedIndexError,
    MalformedManifestError,
    MissingShardError,
    SourceNotFoundError,
    printable,
)
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.tensor_view import TensorView


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "nemotron_fp8.json"
"""Name of the manifest, which lists the files of a result with their digests."""
STACKS = "stacks"
"""Key of the manifest's source: stacks of experts that were split, each with the order of an expert's sides."""
UPRIGHT, TRANSPOSED = "[out, in]", "[in, out]"
STATS = "nemotron_fp8.stats.json"
"""Name of the file with the statistics of every tensor of a result (``--stats``)."""
AMAXES = "nemotron_fp8.amaxes.json"
"""Name of the file with the amaxes of the calibration whose scales a result stores."""
RECORDS = (MANIFEST, STATS, AMAXES)
"""Files of a conversion that are about its weights."""
CARD = "README.md"
"""Name of the model card. The card of a result contains the text of the source's card."""
MAX_CARD_BYTES = 4 << 20
"""Size cap of a model card, in bytes; a longer card is left out."""
TEMPLATES = "additional_chat_templates"
"""Name of the folder with further chat templates. Source: ``CHAT_TEMPLATE_DIR`` of transformers."""
ADAPTER_CONFIG = "adapter_config.json"
"""Name of the config of an adapter (LoRA), beside its weights."""
MARKER = "nemotron_fp8.unfinished"
"""Name of the marker file of an unfinished in-place conversion."""

SIDE_FILE = re.compile(
    r"^(?:[^.].*\.(?:json|jinja|model|model\.v\d+|spm|txt|md|tiktoken|yaml|yml|vocab|bpe|codes)"
    r"|(?:license|notice|copying)[^/]*)$",
    re.IGNORECASE,
)
"""Names of files that are copied: tokenizers, processors, generation config, chat templates, licenses, cards."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS = (".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".tflite", ".ot", ".nemo", ".npz", ".npy")
MAX_SIDE_BYTES = 1 << 30
"""Size cap of one side file, in bytes; the largest tokenizers have tens of MB."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Weight file of a checkpoint.

    Attributes:
        name: file name.
        size: bytes of the file.
        metadata: ``__metadata__`` as pairs; None without metadata.
        views: tensors in file order.
    """

    name: str
    size: int
    metadata: tuple[tuple[str, str], ...] | None
    views: tuple[TensorView, ...]


@dataclass(frozen=True, slots=True)
class SideFile:
    """File that is copied to the result.

    Attributes:
        name: file name in the result.
        size: bytes of the file.
        file: the source's own key of the file that contains it; None if that is its name.
        offset: first byte in that file.
    """

    name: str
    size: int
    file: str | None = None
    offset: int = 0


class SplitStack(NamedTuple):
    """A stack of experts that was split into single experts.

    Attributes:
        name: name of the stack in the source.
        transposed: True if it was stored ``[in, out]``.
        packed: True if its elements were packed; it is not dequantized as a stack, whose rows have another order.
    """

    name: str
    transposed: bool
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Inventory:
    """Contents of a source.

    Attributes:
        source: name of the source in messages.
        shards: weight files, in the order of their names.
        index_metadata: ``metadata`` of the index; None without an index.
        config: config.json, keys in order; None without a config.
        side_files: files to copy.
        left_out: names of files that are not copied, each with the reason.
        made: small files that the source lacks and the result needs, by name (a tokenizer config derived from
            another format's settings).
        notices: notices for the user.
        card: model card; None without a card.
        origin: name of the model on the Hub, ``owner/name``; None if unknown.
        commit: commit of that repository; None if unknown.
        stacks: stacks of experts that were split: by this plan, or, for the result of an earlier conversion, as its
            manifest records them.
        opener_bytes: bytes that the opener holds in memory while the source is read (decoded chunks).
    """

    source: str
    shards: tuple[Shard, ...]
    index_metadata: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    side_files: tuple[SideFile, ...]
    left_out: tuple[tuple[str, str], ...]
    made: tuple[tuple[str, bytes], ...] = ()
    notices: tuple[str, ...] = ()
    card: bytes | None = None
    origin: str | None = None
    commit: str | None = None
    opener_bytes: int = 0
    stacks: tuple[SplitStack, ...] = ()

    @property
    def views(self) -> list[TensorView]:
        """Tensors of all shards, shard by shard."""
        return [v for shard in self.shards for v in shard.views]

    @property
    def quantization_config(self) -> object:
        """``quantization_config`` of config.json or of a config in it, of any type; None without one."""
        top = (self.config or {}).get("quantization_config")
        return top if top is not None else next((value for _, value in stated(self.config)), None)


def stacks_of(manifest: bytes) -> tuple[SplitStack, ...]:
    """Return the stacks that the manifest of a result records as split; none if it cannot be read.

    A manifest that was changed is no error here: verification reports it.
    """
    try:
        source = strict_json.load_object(manifest, MANIFEST, MalformedManifestError).get("source")
    except MalformedManifestError:
        return ()
    found = source.get(STACKS) if isinstance(source, dict) else None
    if not isinstance(found, dict) or not all(kind in (UPRIGHT, TRANSPOSED) for kind in found.values()):
        return ()
    return tuple(SplitStack(name, kind == TRANSPOSED) for name, kind in found.items())


def is_card(name: str, size: int) -> bool:
    """Return True if a file is a model card that the result's card includes; a size below 0 means a missing file."""
    return name == CARD and 0 <= size <= MAX_CARD_BYTES


def assemble(
    source: str,
    shards: tuple[Shard, ...],
    weight_map: Mapping[str, str] | None,
    index_metadata: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    side_files: tuple[SideFile, ...],
    left_out: tuple[tuple[str, str], ...],
) -> Inventory:
    """Check shards against the index, and return the inventory of the shards and files.

    The result of numbered shards has an index, also if the source has none: transformers needs it.

    Raises:
        IndexMismatchError: index and shards disagree, or two shards hold a tensor of one name.
    """
    check_index(shards, weight_map)
    notices: tuple[str, ...] = ()
    if weight_map is None and any(numbered_shards(shard.name) for shard in shards):
        index_metadata = {}
        notices = (f"the source has no {INDEX}; the result has one, made from the headers of {len(shards)} shards",)
    return Inventory(source, shards, index_metadata, config, side_files, left_out, notices=notices)


def without_remnants(inventory: Inventory) -> Inventory:
    """Return an inventory whose config states no quantization that its tensors lack, with a notice.

    The config is unchanged if a tensor is quantized, if a method may compute with unquantized tensors, or if the model
    itself states a quantization, which is refused: only its author knows what it means.
    """
    statements = list(stated(inventory.config))
    if inventory.config is None or not all(is_remnant(statement) for _, statement in statements):
        return inventory
    if any(place == "quantization_config" for place, _ in statements):
        return inventory
    config = without_statements(inventory.config)
    if config == inventory.config or not are_unquantized(inventory.views):
        return inventory
    notices = inventory.notices
    if statements:
        found = listed([f"{printable(place)[1:-1]} ({method_of(statement)})" for place, statement in statements])
        notices += (f"{CONFIG} of the source states a quantization that its tensors do not have; dropped: {found}",)
    return replace(inventory, config=config, notices=notices)


def make_shard(name: str, header: Header, size: int) -> Shard:
    """Return a shard with the views of its tensors."""
    views = tuple(tensor_view.of_entry(name, entry, header.data_start) for entry in header.entries)
    return Shard(name, size, header.metadata, views)


def load_config(data: bytes) -> dict[str, Any]:
    """Parse config.json; keys keep their order.

    Raises:
        MalformedConfigError: the bytes are not a JSON object.
    """
    return strict_json.load_object(data, CONFIG, MalformedConfigError)


def load_index(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse an index; return its metadata and its checked weight_map, which names plain files only.

    Raises:
        MalformedIndexError: the bytes are not an index, or a name in it is not a plain ``.safetensors`` file.
    """
    return read_index(parse_index(data))


def parse_index(data: bytes) -> dict[str, Any]:
    """Parse an index as a JSON object.

    Raises:
        MalformedIndexError: the bytes are not a JSON object.
    """
    return strict_json.load_object(data, INDEX, MalformedIndexError)


def read_index(index: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the checked values of a parsed index, as `load_index`."""
    with guarded(lambda problem: MalformedIndexError(INDEX, problem)):
        return _checked_index(index)


def _checked_index(index: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Check the values of a parsed index."""
    weight_map = index.get("weight_map")
    if type(weight_map) is not dict:
        raise MalformedIndexError(INDEX, "weight_map is missing or not an object")
    checked: set[str] = set()
    for tensor, shard in weight_map.items():
        if type(shard) is str and shard in checked:
            continue
        if type(shard) is not str or not is_plain_name(shard):
            raise MalformedIndexError(
                INDEX,
                f"weight_map places tensor {printable(tensor)} in {printable(str(shard))}, not a plain file name",
            )
        if not shard.endswith(".safetensors"):
            raise MalformedIndexError(
                INDEX,
                f"weight_map places tensor {printable(tensor)} in {printable(shard)}, not a .safetensors file",
            )
        checked.add(shard)
    folded = Counter(name.casefold() for name in set(weight_map.values()))
    for name in sorted(set(weight_map.values())):
        if folded[name.casefold()] > 1:
            raise MalformedIndexError(
                INDEX, f"shard names differ only in upper and lower case, like {printable(name)}; rename one of them"
            )
    metadata = index.get("metadata")
    if metadata is not None and type(metadata) is not dict:
        raise MalformedIndexError(INDEX, "metadata is not an object")
    return metadata or {}, weight_map


_DEVICES = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)


def is_plain_name(name: str) -> bool:
    """Return True if a name is valid for a visible file in a folder, by the rules of POSIX and of Windows."""
    return (
        0 < len(name.encode("utf-8", "surrogatepass")) <= 255
        and name[0] not in ".~ "
        and name[-1] not in ". "
        and name.isprintable()
        and not any(c in '/\\:*?"<>|' for c in name)
        and not _DEVICES.match(name)
    )


_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
"""Name of a shard as transformers writes it: stem, number from 1 on, number of shards."""


def is_adapter(name: str) -> bool:
    """Return True if a file belongs to an adapter (LoRA) in the format of peft."""
    return name == ADAPTER_CONFIG or name.startswith("adapter_model.")


def mistral_weights(names: Collection[str]) -> tuple[str, ...]:
    """Return the weights in the format of Mistral, which has ``params.json`` and its own names of tensors."""
    if "params.json" not in names:
        return ()
    return tuple(name for name in names if re.fullmatch(r"consolidated[-.\dof]*\.safetensors", name))


def model_weights(names: Collection[str]) -> list[str]:
    """Return the files that may be shards of a model in the format of transformers."""
    other = mistral_weights(names)
    return [
        name
        for name in names
        if name.endswith(".safetensors") and is_plain_name(name) and not is_adapter(name) and name not in other
    ]


def numbered_shards(name: str) -> tuple[str, ...]:
    """Return the names of all shards of a checkpoint, from a name like ``model-00001-of-00002.safetensors``.

    Return an empty tuple for any other name, also for one whose number exceeds the number of shards.
    """
    found = _NUMBERED.fullmatch(name)
    if found is None or not 1 <= int(found.group(2)) <= int(found.group(3)):
        return ()
    stem, _, total = found.groups()
    return tuple(f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1))


def shards_beside(shard: str, weight_map: Mapping[str, str] | None) -> int:
    """Return the number of shards of the checkpoint that a shard belongs to, by the index or by its name."""
    listed = set((weight_map or {}).values())
    return len(listed) if shard in listed else max(1, len(numbered_shards(shard)))


def shards_of(source: str, names: Collection[str], weight_map: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return the weight files among ``names``, in order; without an index, one of `model_weights` at least.

    Raises:
        MissingShardError: the index names a shard that is missing.
        MalformedIndexError: the index lists no tensor.
        IncompleteShardsError: shards are missing by the names of the others, and there is no index.
        SourceNotFoundError: several files of weights without an index, and their names do not number them.
    """
    if weight_map is not None:
        counts = Counter(weight_map.values())
        for shard in sorted(counts):
            if shard not in names:
                raise MissingShardError(shard, counts[shard], INDEX)
        if not counts:
            raise MalformedIndexError(INDEX, "weight_map is empty")
        return tuple(sorted(counts))
    found = model_weights(names)
    if SINGLE in found:
        return (SINGLE,)
    expected, there = numbered_shards(found[0]), set(found)
    if expected and there <= set(expected):
        if missing := tuple(name for name in expected if name not in there):
            raise IncompleteShardsError(source, missing, len(expected), INDEX)
        return expected
    if len(found) == 1:
        return (found[0],)
    raise SourceNotFoundError(
        source, f"{len(found)} files of weights, but no {INDEX} that lists their tensors; fetch the index again"
    )


def check_index(shards: tuple[Shard, ...], weight_map: Mapping[str, str] | None) -> None:
    """Reject a tensor in two shards, and any difference between the index and the shards.

    Raises:
        IndexMismatchError: the first difference.
    """
    home: dict[str, str] = {}
    for shard in shards:
        for v in shard.views:
            if v.name in home:
                raise IndexMismatchError(
                    v.name, shard.name, f"duplicate, also in {printable(home[v.name])}; keep one of the two"
                )
            home[v.name] = shard.name
            if weight_map is not None and weight_map.get(v.name) != shard.name:
                other = weight_map.get(v.name)
                problem = f"not in {INDEX}" if other is None else f"{INDEX} places it in {printable(other)}"
                raise IndexMismatchError(v.name, shard.name, problem)
    for tensor, name in (weight_map or {}).items():
        if tensor not in home:
            raise IndexMismatchError(tensor, name, f"in {INDEX}, but not in the shard")


def sort_side_files(
    sizes: Mapping[str, int], shards: tuple[str, ...], code: Collection[str] = ()
) -> tuple[tuple[SideFile, ...], tuple[tuple[str, str], ...]]:
    """Split the other files of a source into files to copy, and files to leave out with the reason.

    Args:
        sizes: bytes of every file, by name.
        shards: names of the shards.
        code: names of the modules that the configs name (`nemotron_fp8.checkpoint.model_code`).
    """
    side: list[SideFile] = []
    left_out: list[tuple[str, str]] = []
    for name, size in sorted(sizes.items()):
        if name in shards or name in (INDEX, CONFIG) or is_card(name, size):
            continue
        if name not in code and (reason := why_left_out(name, size)):
            left_out.append((name, reason))
        else:
            side.append(SideFile(name, size))
    return tuple(side), tuple(left_out)


def copyable(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the files with a safe name, and up to the size cap of a side file."""
    return {name: size for name, size in sizes.items() if is_plain_name(name) and size <= MAX_SIDE_BYTES}


def why_folder_left_out(name: str) -> str:
    """Return the reason why a folder of a source is not copied."""
    if name == TEMPLATES:
        return "a folder; transformers reads its chat templates, so copy it to the result"
    return "a folder"


def why_left_out(name: str, size: int) -> str | None:
    """Return the reason why a side file is not copied; None if it is copied."""
    lower = name.lower()
    rules: tuple[tuple[bool, str], ...] = (
        (name.startswith("."), "a dot file"),
        (not is_plain_name(name), "an unsafe name"),
        (name in RECORDS, "a record of an earlier conversion"),
        (lower == CARD.lower(), "a model card with another spelling than README.md, or over the size cap"),
        (states_quantization(name), "it states another quantization than the result has, and engines would read it"),
        (is_adapter(name), "an adapter, whose changes are not merged into the weights"),
        (lower.endswith(".py"), f"code that no {model_code.KEY} names"),
        (lower.endswith(PICKLES), "a pickle"),
        (lower.endswith(".safetensors"), "weights that the index does not list"),
        (lower.endswith(OTHER_WEIGHTS), "another framework's weights"),
        (lower.endswith(".index.json"), "an index of weights that are not copied"),
        (not SIDE_FILE.match(name), "not a kind of file that is copied"),
        (size > MAX_SIDE_BYTES, f"{size:,} bytes, over the cap of {MAX_SIDE_BYTES:,}"),
    )
    return next((reason for applies, reason in rules if applies), None)
