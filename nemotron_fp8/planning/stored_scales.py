"""Scales from a calibration in a result: of the inputs of quantized weights, and of an FP8 cache of keys and values.

A scale is ``amax * factor / 448``, rounded to float32, at least the smallest normal float32, and 1.0 for an amax of 0.

Weights with one input have one scale: those that engines fuse (q/k/v, gate/up), and, by role, all experts of a layer
(gate and up; down). Engines take the largest scale of such weights for all of them, so that one weight without a scale
would ruin its layer. Experts that no token reached have the scale of the others.

Sources: ``Fp8LinearMethod``, ``process_fp8_input_tensor_strategy_moe``, ``BaseKVCacheMethod`` and the names that
``get_cache_scale_mapper`` and ``maybe_remap_kv_scale_name`` of vLLM accept, by runs of 60 families.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.stated_quantization import last_name
from nemotron_fp8.errors import MissingAmaxError, OtherAmaxesError
from nemotron_fp8.planning.evidence import Evidence
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.families.base import ENCODERS, EVERYWHERE
from nemotron_fp8.planning.kv_cache import why_unscaled
from nemotron_fp8.planning.layouts import execution_scales
from nemotron_fp8.planning.number_format import E4M3, bfloat16_from, float32
from nemotron_fp8.planning.tasks import StoredScale

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.layouts import StaticScales
    from nemotron_fp8.planning.recipe import Recipe


SMALLEST = 2.0**-126
"""Smallest scale: the smallest normal float32, whose reciprocal is finite."""
MORE_TEXT = "calibrate on more text, or on another one, and merge both (nemotron-fp8 calibrate --merge)"
PROJECTED = ("self_attn", "mixer")
"""Names of attention modules whose scales engines look up under the projections of keys and values."""
BARE = "attn"
"""Name of attention modules in which engines have another module of that name, which holds the scales."""
KEYS, VALUES = "k_proj", "v_proj"


class StoredScales(NamedTuple):
    """Scales that a result stores.

    Attributes:
        beside: scales beside each tensor, by its name.
        notices: what to know of them.
    """

    beside: Mapping[str, tuple[StoredScale, ...]]
    notices: tuple[str, ...] = ()

    @property
    def all(self) -> dict[str, StoredScale]:
        """All scales, by name."""
        return {scale.name: scale for scales in self.beside.values() for scale in scales}


NO_SCALES = StoredScales({})


def scale_of(amax: float, factor: float = 1.0) -> float:
    """Return the static scale of an amax: a float32 value."""
    return max(float32(amax * factor / E4M3.max), SMALLEST) if amax else 1.0


def stored_scales(
    recipe: Recipe,
    amaxes: Amaxes | None,
    views: Sequence[TensorView],
    quantized: Iterable[str],
    config: Mapping[str, Any] | None,
    source: str,
    modules: Iterable[str] = (),
) -> StoredScales:
    """Return the scales that a result stores.

    Args:
        recipe: settings of the quantization.
        amaxes: amaxes of the calibration; None for a result without its scales.
        views: tensors of the result, without scales of weights; or of the source, with single experts where they are
            quantized.
        quantized: names of the quantized weights.
        config: config.json; None without one.
        source: name of the source in messages.
        modules: further modules that the amaxes may be of: experts of stacks that are not split.

    Raises:
        OtherAmaxesError: the amaxes are of modules that the source lacks.
        MissingAmaxError: a module that needs a scale has no amax.
    """
    layout = recipe.layout.static
    if amaxes is None or layout is None:
        return NO_SCALES
    # A scale of activations or of the cache in a quantized source is not in the result: nothing can lie beside it.
    views = [view for view in views if last_name(view.name) not in execution_scales()]
    names = {view.name: None for view in views}
    _check_same_model(amaxes, names, modules, source)
    family = family_of(config)
    beside: defaultdict[str, list[StoredScale]] = defaultdict(list)
    notices: list[str] = []
    if recipe.activations == "static":
        found = _input_amaxes(amaxes, quantized, family, source)
        notices += found.notices
        for name, amax in found.by_weight.items():
            output = layout.input_scale_of(name)
            beside[name].append(StoredScale(output.name, output.shape, scale_of(amax, amaxes.factor), True))
    why = why_unscaled(config)
    if recipe.kv_cache != "none" and why:
        notices.append(f"the FP8 KV cache has scales of 1.0, whatever was calibrated: {why}")
    elif recipe.kv_cache != "none":
        evidence = Evidence(views, family, config)
        for module in _attention_modules(amaxes, views, evidence, source):
            for scale, owner in _cache_scales(module, amaxes, names, layout):
                beside[owner].append(scale)
    return StoredScales({name: tuple(scales) for name, scales in beside.items()}, tuple(notices))


def _check_same_model(amaxes: Amaxes, names: Mapping[str, None], modules: Iterable[str], source: str) -> None:
    """Raise OtherAmaxesError for amaxes of modules that a checkpoint lacks."""
    known = {name.removesuffix(".weight") for name in (*names, *modules)}
    parents = {module[: dot.start()] for module in known for dot in re.finditer(r"\.", module)}
    strange = [name for name in amaxes.inputs if name not in known]
    strange += [name for name in {**amaxes.k, **amaxes.v} if name not in parents]
    if strange:
        raise OtherAmaxesError(source, tuple(strange))


class _Inputs(NamedTuple):
    """Amaxes of the inputs of weights, by name of the weight."""

    by_weight: dict[str, float]
    notices: tuple[str, ...]


def _input_amaxes(amaxes: Amaxes, quantized: Iterable[str], family: Family, source: str) -> _Inputs:
    """Return the amax of each quantized weight: the largest of those with the same input.

    Raises:
        MissingAmaxError: a group of weights has no amax at all.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in quantized:
        groups[one_input(name, family)].append(name)
    found: dict[str, float] = {}
    missing: list[str] = []
    unseen_layers: list[str] = []
    silent: list[str] = []
    unseen_experts = 0
    for group, members in groups.items():
        known = [amaxes.inputs[module] for name in members if (module := name.removesuffix(".weight")) in amaxes.inputs]
        routed = family.is_routed(members[0])
        if not known:
            (unseen_layers if routed else missing).append(group.removesuffix(".weight"))
            continue
        unseen_experts += (len(members) - len(known)) * routed
        largest = max(known)
        if not largest:
            silent.append(group.removesuffix(".weight"))
        found.update(dict.fromkeys(members, largest))
    if missing:
        advice = "calibrate this source, or leave them unquantized (--ignore)"
        raise MissingAmaxError(source, "inputs", tuple(missing), advice)
    if unseen_layers:
        what = "inputs of any expert, since no token reached one,"
        raise MissingAmaxError(source, what, tuple(unseen_layers), MORE_TEXT)
    notices = []
    if unseen_experts:
        notices.append(
            f"no token of the calibration reached {unseen_experts:,} projections of experts: they have the scales of"
            " the other experts of their layers"
        )
    if silent:
        notices.append(f"the inputs of {listed(silent[:3])} were all 0 in the calibration: their scales are 1.0")
    return _Inputs(found, tuple(notices))


def one_input(name: str, family: Family) -> str:
    """Return the name of the group of weights that have one scale of their inputs with a weight.

    Args:
        name: name of a weight.
        family: model family.
    """
    matrix = family.fused_matrix_of(name)
    if not family.is_routed(name):
        return matrix
    return f"{family.fused_module_of(name)}.{matrix.removesuffix('.weight').rpartition('.')[2]}"


def _attention_modules(amaxes: Amaxes, views: Sequence[TensorView], evidence: Evidence, source: str) -> list[str]:
    """Return the attention modules of the decoder whose keys and values an engine caches.

    Those are the modules with measured keys, and further modules of the same last names with projections of both.

    Raises:
        MissingAmaxError: keys or values of one of them were not measured.
    """
    names = {view.name for view in views}
    excluded = (*EVERYWHERE, *ENCODERS)
    kinds = {module.rpartition(".")[2] for module in amaxes.k}
    found = dict.fromkeys(sorted(amaxes.k))
    for name in names:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        if (
            last == KEYS
            and f"{module}.{VALUES}.weight" in names
            and module.rpartition(".")[2] in kinds
            and not any(rule.matches(name) for rule in excluded)
            and not evidence.is_beyond_the_layers(name)
            and not evidence.is_beside_the_decoder(name)
        ):
            found[module] = None
    for what, table in (("keys", amaxes.k), ("values", amaxes.v)):
        missing = [module for module in found if module not in table]
        if missing or not table:
            advice = "calibrate this source, or leave the cache to the engine (--kv-cache none)"
            raise MissingAmaxError(source, what, tuple(sorted(missing)), advice)
    return list(found)


def _cache_scales(
    module: str, amaxes: Amaxes, names: Mapping[str, None], layout: StaticScales
) -> list[tuple[StoredScale, str]]:
    """Return the scales of the cache of an attention module, each with the tensor that it is stored beside."""
    found = []
    for last, projection, table in (("k_scale", KEYS, amaxes.k), ("v_scale", VALUES, amaxes.v)):
        weight = f"{module}.{projection}.weight"
        owner = weight if weight in names else next(name for name in names if name.startswith(f"{module}."))
        holder = module
        if module.rpartition(".")[2] == BARE:
            holder = f"{module}.{BARE}"
        elif layout.of_projections and weight in names and module.rpartition(".")[2] in PROJECTED:
            holder = f"{module}.{projection}"
        value = scale_of(table[module], amaxes.factor)
        value = bfloat16_from(value) if layout.in_bfloat16 else value
        found.append((StoredScale(f"{holder}.{last}", layout.shape, value, False), owner))
    return found
