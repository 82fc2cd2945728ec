"""Public functions: inspect, plan, quantize, convert and dequantize a checkpoint."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8._progress_bar import progress_callback
from nemotron_fp8._utils import check_arguments, parse_bytes, shortened, usable_cores
from nemotron_fp8.conversion.report import Report
from nemotron_fp8.destinations.open import refuse_occupied
from nemotron_fp8.documents.render import planned_sizes
from nemotron_fp8.engines.devices import check_number_formats
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.events import logged
from nemotron_fp8.planning.amaxes import as_amaxes
from nemotron_fp8.planning.linear_share import check_share
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.recipe import as_recipe
from nemotron_fp8.progress import Progress
from nemotron_fp8.sources.open import open_source, shards_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.conversion.workers.base import WorkerPool
    from nemotron_fp8.destinations.base import RunOptions
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.sources.inspection import Inspection

    Planner = Callable[[Inventory, int, int], Plan]
    """Function that makes the plan of an inventory, for a byte budget and a number of threads."""

__all__ = [
    "DEFAULT_MEMORY",
    "Progress",
    "Report",
    "convert_repo",
    "dequantize_repo",
    "inspect_repo",
    "plan_repo",
    "quantize_repo",
]

DEFAULT_MEMORY = "256MiB"


def inspect_repo(path: str | os.PathLike[str], hub: HubOptions | None = None) -> Inspection:
    """List the files and the tensors of a checkpoint, from headers alone.

    Args:
        path: a checkpoint folder, a ``.safetensors`` file, a repository on the Hub (``hf://owner/name``), or a folder
            of an object store.
        hub: options for reading from the Hub.

    Returns:
        Weight files, and name, dtype, shape and bytes of every tensor.

    Raises:
        SourceError: the checkpoint cannot be read; the subclass names the cause.
        HubError, AddressError: the Hub rejects a request or cannot be reached, or the address is malformed.
        StoreError, StoreAddressError: the same of an object store.
        RecipeError: an argument has an unsupported value.
    """
    from nemotron_fp8.hub.options import as_hub_options
    from nemotron_fp8.sources.inspection import inspection_of

    check_arguments(path=path)
    text = os.fspath(path)
    return inspection_of(text, shards_of(text, as_hub_options(hub)))


def plan_repo(
    source: str | os.PathLike[str],
    recipe: Recipe | None = None,
    max_memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
    shard_size: str | int | None = None,
    hub: HubOptions | None = None,
    amaxes: Amaxes | str | os.PathLike[str] | None = None,
    min_share: float | None = None,
) -> Plan:
    """Plan a conversion, and write nothing.

    Args:
        source: a checkpoint folder, a ``.safetensors`` file, or a repository on the Hub (``hf://owner/name``). Only
            headers are read.
        recipe: the tensors to quantize and their format; the default quantizes every linear weight of the decoder with
            one scale for each output channel.
        max_memory: bytes for the working buffers, as a number or like ``"256MiB"``.
        threads: worker threads; None for one on each available core.
        shard_size: bytes of tensors in a shard of the result, for a NeMo checkpoint; as in `quantize_repo`.
        hub: options for reading from the Hub.
        amaxes: amaxes of a calibration, or their file; as in `quantize_repo`.
        min_share: as in `quantize_repo`.

    Returns:
        The plan: every tensor with its shard, dtype, sizes and reason, and the bytes of result and buffers.

    Raises:
        SourceError: the source cannot be converted; the subclass names the cause.
        HubError, AddressError: the Hub rejects a request or cannot be reached, or the address is malformed.
        BudgetError: the buffers of a tensor exceed ``max_memory``.
        RecipeError: the recipe or another argument has an unsupported value.
        CalibrationError: the amaxes cannot be read, or do not fit the source.
    """
    check_arguments(source=source, max_memory=max_memory, threads=threads, shard_size=shard_size, min_share=min_share)
    wanted, measured = as_recipe(recipe), as_amaxes(amaxes)
    plan = plan_source(open_source(source, shard_size, hub), wanted, max_memory, threads, measured)
    check_share(plan.share, min_share)
    return plan


def plan_source(
    source: Source,
    recipe: Recipe | None = None,
    max_memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
    amaxes: Amaxes | None = None,
) -> Plan:
    """Return the plan of an open source; arguments as in `plan_repo`."""
    budget, cores = parse_bytes(max_memory), threads or usable_cores()
    plan = make_plan(source.inventory, as_recipe(recipe), budget, cores, amaxes=amaxes)
    check_number_formats(plan.shard_tasks)
    return replace(plan, disk_bytes=sum(planned_sizes(plan).values()))


@logged("quantize")
def quantize_repo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    device: str = "auto",
    max_memory: str | int = DEFAULT_MEMORY,
    progress: Callable[[Progress], None] | bool | None = None,
    *,
    overwrite: bool = False,
    in_place: bool = False,
    restart: bool = False,
    threads: int | None = None,
    digests: bool = True,
    max_device_memory: str | int | None = None,
    shard_size: str | int | None = None,
    hub: HubOptions | None = None,
    cluster: str | None = None,
    base_model: str | None = None,
    amaxes: Amaxes | str | os.PathLike[str] | None = None,
    min_share: float | None = None,
) -> Report:
    """Quantize a checkpoint into a folder or a repository on the Hub, or in place.

    A source of FP8 or MXFP4 weights is laid out again: codes are kept where the scales can be repeated, and rounded
    once elsewhere (``recoded`` of the report).

    The result is published in one step. The same call resumes an interrupted run, and writes the same bytes as an
    uninterrupted run.

    Args:
        source: a checkpoint folder of safetensors shards, with an index for several shards; a ``.safetensors`` file; a
            NeMo checkpoint; or a repository on the Hub: ``hf://owner/name`` or ``hf://owner/name@revision``, also
            without ``hf://`` if no such folder exists.
        destination: folder of the result; ``hf://owner/name`` (``@branch`` for another branch than main); or a new
            folder of an object store, ``s3://bucket/folder``, ``gs://bucket/folder`` or ``az://container/folder``;
            None with ``in_place``. A destination that already holds the result is left unchanged.
        recipe: the tensors to quantize and their format; the default quantizes every linear weight of the decoder with
            one scale for each output channel.
        device: ``auto`` (every CUDA device, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or a list like
            ``cuda:0,cuda:1``. Several devices have one worker process each.
        max_memory: bytes for the working buffers of all workers together, as a number or like ``"256MiB"``.
        progress: called with the progress of the conversion, from any thread; True for a bar of tqdm, which notebooks
            show as a widget.
        overwrite: True to replace other contents of ``destination``: a folder by an atomic exchange, files of a branch
            by a commit. An object store can do neither, so that this is refused there.
        in_place: True to replace the source's own shards, one after the other. The conversion needs extra disk space
            for one output shard, and the originals are lost.
        restart: True to discard an unfinished run instead of resuming it.
        threads: worker threads; None for one on each available core.
        digests: True to record the SHA-256 of every file in the manifest. Without digests, a resumed run makes finished
            shards again.
        max_device_memory: bytes on each CUDA device; None for 80% of the free bytes.
        shard_size: bytes of tensors in a shard of the result, as a number or like ``"5GB"`` (the default), for a
            NeMo checkpoint; other sources keep their shards.
        hub: options for reading from the Hub and writing to it.
        cluster: address of a Ray cluster that makes the shards, one task each: ``"auto"``, ``"HOST:PORT"`` or
            ``"ray://HOST:PORT"``; None for this machine. An existing connection of the program (``ray.init``) takes
            precedence over the address. ``max_memory``, ``max_device_memory`` and ``threads`` then apply to each task,
            and ``device`` is ``auto``, ``cpu`` or ``cuda``.
        base_model: name of the source on the Hub, ``owner/name``, for the model card of the result; None for the
            repository of the source, or for the name in the source's own card.
        amaxes: amaxes of a calibration (`calibrate_repo`), or their file, for the static scales of a recipe with
            activations ``static``, and for the scales of an FP8 KV cache.
        min_share: least share of the bytes of the decoder's linear weights that becomes FP8, in percent (0 to 100): a
            plan with less is refused before anything is written. Weights with NaN or Inf, which only the conversion
            finds, are not counted out. None for any share.

    Returns:
        The report: tensors, bytes, seconds, memory, and notices.

    Raises:
        SourceError: the source cannot be converted; the subclass names the cause. If a second run would fail too
            (`errors.is_permanent`), nothing is left at the destination.
        RecipeError: the recipe or another argument has an unsupported value. Nothing was opened or written.
        CalibrationError: the amaxes cannot be read, or do not fit the source.
        BudgetError: the working buffers exceed ``max_memory`` or ``max_device_memory``.
        DeviceError: a device is missing, or its name is malformed.
        DestinationError: the destination cannot be written, or an unfinished run there cannot be resumed.
        HubError, AddressError: the Hub rejects a request or cannot be reached, or an address is malformed.
        WorkerDiedError: a worker process died.
        ClusterError: the cluster cannot be reached or cannot run the conversion; the subclass names the cause.
    """
    check_arguments(source=source, threads=threads, shard_size=shard_size, cluster=cluster, base_model=base_model)
    check_arguments(min_share=min_share)
    wanted, measured = as_recipe(recipe), as_amaxes(amaxes)
    if base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model, re.ASCII):
        problem = (
            f"base_model (--base-model) is {shortened(base_model)}, not the name of a model on the Hub (owner/name)"
        )
        raise RecipeError(problem, ("base_model",))

    def planner(inventory: Inventory, budget: int, cores: int) -> Plan:
        if base_model is not None:
            inventory = replace(inventory, origin=base_model, commit=None)
        # In place, a shard is replaced while others still need its scales.
        plan = make_plan(inventory, wanted, budget, cores, requantize=not in_place, amaxes=measured)
        check_share(plan.share, min_share)
        return plan

    if cluster is not None and (in_place or destination is None):
        raise RecipeError("a cluster needs a destination: a conversion in place runs on one machine only")
    if not in_place:
        if destination is not None:
            check_arguments(destination=destination)
        refuse_occupied(source, destination, overwrite)
    # The threads of a cluster are those of its tasks.
    own_threads = None if cluster else threads
    with (
        _run_options(
            "quantize", max_memory, max_device_memory, own_threads, digests, restart, overwrite, progress, hub
        ) as options,
        _worker_pool(device, options, cluster, threads) as workers,
    ):
        if not in_place:
            if destination is None:
                raise RecipeError("no destination; name one, or convert in place with in_place=True (--in-place)")
            return _convert(source, destination, planner, workers, options, shard_size)
        if destination is not None or overwrite or shard_size is not None:
            raise RecipeError("a conversion in place takes no destination, no overwrite and no shard size")
        from nemotron_fp8.conversion.in_place import convert_in_place
        from nemotron_fp8.destinations.open import folder_in_place

        spec = workers.spec
        return convert_in_place(
            folder_in_place(source),
            lambda inventory: planner(inventory, spec.host_bytes, spec.threads),
            wanted,
            measured,
            spec,
            options,
        )


@logged("convert")
def convert_repo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    max_memory: str | int = DEFAULT_MEMORY,
    progress: Callable[[Progress], None] | bool | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    threads: int | None = None,
    digests: bool = True,
    shard_size: str | int | None = None,
    hub: HubOptions | None = None,
) -> Report:
    """Convert a NeMo checkpoint to a Hugging Face checkpoint; every tensor keeps its dtype.

    Args:
        source: a NeMo checkpoint: a folder, a ``.nemo`` archive or a repository on the Hub. A Hugging Face checkpoint
            is copied.
        destination: as in `quantize_repo`.
        max_memory: as in `quantize_repo`.
        progress: as in `quantize_repo`.
        overwrite: as in `quantize_repo`.
        restart: as in `quantize_repo`.
        threads: as in `quantize_repo`.
        digests: as in `quantize_repo`.
        shard_size: as in `quantize_repo`.
        hub: as in `quantize_repo`.

    Returns:
        The report, as in `quantize_repo`.

    Raises:
        SourceError, RecipeError, BudgetError, DestinationError, HubError, AddressError: as in `quantize_repo`.
    """
    from nemotron_fp8.planning.convert import plan_convert

    check_arguments(source=source, destination=destination, shard_size=shard_size)
    refuse_occupied(source, destination, overwrite)
    with (
        _run_options("convert", max_memory, None, threads, digests, restart, overwrite, progress, hub) as options,
        _worker_pool("cpu", options) as workers,
    ):
        return _convert(source, destination, plan_convert, workers, options, shard_size)


@logged("dequantize")
def dequantize_repo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str = "bfloat16",
    max_memory: str | int = DEFAULT_MEMORY,
    progress: Callable[[Progress], None] | bool | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    threads: int | None = None,
    digests: bool = True,
    hub: HubOptions | None = None,
) -> Report:
    """Dequantize an FP8 checkpoint: every weight is ``code * scale``, rounded to ``dtype``, and scales are dropped.

    Every layout that `quantize_repo` writes is supported, and the block FP8 of DeepSeek.

    Args:
        source: a checkpoint with FP8 weights and their scales, in any place of `quantize_repo`.
        destination: as in `quantize_repo`.
        dtype: dtype of the dequantized weights: ``bfloat16``, ``float16`` or ``float32``.
        max_memory: as in `quantize_repo`.
        progress: as in `quantize_repo`.
        overwrite: as in `quantize_repo`.
        restart: as in `quantize_repo`.
        threads: as in `quantize_repo`.
        digests: as in `quantize_repo`.
        hub: as in `quantize_repo`.

    Returns:
        The report, as in `quantize_repo`.

    Raises:
        NotQuantizedError: the source holds no FP8 weight.
        LayoutError: an FP8 tensor has no scale, or the scale fits no known layout.
        SourceError, RecipeError, BudgetError, DestinationError, HubError, AddressError: as in `quantize_repo`.
    """
    from nemotron_fp8.planning.dequantize import DTYPES, plan_dequantize

    check_arguments(source=source, destination=destination)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RecipeError(f"dtype is {shortened(dtype)}, not one of {', '.join(DTYPES)}", ("dtype",))
    refuse_occupied(source, destination, overwrite)

    def planner(inventory: Inventory, budget: int, cores: int) -> Plan:
        return plan_dequantize(inventory, dtype, budget, cores)

    with (
        _run_options("dequantize", max_memory, None, threads, digests, restart, overwrite, progress, hub) as options,
        _worker_pool("cpu", options) as workers,
    ):
        return _convert(source, destination, planner, workers, options)


@contextmanager
def _run_options(
    task: str,
    max_memory: str | int,
    max_device_memory: str | int | None,
    threads: int | None,
    digests: bool,
    restart: bool,
    overwrite: bool,
    progress: Callable[[Progress], None] | bool | None,
    hub: HubOptions | None,
) -> Iterator[RunOptions]:
    """Parse the arguments that all conversions share, and show the progress until the context ends."""
    from nemotron_fp8.destinations.base import RunOptions
    from nemotron_fp8.hub.options import as_hub_options

    check_arguments(max_memory=max_memory, max_device_memory=max_device_memory, threads=threads, progress=progress)
    hub_options, device_bytes = (
        as_hub_options(hub),
        None if max_device_memory is None else parse_bytes(max_device_memory),
    )
    with progress_callback(progress, task) as callback:
        yield RunOptions(
            hub_options,
            parse_bytes(max_memory),
            device_bytes,
            threads or usable_cores(),
            digests,
            restart,
            overwrite,
            callback,
        )


@contextmanager
def _worker_pool(
    device: str, options: RunOptions, cluster: str | None = None, threads: int | None = None
) -> Iterator[WorkerPool]:
    """Create the workers: this process for one device, a process for each of several devices, or tasks of a cluster.

    Args:
        device: name of the devices, as in `quantize_repo`.
        options: options of the conversion.
        cluster: address of a Ray cluster; None for this machine.
        threads: threads of each task of a cluster; None for a default that depends on its nodes.

    Raises:
        DeviceError: a device is missing.
        ClusterError: the cluster cannot be reached, or has no node for such tasks; the subclass names the cause.
    """
    from nemotron_fp8.conversion.workers.base import InProcess
    from nemotron_fp8.conversion.workers.processes import Processes
    from nemotron_fp8.engines.devices import EngineSpec, resolve_devices

    if cluster is not None:
        from nemotron_fp8.conversion.workers.ray.cluster import connect
        from nemotron_fp8.conversion.workers.ray.pool import RayPool

        with connect(cluster) as connection:
            yield RayPool(connection, *connection.spec(device, threads, options.max_memory, options.max_device_memory))
        return
    devices = resolve_devices(device)
    # Each worker gets a share of the budget and of the threads; the plan is made for one worker.
    share = options.max_memory // len(devices), options.max_device_memory, max(1, options.threads // len(devices))
    specs = [EngineSpec(name, *share) for name in devices]
    yield InProcess(specs[0]) if len(specs) == 1 else Processes(specs)


def _convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    planner: Planner,
    workers: WorkerPool,
    options: RunOptions,
    shard_size: str | int | None = None,
) -> Report:
    """Open source and destination, make the plan, and run the conversion."""
    from nemotron_fp8.conversion.run import convert
    from nemotron_fp8.destinations.open import open_destination

    target = open_destination(destination, options)
    opened = open_source(source, shard_size, options.hub)
    plan = planner(opened.inventory, workers.spec.host_bytes, workers.spec.threads)
    return convert(opened, target, plan, workers, options)
