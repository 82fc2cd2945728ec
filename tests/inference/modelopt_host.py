"""Quantize checkpoints by NVIDIA's Model Optimizer, in its own environment.

Reads jobs from the standard input, one line of JSON each, and answers each by a line of JSON. The first line that it
writes holds its versions, as soon as it is ready.

===============  ========================================================================================
key of a job     value
===============  ========================================================================================
``source``       folder of the checkpoint
``destination``  folder for the export
``sequences``    lists of token ids, which are run one at a time for the calibration
``config``       name of a configuration of ``modelopt.torch.quantization``
``kv_cache``     true for scales of an FP8 cache, too
===============  ========================================================================================

An answer has ``amaxes``: the amax of every quantizer, and the dtype that it was measured in.
"""

from __future__ import annotations

import copy
import json
import sys
from contextlib import redirect_stdout
from typing import Any

import modelopt
import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint


def main() -> None:
    versions = {"modelopt": modelopt.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        with redirect_stdout(sys.stderr):  # modelopt prints what it does
            amaxes = _quantize(**json.loads(line))
        print(json.dumps({"amaxes": amaxes}), flush=True)


def _quantize(
    source: str, destination: str, sequences: list[list[int]], config: str, kv_cache: bool
) -> dict[str, tuple[float, str]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    chosen: dict[str, Any] = copy.deepcopy(getattr(mtq, config))
    if kv_cache:
        chosen["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]

    def calibrate(model: torch.nn.Module) -> None:
        for ids in sequences:
            # Without a cache, which transformers does not make for every hybrid of Mamba and attention.
            model(torch.tensor([ids]), use_cache=False)

    with torch.inference_mode():
        mtq.quantize(model, chosen, calibrate)
    quantizers = {name: each for name, each in model.named_modules() if hasattr(each, "_amax")}
    amaxes = {name: (float(each._amax), str(each._amax.dtype)) for name, each in quantizers.items() if each.is_enabled}
    export_hf_checkpoint(model, export_dir=destination)
    return amaxes


if __name__ == "__main__":
    main()
