"""The core on a CUDA device, where there is one: peft's numbers, the fused step, and a model moved after it was adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

from lora_edu import (  # noqa: E402
    LoRALinear,
    cost,
    disabled,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lora_edu.lab import at_scale  # noqa: E402
from tests.test_functional import PLAIN, for_  # noqa: E402
from tests.test_peft import GRID, IDS, base, ours, randomise, theirs, trainable  # noqa: E402

HERE = IDS.cuda()


@pytest.mark.parametrize("options", GRID.values(), ids=GRID)
def test_outputs_and_gradients_are_pefts(options: dict[str, Any]) -> None:
    a, b = ours(options).eval().double(), theirs(options).eval().double()
    randomise(a, b)
    ya, yb = a.cuda()(HERE), b.cuda()(HERE)
    torch.testing.assert_close(ya, yb, rtol=1e-9, atol=1e-9)
    ya.square().mean().backward(), yb.square().mean().backward()
    for name, parameter in trainable(a).items():
        torch.testing.assert_close(parameter.grad, trainable(b)[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", PLAIN)
@pytest.mark.parametrize("r", [4, 32])
def test_the_fused_step_is_the_plain_one(fused: Any, dtype: torch.dtype, r: int) -> None:
    args, _ = for_(fused, (3, 40, 64), 48, r)
    moved = [a.detach().to("cuda", dtype).requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in args]
    exact = [a.detach().double().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in moved]
    y, reference = fused(*moved), PLAIN[fused](*exact)
    assert "Fused" in y.grad_fn.next_functions[0][0].name()
    g = torch.randn_like(y)
    leaves = [[a for a in those if torch.is_tensor(a) and a.requires_grad] for those in (moved, exact)]
    found = [y, *torch.autograd.grad(y, leaves[0], g)]
    wanted = [reference, *torch.autograd.grad(reference, leaves[1], g.double())]
    for one, two in zip(found, wanted, strict=True):
        assert (one - two).norm() < 4 * torch.finfo(dtype).eps * two.norm()


def test_a_model_moved_after_it_was_adapted_is_switched_off_merged_restored_and_saved(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["emb", "lin", "conv"], "modules_to_save": ["head"], "bias": "all"}
    model, plain = ours(options).eval(), base().eval().cuda()
    randomise(model)
    on_cpu = model(IDS)
    model.cuda()
    y = model(HERE)
    torch.testing.assert_close(y.cpu(), on_cpu, rtol=1e-4, atol=1e-3)
    with disabled(model):
        assert torch.equal(model(HERE), plain(HERE))
    torch.testing.assert_close(merge_lora(model)(HERE), y, rtol=1e-4, atol=1e-3)
    assert torch.equal(unmerge_lora(model)(HERE), y)
    there = load_adapter(base().eval(), save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(there(IDS), on_cpu)
    assert torch.equal(remove_lora(model)(HERE), plain(HERE))


def test_the_peak_of_a_step_is_near_the_frozen_layers() -> None:
    def peak(layer: torch.nn.Module) -> int:
        x, g = (torch.randn(2048, 768, device="cuda") for _ in range(2))
        for _ in range(2):
            layer.zero_grad()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            layer(x.requires_grad_()).backward(g)
            x = x.detach()
        return torch.cuda.max_memory_allocated() - before

    frozen = torch.nn.Linear(768, 768, device="cuda").requires_grad_(False)
    assert peak(LoRALinear(frozen, r=8, lora_alpha=8)) < 1.1 * peak(frozen)


@pytest.mark.parametrize("case", at_scale.CASES)
def test_a_step_of_a_whole_model_keeps_what_the_ledger_says(case: str) -> None:
    shape = cost.Shape(64, 128, 2, 100, heads=4)
    row = at_scale.measure(case, shape, texts=2, tokens=32)
    recipe, r, targets = at_scale.CASES[case]
    if recipe:
        adapter = cost.lora_parameters(shape, r, targets) if r else 0
        kept = row["weights"] + row["gradients"] + row["optimizer"]
        assert kept == pytest.approx(cost.training_memory(recipe, cost.parameters(shape), adapter).total, rel=0.01)
        assert row["trained"] == (adapter or cost.parameters(shape))
    assert row["highest"] > row["weights"] and row["ms"] > 0
