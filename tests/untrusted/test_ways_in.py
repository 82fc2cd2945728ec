"""Find every way in for data from outside, and compare with the list of those that are known.

A file, an environment variable, an answer of a server or a message of another process may hold anything. Modules that
read one are listed here with the reason. A new use fails with its line and with the reader that it should call instead.
"""

from __future__ import annotations

import ast
import builtins
from pathlib import Path
from typing import NamedTuple

import pytest

import nemotron_fp8
import nemotron_fp8_kernels

PACKAGES = {package.__name__: Path(str(package.__file__)).parent for package in (nemotron_fp8, nemotron_fp8_kernels)}

# -- what counts as a way in -------------------------------------------------------------------------------------------

LIBRARIES = frozenset(
    (
        *("bz2", "gzip", "lzma", "numcodecs", "tarfile", "zipfile", "zlib", "zstandard"),
        *("cloudpickle", "dill", "marshal", "multiprocessing", "pickletools", "shelve"),
        *("aiohttp", "ftplib", "http", "httpx", "httpx2", "ray", "requests", "socket", "subprocess", "urllib3"),
        *("boto3", "obstore"),
        *("configparser", "csv", "plistlib", "sqlite3", "tensorstore", "tomllib", "xml", "yaml"),
        *("ctypes", "fileinput", "glob", "importlib", "linecache", "mmap", "runpy", "safetensors", "struct"),
    )
)
"""Libraries that read, decode or run something: importing one at run time is a use."""
NAMES = {
    name: name
    for name in (
        *("open", "eval", "exec", "compile", "input", "__import__"),
        *("os.open", "os.read", "os.pread", "os.preadv", "os.readv", "os.fdopen", "os.popen", "os.system"),
        *("os.scandir", "os.listdir", "os.walk", "os.fwalk", "os.readlink", "os.environ", "os.getenv"),
        *("json.load", "json.loads", "json.JSONDecoder", "ast.parse", "ast.literal_eval", "io.open", "io.FileIO"),
        *("pickle.load", "pickle.loads", "pickle.Unpickler", "shutil.copy", "shutil.copyfile", "shutil.copytree"),
        *("sys.stdin", "sys.argv", "torch.load", "torch.frombuffer", "torch.from_file", "urllib.request"),
        *("huggingface_hub.HfApi", "huggingface_hub.constants", "huggingface_hub.get_session"),
        *("huggingface_hub.get_token", "huggingface_hub.hf_hub_download", "huggingface_hub.snapshot_download"),
    )
}
"""Functions and objects, by their full name."""
METHODS = frozenset(
    (
        *("open", "read_bytes", "read_text", "iterdir", "glob", "rglob", "walk", "readlink"),
        *("json", "iter_raw", "iter_bytes", "iter_lines", "iter_text", "recv", "recv_bytes", "extractall"),
        *("validate_json", "model_validate_json", "parse_raw"),
    )
)
"""Methods of paths, answers, connections and models, whatever the object."""
SESSION_METHODS = frozenset(("delete", "get", "head", "post", "put", "request", "send", "stream"))
"""Methods that count for an object with ``session`` in its name."""
OWN_OBJECTS = ("opener", "destination", "folder")
"""Ends of the names of objects of this package with a method ``open``."""
PATTERNS = frozenset(
    f"re.{name}" for name in ("compile", "search", "match", "fullmatch", "sub", "subn", "findall", "finditer", "split")
)
"""Functions whose first argument is a pattern. A pattern that is no literal could come from a file."""
OF_TENSORS = frozenset(("argmax", "count_nonzero", "flatten", "item", "max", "min", "numel", "sum"))
"""Methods whose number is no text: ``int(tensor.max())`` parses nothing."""

# -- what is known -----------------------------------------------------------------------------------------------------

Uses = dict[str, dict[str, str]]
"""Uses of each module, with the reason."""

DOORS: Uses = {
    "untrusted/regular_files.py": {
        "os.open": "regular files only, without blocking",
        "os.pread": "up to a number of bytes",
        ".readlink": "names a missing target in a message",
    },
    "untrusted/strict_json.py": {
        "json.JSONDecoder": "the only parser of JSON",
        "int": "at most 300 digits",
        "float": "at most 300 characters",
    },
    "untrusted/yaml_text.py": {
        "yaml": "the only parser of YAML: events, no values",
        "int": "at most 30 digits, by a pattern",
        "float": "at most 60 characters",
    },
    "checkpoint/header.py": {"os.pread": "the length and the text of a header"},
    "checkpoint/model_code.py": {"ast.parse": "one import statement, at most 500 characters; never compiled"},
    "destinations/journal.py": {"os.open": "opened for appending; read through `regular_files`"},
    "sources/nemo/inert_pickle.py": {"pickletools": "opcodes as records; nothing is called"},
    "sources/nemo/torch_save.py": {
        "zipfile": "directory of an archive; entries are read by offset",
        "struct": "local header of an entry",
        "zlib": "a checksum; nothing is decompressed",
    },
    "sources/nemo/payload_checks.py": {"zlib": "a checksum; nothing is decompressed"},
    "sources/nemo/compressed_chunks.py": {
        "bz2": "decompressor that stops at a size",
        "zlib": "decompressor that stops at a size",
        "numcodecs": "blosc and zstd, into a buffer of the expected size",
    },
    "sources/nemo/sentencepiece.py": {"int": "a number of protocol buffers, not text"},
    "sources/nemo/tar_index.py": {"int": "at most 20 digits of a header"},
    "hub/client.py": {
        "huggingface_hub.HfApi": "uploads and refs, within the limits of `transport`",
        "huggingface_hub.constants": "checked by `_address`",
        "huggingface_hub.get_session": "proxies and certificates; limited by `transport`",
        "huggingface_hub.get_token": "checked against a pattern",
        "os.environ": "the token, checked against a pattern",
        "session.request": "HEAD, no body",
        "session.stream": "a range of a file, counted",
        ".iter_raw": "a range of a file, counted",
        "os.open": "a new file of a download",
        "os.fdopen": "a new file of a download",
        "int": "three numbers of at most 18 digits",
    },
    "hub/transport.py": {"session.stream": "limits of bytes, time and redirects", ".iter_raw": "limits of bytes"},
    "hub/options.py": {
        "huggingface_hub.constants": "offline mode, and the folder of the cache",
        "os.environ": "whether the token's variable is set",
    },
    "stores/client.py": {"obstore": "names, sizes and ranges are checked; bytes are counted"},
    "stores/connection.py": {
        "obstore": "makes connections; no request",
        "boto3": "credentials of a profile",
        "importlib": "whether a package is installed",
        "os.environ": "endpoints, checked as addresses; names of files of credentials",
    },
    "stores/failures.py": {"int": "three digits of a status"},
    "inference/transformers_api.py": {
        "importlib": "transformers, which runs no code of a checkpoint",
        "os.environ": "how transformers reads; set, not read",
        "int": "two numbers of the version of transformers",
        "re.compile": "names of parameters in the code of transformers",
    },
    "hub/failures.py": {"int": "status of an answer, a number", "float": "seconds of a header, by a pattern"},
}
"""Readers within limits, each with its class of errors. Everything else must go through one of them."""

WEIGHTS: Uses = {
    "sources/files.py": {
        "mmap": "pages of a shard whose header is checked",
        "os.preadv": "bytes of a shard whose header is checked",
        "os.scandir": "names and sizes of the files of a source",
    },
    "sources/reader.py": {"torch.frombuffer": "elements of a checked extent"},
    "sources/hub.py": {".open": "a file that this run has downloaded and hashed"},
    "engines/cuda/slot_reader.py": {
        "ctypes": "whether pages are in the cache",
        "os.open": "an open shard again, without the cache",
        "os.preadv": "bytes of a shard whose header is checked",
    },
    "engines/cuda/device.py": {"mmap": "memory of this process", "torch.frombuffer": "memory of this process"},
    "engines/cpu.py": {"torch.frombuffer": "elements that the kernels computed"},
    "inference/layer_memory.py": {
        "mmap": "a new file without a name",
        "torch.frombuffer": "a new file without a name",
    },
    "inference/state.py": {
        "os.preadv": "hidden states of the expected size, before their digest is compared",
        "os.scandir": "files of a saved state",
        "float": "a number of JSON below 2^512",
    },
    "engines/base.py": {"ctypes": "memory of a tensor as bytes"},
    "engines/kept_codes.py": {"torch.frombuffer": "codes of a checked extent"},
    "conversion/recoding.py": {"torch.frombuffer": "codes that an engine computed"},
    "verification/recoded_values.py": {"torch.frombuffer": "two equal extents, compared"},
    "checkpoint/local_files.py": {"os.fdopen": "a regular file, to hash it", "os.preadv": "pieces of a hashed file"},
    "planning/number_format.py": {"struct": "numbers of a checked extent"},
    "planning/amaxes.py": {"float": "a number of strict JSON, within bounds"},
    "verification/dequantized_values.py": {"torch.frombuffer": "two equal extents of whole values, compared"},
    "verification/quantized_values.py": {"torch.frombuffer": "two equal extents, compared"},
    "verification/second_reader.py": {
        "safetensors": "a second opinion about headers; behind the first reader",
        "importlib": "torch or numpy, which the safetensors library would import",
        ".open": "a file that the first reader has accepted",
    },
    "conversion/in_place.py": {
        "os.pread": "the length of a header that was read before",
        "torch.frombuffer": "saved amaxes, after their digest is checked",
    },
}
"""Bytes of tensors: any bytes are valid, and sizes come from a checked header."""

FOLDERS: Uses = {
    "_filesystem.py": {
        "os.scandir": "names of a working folder",
        "os.open": "a folder, to sync it; a pipe or a device, to write a page into it",
        "os.fdopen": "a pipe or a device, to write a page into it",
        "int": "numbers in the name of a folder of temporaries",
    },
    "cli/json_log.py": {"os.open": "the log, opened for appending"},
    "cli/metrics.py": {"os.open": "a new file of metrics", "os.fdopen": "a new file of metrics"},
    "cli/monitor.py": {"socket": "the name of this host"},
    "cli/signals.py": {
        "os.read": "numbers of signals, from a pipe of this process",
        ".iterdir": "/proc: the threads of this process",
        ".read_bytes": "/proc: the children of this process",
        "int": "/proc: the children of this process",
    },
    "_process.py": {
        ".read_bytes": "/proc: the boot of the system, the start of a process",
        ".readlink": "/proc: the namespace of processes",
        "socket": "the name of this host",
        "int": "/proc: the start of a process",
    },
    "errors/checkpoint_files.py": {
        ".iterdir": "names for a suggestion",
        ".readlink": "a missing target, for a message",
    },
    "sources/folder.py": {
        "os.scandir": "files of a source",
        ".glob": "names of nested checkpoints, for a message",
        "os.pread": "the start of a regular file: a Git LFS pointer?",
    },
    "sources/nemo/files.py": {"os.walk": "files of a NeMo checkpoint"},
    "verification/result_files.py": {"os.scandir": "files of a result"},
    "destinations/comparison.py": {
        "os.scandir": "files of a finished result",
        "os.open": "a file of a finished result, compared byte by byte",
        "os.pread": "a file of a finished result, compared byte by byte",
        ".open": "a file of a finished result, compared byte by byte",
    },
    "destinations/file_sink.py": {
        "ctypes": "room for a new file",
        "os.open": "a new file",
        "os.fdopen": "a new file",
        "os.preadv": "the new file again, for its digest",
    },
    "destinations/store/ordered_bytes.py": {"os.preadv": "a file without a name that this process has written"},
    "destinations/folder.py": {"ctypes": "exchange of two names", "os.scandir": "whether a folder is empty"},
    "destinations/partial_folder.py": {
        "os.open": "the lock",
        ".iterdir": "whether a folder is empty",
    },
}
"""Names and files of folders that this library lists, or that it has written itself."""

PROCESSES: Uses = {
    "conversion/workers/processes.py": {
        "multiprocessing": "a socket pair with an own child",
        "socket": "a socket pair with an own child",
        "subprocess": "an own child",
        ".recv": "messages of an own child",
        "pickle.loads": "an error that was pickled a line before",
    },
    "conversion/workers/ray/cluster.py": {
        "ray": "the cluster that the user names",
        "os.environ": "the address of the cluster",
        "socket": "whether the address answers",
        "int": "port of an address, and numbers of resources",
    },
    "conversion/workers/ray/entry.py": {
        "importlib": "this package on the node, without the driver's folders",
        ".rglob": "the installed code, for its digest",
        ".read_bytes": "the installed code, for its digest",
    },
    "conversion/workers/ray/worker.py": {
        "ray": "runs on a node",
        "pickle.loads": "the driver's task, after `identity`",
    },
    "destinations/hub/commit.py": {
        "pickle.loads": "an operation that this run has pickled",
        ".read_bytes": "a small file that this run has written",
        "io.FileIO": "a shard that this run has written",
    },
}
"""Messages between processes of one conversion."""

SURROUNDINGS: Uses = {
    "__init__.py": {"importlib": "public names, when they are first used"},
    "_utils.py": {
        ".read_text": "/proc: memory of this process",
        "int": "/proc: memory of this process",
        "float": "at most 36 digits of an option, by a pattern",
    },
    "cli/demo.py": {
        ".iterdir": "the checkpoint that the demo has just written",
        "sys.stdin": "whether it is a terminal",
    },
    "cli/commands.py": {
        "os.environ": "names of variables, compared with those of the options",
        "re.search": "the name of a field of the recipe",
    },
    "cli/environment.py": {
        "os.environ": "values of options, which click parses as those of the command line",
        "re.search": "the escaped name of an option",
    },
    "cli/gguf.py": {
        "struct": "a file whose digest is known",
        "torch.frombuffer": "a file whose digest is known",
    },
    "cli/real_model.py": {
        "importlib": "whether pip and the package of the model are installed",
        "subprocess": "pip, with the settings of the user",
        "zipfile": "a wheel whose digest is known",
        "mmap": "a file whose digest is known",
        "torch.frombuffer": "memory for a tensor",
        ".glob": "what pip has just downloaded",
        ".open": "a wheel or a file, to compute its digest",
    },
    "cli/exit.py": {"os.environ": "words for PYTHONWARNINGS", "sys.argv": "name of the command"},
    "cli/progress_line.py": {"os.environ": "whether the terminal is dumb; compared, not parsed"},
    "cli/show_report.py": {"importlib": "whether matplotlib is installed"},
    "cli/streams.py": {"open": "closed standard streams", "os.open": "the null device"},
    "conversion/estimate.py": {".read_text": "/proc: memory of this process", "int": "/proc: memory of this process"},
    "engines/devices.py": {"int": "number of a device, by a pattern"},
    "inference/session.py": {
        "os.environ": "folder of the user's cache",
        ".read_text": "/proc: free memory",
        "int": "/proc: free memory",
    },
    "nemotron_fp8_kernels/__init__.py": {"importlib": "public names, when they are first used"},
    "nemotron_fp8_kernels/native/__init__.py": {
        "ctypes": "a library of this package",
        "os.environ": "whether to use it; compared, not parsed",
    },
    "nemotron_fp8_kernels/native/libraries.py": {".read_bytes": "source of a library of this package"},
    "nemotron_fp8_kernels/inspect/report.py": {
        "subprocess": "cuobjdump of the own kernels",
        "importlib": "version of triton",
        "re.findall": "one of two patterns of this module",
        "int": "numbers in the output of cuobjdump",
    },
    "nemotron_fp8_kernels/inspect/sass.py": {
        "int": "numbers in the output of cuobjdump",
    },
}
"""The machine and the command line."""

NUMBERS: Uses = {
    "checkpoint/inventory.py": {"int": "five digits of a shard's name"},
    "checkpoint/other_formats.py": {"int": "at most 18 digits of a Git LFS pointer"},
    "calibration/calibrate.py": {"float": "a percentile and a factor of the user, within their limits"},
    "calibration/magnitudes.py": {"float": "elements of tensors", "int": "numbers of elements"},
    "cli/options.py": {"float": "at most 19 characters of an option, by a pattern"},
    "cli/progress_line.py": {"int": "five digits of a shard's name"},
    "conversion/shard.py": {"float": "a scale"},
    "engines/kept_codes.py": {"float": "a scale", "int": "rows of scales"},
    "destinations/hub/branch.py": {"int": "at most nine digits of a pull request"},
    "destinations/hub/status.py": {"int": "at most nine digits of a pull request"},
    "destinations/lock_record.py": {"float": "a number of JSON within bounds"},
    "destinations/status.py": {"int": "at most six digits of a name"},
    "engines/cuda/device.py": {"int": "a status of CUDA"},
    "engines/cuda/slot_reader.py": {"int": "a number of pages"},
    "engines/nonfinite.py": {"float": "an element"},
    "inference/activations.py": {"float": "a scale"},
    "evaluation/comparison.py": {"float": "elements of tensors"},
    "evaluation/run.py": {"float": "elements of tensors"},
    "evaluation/serving.py": {"int": "elements of tensors"},
    "inference/fp8_cache.py": {"int": "a size of a model that transformers built", "float": "elements of tensors"},
    "inference/weights.py": {"int": "digits of a name in a model that transformers built"},
    "planning/evidence.py": {"int": "digits of a tensor's name, at most 512"},
    "planning/receipt.py": {"float": "a number of JSON below 2^512, or inf or nan"},
    "planning/restacked_experts.py": {"int": "digits of a tensor's name, at most 512"},
    "report/summary.py": {"int": "a few digits of a name"},
    "report/series.py": {"int": "a place on a ramp of colors"},
    "nemotron_fp8_kernels/torch_cpu.py": {"float": "a multiplier"},
    "nemotron_fp8_kernels/reference.py": {"float": "a multiplier"},
}
"""Numbers: short by their origin, because ``int`` takes quadratic time and rejects over 4,300 digits."""

REGULAR_EXPRESSIONS: Uses = {
    "documents/evaluation_section.py": {"re.compile": "the text of a section of this library, escaped"},
    "planning/recipe.py": {"re.compile": "the user's own pattern"},
    "planning/selection.py": {"re.compile": "the user's own pattern", "re.search": "the user's own pattern"},
    "planning/quantize.py": {"re.search": "the user's own pattern"},
    "planning/families/base.py": {"re.compile": "patterns of records in the code"},
    "planning/module_lists.py": {
        "re.compile": "an escaped name",
        "re.match": "a pattern that this module has written, and parsed again",
    },
    "verification/small_files.py": {"re.search": "an escaped name"},
    "inference/weights.py": {"re.compile": "an escaped name of a model that transformers built"},
    "hub/failures.py": {"re.compile": "parts of the token, escaped"},
}
"""Patterns that are no literals. A pattern of a stranger could take years to match, so none is compiled."""

GROUPS = {
    "doors": DOORS,
    "bytes of tensors": WEIGHTS,
    "names and own files": FOLDERS,
    "messages between processes": PROCESSES,
    "surroundings": SURROUNDINGS,
    "numbers": NUMBERS,
    "regular expressions": REGULAR_EXPRESSIONS,
}

ADVICE = {
    "json": "parse JSON with nemotron_fp8.untrusted.strict_json",
    "yaml": "parse YAML with nemotron_fp8.untrusted.yaml_text",
    "pickle": "read pickles with nemotron_fp8.sources.nemo.inert_pickle, which calls nothing",
    "session": "ask the Hub with nemotron_fp8.hub.client, and parse its answers with nemotron_fp8.hub.answers",
    "re": "compile no pattern from outside; escape it, or compare texts",
    "int": "convert numbers with nemotron_fp8.untrusted.yaml_text or strict_json, which cap the digits",
    "packed": "decompress with nemotron_fp8.sources.nemo.compressed_chunks, which stops at a size",
    "files": "open files with nemotron_fp8.untrusted.regular_files, which opens neither pipes nor devices",
}


def advice(what: str) -> str:
    """Return where a use belongs instead."""
    word = what.strip(".").partition(".")[0]
    if "pickle" in what or word in ("dill", "marshal", "shelve"):
        return ADVICE["pickle"]
    if word in ("huggingface_hub", "httpx", "requests", "urllib", "iter_raw", "socket"):
        return ADVICE["session"]
    if word in ("bz2", "gzip", "lzma", "numcodecs", "tarfile", "zipfile", "zlib", "zstandard"):
        return ADVICE["packed"]
    return ADVICE.get({"float": "int"}.get(word, word), ADVICE["files"])


# -- the search --------------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """A place where data may come in."""

    module: str
    what: str
    line: int


class _Finder(ast.NodeVisitor):
    """Finds the uses in one module; names are followed through its imports, not through assignments."""

    def __init__(self, module: str, code: str) -> None:
        tree = ast.parse(code)
        self._module, self.uses = module, list[Use]()
        self._names: dict[str, str] = {}
        self._constants = {
            name.id
            for statement in tree.body
            if isinstance(statement, (ast.Assign, ast.AnnAssign))
            for name in ast.walk(statement)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        self.visit(tree)

    def _add(self, what: str, node: ast.AST) -> None:
        self.uses.append(Use(self._module, what, getattr(node, "lineno", 0)))

    def _check(self, full: str, node: ast.AST) -> None:
        """Add a use of a library or of a known name."""
        root = full.partition(".")[0]
        if root in LIBRARIES:
            self._add(root, node)
        elif known := next((name for name in NAMES if full == name or full.startswith(f"{name}.")), None):
            self._add(known, node)

    def visit_If(self, node: ast.If) -> None:
        for statement in (
            node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else [node.test, *node.body, *node.orelse]
        ):
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            root = alias.name.partition(".")[0]
            self._names[alias.asname or root] = alias.name if alias.asname else root
            self._check(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._names[alias.asname or alias.name] = full = f"{node.module}.{alias.name}"
            self._check(full, node)

    def _full_name(self, node: ast.AST) -> str:
        """Return the full name of an imported object or a builtin; empty for anything else."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, node.id if hasattr(builtins, node.id) else "")
        if isinstance(node, ast.Attribute) and (base := self._full_name(node.value)):
            return f"{base}.{node.attr}"
        return ""

    def visit_Name(self, node: ast.Name) -> None:
        self._check(self._full_name(node), node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if full := self._full_name(node):
            self._check(full, node)
        else:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        full, first = self._full_name(node.func), node.args[0] if node.args else None
        if isinstance(node.func, ast.Attribute):
            self._method(node, node.func, full)
        if full in PATTERNS and first is not None and not self._is_fixed(first):
            self._add(full, node)
        number = first.id if full == "map" and isinstance(first, ast.Name) else full
        if number in ("int", "float") and first is not None and (full == "map" or _may_be_text(first)):
            self._add(number, node)
        self.generic_visit(node)

    def _method(self, node: ast.Call, func: ast.Attribute, full: str) -> None:
        owner = ast.unparse(func.value)
        if func.attr in SESSION_METHODS and "session" in owner.lower():
            self._add(f"session.{func.attr}", node)
        elif func.attr in METHODS and not (full.startswith("nemotron_fp8") or full in NAMES):
            own = func.attr == "open" and owner.rpartition(".")[2].lower().endswith(OWN_OBJECTS)
            if not own and not _writes(node):
                self._add(f".{func.attr}", node)

    def _is_fixed(self, pattern: ast.expr) -> bool:
        """Return True for a literal or a constant of the module."""
        return isinstance(pattern, ast.Constant) or (isinstance(pattern, ast.Name) and pattern.id in self._constants)


def _writes(call: ast.Call) -> bool:
    """Return True for ``open("wb")`` and the like, where no data comes in."""
    return any(
        isinstance(word, ast.Constant) and isinstance(word.value, str) and word.value[:1] in ("a", "w", "x")
        for word in [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    )


def _may_be_text(value: ast.expr) -> bool:
    """Return True unless a value is a number by its form."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return value.func.attr not in OF_TENSORS
    if isinstance(value, ast.Subscript):
        return _may_be_text(value.value)
    return isinstance(value, (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.BoolOp, ast.IfExp))


def modules() -> dict[str, Path]:
    """Return every module, named as in the table."""
    found = {}
    for package, folder in PACKAGES.items():
        prefix = "" if package == "nemotron_fp8" else f"{package}/"
        found |= {f"{prefix}{path.relative_to(folder).as_posix()}": path for path in sorted(folder.rglob("*.py"))}
    return found


def uses(module: str, code: str) -> list[Use]:
    """Return the ways in of a module."""
    return _Finder(module, code).uses


KNOWN = {(module, what) for group in GROUPS.values() for module, calls in group.items() for what in calls}


@pytest.fixture(scope="module")
def found() -> list[Use]:
    """Every way in of both packages."""
    return [use for module, path in modules().items() for use in uses(module, path.read_text(encoding="utf-8"))]


def test_every_way_in_is_known(found: list[Use]) -> None:
    unknown = [use for use in found if (use.module, use.what) not in KNOWN]
    assert not unknown, "\n" + "\n".join(
        f"{use.module}:{use.line}: {use.what}: {advice(use.what)}; or list it here with the reason" for use in unknown
    )


def test_every_known_way_in_exists(found: list[Use]) -> None:
    """A line of the table that stands for nothing would hide the next use."""
    gone = KNOWN - {(use.module, use.what) for use in found}
    assert not gone, "\n" + "\n".join(
        f"{module}: {what} is no longer used; remove it here" for module, what in sorted(gone)
    )


def test_every_module_of_the_table_exists() -> None:
    there = modules().keys()
    missing = sorted({module for module, _ in KNOWN} - there)
    assert not missing, f"no such modules: {missing}; rename or remove them here"


def test_no_use_is_listed_twice_and_each_has_a_reason() -> None:
    listed = [(module, what) for group in GROUPS.values() for module, calls in group.items() for what in calls]
    assert len(listed) == len(set(listed))
    reasons = [reason for group in GROUPS.values() for calls in group.values() for reason in calls.values()]
    assert all(len(reason.split()) > 1 for reason in reasons)


CASES = {
    "open('a')": ["open"],
    "from os import open as o\no('a', 0)": ["os.open", "os.open"],
    "import os\nwith os.scandir('a') as x: pass": ["os.scandir"],
    "import os\nkey = os.environ['A']": ["os.environ"],
    "import os\nread = os.pread": ["os.pread"],
    "path.open()": [".open"],
    "path.open('rb')": [".open"],
    "path.open('wb')": [],
    "self.opener.open(name)": [],
    "(a / b).read_text()": [".read_text"],
    "import json\njson.loads(a)": ["json.loads"],
    "import json\njson.dumps(a)": [],
    "import yaml\nyaml.safe_load(a)": ["yaml", "yaml"],
    "import pickle\npickle.loads(a)": ["pickle.loads"],
    "import torch\ntorch.load(a)": ["torch.load"],
    "def f():\n    import zipfile": ["zipfile"],
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zipfile": [],
    "import sys\nsys.stdin.buffer.read()": ["sys.stdin"],
    "from huggingface_hub import get_session\nget_session().get(a)": [
        "huggingface_hub.get_session",
        "session.get",
        "huggingface_hub.get_session",
    ],
    "answer.json()": [".json"],
    "Model.model_validate_json(a)": [".model_validate_json"],
    "import re\nre.compile('a')": [],
    "import re\nA = 'a'\nre.search(A, b)": [],
    "import re\nre.search(a, b)": ["re.search"],
    "import re\nre.search(f'{a}', b)": ["re.search"],
    "int(text)": ["int"],
    "list(map(int, words))": ["int"],
    "int(a.max())": [],
    "int(1 / 2)": [],
    "exec(a)": ["exec"],
    "x = eval": ["eval"],
}


@pytest.mark.parametrize("code", CASES)
def test_the_search_finds(code: str) -> None:
    assert [use.what for use in uses("made_up.py", code)] == CASES[code]


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("json.loads", "strict_json"),
        ("yaml", "yaml_text"),
        ("pickle.loads", "inert_pickle"),
        ("pickletools", "inert_pickle"),
        ("session.get", "hub.answers"),
        ("huggingface_hub.HfApi", "hub.client"),
        ("re.compile", "no pattern"),
        ("float", "digits"),
        ("gzip", "compressed_chunks"),
        (".open", "regular_files"),
    ],
)
def test_the_advice_names_the_reader(what: str, word: str) -> None:
    assert word in advice(what)
