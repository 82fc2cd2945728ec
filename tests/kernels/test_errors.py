"""One test per error class: raised for its violation, with the numbers of the case, on every path."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nemotron_fp8_kernels as kernels
from nemotron_fp8_kernels import cpu, errors, native, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

W = torch.ones(4, 6)


@pytest.fixture(params=["public", "cpu", "reference", "triton"])
def path(request: pytest.FixtureRequest) -> ModuleType:
    named = {"public": kernels, "cpu": cpu, "reference": reference}
    found: ModuleType = named.get(request.param) or request.getfixturevalue("triton_ops")
    if request.param == "triton" and not found.INTERPRETED:  # type: ignore[attr-defined]
        pytest.skip("the host makes these checks before it uses the device")
    return found


def test_unsupported_dtype(path: ModuleType) -> None:
    for call in (
        lambda: path.quantize(W.double()),
        lambda: path.amax_bits(W.to(torch.int8)),
        lambda: path.quantize_with_amax(W, torch.tensor(1.0, dtype=torch.float64)),
        lambda: path.dequantize(W, torch.tensor(1.0)),
        lambda: path.dequantize(W.to(torch.float8_e4m3fn), torch.tensor(1)),
        lambda: path.dequantize(W.to(torch.float8_e4m3fn), torch.tensor(1.0), dtype=torch.float64),
    ):
        with pytest.raises(errors.UnsupportedDtypeError) as caught:
            call()
        assert caught.value.dtype not in caught.value.allowed


def test_shape(path: ModuleType) -> None:
    for call, argument in (
        (lambda: path.quantize(torch.ones(3), "channel"), "w"),
        (lambda: path.quantize(torch.ones(3, 3, 3), "block"), "w"),
        (lambda: path.quantize_with_amax(W, torch.ones(4), "channel"), "amax"),
        (lambda: path.quantize_with_amax(W, torch.ones(1)), "amax"),
        (lambda: path.dequantize(W.to(torch.float8_e4m3fn), torch.ones(4), "channel"), "scale"),
    ):
        with pytest.raises(errors.ShapeError) as caught:
            call()
        assert caught.value.argument == argument
    with pytest.raises(errors.ShapeError):
        reference.scale_from_amax(torch.ones(2), "original")


def test_output_that_does_not_fit() -> None:
    for path in (kernels, cpu):
        with pytest.raises(errors.ShapeError):
            path.quantize_with_amax(W, kernels.amax(W), out=torch.empty(6, 4, dtype=torch.float8_e4m3fn))
        with pytest.raises(errors.UnsupportedDtypeError):
            path.quantize_with_amax(W, kernels.amax(W), out=torch.empty(4, 6, dtype=torch.uint8))
        with pytest.raises(errors.DeviceError) as caught:
            path.quantize_with_amax(W, kernels.amax(W), out=torch.empty(4, 6, dtype=torch.float8_e4m3fn, device="meta"))
        assert (caught.value.device, caught.value.expected) == ("meta", "cpu")


@pytest.fixture(params=["public", "cpu", "reference", "triton"])
def many(request: pytest.FixtureRequest) -> Callable[..., object]:
    if request.param == "triton":
        if not request.getfixturevalue("triton_ops").INTERPRETED:
            pytest.skip("the host makes these checks before it uses the device")
        from nemotron_fp8_kernels.gpu.many import quantize_many

        return quantize_many
    paths = {"public": kernels, "cpu": cpu, "reference": reference}
    return paths[request.param].quantize_many  # type: ignore[no-any-return]


def codes(*shape: int) -> torch.Tensor:
    """Return codes that no cast of ``W`` writes."""
    return torch.full(shape, 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn)


SLAB = torch.full((100,), 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn)
INPUT = torch.zeros(200, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (torch.empty(4, 6, dtype=torch.uint8), errors.UnsupportedDtypeError),
        (codes(6, 4), errors.ShapeError),
        (codes(24), errors.ShapeError),
        (torch.empty(4, 6, dtype=torch.float8_e4m3fn, device="meta"), errors.DeviceError),
        (codes(6, 4).t(), errors.LayoutError),
        (codes(4, 12)[:, ::2], errors.LayoutError),
        (codes(1, 6).expand(4, 6), errors.OutputsError),
        (codes(40).as_strided((4, 6), (5, 1)), errors.OutputsError),
        (SLAB[23:47].view(4, 6), errors.OutputsError),
        (SLAB.as_strided((4, 6), (7, 1), 18), errors.OutputsError),
        (INPUT[95:119].view(torch.float8_e4m3fn).view(4, 6), errors.OutputsError),
    ],
)
def test_outputs_of_a_list_that_do_not_fit(
    many: Callable[..., object], second: torch.Tensor, error: type[errors.KernelInputError]
) -> None:
    """The second output is rejected before the first one is written."""
    first = SLAB[:24].view(4, 6)
    inputs = [W, INPUT[:96].view(torch.float32).view(4, 6)]
    with pytest.raises(error):
        many(inputs, out=[first, second])
    assert bool((first.view(torch.uint8) == 0x55).all())
    for out in ([], [first], [first, codes(4, 6), codes(4, 6)]):
        with pytest.raises(errors.OutputsError, match="2 tensors"):
            many(inputs, out=out)


def test_inputs_of_a_list_that_do_not_fit(many: Callable[..., object]) -> None:
    """The second tensor is rejected before the first output is written."""
    for second, granularity, error in (
        (torch.ones(3, dtype=torch.int8), "tensor", errors.UnsupportedDtypeError),
        (torch.ones(3), "channel", errors.ShapeError),
        (torch.ones(3), "block", errors.ShapeError),
    ):
        outs = [codes(4, 6), codes(3)]
        with pytest.raises(error):
            many([W, second], granularity, out=outs)
        assert bool((outs[0].view(torch.uint8) == 0x55).all())


def test_layout() -> None:
    for call in (
        lambda: kernels.quantize(W.t()),
        lambda: kernels.amax(W[:, ::2]),
        lambda: kernels.quantize(torch.ones(2, 3, 4)[:, :, :2]),
        lambda: kernels.dequantize(W.to(torch.float8_e4m3fn).t(), torch.tensor(1.0)),
    ):
        with pytest.raises(errors.LayoutError, match="contiguous"):
            call()


def test_granularity(path: ModuleType) -> None:
    for call in (
        lambda: path.quantize(W, "row"),
        lambda: path.quantize(W, "block", (0, 128)),
        lambda: path.quantize(W, "block", (128,)),
        lambda: path.quantize(W, "channel", numerics="original"),
    ):
        with pytest.raises(errors.GranularityError):
            call()


def test_granularity_of_shared_scales() -> None:
    for path in (kernels, cpu, reference):
        with pytest.raises(errors.GranularityError):
            path.quantize_many([W, W], "channel", shared=[[0, 1]])
        with pytest.raises(errors.GranularityError):
            path.quantize_many([W, W], numerics="original", shared=[[0, 1]])


def test_numerics(path: ModuleType) -> None:
    with pytest.raises(errors.NumericsError) as caught:
        path.quantize(W, numerics="float64")
    assert caught.value.numerics == "float64"


def test_multiplier_overflow(path: ModuleType) -> None:
    with pytest.raises(errors.MultiplierOverflowError) as caught:
        path.quantize(torch.zeros(3, dtype=torch.float16), numerics="original")
    assert caught.value.amax == 0.0


def test_shared_scale() -> None:
    for path in (kernels, cpu, reference):
        with pytest.raises(errors.SharedScaleError, match="two groups"):
            path.quantize_many([W, W], shared=[[0, 1], [1]])


def test_device_of_many(triton_ops: ModuleType) -> None:
    from nemotron_fp8_kernels.gpu.many import quantize_many

    with pytest.raises(errors.DeviceError):
        quantize_many([W, torch.ones(2, device="meta")])
    with pytest.raises(errors.DeviceError):
        triton_ops.quantize_with_amax(W, torch.ones((), device="meta"))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_device_of_a_call_on_the_cpu(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels get addresses: none of another device may reach them."""
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    elsewhere, codes = torch.ones((), device="meta"), W.to(torch.float8_e4m3fn)
    calls: list[Callable[[], object]] = [
        lambda: kernels.quantize_with_amax(W, elsewhere),
        lambda: cpu.cast_and_measure(W, elsewhere),
        lambda: kernels.dequantize(codes, elsewhere),
        lambda: kernels.quantize_many([W, W.to("meta")]),
        lambda: reference.quantize_with_amax(W, elsewhere),
    ]
    for call in calls:
        with pytest.raises(errors.DeviceError):
            call()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_no_data() -> None:
    if native.load() is None:
        pytest.skip("there are no compiled kernels")
    with FakeTensorMode():
        fake = torch.ones(4, 6)
        for call in (cpu.quantize, cpu.amax_bits):
            with pytest.raises(errors.NoDataError):
                call(fake)
    with pytest.raises(errors.NoDataError):
        cpu.amax_bits(W.to("meta"))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_blocks_of_any_size(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than the tensor, even than 64 bits: one scale, as for a block of its shape."""
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    expected = reference.quantize(w, "block", (6, 40))
    for block in ((1 << 40, 1 << 40), (1 << 64, 1 << 64), (6, 1 << 63)):
        for path in (kernels, reference):
            q, scale = path.quantize(w, "block", block)
            assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
            assert torch.equal(scale, expected[1])
            assert torch.equal(
                path.dequantize(q, scale, "block", block), reference.dequantize(q, scale, "block", (6, 40))
            )
    for wrong in ((1.5, 2), (0, 2), (-1, 2), ("1", 2)):
        with pytest.raises(errors.GranularityError):
            kernels.quantize(w, "block", wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_an_output_in_the_memory_of_its_weights() -> None:
    w = torch.randn(8, 8).bfloat16()
    out = w.view(torch.uint8).view(torch.float8_e4m3fn)[:, :8]
    with pytest.raises(errors.OutputsError, match="share memory"):
        kernels.quantize_with_amax(w, torch.tensor(1.0), out=out)


def test_device_older_than_hopper(triton_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ada:
        is_cuda = True
        device = "cuda:0"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    with pytest.raises(errors.DeviceNotSupportedError) as caught:
        triton_ops.on_device(Ada())
    assert caught.value.capability == (8, 9)


def test_every_error_is_a_value_error() -> None:
    classes = [entry for entry in vars(errors).values() if isinstance(entry, type)]
    assert len(classes) == 13
    assert all(issubclass(entry, ValueError) for entry in classes)


@pytest.mark.parametrize(
    "error",
    [
        errors.UnsupportedDtypeError("w", torch.float64, (torch.bfloat16, torch.float16)),
        errors.ShapeError("w", (3,), "2-D is required"),
        errors.LayoutError("w", (2, 3), (1, 2)),
        errors.DeviceError("amax", "cpu", "cuda:0"),
        errors.GranularityError("token", "unknown"),
        errors.NumericsError("float64"),
        errors.RoundingError("up", "unknown"),
        errors.MultiplierOverflowError(0.001),
        errors.SharedScaleError("two groups"),
        errors.OutputsError("2 outputs for 3 tensors"),
        errors.DeviceNotSupportedError((8, 9)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error: errors.KernelInputError) -> None:
    """Class, message and attributes survive pickling."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error) != {}
