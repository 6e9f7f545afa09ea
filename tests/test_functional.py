"""The fused kernel is the plain formula in value, first and second derivatives, and keeps only x and z."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts  # noqa: E402

from lora_edu.cost import saved_bytes  # noqa: E402
from lora_edu.functional import _Fused, delta, dora_linear, dora_norm, lora_linear, plain_lora_linear  # noqa: E402


def factors(shape: tuple[int, ...], d_out: int, r: int, bias: bool = True, dtype: Any = torch.float64) -> list[Any]:
    """x, W, A, B, s, b with x (*shape); x, A and B require gradients, W and b are frozen."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Any:
        return torch.randn(size, generator=generator, dtype=dtype)

    x, W, A, B = draw(*shape), draw(d_out, shape[-1]), draw(r, shape[-1]), draw(d_out, r)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    return [x, W, A, B, 1.5, draw(d_out) if bias else None]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that really took the fused path."""
    calls: list[int] = []
    fused = _Fused.apply
    monkeypatch.setattr(_Fused, "apply", lambda *args: calls.append(1) or fused(*args))
    return calls


def with_factor(args: list[Any]) -> list[Any]:
    """The arguments of dora_linear: those of lora_linear, and a trained factor for every output."""
    f = torch.rand(len(args[1]), dtype=args[1].dtype, generator=torch.Generator().manual_seed(1)) + 0.5
    return [*args[:5], f.requires_grad_(), args[5]]


def plain_dora_linear(x: Any, W: Any, A: Any, B: Any, s: float, f: Any, b: Any) -> Any:
    return f * plain_lora_linear(x, W, A, B, s) + (0 if b is None else b)


PLAIN = {lora_linear: plain_lora_linear, dora_linear: plain_dora_linear}


def for_(function: Any, *args: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """The arguments of `function`, and those of them that require a gradient."""
    found = factors(*args, **options)
    found = with_factor(found) if function is dora_linear else found
    return found, [a for a in found if torch.is_tensor(a) and a.requires_grad]


def same_everywhere(args: list[Any], fused: Any = lora_linear) -> None:
    """Fused and plain agree in value and in the gradients of whatever requires one."""
    leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    one, two = fused(*args), PLAIN[fused](*args)
    torch.testing.assert_close(one, two)
    g = torch.randn_like(two)
    for a, b in zip(torch.autograd.grad(one, leaves, g), torch.autograd.grad(two, leaves, g), strict=True):
        torch.testing.assert_close(a, b)


@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    d_in=st.integers(1, 6),
    d_out=st.integers(1, 6),
    r=st.integers(1, 8),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_fused_is_plain_for_every_shape(lead: list[int], d_in: int, d_out: int, r: int, bias: bool) -> None:
    args = factors((*lead, d_in), d_out, r, bias)
    same_everywhere(args)
    same_everywhere(with_factor(args), dora_linear)
    assert lora_linear(*args).shape == dora_linear(*with_factor(args)).shape == (*lead, d_out)


@pytest.mark.parametrize("tokens", [3, 20])
def test_first_and_second_derivatives(tokens: int, fused_calls: list[int]) -> None:
    args = factors((tokens, 3), 4, 2)
    for function, inputs in ((lora_linear, args), (dora_linear, with_factor(args))):
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)
    assert fused_calls


@pytest.mark.parametrize("leaf", [0, 2, 3])
def test_each_gradient_alone(leaf: int, fused_calls: list[int]) -> None:
    args = factors((3, 4), 5, 2)
    for position in (0, 2, 3):
        args[position].requires_grad_(position == leaf)
    same_everywhere(args)
    same_everywhere(with_factor(args), dora_linear)
    same_everywhere([a.detach() if i == 5 else a for i, a in enumerate(with_factor(args))], dora_linear)
    assert bool(fused_calls) == (leaf == 2)  # where A is frozen the plain formula need not keep x


@pytest.mark.parametrize("function", PLAIN)
def test_a_second_backward_pass_through_a_kept_graph_is_the_first(function: Any, fused_calls: list[int]) -> None:
    args, leaves = for_(function, (20, 5), 4, 2)
    y = function(*args)
    g = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, leaves, g, retain_graph=True) for _ in range(2))
    assert fused_calls and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_of_the_size_of_the_output_is_kept_for_the_backward_pass(fused_calls: list[int]) -> None:
    args = factors((64, 16), 24, 4)
    own = {t.data_ptr() for t in args if torch.is_tensor(t)}
    y = lora_linear(*args)
    node = y.grad_fn.next_functions[0][0]  # below the view
    assert fused_calls and {t.data_ptr() for t in node.saved_tensors if t is not None} <= own
    assert [t.shape for t in node.kept if t is not None] == [(64, 4)]  # z, let go in the backward pass
    y.sum().backward()
    assert node.kept is None


@pytest.mark.parametrize("function", PLAIN)
def test_hooks_on_saved_tensors_see_all_that_is_kept(function: Any, fused_calls: list[int]) -> None:
    args, leaves = for_(function, (64, 16), 24, 4)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function(*args)
    seen = {t.shape for t in kept}
    assert fused_calls and (64, 4) in seen and ((64, 24) in seen) == (function is dora_linear)
    assert y.grad_fn.next_functions[0][0].kept is None
    g = torch.randn_like(y)
    wanted = torch.autograd.grad(PLAIN[function](*args), leaves, g)
    for _ in range(2):  # nothing that a hook has seen is written over
        for a, b in zip(torch.autograd.grad(y, leaves, g, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_is_fused_in_a_checkpoint_and_keeps_nothing_there(reentrant: bool, fused_calls: list[int]) -> None:
    args, leaves = for_(lora_linear, (64, 16), 24, 4)
    y = checkpoint(lambda x: lora_linear(x, *args[1:]).tanh(), args[0], use_reentrant=reentrant)
    wanted = torch.autograd.grad(plain_lora_linear(*args).tanh().sum(), leaves)
    y.sum().backward()
    for a, b in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(a.grad, b)
    assert len(fused_calls) == 2


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_fused_in_the_low_precision_with_gradients_in_the_high(
    base: Any, fused_calls: list[int]
) -> None:
    x, W, A, B, s, b = factors((3, 8, 4), 5, 2, dtype=torch.float32)
    x, W, b = x.detach().to(base).requires_grad_(), W.to(base), b.to(base)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, W, A, B, s, b)
        wanted = plain_lora_linear(x, W, A, B, s, b)
    assert fused_calls and y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=0.03, atol=0.03)
    g = torch.randn_like(y)
    for leaf, a, c in zip(
        (x, A, B), torch.autograd.grad(y, (x, A, B), g), torch.autograd.grad(wanted, (x, A, B), g), strict=True
    ):
        assert a.dtype == leaf.dtype and (a - c).norm() < 0.02 * c.norm()


def test_where_a_is_frozen_x_is_not_kept() -> None:
    x, W, A, B, s, b = factors((64, 16), 24, 4)
    layer = torch.nn.Module()  # owns what is frozen
    layer.W, layer.A, layer.b = (torch.nn.Parameter(t.detach(), requires_grad=False) for t in (W, A, b))
    kept = saved_bytes(lambda: lora_linear(x.detach(), layer.W, layer.A, B, s, layer.b).sum(), layer)
    assert kept == 64 * 4 * 8  # z alone


@pytest.mark.parametrize("function", PLAIN)
def test_other_ways_to_differentiate(function: Any) -> None:
    args, _ = for_(function, (7, 5), 4, 2)
    f, g, x = (lambda x: function(x, *args[1:])), (lambda x: PLAIN[function](x, *args[1:])), args[0].detach()
    wanted = torch.autograd.functional.jacobian(g, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), wanted)
    forward = torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(forward, wanted)
    torch.testing.assert_close(torch.func.jacrev(f)(x), wanted)


@pytest.mark.parametrize("function", PLAIN)
def test_a_backward_pass_inside_autocast_has_the_dtypes_of_the_forward_pass(
    function: Any, fused_calls: list[int]
) -> None:
    args, leaves = for_(function, (7, 5), 4, 2, dtype=torch.float32)
    y, g = function(*args), torch.randn(7, 4)
    wanted = torch.autograd.grad(PLAIN[function](*args), leaves, g)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, leaves, g)
    assert fused_calls
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_selective_checkpoint_may_keep_products() -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    args, leaves = for_(lora_linear, (7, 5), 4, 2)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(lambda x: lora_linear(x, *args[1:]).tanh(), args[0], use_reentrant=False, context_fn=contexts)
    wanted = torch.autograd.grad(plain_lora_linear(*args).tanh().sum(), leaves)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_it_falls_back_where_it_must(fused_calls: list[int]) -> None:
    trainable = factors((3, 4), 5, 2)
    trainable[1].requires_grad_()
    same_everywhere(trainable)  # the gradient of W is there
    trainable_bias = factors((3, 4), 5, 2)
    trainable_bias[5].requires_grad_()
    same_everywhere(trainable_bias)
    x, W, A, B, s, b = factors((3, 4), 5, 2, dtype=torch.float32)
    half = [x.bfloat16().detach(), W.bfloat16(), A, B, s, b.bfloat16()]
    assert lora_linear(*half).dtype == torch.bfloat16
    rows = torch.vmap(lambda row: lora_linear(row, W, A, B, s, b))(x)
    torch.testing.assert_close(rows, plain_lora_linear(x, W, A, B, s, b))
    assert not fused_calls


@given(d_in=st.integers(1, 7), d_out=st.integers(1, 7), r=st.integers(1, 8), s=st.floats(-4, 4))
@settings(max_examples=60, deadline=None)
def test_doras_norm_is_the_length_of_every_row(d_in: int, d_out: int, r: int, s: float) -> None:
    _, W, A, B, _, _ = factors((1, d_in), d_out, r)
    direct = torch.linalg.norm(W + delta(A, B, s), dim=1)
    torch.testing.assert_close(dora_norm(W, A, B, s), direct, rtol=1e-6, atol=1e-6)


def test_doras_norm_keeps_its_digits_where_a_row_almost_cancels() -> None:
    torch.manual_seed(0)
    W = torch.randn(5, 7)
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    A, B = Vt, -(1 - 1e-4) * U * s  # W + B A is about 1e-4 W
    direct = torch.linalg.norm((W.double() + B.double() @ A.double()), dim=1).float()
    torch.testing.assert_close(dora_norm(W, A, B, 1.0), direct, rtol=1e-2, atol=0)


def test_doras_norm_of_a_row_that_cancels_is_zero_and_not_nan() -> None:
    W, A, B = torch.eye(3), torch.eye(3), -torch.eye(3)
    assert torch.equal(dora_norm(W, A, B, 1.0), torch.zeros(3))
