"""Formula against measurement, to the unit; published counts, to the printed digit; the calculator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("agg")
torch = pytest.importorskip("torch")

import peft  # noqa: E402
from peft import get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM  # noqa: E402

from lora_edu import LoRAConfig, add_lora, cost, functional, parameter_report, save_adapter, widgets  # noqa: E402
from lora_edu.lab.at_scale import llama  # noqa: E402

LLAMA_7B = cost.SHAPES["Llama-2-7B"]
GROUPED = cost.Shape(hidden=24, intermediate=40, layers=2, vocab=11, heads=6, kv_heads=2)


@pytest.fixture(params=["fused", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which path the LoRA layers take."""
    if request.param == "plain":
        monkeypatch.setattr(functional, "_may_fuse", lambda *tensors: False)
    return str(request.param)


# Published counts


@pytest.mark.parametrize("row", cost.PUBLISHED, ids=lambda row: f"{row.source}: {row.what}")
def test_a_published_number_is_computed_to_its_last_digit_or_the_difference_has_a_reason(row: cost.Published) -> None:
    assert row.agrees == (not row.reason), f"printed {row.printed}, computed {row.rounded}"
    assert not row.reason or row.reason.endswith(".")


def test_a_number_is_written_with_the_unit_and_the_digits_of_the_printed_one() -> None:
    for printed, computed in (("37.7M", 37_748_736), ("1.863 GiB", 2e9), ("9,175,040", 9_175_040), ("0.01 %", 1.08e-4)):
        row = cost.Published("a paper", "a number", printed, computed)
        assert row.rounded == printed and row.agrees
        assert not cost.Published("a paper", "a number", printed, 1.2 * computed).agrees or printed == "0.01 %"
    with pytest.raises(ValueError, match="'many MB' is no number with a unit of x, bit, %, M"):
        _ = cost.Published("a paper", "a number", "many MB", 1).rounded


@pytest.mark.parametrize(
    ("r", "q_v", "all_linear", "ratio"),
    [
        (8, 4_194_304, 19_988_480, 0.6697),
        (16, 8_388_608, 39_976_960, 0.6727),
        (64, 33_554_432, 159_907_840, 0.6909),
        (256, 134_217_728, 639_631_360, 0.7635),
    ],
)
def test_llama_2_7b(r: int, q_v: int, all_linear: int, ratio: float) -> None:
    assert (cost.lora_parameters(LLAMA_7B, r, "q,v"), cost.lora_parameters(LLAMA_7B, r)) == (q_v, all_linear)
    assert cost.flops_ratio(LLAMA_7B, r) == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize(
    ("recipe", "gigabytes"),
    [
        *(("full, fp32", 107.81), ("full, mixed", 107.81), ("full, mixed, fp32 gradients", 121.29)),
        *(("full, bf16", 53.91), ("LoRA, fp32 base", 27.59), ("LoRA, bf16 base", 14.12), ("LoRA, bf16", 13.80)),
        *(("QLoRA, NF4, double", 4.505), ("QLoRA, NF4", 4.807)),
    ],
)
def test_training_memory_of_llama_2_7b_with_rank_16_on_all_maps(recipe: str, gigabytes: float) -> None:
    adapter = 0 if recipe.startswith("full") else 39_976_960
    linear = 6_476_005_376 if recipe.startswith("QLoRA") else 0
    memory = cost.training_memory(recipe, 6_738_415_616, adapter, linear)
    assert memory.total / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert (cost.parameters(LLAMA_7B), cost.linear_weights(LLAMA_7B)) == (6_738_415_616, 6_476_005_376)


def test_bits_per_weight() -> None:
    assert cost.bits_per_weight() == 4.5 and cost.bits_per_weight(double=True) == 4.126953125
    assert cost.bits_per_weight(128, double=True, second=64, bits=8) == 8 + 8 / 128 + 32 / 8192


# Parameters


def on_meta(shape: cost.Shape) -> nn.Module:
    """The model of this shape in transformers, without its numbers."""
    with torch.device("meta"):
        if shape.biases:
            sizes = {"n_embd": shape.hidden, "n_layer": shape.layers, "n_head": shape.heads}
            return GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab, n_positions=shape.positions, **sizes))
        return LlamaForCausalLM(llama(shape))


def count(model: nn.Module, *endings: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.endswith(endings))


@pytest.mark.parametrize("name", cost.SHAPES)
def test_a_model_has_the_parameters_of_its_shape_and_a_lora_those_of_its_rank_and_targets(name: str) -> None:
    shape, model = cost.SHAPES[name], on_meta(cost.SHAPES[name])
    assert parameter_report(model).total == cost.parameters(shape)
    assert count(model, "bias") == cost.bitfit_parameters(shape)
    norms = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "ln_f.weight", "ln_f.bias", "norm.weight")
    assert count(model, *norms) == cost.norm_parameters(shape)
    if not shape.biases:
        add_lora(model, LoRAConfig("all-linear", r=16))
        assert parameter_report(model).trainable == cost.lora_parameters(shape, 16)
        assert parameter_report(model).total == cost.parameters(shape) + cost.lora_parameters(shape, 16)


@pytest.mark.parametrize("shape", [GROUPED, cost.Shape(20, 36, 2, 7, heads=2, head_dim=16)])
@pytest.mark.parametrize("targets", [*cost.GROUPS, ("k_proj",), ("down_proj", "lm_head")])
def test_ranks_and_targets(shape: cost.Shape, targets: str | tuple[str, ...]) -> None:
    model = LlamaForCausalLM(llama(shape))
    names = cost.GROUPS[targets] if isinstance(targets, str) else targets
    assert parameter_report(model).total == cost.parameters(shape)
    add_lora(model, LoRAConfig(list(names), r=3))
    assert parameter_report(model).trainable == cost.lora_parameters(shape, 3, targets)
    assert count(model, "lora_B.weight") == cost.lora_fa_parameters(shape, 3, targets)
    assert cost.lora_parameters(shape, 3, [*reversed(names), *names]) == cost.lora_parameters(shape, 3, targets)


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        (peft.LoraConfig(r=3, target_modules="all-linear"), lambda s: cost.lora_parameters(s, 3)),
        (
            peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True),
            lambda s: cost.dora_parameters(s, 3, "q,v"),
        ),
        (peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj"]), lambda s: cost.vera_parameters(s, 5, "q,v")),
        (peft.VeraConfig(r=5, target_modules=["up_proj", "down_proj"]), lambda s: s.layers * (40 + 5 + 24 + 5)),
        (
            peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
            cost.ia3_parameters,
        ),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9),
            lambda s: cost.prefix_parameters(s, 9),
        ),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9),
            lambda s: cost.prompt_parameters(s, 9),
        ),
        (
            peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
            cost.norm_parameters,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:`is_gradient_checkpointing`")
def test_the_other_methods_count_as_peft_does(config: peft.PeftConfig, formula: Callable[[cost.Shape], int]) -> None:
    model = get_peft_model(LlamaForCausalLM(llama(GROUPED)), config)
    assert parameter_report(model).trainable == formula(GROUPED)


def test_an_adapter_has_two_maps_with_biases_twice_in_a_block() -> None:
    adapter = nn.Sequential(nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 24))
    assert cost.adapter_parameters(GROUPED, 5) == 2 * GROUPED.layers * parameter_report(adapter).total


# FLOPs and bytes of maps


def stack(widths: tuple[int, ...], adapted: tuple[int, ...], r: int) -> nn.Module:
    """Maps one above the other; without a rank `adapted` are the ones that train."""
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(widths)))
    if r:
        return add_lora(model, LoRAConfig([str(i) for i in adapted], r=r, lora_alpha=2 * r))
    for i, layer in enumerate(model):
        layer.requires_grad_(i in adapted)
    return model


STACKS = [
    ((7, 5), (0,), 3),
    ((16, 24, 8, 12), (0, 1, 2), 4),
    ((16, 24, 8, 12), (1,), 2),
    ((30, 6, 30), (0, 1), 8),  # a rank above the width
    ((16, 24, 8, 12), (0, 1, 2), 0),
    ((16, 24, 8, 12), (1, 2), 0),
]


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize(("widths", "adapted", "r"), STACKS)
def test_flops_of_a_step_on_a_stack(
    widths: tuple[int, ...], adapted: tuple[int, ...], r: int, tokens: int, path: str
) -> None:
    model, x = stack(widths, adapted, r), torch.randn(tokens, widths[0])
    expected, below = 0, False
    for i, (n, m) in enumerate(pairwise(widths)):
        here = i in adapted
        step = cost.linear_flops(m, n, r * here, trains=here and not r, dx=below)
        expected, below = expected + tokens * step.total, below or here
    assert cost.measured_flops(lambda: model(x).sum().backward()) == expected


def test_a_lora_leaves_out_one_of_three_large_products() -> None:
    assert cost.linear_flops(40, 30, 4).total == 4 * 40 * 30 + 6 * 4 * (40 + 30)
    assert cost.linear_flops(40, 30, trains=True).total == 6 * 40 * 30
    assert cost.linear_flops(40, 30).total == 4 * 40 * 30 and cost.linear_flops(40, 30, dx=False).total == 2 * 40 * 30


def test_what_torch_does_not_count_is_counted() -> None:
    x, W, C = torch.randn(5, 7), torch.randn(3, 7), torch.zeros(2, 5, 5)
    assert cost.measured_flops(lambda: torch.zeros(5, 3).addmm_(x, W.t())) == 2 * 5 * 7 * 3
    assert cost.measured_flops(lambda: C.baddbmm_(torch.ones(2, 5, 4), torch.ones(2, 4, 5))) == 2 * 2 * 5 * 4 * 5
    q, k, v = (torch.randn(2, 3, 10, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 10 * 10 * 8
    attend = F.scaled_dot_product_attention
    assert cost.measured_flops(lambda: attend(q, k, v, is_causal=True)) == 2 * product
    assert cost.measured_flops(lambda: attend(q, k, v, is_causal=True).sum().backward()) == 7 * product
    assert cost.measured_flops(lambda: x + x) == 0


@pytest.mark.parametrize(("widths", "adapted", "r"), STACKS)
def test_bytes_that_a_stack_keeps(widths: tuple[int, ...], adapted: tuple[int, ...], r: int) -> None:
    model, x = stack(widths, adapted, r), torch.randn(2, 13, widths[0])
    expected = sum(cost.saved_by_linear(26, n, r, trains=not r) for i, n in enumerate(widths[:-1]) if i in adapted)
    assert cost.saved_bytes(lambda: model(x).sum(), model) == expected
    assert cost.saved_by_linear(26, 9) == 0


def test_a_storage_counts_once_and_in_whole_and_only_while_it_is_kept() -> None:
    x = torch.randn(10, 6)
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(3, 4)])
    assert cost.saved_bytes(lambda: (model[0](x) + model[1](x)).sum(), model) == 10 * 6 * 4
    assert cost.saved_bytes(lambda: model[2](x[:, :3]).sum(), model) == 10 * 6 * 4  # a view keeps all of x

    def forward() -> torch.Tensor:
        model[0](x.clone()).exp()  # what no one keeps the graph of
        return model[0](x).sum()

    assert cost.saved_bytes(forward, model) == 10 * 6 * 4
    hidden = nn.Parameter(torch.randn(10, 6))
    assert cost.saved_bytes(lambda: (hidden * hidden).sum(), nn.Linear(1, 1)) == 10 * 6 * 4
    model.register_buffer("table", hidden.detach())
    assert cost.saved_bytes(lambda: (hidden * hidden).sum(), model) == 0


@pytest.mark.parametrize(("recipe", "r"), [("full, fp32", 0), ("LoRA, fp32 base", 4)])
def test_bytes_of_weights_gradients_and_optimizer(recipe: str, r: int) -> None:
    model = stack((16, 24, 8, 12), (0, 1, 2), r)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.randn(5, 16)).sum().backward()
    optimizer.step()
    report = parameter_report(model)
    base = report.total - report.trainable if r else report.total
    assert (
        *(cost.weight_bytes(model), cost.gradient_bytes(model)),
        cost.optimizer_bytes(optimizer) - 4 * len(trained),  # Adam's step counts
    ) == cost.training_memory(recipe, base, report.trainable if r else 0)


def test_an_adapters_file_is_its_parameters_and_a_header(tmp_path: Path) -> None:
    shape = GROUPED
    model = add_lora(LlamaForCausalLM(llama(shape)), LoRAConfig("all-linear", r=3))
    file = save_adapter(model, tmp_path) / "adapter_model.safetensors"
    header, payload = cost.file_bytes(file)
    assert payload == cost.adapter_bytes(cost.lora_parameters(shape, 3))
    assert header + payload == file.stat().st_size and 0 < header < 150 * 2 * 7 * shape.layers


# FLOPs of a transformer


class Block(nn.Module):
    def __init__(self, shape: cost.Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(shape.hidden, bias=shape.biases) for _ in range(2))
        for name, (m, n) in shape.maps.items():
            self.add_module(name, nn.Linear(n, m, bias=shape.biases))
        self.width, self.gated = shape.maps["o_proj"][1] // shape.heads, shape.gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        later = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        scores = (q @ k.transpose(-2, -1) + later).softmax(-1)
        x = x + self.o_proj((scores @ v).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        up = F.silu(self.gate_proj(h)) * self.up_proj(h) if self.gated else F.gelu(self.up_proj(h))
        return x + self.down_proj(up)


class Transformer(nn.Module):
    def __init__(self, shape: cost.Shape) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(shape.vocab, shape.hidden), shape.positions
        if shape.positions:
            self.table = nn.Parameter(torch.randn(shape.positions, shape.hidden))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden, bias=shape.biases)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.checkpointing = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.table[: ids.shape[1]] if self.positions else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.lm_head(self.norm(x))


PLAIN = cost.Shape(hidden=24, intermediate=96, layers=2, vocab=13, heads=4, gated=False, biases=True, positions=16)
IDS = torch.arange(2 * 9).reshape(2, 9) % 11


@pytest.mark.parametrize("shape", [GROUPED, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("targets", ["q,v", "mlp", "all-linear", ("k_proj", "o_proj", "lm_head")])
def test_flops_of_a_lora_step(shape: cost.Shape, targets: str | tuple[str, ...], path: str) -> None:
    names = cost.GROUPS[targets] if isinstance(targets, str) else targets
    for top in range(shape.layers + 1):
        blocks = range(shape.layers - top, shape.layers)
        paths = [f"blocks.{i}.{name}" for i in blocks for name in names if name in shape.maps]
        paths += ["lm_head"] * ("lm_head" in names)
        if paths:
            model = add_lora(Transformer(shape), LoRAConfig(paths, r=5))
            compare_flops(model, shape, r=5, targets=targets, top=top)
        else:
            with pytest.raises(ValueError, match="with top = 0 no block carries the LoRA"):
                cost.training_flops(shape, 5, targets, top=top)


@pytest.mark.parametrize("shape", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_flops_of_a_full_step(shape: cost.Shape) -> None:
    assert parameter_report(Transformer(shape)).total == cost.parameters(shape)
    compare_flops(Transformer(shape), shape)
    with torch.no_grad():
        forward = cost.measured_flops(lambda: Transformer(shape)(IDS))
    assert forward == IDS.numel() * cost.training_flops(shape, context=9).forward
    for top in range(shape.layers):
        model = Transformer(shape).requires_grad_(False)
        for part in (*model.blocks[shape.layers - top :], model.lm_head):
            part.requires_grad_(True)
        compare_flops(model, shape, top=top)


def compare_flops(model: Transformer, shape: cost.Shape, **options: Any) -> None:
    for model.checkpointing in (False, True):
        formula = cost.training_flops(shape, context=9, checkpointing=model.checkpointing, **options)
        with set_checkpoint_early_stop(False):  # which would leave out a block's last product
            assert cost.measured_flops(lambda: model(IDS).sum().backward()) == IDS.numel() * formula.total


def test_what_changes_the_ratio() -> None:
    def ratio(r: int = 16, targets: str = "all-linear", top: int = 32, **both: Any) -> float:
        full = cost.training_flops(LLAMA_7B, **both)
        return cost.training_flops(LLAMA_7B, r, targets, top=top, **both).total / full.total

    for r, targets in ((16, "q,v"), (16, "all-linear"), (256, "all-linear")):
        assert 0 < cost.flops_ratio(LLAMA_7B, r, targets) - ratio(r, targets) < 0.003
    assert ratio(targets="q,v") < 2 / 3 < ratio()
    assert ratio(context=2048) == pytest.approx(0.695, abs=5e-4)
    assert ratio(context=16384) == pytest.approx(0.800, abs=5e-4)
    assert ratio(checkpointing=True) == pytest.approx(0.753, abs=5e-4)
    assert ratio(top=16) == pytest.approx(0.504, abs=5e-4)
    assert ratio(0, top=16) == pytest.approx(0.673, abs=5e-4) and ratio(0, top=0) == pytest.approx(0.340, abs=5e-4)


# The rest


def test_the_formulas_need_no_torch_and_no_numpy() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
from lora_edu import cost
print(cost.lora_parameters(cost.SHAPES["Llama-2-70B"], 16), len(cost.PUBLISHED) > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["207093760", "True"], done.stderr


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: cost.Shape(0, 1, 1, 1, 1), ValueError, "hidden must be at least 1; got 0"),
        (lambda: cost.Shape(10, 1, 1, 1, heads=3), ValueError, "hidden 10 is no multiple of heads 3; say head_dim"),
        (lambda: cost.Shape(12, 1, 1, 1, heads=4, kv_heads=3), ValueError, "no multiple of kv_heads 3"),
        (lambda: cost.Shape(12.0, 1, 1, 1, 1), TypeError, "hidden must be an integer; got 12.0"),
        (lambda: cost.lora_parameters(LLAMA_7B, 0), ValueError, "r must be at least 1; got 0"),
        (lambda: cost.lora_parameters(LLAMA_7B, 1.5), TypeError, "r must be an integer; got 1.5"),
        (lambda: cost.lora_parameters(LLAMA_7B, 8, "qv"), ValueError, "one of q,v, attention, mlp, all-linear, or a"),
        (lambda: cost.lora_parameters(LLAMA_7B, 8, ["c_attn"]), ValueError, "no map 'c_attn'; there are q_proj, k_"),
        (lambda: cost.lora_parameters(LLAMA_7B, 8, []), ValueError, "targets is empty"),
        (lambda: cost.prompt_parameters(LLAMA_7B, 0), ValueError, "tokens must be at least 1"),
        (lambda: cost.bits_per_weight(0), ValueError, "block must be at least 1"),
        (lambda: cost.training_memory("full", 7e9), ValueError, "no recipe 'full'; there are: full, fp32; full, mixed"),
        (lambda: cost.training_memory("full, mixed", 7e9, 1e6), ValueError, "trains the model itself: leave adapter"),
        (lambda: cost.training_memory("LoRA, bf16", 7e9), ValueError, "trains an adapter: say its parameters"),
        (lambda: cost.training_memory("LoRA, bf16", 7e9, 1e6, 6e9), ValueError, "keeps nothing in 4 bits"),
        (lambda: cost.training_memory("QLoRA, NF4", 7e9, 1e6), ValueError, "keeps weights in 4 bits: say linear"),
        (lambda: cost.training_memory("QLoRA, NF4", 7e9, 1e6, 8e9), ValueError, "0 <= linear <= base"),
        (lambda: cost.training_memory("full, mixed", float("nan")), ValueError, "base > 0"),
        (lambda: cost.linear_flops(3, 4, 2, trains=True), ValueError, "not both"),
        (lambda: cost.training_flops(LLAMA_7B, top=33), ValueError, "top is at most 32"),
        (lambda: cost.training_flops(LLAMA_7B, context=-1), ValueError, "context at least 0"),
        (lambda: cost.saved_bytes(lambda: torch.ones(1), nn.Linear(1, 1)), ValueError, "must return a loss"),
        (lambda: cost.saved_bytes(lambda: None, nn.Linear(1, 1)), ValueError, "must return a loss"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def test_seconds_are_taken_in_turns_and_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    spent = {"a": iter((9.0, 2.0, 3.0)), "b": iter((9.0, 5.0, 4.0))}
    clock = [0.0]
    monkeypatch.setattr(cost, "thread_time", lambda: clock[0])

    def call(name: str) -> None:
        called.append(name)
        clock[0] += next(spent[name])

    assert cost.least_seconds({n: lambda n=n: call(n) for n in "ab"}, rounds=2) == {"a": 2.0, "b": 4.0}
    assert called == [*"ababab"]


def test_only_a_whole_safetensors_file_has_its_bytes_counted(tmp_path: Path) -> None:
    file = save_adapter(stack((4, 5), (0,), 2), tmp_path) / "adapter_model.safetensors"
    whole = file.read_bytes()
    for content in (b"", b"short", whole[:-1], whole[:40], whole + b" ", b"\x02" + bytes(7) + b"[]", bytes(64)):
        broken = tmp_path / "broken"
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file, or it is cut short"):
            cost.file_bytes(broken)
    with pytest.raises(FileNotFoundError):
        cost.file_bytes(tmp_path / "none")


def test_the_calculator_shows_what_the_formulas_say() -> None:
    box = widgets.cost_calculator()
    model, rank, targets, recipe, label, picture = box.children
    first = picture.value
    assert "trains 39,976,960 of 6,778,392,576 parameters (0.5898 %), stores 159.9 MB" in label.value
    assert "takes 14.1 GB of memory where full fine-tuning takes 107.8 GB" in label.value
    targets.value = "q,v"
    assert "trains 8,388,608 of" in label.value
    rank.value = 4
    assert "rank 4 on q,v" in label.value and "trains 2,097,152 of" in label.value
    recipe.value = "LoRA, bf16"
    assert "stores 4.2 MB" in label.value
    model.value = "Llama-2-70B"
    shape = cost.SHAPES["Llama-2-70B"]
    base, adapter = cost.parameters(shape), cost.lora_parameters(shape, 4, "q,v")
    assert f"trains {adapter:,} of {base + adapter:,}" in label.value
    recipe.value = "QLoRA, NF4, double"
    memory = cost.training_memory(recipe.value, base, adapter, cost.linear_weights(shape))
    assert f"takes {memory.total / 1e9:,.1f} GB" in label.value
    assert picture.value != first and label.value in picture.value
    data, metadata = box._repr_mimebundle_()
    assert data["text/plain"].startswith("Widget: ") and metadata["image/png"]["alt"] in data["text/plain"]
    assert "Llama-2-7B, rank 16 on all-linear" in repr(box), "the static view stands at the start"
