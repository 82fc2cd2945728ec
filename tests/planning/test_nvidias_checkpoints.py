"""``selection="nvidia"`` with static scales gives, module for module, what NVIDIA published for Nemotron 3.

The headers are those of the published checkpoints, with all layers and experts. What NVIDIA published is stated here as
these sources state it:

- NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4, revision 6efb4a2a: ``hybrid_override_pattern`` of config.json,
  ``exclude_modules`` of hf_quant_config.json, and 24,147 tensors, four for each quantized module. The FP8 release
  leaves the same modules unquantized (technical report of Nemotron 3 Nano, section 4).
- NVIDIA-Nemotron-3-Super-120B-A12B-FP8: scales of the cache of eight layers by name, dtype and shape, and the scales
  of Mamba layers. Quantized are experts, routed and shared, and Mamba's projections; attention, latent projections,
  embeddings, lm_head, convolutions and the layers for multi-token prediction are not (documentation of Nemotron 3
  Super).
- NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4, revision 4f0cf9da: ``hybrid_override_pattern``, and 165,860 tensors: 16
  scales of the cache, three tensors for each of 139 modules and four for each of 40,961.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from nemotron_fp8 import Recipe
from nemotron_fp8.planning.amaxes import Amaxes
from nemotron_fp8.planning.quantize import make_plan
from tests.planning.test_families import Table, attention, ends, inventory, mamba, mlp, norms, router, written
from tests.support.amaxes import RUN, value_of
from tests.support.decoders import in_list

if TYPE_CHECKING:
    from nemotron_fp8.planning.plan import Plan

RECIPE = Recipe(format="modelopt", granularity="tensor", activations="static", kv_cache="fp8", selection="nvidia")


class Size(NamedTuple):
    """A size of Nemotron 3.

    Attributes:
        pattern: ``hybrid_override_pattern``: M a Mamba mixer, E experts, * attention.
        hidden: width of the model.
        experts: routed experts of a layer.
        inner: width inside a routed expert; that of the shared one is twice as much.
        latent: width that routed experts see; None for that of the model.
        mamba: inner width, rows of ``in_proj``, channels of the convolution and heads of a Mamba mixer.
    """

    pattern: str
    hidden: int
    experts: int
    inner: int
    latent: int | None
    mamba: tuple[int, int, int, int]

    def layers(self, kind: str) -> list[int]:
        """Return the numbers of the layers of a kind."""
        return [number for number, letter in enumerate(self.pattern) if letter == kind]

    @property
    def config(self) -> dict[str, Any]:
        """Fields of config.json."""
        return {
            "model_type": "nemotron_h",
            "architectures": ["NemotronHForCausalLM"],
            "hidden_size": self.hidden,
            "hybrid_override_pattern": self.pattern,
            "num_hidden_layers": len(self.pattern),
            "n_routed_experts": self.experts,
            **({} if self.latent is None else {"moe_latent_size": self.latent, "num_nextn_predict_layers": 1}),
        }

    def table(self) -> Table:
        """Return all tensors."""
        found: Table = ends(131_072, self.hidden, "backbone.embeddings", "backbone.norm_f")
        for number, kind in enumerate(self.pattern):
            layer = f"backbone.layers.{number}."
            found |= norms(self.hidden, f"{layer}norm.weight")
            if kind == "M":
                inner, projected, convolved, heads = self.mamba
                found |= mamba(number, self.hidden, inner, projected, convolved, heads)
            else:
                found |= self._mixer(f"{layer}mixer.", kind)
        if self.latent is not None:
            first, second = "mtp.layers.0.", "mtp.layers.1."
            found |= norms(self.hidden, *(f"{first}{norm}.weight" for norm in ("enorm", "hnorm", "norm")))
            found |= {f"{first}eh_proj.weight": ((self.hidden, 2 * self.hidden), "")} | self._mixer(
                f"{first}mixer.", "*"
            )
            found |= norms(self.hidden, f"{second}norm.weight", f"{second}final_layernorm.weight")
            found |= self._mixer(f"{second}mixer.", "E")
        return found

    def _mixer(self, stem: str, kind: str) -> Table:
        if kind == "*":
            return attention(stem, self.hidden, 4096, 256)
        seen = self.latent or self.hidden
        found: Table = {
            **router(stem, self.experts, self.hidden),
            **mlp(f"{stem}shared_experts.", self.hidden, 2 * self.inner, gated=False),
        }
        for expert in range(self.experts):
            found |= mlp(f"{stem}experts.{expert}.", seen, self.inner, gated=False)
        if self.latent is not None:
            found[f"{stem}fc1_latent_proj.weight"] = ((self.latent, self.hidden), "")
            found[f"{stem}fc2_latent_proj.weight"] = ((self.hidden, self.latent), "")
        return found


NANO = Size("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", 2688, 128, 1856, None, (4096, 10304, 6144, 64))
SUPER = Size(
    "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    *(4096, 512, 2688, 1024),
    (8192, 18560, 10240, 128),
)
SIZES = {"Nano": NANO, "Super": SUPER}
ATTENTION = {"Nano": (5, 12, 19, 26, 33, 42), "Super": (7, 16, 25, 36, 47, 58, 69, 78)}
"""Layers with attention, as published."""
EXCLUDED_MAMBA = (4, 11, 18, 25, 32, 41)
"""Mamba layers in ``exclude_modules`` of Nano."""
CONVOLUTIONS = (0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 25, 28, 30, 32, 35, 37, 39, 41, 44, 46, 48, 50)
"""Layers whose convolution is in ``exclude_modules`` of Nano."""
NANO_EXCLUDES = {
    "lm_head",
    *(f"backbone.layers.{layer}.mixer.{part}_proj" for layer in EXCLUDED_MAMBA for part in ("in", "out")),
    *(f"backbone.layers.{layer}.mixer.{part}_proj" for layer in ATTENTION["Nano"] for part in "qkvo"),
    *(f"backbone.layers.{layer}.mixer.conv1d" for layer in CONVOLUTIONS),
}
SUPER_QUANTIZES = re.compile(
    r"backbone\.layers\.\d+\.mixer\.(in_proj|out_proj|(shared_experts|experts\.\d+)\.(up|down)_proj)"
)


@cache
def planned(name: str) -> tuple[Table, Plan]:
    """The tensors of a size, and its plan with amaxes of all that a calibration measures."""
    size = SIZES[name]
    table = size.table()
    linear = [n for n, (shape, _) in table.items() if len(shape) == 2 and n.startswith("backbone.layers.")]
    inputs = {n.removesuffix(".weight"): value_of(n) for n in linear if not n.endswith("gate.weight")}
    modules = [f"backbone.layers.{layer}.mixer" for layer in ATTENTION[name]]
    keys, values = ({module: value_of(f"{module} {what}") for module in modules} for what in "kv")
    source = inventory(size.config, table)
    return table, make_plan(source, RECIPE, 1 << 30, 1, amaxes=Amaxes(inputs, keys, values, (RUN,)))


def quantized(plan: Plan) -> set[str]:
    return {tensor.name.removesuffix(".weight") for tensor in plan.tensors if tensor.quantize}


def test_the_headers_are_the_published_ones() -> None:
    """By their number of tensors: NVFP4 has three more for each module, or two for one in FP8."""
    excluded_linear = {name for name in NANO_EXCLUDES if not name.endswith("conv1d")}
    matrices = {n.removesuffix(".weight") for n, (shape, _) in NANO.table().items() if len(shape) == 2}
    packed = {n for n in matrices - excluded_linear if not n.endswith(("embeddings", "mixer.gate"))}
    assert len(NANO.table()) + 3 * len(packed) == 24_147
    assert len(SUPER.table()) + 16 + 2 * 139 + 3 * 40_961 == 165_860
    for name, size in SIZES.items():
        assert tuple(size.layers("*")) == ATTENTION[name]
    assert tuple(NANO.layers("M")) == CONVOLUTIONS


def test_nano_leaves_what_nvidia_excludes() -> None:
    """Nothing more and nothing less, but for routers, which are no linear layers in Model Optimizer."""
    table, plan = planned("Nano")
    fp8 = quantized(plan)
    left = {n.removesuffix(".weight") for n, (shape, _) in table.items() if len(shape) >= 2} - fp8
    routers = {f"backbone.layers.{layer}.mixer.gate" for layer in NANO.layers("E")}
    assert left - routers == NANO_EXCLUDES | {"backbone.embeddings"}
    config = written(plan)
    linear = {name for name in NANO_EXCLUDES if not name.endswith("conv1d")} | routers
    listed = {n for n in left | fp8 if in_list(config, "vLLM", n)}
    assert listed - {name for name in NANO_EXCLUDES if name.endswith("conv1d")} == linear


def test_super_quantizes_what_nvidia_quantizes() -> None:
    table, plan = planned("Super")
    matrices = {n.removesuffix(".weight") for n, (shape, _) in table.items() if len(shape) == 2}
    fp8 = quantized(plan)
    assert fp8 == {name for name in matrices if SUPER_QUANTIZES.fullmatch(name)}
    assert len(fp8) == 2 * 40 + 40 * 2 * (512 + 1)
    config = written(plan)
    left = matrices - fp8 - {"backbone.embeddings"}
    assert {name.split(".")[-1] for name in left} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "fc1_latent_proj", "fc2_latent_proj", "gate", "lm_head"),
        *("eh_proj", "up_proj", "down_proj"),  # of the layers for multi-token prediction
    }
    assert all(in_list(config, "vLLM", name) for name in left)
    # Of the experts of a layer, the first, a middle one and the last.
    some = {name for name in fp8 if not re.search(r"\.experts\.(?!(0|85|511)\.)", name)}
    assert len(some) == 2 * 40 + 40 * 2 * (3 + 1)
    assert not any(in_list(config, "vLLM", name) for name in some)


@pytest.mark.parametrize("name", SIZES)
def test_scales_are_stored_as_nvidia_stores_them(name: str) -> None:
    """Two beside each quantized weight, and two for each attention, although its projections are unquantized."""
    table, plan = planned(name)
    fp8 = quantized(plan)
    entries = {each.name: each for shard in plan.shard_tasks for each in shard.layout.entries}
    added = {n: (each.dtype, each.shape) for n, each in entries.items() if n not in table}
    scales = {f"{module}.{last}" for module in fp8 for last in ("weight_scale", "input_scale")}
    cached = {f"backbone.layers.{layer}.mixer.{part}_proj.{part}_scale" for layer in ATTENTION[name] for part in "kv"}
    assert added == dict.fromkeys(scales | cached, ("F32", ()))
    assert {n: each.dtype for n, each in entries.items() if n in table} == {
        n: "F8_E4M3" if n.removesuffix(".weight") in fp8 else "BF16" for n in table
    }


@pytest.mark.parametrize("name", SIZES)
def test_the_config_states_what_nvidia_states(name: str) -> None:
    config = written(planned(name)[1])
    floats = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert {key: config[key] for key in ("quant_method", "quant_algo", "kv_cache_scheme", "config_groups")} == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_scheme": floats,
        "config_groups": {"group_0": {"input_activations": floats, "weights": floats, "targets": ["Linear"]}},
    }
