"""The methods beside LoRA: one interface, the counts of `lora_edu.cost`, and peft's numbers where peft has the method."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from lora_edu import cost, disabled, load_adapter, parameter_report, remove_lora, save_adapter  # noqa: E402
from lora_edu.inject import lora_layers  # noqa: E402
from lora_edu.lab.model import GPT, TARGETS, bits_per_character  # noqa: E402
from lora_edu.lab.training import Recipe, train  # noqa: E402
from lora_edu.peft_methods import (  # noqa: E402
    IA3,
    METHODS,
    AdaLoRA,
    BitFit,
    Bottleneck,
    DoRA,
    Full,
    Head,
    LoRA,
    Method,
    Norm,
    PiSSA,
    Prefix,
    Prompt,
    RsLoRA,
    VeRA,
    loraplus_groups,
)
from lora_edu.peft_methods.base import Wrapped  # noqa: E402

SHAPE = cost.Shape(32, 128, 2, 96, 4, gated=False, biases=True, positions=64)
IDS = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(0))
TEXT = "a text of the laboratory, longer than one window. " * 8

# The method, its parameters, and its start: exactly the base, the base up to rounding, or another model.
CASES: dict[str, tuple[Method, int, str]] = {
    "full": (Full(), cost.parameters(SHAPE), "exact"),
    "head": (Head(), 96 * 32, "exact"),
    "bitfit": (BitFit(), cost.bitfit_parameters(SHAPE), "exact"),
    "norm": (Norm(), cost.norm_parameters(SHAPE), "exact"),
    "ia3": (IA3(), cost.ia3_parameters(SHAPE), "exact"),
    "bottleneck": (Bottleneck(5), cost.adapter_parameters(SHAPE, 5), "exact"),
    "prompt": (Prompt(3), cost.prompt_parameters(SHAPE, 3), "another"),
    "prefix": (Prefix(3), cost.prefix_parameters(SHAPE, 3), "another"),
    "lora": (LoRA(r=3), cost.lora_parameters(SHAPE, 3), "exact"),
    "rslora": (RsLoRA(r=3), cost.lora_parameters(SHAPE, 3), "exact"),
    "dora": (DoRA(r=3), cost.dora_parameters(SHAPE, 3), "rounding"),
    "pissa": (PiSSA(r=3), cost.lora_parameters(SHAPE, 3), "rounding"),
    "vera": (VeRA(r=5), cost.vera_parameters(SHAPE, 5), "exact"),
    "adalora": (AdaLoRA(9, init_r=3, target_r=2), cost.lora_parameters(SHAPE, 3) + 3 * 6 * 2, "exact"),
}
assert CASES.keys() == METHODS.keys() and all(type(CASES[name][0]) is METHODS[name] for name in CASES)
every = pytest.mark.parametrize("name", CASES)


def base(dtype: torch.dtype = torch.float64) -> GPT:
    """Far from linear, and with a parameter that was frozen already."""
    torch.manual_seed(0)
    model = GPT(d=32, layers=2, heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.norm.bias.requires_grad_(False)
    return model.to(dtype)


def applied(method: Method, model: nn.Module | None = None) -> nn.Module:
    model = base() if model is None else model
    torch.manual_seed(1)
    return method.apply(model)


def shaken(model: nn.Module) -> nn.Module:
    """As after some training."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": [(p, id(m), sorted(vars(m)), len(m._forward_pre_hooks)) for p, m in model.named_modules()],
    }


def same(model: nn.Module, before: dict[str, Any]) -> bool:
    now = snapshot(model)
    tensors = now["tensors"].keys() == before["tensors"].keys() and all(
        torch.equal(v, before["tensors"][k]) for k, v in now["tensors"].items()
    )
    return tensors and now["grad"] == before["grad"] and now["modules"] == before["modules"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# All of them.


@every
def test_it_starts_as_it_says_trains_what_it_says_and_gives_the_base_back(name: str) -> None:
    method, count, start = CASES[name]
    model = base()
    before, y = snapshot(model), model(IDS)
    assert applied(method, model) is model
    if start == "exact":
        assert torch.equal(model(IDS), y)
    else:
        assert torch.allclose(model(IDS), y, rtol=0, atol=1e-12) == (start == "rounding")
        assert start == "rounding" or (model(IDS) - y).abs().max() > 0.1
    training = method.trainable(shaken(model))
    assert sum(p.numel() for p in training.values()) == parameter_report(model).trainable == count

    was = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == training.keys()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, was[n])}
    assert changed <= training.keys()
    assert all(n.endswith("k_proj.bias") for n in training.keys() - changed)  # softmax does not see it

    assert method.remove(model) is model
    assert same(model, before) and torch.equal(model(IDS), y)


@every
def test_merging_keeps_the_outputs_or_says_why_not(name: str) -> None:
    method, _, _ = CASES[name]
    model = base()
    before = snapshot(model)
    y = shaken(applied(method, model))(IDS)
    adapted = snapshot(model)
    if not method.mergeable:
        with pytest.raises(RuntimeError, match=f"cannot be merged: {method.why[:20]}"):
            method.merge(model)
        assert same(model, adapted)
    else:
        method.merge(model.eval())
        close(model(IDS), y)
        assert not any(isinstance(m, Wrapped) for m in model.modules())
        assert isinstance(method, LoRA) or not method.trainable(model)
        with pytest.raises(RuntimeError, match="merged already"):
            method.merge(model)
        with pytest.raises(RuntimeError, match="remove it first"):
            method.apply(model)
    assert same(method.remove(model.train()), before)


@every
def test_a_second_method_and_one_that_is_not_there_are_refused(name: str) -> None:
    method, _, _ = CASES[name]
    model = base()
    before = snapshot(model)
    for call in (method.remove, method.trainable, method.merge):
        with pytest.raises(RuntimeError, match="this model has no"):
            call(model)
    assert same(model, before)
    applied(method, model)
    adapted = snapshot(model)
    for other, _, _ in CASES.values():
        with pytest.raises(RuntimeError, match="already; remove it first"):
            other.apply(model)
    stranger = Norm() if name == "bitfit" else BitFit()
    with pytest.raises(RuntimeError, match="this model has no"):
        stranger.remove(model)
    assert same(model, adapted)


@every
def test_a_copy_of_the_model_is_independent(name: str) -> None:
    method, _, _ = CASES[name]
    model = shaken(applied(method))
    y, other = model(IDS), copy.deepcopy(model)
    assert torch.equal(other(IDS), y)
    method.remove(shaken(other))
    assert torch.equal(other(IDS), base()(IDS)) and torch.equal(model(IDS), y)


@pytest.mark.parametrize("name", ["ia3", "bottleneck", "prompt", "prefix", "vera", "adalora"])
def test_over_a_half_precision_base_float32_trains(name: str) -> None:
    method, _, start = CASES[name]
    model = applied(method, base(torch.bfloat16))
    assert {p.dtype for p in method.trainable(model).values()} == {torch.float32}
    y = model(IDS)
    assert y.dtype == torch.bfloat16 and (start == "another" or torch.equal(y, base(torch.bfloat16)(IDS)))
    y.sum().backward()


def test_a_model_of_the_llama_family() -> None:
    def llama(tied: bool = False) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).double()

    shape = cost.Shape(16, 24, 2, 50, 4, kv_heads=2)
    every_map = [*TARGETS, "gate_proj"]
    for method, count in (
        (Norm(), cost.norm_parameters(shape)),
        (IA3(), cost.ia3_parameters(shape)),
        (Bottleneck(3), cost.adapter_parameters(shape, 3)),
        (VeRA(every_map, r=3), cost.vera_parameters(shape, 3)),
        (LoRA(every_map, r=3), cost.lora_parameters(shape, 3)),
        (Head(["lm_head"]), 50 * 16),
    ):
        model = llama()
        y = model(IDS % 50).logits
        assert torch.equal(applied(method, model)(IDS % 50).logits, y)
        assert parameter_report(model).trainable == count
        assert torch.equal(method.remove(shaken(model))(IDS % 50).logits, y)
    for method, says in (
        (BitFit(), "has no biases"),
        (Prompt(), "has no embed and decode"),
        (Prefix(), "has no lora_edu.lab.model.Attention"),
        (Head(["lm_head"]), "lm_head.weight and model.embed_tokens.weight share one memory"),
        (PiSSA(["lm_head"]), "share one memory; the residual would change both"),
    ):
        model = llama(tied=True)
        before = snapshot(model)
        with pytest.raises(ValueError, match=says):
            method.apply(model)
        assert same(model, before)
    merging = VeRA(["lm_head"], r=2)
    shaken(merging.apply(model))
    adapted = snapshot(model)
    with pytest.raises(ValueError, match="merging would change both"):
        merging.merge(model)
    assert same(model, adapted)


REFUSED: dict[str, tuple[Callable[[], Method], str]] = {
    "no such target": (lambda: IA3(["k_projj"], []), "'k_projj' matches no module; near names: .*k_proj"),
    "no such head": (lambda: Head(["hed"]), "'hed' matches no module; near names: head"),
    "a target of another kind": (lambda: VeRA(["tokens"]), "'tokens' is a Embedding; VeRA goes on nn.Linear"),
    "a head without parameters": (lambda: Head(["dropout"]), "no parameter to train"),
    "a rank that does not exist": (
        lambda: PiSSA(["q_proj"], r=33),
        r"a \(32, 32\) matrix has truncations of rank 1 to 32",
    ),
    "read past the layer": (lambda: Bottleneck(2, ["out_proj"]), "MultiheadAttention reads this weight directly"),
    "computed weight": (lambda: AdaLoRA(9, ["normed"]), "'normed' has no plain weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_suit_leaves_the_model_alone(name: str) -> None:
    make, says = REFUSED[name]
    model = base()
    model.dropout, model.other = nn.Dropout(), nn.MultiheadAttention(4, 2)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        make().apply(model)
    assert same(model, before)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Bottleneck(0), ValueError, "the width r must be at least 1"),
        (lambda: Bottleneck(2.5), TypeError, "must be an integer"),
        (lambda: Prompt(65), ValueError, "at most 64"),
        (lambda: Prefix(0), ValueError, "at least 1"),
        (lambda: IA3(["k_proj"], ["down_proj"]), ValueError, "feedforward must be among the targets"),
        (lambda: IA3("k_proj"), TypeError, "lists of names"),
        (lambda: VeRA(r=0), ValueError, "at least 1"),
        (lambda: VeRA(d_initial=0), ValueError, "d_initial must be finite and not 0"),
        (lambda: AdaLoRA(9, init_r=2, target_r=3), ValueError, "must not exceed init_r"),
        (lambda: AdaLoRA(9, tinit=5, tfinal=4), ValueError, "must be below total_step"),
        (lambda: AdaLoRA(9, beta1=1), ValueError, "0 <= beta1 < 1"),
        (lambda: Head([]), ValueError, "target_modules is empty"),
        (lambda: LoRA(r=0), ValueError, "at least 1"),
        (lambda: PiSSA(lora_alpha=-1), ValueError, "must be above 0"),
        (lambda: loraplus_groups(applied(LoRA()), 1e-3, 0.5), ValueError, "ratio at least 1"),
        (lambda: loraplus_groups(base(), 1e-3), RuntimeError, "has no LoRA"),
        (lambda: PiSSA().convert(applied(LoRA())), RuntimeError, "is no PiSSA"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_change_that_is_not_finite_is_not_merged() -> None:
    method = IA3()
    model = applied(method)
    model.blocks[1].attn.v_proj.ia3_l.data[3] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"NaN or infinity into blocks\.1\.attn\.v_proj"):
        method.merge(model)
    assert same(model, before)


def test_the_adapter_is_its_formula() -> None:
    layer = shaken(applied(Bottleneck(5))).blocks[0].mlp.down_proj
    x = torch.randn(7, 128, dtype=torch.float64)
    W, D, U = layer.base_layer, layer.down, layer.up
    h = x @ W.weight.t() + W.bias
    z = h @ D.weight.t() + D.bias
    close(layer(x), h + (z * (1 + torch.erf(z / 2**0.5)) / 2) @ U.weight.t() + U.bias)


# Against peft, which wraps the same model.

LORA = {"r": 3, "lora_alpha": 6, "target_modules": list(TARGETS)}
PEFT: dict[str, Callable[[], Any]] = {
    "norm": lambda: peft.LNTuningConfig(target_modules=["norm1", "norm2", "norm"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "lora": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "pissa": lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=list(TARGETS), projection_prng_key=0),
    "adalora": lambda: adalora_config(9, init_r=3, target_r=2, lora_alpha=24),
}


def adalora_config(total_step: int, **fields: Any) -> Any:
    return peft.AdaLoraConfig(target_modules=list(TARGETS), total_step=total_step, **fields)


def theirs(config: Any, model: nn.Module | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base(torch.float32) if model is None else model, config).double()


def by_our_names(model: nn.Module) -> dict[str, nn.Parameter]:
    names = {n: n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    short = {n: s.replace(".ln_tuning_layers.default", "").replace(".default", "") for n, s in names.items()}
    return {s.replace("vector.weight", "vector"): model.get_parameter(n) for n, s in short.items()}


@pytest.mark.parametrize("name", PEFT)
def test_outputs_gradients_and_counts_are_pefts(name: str) -> None:
    method, count, _ = CASES[name]
    a, b = applied(method, base(torch.float32)).double(), theirs(PEFT[name]())
    assert b.get_nb_trainable_parameters()[0] == count
    if name == "pissa":  # peft decomposes W in float32
        for path, lora in lora_layers(a).items():
            there = b.base_model.model.get_submodule(path)
            close(lora.delta(), there.get_delta_weight("default"), 1e-4)
            close(lora.weight, there.base_layer.weight, 1e-4)
            lora.weight.data.copy_(there.base_layer.weight)
    shaken(b)
    training, other = method.trainable(a), by_our_names(b)
    with torch.no_grad():
        for key, parameter in training.items():
            parameter.copy_(other[key].view_as(parameter))
    assert training.keys() == other.keys()
    close(a(IDS), b(IDS))
    for model in (a, b):
        model(IDS).square().mean().backward()
    for key, parameter in training.items():
        close(parameter.grad, other[key].grad.view_as(parameter))


@pytest.mark.parametrize("method", [LoRA(r=3), DoRA(r=3)])
def test_the_groups_of_loraplus_are_pefts(method: LoRA) -> None:
    a, b = applied(method), theirs(PEFT["lora" if type(method) is LoRA else "dora"]())
    optimizer = create_loraplus_optimizer(b, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)

    def rates(groups: Any, names: dict[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
        of = {id(p): name for name, p in names.items()}
        return {of[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    ours = rates(loraplus_groups(a, 1e-3), method.trainable(a))
    assert ours == rates(optimizer.param_groups, by_our_names(b)) and len(ours) == len(method.trainable(a))
    assert {lr for lr, _ in ours.values()} == {1e-3, 16e-3}
    torch.optim.AdamW(loraplus_groups(a, 1e-3))


def twin(model: GPT, rows_in_front: int = 0) -> GPT2LMHeadModel:
    """The course's GPT as a GPT-2 of transformers, with rows of zeros in front of its table of positions."""
    config = GPT2Config(
        vocab_size=96,
        n_positions=64 + rows_in_front,
        n_embd=32,
        n_layer=2,
        n_head=4,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    other = GPT2LMHeadModel(config).double()
    s = model.state_dict()
    new = {"transformer.wte.weight": s["tokens.weight"], "lm_head.weight": s["head.weight"]}
    new["transformer.wpe.weight"] = nn.functional.pad(s["positions.weight"], (0, 0, rows_in_front, 0))
    pairs = {"transformer.ln_f": ["norm"]}
    for i in range(2):
        ours, their = f"blocks.{i}.", f"transformer.h.{i}."
        pairs[f"{their}ln_1"], pairs[f"{their}ln_2"] = [f"{ours}norm1"], [f"{ours}norm2"]
        pairs[f"{their}attn.c_attn"] = [f"{ours}attn.{x}_proj" for x in "qkv"]
        pairs[f"{their}attn.c_proj"] = [f"{ours}attn.o_proj"]
        pairs[f"{their}mlp.c_fc"], pairs[f"{their}mlp.c_proj"] = [f"{ours}mlp.up_proj"], [f"{ours}mlp.down_proj"]
    for their, parts in pairs.items():
        new[f"{their}.bias"] = torch.cat([s[f"{p}.bias"] for p in parts])
        W = torch.cat([s[f"{p}.weight"] for p in parts])
        new[f"{their}.weight"] = W.t() if W.dim() == 2 else W  # GPT-2 stores (in, out)
    other.load_state_dict(new)
    close(other(IDS).logits, model(IDS)) if not rows_in_front else None
    return other


def test_prompt_tuning_is_pefts_with_its_labels_and_positions() -> None:
    p, method = 3, Prompt(3)
    a = shaken(applied(method))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p)
    b = theirs(config, twin(base(), rows_in_front=p))  # peft moves the text by p
    assert b.get_nb_trainable_parameters()[0] == sum(x.numel() for x in method.trainable(a).values())
    (P,) = by_our_names(b).values()
    P.data.copy_(a.prompt)
    labels = IDS.clone()
    labels[:, 0] = -100
    out = b(input_ids=IDS, labels=labels)
    close(a(IDS), out.logits[:, p:])
    loss = cross_entropy(a(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    close(loss.float(), out.loss, 1e-6)  # transformers takes the loss in float32
    loss.backward(), out.loss.backward()
    close(a.prompt.grad, P.grad, 1e-6)
    # With a label on the first character peft's loss has one more term: the last virtual token predicts it.
    first = cross_entropy(out.logits[:, p - 1], IDS[:, 0])
    close(((first + 11 * loss) / 12).float(), b(input_ids=IDS, labels=IDS).loss, 1e-6)


def test_the_text_keeps_its_positions_behind_a_prompt() -> None:
    model = applied(Prompt(3))
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert model(IDS).shape == (3, 12, 96)
    assert torch.equal(seen[0][:, 3:], model.embed(IDS)) and torch.equal(seen[0][1, :3], model.prompt)
    assert bits_per_character(model, TEXT, windows=2) > 0  # whole windows of 64 fit


def test_prefix_tuning_is_pefts() -> None:
    p, method = 3, Prefix(3)
    a = shaken(applied(method))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p)
    b = theirs(config, twin(base()))
    assert b.get_nb_trainable_parameters()[0] == sum(x.numel() for x in method.trainable(a).values())
    (stored,) = by_our_names(b).values()

    def flat(pairs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(pairs).permute(2, 0, 1, 3).reshape(p, -1)  # (2 layers, h, p, d / h) -> (p, 2 layers d)

    ours = [x for block in a.blocks for x in (block.attn.keys, block.attn.values)]
    stored.data.copy_(flat([x.detach() for x in ours]))
    y = b(input_ids=IDS, position_ids=torch.arange(12)[None] - p).logits  # peft adds p
    close(a(IDS), y)
    a(IDS).square().mean().backward(), y.square().mean().backward()
    close(flat([x.grad for x in ours]), stored.grad)
    assert (b(input_ids=IDS).logits - y).abs().max() > 0.1  # without it the text is moved


def test_a_prefix_starts_as_the_prompt_of_the_same_characters() -> None:
    close(applied(Prefix(5))(IDS), applied(Prompt(5))(IDS))


# AdaLoRA's ranks.


def test_the_ranks_are_those_of_pefts_allocator() -> None:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "lora_alpha": 24}
    method = AdaLoRA(12, **schedule)
    a, b = applied(method, base(torch.float32)).double(), theirs(adalora_config(12, **schedule))
    training, other = method.trainable(a), by_our_names(b)
    with torch.no_grad():
        for key, parameter in training.items():
            parameter.copy_(other[key].view_as(parameter))
    optimizers = [torch.optim.SGD([x[n] for n in sorted(x)], 0.3) for x in (training, other)]
    total, budgets = [], []
    for step in range(15):
        for model, optimizer in zip((a, b), optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
            optimizer.step()
        method.allocate(a, step)
        b.base_model.update_and_allocate(step)
        for name, parameter in training.items():
            close(parameter, other[name].view_as(parameter))
        allocator = b.base_model.rankallocator
        for kind, moving in enumerate((allocator.exp_avg_ipt, allocator.exp_avg_unc)):
            for name, value in moving.items():  # reset at the end of the phase
                path, _, factor = name.removeprefix("model.").removesuffix(".default").rpartition(".")
                ours = a.get_submodule(path).score[factor][kind]
                torch.testing.assert_close(ours, value.view_as(ours), rtol=1e-9, atol=0)
        total.append(sum(int((p != 0).sum()) for n, p in training.items() if n.endswith("lora_E")))
        budgets.append(allocator.budget_schedule(step)[0])
        assert method.budget.triplets(step, 12) == budgets[-1]
    assert (budgets[2], budgets[9]) == (48, 24) and total[9:] == [24] * 6
    assert sum(method.ranks(a).values()) == 24 and len(set(method.ranks(a).values())) > 1
    y = a(IDS)
    close(method.merge(a.eval())(IDS), y)


def test_orthogonality_is_what_peft_adds_to_the_loss() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = base(torch.float32)

        def forward(self, ids: torch.Tensor) -> Any:
            return SimpleNamespace(loss=self.gpt(ids).square().mean() * 0)

    method = AdaLoRA(9, init_r=3, target_r=2)
    a, b = applied(method, base(torch.float32)).double(), shaken(theirs(PEFT["adalora"](), WithLoss()))
    with torch.no_grad():
        for name, parameter in by_our_names(b).items():
            ours = a.get_parameter(name.removeprefix("gpt."))
            ours.copy_(parameter.view_as(ours))
    close(0.5 * method.orthogonality(a), b.base_model(IDS).loss)
    assert b(IDS).loss == 0  # peft without a task_type goes past it


def test_allocation_follows_the_laboratorys_training() -> None:
    method = AdaLoRA(4, init_r=3, target_r=1)
    model = applied(method, base(torch.float32))
    with pytest.raises(RuntimeError, match="before zero_grad"):
        method.allocate(model, 1)
    with pytest.raises(RuntimeError, match="no scores yet"):
        method.allocate(model, 4)
    steps = iter(range(1, 99))

    def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(method.trainable(model).values(), recipe.rate)
        optimizer.register_step_post_hook(lambda *_: method.allocate(model, next(steps)))
        return optimizer

    train(model, TEXT, Recipe(steps=6, batch=2, rate=1e-2), optimizer=adamw)
    assert sum(method.ranks(model).values()) == 12
    assert sum(int((m.lora_E != 0).sum()) for m in model.modules() if hasattr(m, "lora_E")) == 12


# PiSSA and its file.


def test_pissa_keeps_the_residual_as_its_base_and_is_converted_for_a_file(tmp_path: Path) -> None:
    method = PiSSA(r=3)
    model = base(torch.float32)
    before, W = snapshot(model), model.blocks[0].attn.q_proj.weight.detach().clone()
    applied(method, model)
    with disabled(model):
        assert torch.equal(model(IDS), base(torch.float32)(IDS))
    S = torch.linalg.svdvals(W)
    close(torch.linalg.svdvals(lora_layers(model)["blocks.0.attn.q_proj"].weight)[:29], S[3:], 1e-5)
    y = shaken(model)(IDS)
    naive = applied(LoRA(r=3), base(torch.float32))
    with torch.no_grad():
        for name, parameter in LoRA().trainable(naive).items():
            parameter.copy_(method.trainable(model)[name])
    assert (naive(IDS) - y).abs().max() > 0.5  # A and B on W add W_r a second time
    assert torch.equal(remove_lora(copy.deepcopy(model))(IDS), base(torch.float32)(IDS))

    save_adapter(model, tmp_path / "unconverted")  # holds W_res too
    with pytest.raises(ValueError, match=r"not in the model: .*base_layer\.weight"):
        load_adapter(base(torch.float32), tmp_path / "unconverted")
    close(peft.PeftModel.from_pretrained(base(torch.float32), tmp_path / "unconverted").eval()(IDS), y, 1e-6)

    method.convert(model)
    assert parameter_report(model).trainable == 2 * CASES["pissa"][1]
    close(model(IDS), y, 1e-4)
    save_adapter(model, tmp_path)
    there = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path).eval()
    close(there(IDS), y, 1e-4)
    assert same(method.remove(model), before)
