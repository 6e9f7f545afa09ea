"""The LoRA layer: equal to peft's, a no-op at the start, merged exactly, and refusing bad input unchanged."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from lora_edu import LoRALinear, lora_linear  # noqa: E402
from lora_edu.cost import measured_flops  # noqa: E402
from lora_edu.functional import accumulate  # noqa: E402


def filled(
    d_in: int = 6, d_out: int = 5, r: int = 3, alpha: float = 12, bias: bool = True, **options: float
) -> LoRALinear:
    """A layer whose B is not zero, so that a wrong scale shows."""
    layer = LoRALinear(nn.Linear(d_in, d_out, bias=bias), r, alpha, **options)
    nn.init.normal_(layer.lora_B.weight)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_start_is_the_base_and_only_a_and_b_train(bias: bool, dropout: float) -> None:
    base = nn.Linear(6, 5, bias=bias)
    layer, x = LoRALinear(base, 2, 8, dropout), torch.randn(4, 6)
    assert torch.equal(layer(x), base(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A.weight", "lora_B.weight"}
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * (6 + 5)
    assert layer.lora_A.weight.abs().max() <= 6**-0.5


@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_pass_is_the_formula(bias: bool) -> None:
    layer, x = filled(bias=bias), torch.randn(2, 3, 6)
    W, A, B, b = layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.base_layer.bias
    expected = x @ (W + 12 / 3 * B @ A).T + (0 if b is None else b)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(lora_linear(x, W, A, B, 4.0, b), expected)


def test_dropout_spares_the_frozen_path_and_eval() -> None:
    torch.manual_seed(0)
    layer, x = filled(lora_dropout=0.5), torch.randn(2000, 6)
    update = (layer(x) - layer.base_layer(x)) @ torch.linalg.pinv(layer.lora_B.weight).T / layer.scaling
    # z = A dropout(x): each input is either dropped or doubled before A.
    dropped = update @ torch.linalg.pinv(layer.lora_A.weight).T
    assert not torch.equal(layer(x), layer(x)) and dropped.shape == x.shape
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.delta().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_same_map_and_unmerge_the_same_bits(dtype: torch.dtype) -> None:
    layer = filled().to(dtype)
    before, x = layer.base_layer.weight.clone(), torch.randn(4, 6, dtype=dtype)
    expected = layer(x)
    layer.merge()
    assert layer.merged and layer.base_layer.weight.shape == before.shape
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **tolerance)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.base_layer.weight, before)


def test_the_merged_sum_is_rounded_once() -> None:
    W, update = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 2.0**-8 + 2.0**-16)
    assert accumulate(W, update).item() == 1 + 2.0**-7  # rounding the update first would give a tie, and 1
    assert accumulate(W, update).dtype == torch.bfloat16


def state(layer: LoRALinear) -> dict[str, torch.Tensor]:
    return copy.deepcopy(layer.state_dict())


def test_refusals_leave_the_layer_as_it_was() -> None:
    layer = filled()
    before = state(layer)
    with pytest.raises(RuntimeError, match="nothing to take out"):
        layer.unmerge()
    with torch.no_grad():
        layer.lora_B.weight[0, 0] = float("inf")
    spoilt = state(layer)
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge()
    assert not layer.merged and all(torch.equal(v, spoilt[k]) for k, v in state(layer).items())
    layer.load_state_dict(before)
    layer.merge()
    merged = state(layer)
    with pytest.raises(RuntimeError, match="twice"):
        layer.merge()
    assert all(torch.equal(v, merged[k]) for k, v in state(layer).items())


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((nn.ReLU(), 2, 2), TypeError, "wraps an nn.Linear; got ReLU"),
        ((nn.Linear(3, 3), 0, 2), ValueError, "at least 1; got 0"),
        ((nn.Linear(3, 3), 1.5, 2), TypeError, "must be an integer; got 1.5"),
        ((nn.Linear(3, 3), 2, float("nan")), ValueError, "lora_alpha must be finite"),
        ((nn.Linear(3, 3), 2, 2, 1.0), ValueError, "0 <= lora_dropout < 1; got 1.0"),
    ],
)
def test_bad_arguments_are_refused_before_the_base_is_touched(
    arguments: tuple, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LoRALinear(*arguments)
    assert all(p.requires_grad for p in arguments[0].parameters())


def test_doras_magnitudes_reach_a_bfloat16_output() -> None:
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(64, 64).bfloat16(), 4, 8, use_dora=True), torch.randn(200, 64).bfloat16()
    before = layer(x)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.0015)  # less than a step of bfloat16 at 1
    assert 0.02 < (layer(x) != before).double().mean() < 0.5


def test_dora_starts_as_the_base_bit_for_bit_without_a_bias() -> None:
    base, x = nn.Linear(33, 17, bias=False), torch.randn(9, 33)
    assert torch.equal(LoRALinear(base, 4, 8, use_dora=True)(x), base(x))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_pefts_layer(seed: int, bias: bool) -> None:
    peft = pytest.importorskip("peft")

    def base() -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(9, 7, bias=bias))

    ours = nn.Sequential(LoRALinear(base()[0], 4, 10))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=10, target_modules=["0"]))
    twin = theirs.base_model.model[0]
    assert torch.equal(ours[0].lora_A.weight, twin.lora_A["default"].weight), "one seed, one start"
    x = torch.randn(16, 9, dtype=torch.float64)  # float64: no room for a near miss
    ours.double(), theirs.double()
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (ours, theirs)]
    for _ in range(30):
        for model, optimizer in zip((ours, theirs), steps, strict=True):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[0].delta(), twin.get_delta_weight("default"), rtol=0, atol=1e-12)


def test_dora_under_hooks_multiplies_by_w_once() -> None:
    layer, x, (out, d, r) = (
        LoRALinear(nn.Linear(12, 7), r=3, lora_alpha=3, use_dora=True),
        torch.randn(5, 12),
        (7, 12, 3),
    )
    norm = 2 * (out * d * r + r * d * r + out * r * r)
    assert measured_flops(lambda: layer(x)) == 2 * 5 * (out * d + r * (out + d)) + norm
