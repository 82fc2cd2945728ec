"""Inputs of products with the weights of a layer, by name of the module; and the names, without a model."""

from __future__ import annotations

import pytest
import torch

from nemotron_fp8.calibration.modules import Experts, matrices_of
from nemotron_fp8.calibration.observer import Inputs
from nemotron_fp8.checkpoint.tensor_view import TensorView
from nemotron_fp8.inference.weights import Part, Piece

LINEAR = torch.nn.functional.linear


def largest(inputs: Inputs) -> dict[str, float | None]:
    return {name: found.largest for name, found in inputs.found.items()}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_each_matrix_has_the_largest_input_of_all_its_products() -> None:
    q, k = random(6, 8), random(4, 8)
    with Inputs({"q": q, "k": k}, {("q", None): ("a.q",), ("k", None): ("a.k",)}, False) as inputs:
        LINEAR(torch.full((2, 8), -3.0), q)
        LINEAR(torch.full((1, 8), 2.0), q)
        torch.full((1, 8), 5.0) @ k.T
        LINEAR(torch.full((1, 8), 50.0), random(3, 8))
    assert largest(inputs) == {"a.q": 3, "a.k": 5}


def test_one_parameter_of_several_tensors_counts_for_all() -> None:
    """Engines merge gate and up; the checkpoint has both."""
    w = random(6, 8)
    with Inputs({"gate_up": w}, {("gate_up", None): ("m.gate", "m.up")}, False) as inputs:
        LINEAR(torch.full((2, 8), -3.0), w)
    assert largest(inputs) == {"m.gate": 3, "m.up": 3}


def test_a_parameter_without_a_name_is_not_measured() -> None:
    w = random(6, 8)
    with Inputs({"w": w, "norm": random(8)}, {}, False) as inputs:
        LINEAR(random(2, 8), w)
    assert not inputs.found


def test_values_that_change_in_place_between_two_products() -> None:
    """One tensor object, of which each product sees other values."""
    q, k, x = random(6, 8), random(4, 8), torch.ones(2, 8)
    with Inputs({"q": q, "k": k}, {("q", None): ("q",), ("k", None): ("k",)}, False) as inputs:
        LINEAR(x, q)
        x.mul_(4)
        LINEAR(x, k)
    assert largest(inputs) == {"q": 1, "k": 4}


STACK = random(3, 6, 8)
EXPERTS = {("up", number): (f"e.{number}",) for number in range(3)}


def test_experts_one_by_one() -> None:
    with Inputs({"up": STACK}, EXPERTS, False) as inputs:
        LINEAR(torch.full((2, 8), -3.0), STACK[0])
        LINEAR(torch.empty(0, 8), STACK[1])
        LINEAR(torch.full((1, 8), 7.0), STACK[2])
        LINEAR(torch.full((1, 8), 2.0), STACK[2])
    assert largest(inputs) == {"e.0": 3, "e.2": 7}


def test_experts_at_once() -> None:
    """Each has its own inputs; those of an expert without tokens are all 0."""
    x = torch.zeros(3, 2, 8)
    x[0, 1, 3], x[2, 0, 0] = -4.0, 6.0
    with Inputs({"up": STACK}, EXPERTS, True) as inputs:
        torch.bmm(x, STACK.transpose(1, 2))
    assert largest(inputs) == {"e.0": 4, "e.2": 6}


def test_all_experts_with_the_same_inputs() -> None:
    with Inputs({"up": STACK}, EXPERTS, False) as inputs:
        torch.matmul(torch.full((2, 8), 3.0), STACK.transpose(1, 2))
    assert largest(inputs) == {"e.0": 3, "e.1": 3, "e.2": 3}


def test_a_stack_of_one_name_has_the_largest_input_of_all_experts() -> None:
    with Inputs({"up": STACK}, {("up", None): ("experts.up",)}, False) as inputs:
        for number in (0, 2):
            LINEAR(torch.full((1, 8), 1.0 + number), STACK[number])
    assert largest(inputs) == {"experts.up": 3}


def test_a_dense_matrix_with_inputs_of_zeros_has_an_amax() -> None:
    w = random(6, 8)
    with Inputs({"w": w}, {("w", None): ("w",)}, False) as inputs:
        LINEAR(torch.zeros(2, 8), w)
    assert largest(inputs) == {"w": 0}


def view(name: str, *shape: int) -> TensorView:
    return TensorView(name, "BF16", shape, ())


def part(*pieces: tuple[str, str, int | None]) -> Part:
    return Part(pieces=[Piece(view(name, 4, 4), target, 0, expert) for name, target, expert in pieces])


def test_names_of_matrices() -> None:
    """Tensors as they are, experts that the model stacks, stacks that a result splits, and conversions."""
    stack = view("m.0.experts.down_proj", 2, 4, 4)
    found = part(
        ("m.0.q.weight", "q.weight", None),
        ("m.0.experts.0.gate.weight", "experts.gate_up", 0),
        ("m.0.experts.0.up.weight", "experts.gate_up", 0),
        ("m.0.experts.1.gate.weight", "experts.gate_up", 1),
    )
    found.pieces.append(Piece(stack, "experts.down", 0))
    found.converted["model.layers.0.kv.weight"] = [view("m.0.kv_b.weight", 4, 4), view("m.0.kv_a.weight", 4, 4)]
    stacks = {stack.name: Experts("m.0.experts.", ("down_proj",), 2)}
    assert matrices_of(found, "model.layers.0.", stacks) == {
        ("q.weight", None): ("m.0.q",),
        ("experts.gate_up", 0): ("m.0.experts.0.gate", "m.0.experts.0.up"),
        ("experts.gate_up", 1): ("m.0.experts.1.gate",),
        ("experts.down", 0): ("m.0.experts.0.down_proj",),
        ("experts.down", 1): ("m.0.experts.1.down_proj",),
        ("kv.weight", None): ("m.0.kv_b", "m.0.kv_a"),
    }


ATTENTION = part(
    ("h.3.attention.self.query.weight", "attn.q_proj.weight", None),
    ("h.3.attention.self.key.weight", "attn.k_proj.weight", None),
    ("h.3.attention.out.weight", "attn.o_proj.weight", None),
    ("h.3.mlp.weight", "mlp.weight", None),
    ("h.3.mixer.in_proj.weight", "mixer.in_proj.weight", None),
)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("attn", "h.3.attention"),
        ("attn.core", "h.3.attention"),  # a module without weights, in the one that has them
        ("mixer", "h.3.mixer"),
        ("mixer.in_proj", "h.3.mixer.in_proj"),
        ("other", None),
        ("", None),
    ],
)
def test_names_of_attention(path: str, name: str | None) -> None:
    assert ATTENTION.name_of(path) == name
