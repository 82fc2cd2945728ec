"""Lay out the kernels as a repository of Hugging Face's library `kernels`: ``python -m tools.hf_kernels FOLDER``.

`kernels` 0.17 loads ``build/torch-BACKEND/__init__.py``, described by ``metadata.json`` beside it. Variants without
compiled code are named ``torch-cpu`` and ``torch-cuda``; here both have the same files, and torch computes on CPUs.
On the Hub each version of the interface is a branch ``vN``.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels" / "nemotron_fp8_kernels"
NAME = "nemotron-fp8-kernels"
INTERFACE = 1
"""Version of the interface; a change that breaks callers raises it."""
MIN_KERNELS = "0.17.0"
"""Oldest `kernels` that this layout was loaded with."""
BACKENDS = ("cpu", "cuda")
SUFFIXES = (".py", ".c", ".typed")
"""Suffixes of the files of a variant. A variant for every platform may have no compiled code."""
CARD = f"""---
library_name: kernels
license: apache-2.0
tags:
- kernel
- fp8
---

# {NAME}

FP8 (E4M3) quantization and dequantization of weights: Triton kernels for Hopper, and torch on CPUs with the same bytes.

```python
from kernels import get_kernel

fp8 = get_kernel("OWNER/{NAME}", version={INTERFACE}, trust_remote_code=True)
q, scale = fp8.quantize(w, granularity="channel")  # "tensor", "channel" or "block"
w_again = fp8.dequantize(q, scale, granularity="channel")
```

`amax`, `amax_bits`, `quantize_many`, `quantize_with_amax` and `scale_from_amax` are the other operations. The package
`nemotron_fp8_kernels` has kernels in C for CPUs besides.
"""


def lay_out(folder: Path) -> list[Path]:
    """Write the repository to a folder that replaces an older one; return its variants."""
    shutil.rmtree(folder, ignore_errors=True)
    files = sorted(path for path in PACKAGE.rglob("*") if path.suffix in SUFFIXES)
    variants = [folder / "build" / f"torch-{backend}" for backend in BACKENDS]
    for backend, variant in zip(BACKENDS, variants, strict=True):
        for path in files:
            target = variant / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        metadata = _metadata(backend, {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in files})
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    return variants


def _metadata(backend: str, contents: dict[str, bytes]) -> dict[str, object]:
    """Return the description of a variant; its id, the name of the module, changes with any file."""
    digests = {name: hashlib.sha256(data).digest() for name, data in contents.items()}
    whole = hashlib.sha256(b"".join(name.encode() + b"\0" + digest for name, digest in sorted(digests.items())))
    return {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{whole.hexdigest()[:12]}",
        "name": NAME,
        "version": INTERFACE,
        "kernels-minver": MIN_KERNELS,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def main() -> int:
    """Lay out the repository in the folder of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.hf_kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    for variant in lay_out(parser.parse_args().folder):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
