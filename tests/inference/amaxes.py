"""Amaxes of a model that transformers runs as a whole: of the inputs of its linear layers, and of what attention caches.

Nothing of a calibration of this project is used: hooks see the inputs, and a function of attention the keys and values.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.modeling_utils import AttentionInterface

from nemotron_fp8.planning.amaxes import Amaxes, CalibrationRun

if TYPE_CHECKING:
    from pathlib import Path

NAME = "measured_sdpa"


@torch.no_grad()
def measured(folder: Path, ids: torch.Tensor) -> Amaxes:
    """Measure a model of attention modules ``self_attn`` on sequences of tokens ``[sequences, length]``."""
    tables: dict[str, defaultdict[str, float]] = {kind: defaultdict(float) for kind in ("inputs", "k", "v")}

    def keep(kind: str, name: str, values: torch.Tensor) -> None:
        tables[kind][name] = max(tables[kind][name], float(values.abs().max()))

    plain: Any = transformers.integrations.sdpa_attention.sdpa_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, *given: Any, **named: Any) -> Any:
        keep("k", names[module], key)
        keep("v", names[module], value)
        return plain(module, query, key, value, *given, **named)

    AttentionInterface.register(NAME, attend)
    masks: Any = transformers.masking_utils
    masks.AttentionMaskInterface.register(NAME, masks.sdpa_mask)
    read: Any = transformers.AutoModelForCausalLM
    model = read.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=NAME).eval()
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, given, name=name: keep("inputs", name, given[0]))
    for row in ids:
        model(input_ids=row[None], use_cache=False)
    versions = {"version": "0", "torch": torch.__version__, "transformers": transformers.__version__}
    run = CalibrationRun(folder.name, "tokens", "0" * 64, len(ids), ids.shape[1], **versions)
    return Amaxes(*(dict(sorted(tables[kind].items())) for kind in ("inputs", "k", "v")), (run,))
