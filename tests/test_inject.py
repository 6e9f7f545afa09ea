"""LoRA in a whole model: named, counted, merged, switched off, taken out, and refused without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from lora_edu import (  # noqa: E402
    LoRAConfig,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    add_lora,
    disabled,
    lora_parameters,
    merge_lora,
    parameter_report,
    remove_lora,
    unmerge_lora,
)

IDS = torch.arange(20).reshape(4, 5) % 11


class Model(nn.Module):
    """Every kind of layer, and names that tempt a substring match."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=0)
        self.q_proj = nn.Linear(8, 10)
        self.seq_proj = nn.Linear(10, 10, bias=False)
        self.conv = nn.Conv2d(1, 4, 3, padding="same", dilation=2, padding_mode="circular")
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(200, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.relu(self.seq_proj(self.q_proj(self.emb(ids)))))
        return self.head(self.conv(h[:, None]).flatten(1))


def base(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def randomised(model: nn.Module) -> nn.Module:
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter)
    return model


def frozen_copy(model: nn.Module) -> dict[str, Any]:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return {
        "tensors": tensors,
        "grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "kinds": [type(m) for m in model.modules()],
    }


def same(model: nn.Module, before: dict[str, Any]) -> bool:
    now = frozen_copy(model)
    return (
        now["tensors"].keys() == before["tensors"].keys()
        and all(torch.equal(v, before["tensors"][k]) for k, v in now["tensors"].items())
        and now["grad"] == before["grad"]
        and now["kinds"] == before["kinds"]
    )


CONFIGS = {
    "list": LoRAConfig(["q_proj"], r=3, lora_alpha=5),
    "all kinds": LoRAConfig(["emb", "q_proj", "conv"], r=2, lora_alpha=3),
    "regex": LoRAConfig(r".*_proj", r=2, use_rslora=True),
    "all-linear": LoRAConfig("all-linear", r=2, bias="all"),
    "dora": LoRAConfig(["q_proj", "seq_proj"], r=2, use_dora=True, lora_dropout=0.5),
    "head": LoRAConfig(["seq_proj"], r=2, modules_to_save=["head", "norm"], bias="lora_only"),
    "patterns": LoRAConfig(["q_proj", "seq_proj"], rank_pattern={"q_proj": 5}, alpha_pattern={"seq_proj": 1}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_add_is_a_no_op_and_remove_restores_every_bit(config: LoRAConfig) -> None:
    model = base()
    model.norm.bias.requires_grad_(False)  # its own setting, to be restored
    before, y = frozen_copy(model), model(IDS)
    assert add_lora(model, config) is model
    model.eval()
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=1e-6)
    randomised(model)
    assert not torch.allclose(model(IDS), y)
    assert remove_lora(model) is model and same(model, before)
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_equals_unmerged_and_unmerge_is_exact(config: LoRAConfig) -> None:
    model = randomised(add_lora(base(), config)).eval()
    before, y = frozen_copy(model), model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), y, rtol=1e-5, atol=2e-4)
    unmerge_lora(model)
    assert same(model, before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_disabled_is_the_base_and_comes_back_after_an_error(config: LoRAConfig, merged: bool) -> None:
    model = base().eval()
    y = model(IDS)
    randomised(add_lora(model, config))
    if merged:
        merge_lora(model)
    adapted, before = model(IDS), frozen_copy(model)
    with pytest.raises(KeyError), disabled(model) as off:
        assert torch.equal(off(IDS), y)
        raise KeyError
    assert same(model, before) and torch.equal(model(IDS), adapted)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_only_the_adapter_moves_in_training(config: LoRAConfig) -> None:
    model = add_lora(base(), config)
    own = lora_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == own.keys()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(IDS) - 1).square().mean().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == own.keys()


def test_names_match_whole_parts_only() -> None:
    model = add_lora(base(), LoRAConfig(["q_proj"]))
    assert isinstance(model.q_proj, LoRALinear) and type(model.seq_proj) is nn.Linear
    model = add_lora(base(), LoRAConfig(["emb", "conv"]))
    assert isinstance(model.emb, LoRAEmbedding) and isinstance(model.conv, LoRAConv2d)
    model = add_lora(base(), LoRAConfig("all-linear", exclude_modules=["head"]))
    assert type(model.head) is nn.Linear and isinstance(model.seq_proj, LoRALinear)


def test_counts() -> None:
    model = add_lora(base(), LoRAConfig(["emb", "q_proj", "conv"], r=2))
    expected = 2 * (11 + 8) + 2 * (8 + 10) + 2 * (1 * 9 + 4)
    report = parameter_report(model)
    assert report.trainable == expected == sum(p.numel() for p in lora_parameters(model).values())
    assert report.trainable_bytes == 4 * expected and report.total == expected + parameter_report(base()).total
    assert str(report).startswith(f"trainable: {expected:,} of ")
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    tied[1].weight = tied[0].weight
    assert parameter_report(tied).total == 16 + 8


def test_the_mode_of_the_model_is_its_own() -> None:
    model = base().eval()
    add_lora(model, LoRAConfig(["q_proj"], lora_dropout=0.3))
    assert not any(m.training for m in model.modules())
    with disabled(model):
        assert not model.training
    merge_lora(model), unmerge_lora(model)
    assert not any(m.training for m in model.modules())


def test_training_while_merged_is_refused() -> None:
    model = merge_lora(randomised(add_lora(base(), LoRAConfig(["q_proj"]))))
    with pytest.raises(RuntimeError, match="merged, so A and B cannot train"):
        model(IDS)
    with torch.no_grad():
        model(IDS)


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        model.seq_proj.lora_B.weight[0, 0] = float("nan")


def tie(model: nn.Module) -> None:
    model.seq_proj.base_layer.weight = nn.Parameter(model.seq_proj.base_layer.weight)
    model.register_module("other", nn.Linear(10, 10, bias=False))
    model.other.weight = model.seq_proj.base_layer.weight


@pytest.mark.parametrize(
    ("prepare", "call", "error", "says"),
    [
        (lambda m: None, lambda m: add_lora(m, LoRAConfig(["q_proj"])), RuntimeError, "has a LoRA already"),
        (lambda m: None, unmerge_lora, RuntimeError, "not merged"),
        (merge_lora, merge_lora, RuntimeError, "merged already"),
        (spoil, merge_lora, ValueError, "NaN or infinity"),
        (tie, merge_lora, ValueError, "'seq_proj' is shared by other.weight, seq_proj.base_layer.weight"),
    ],
)
def test_refusals_on_an_adapted_model_change_nothing(
    prepare: Any, call: Any, error: type[Exception], says: str
) -> None:
    model = randomised(add_lora(base(), LoRAConfig(["q_proj", "seq_proj"]))).eval()
    prepare(model)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=says):
        call(model)
    assert all(torch.equal(v, tensors[k]) or v.isnan().any() for k, v in model.state_dict().items())


def test_a_nan_in_the_last_layer_keeps_the_first_unmerged() -> None:
    model = randomised(add_lora(base(), LoRAConfig(["q_proj", "seq_proj"])))
    spoil(model)
    with pytest.raises(ValueError, match="NaN"):
        merge_lora(model)
    assert not model.q_proj.merged


class Half(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.bounded = nn.Embedding(5, 8, max_norm=1.0)
        self.act = nn.ReLU()
        self.q_proj = nn.Linear(8, 8)
        self.conv = nn.Conv2d(1, 1, 1)
        self.half = Half(8, 8)
        self.pruned = prune.identity(nn.Linear(8, 8), "weight")
        self.zero_row = nn.Linear(8, 8)
        self.zero_row.weight.data[3] = 0
        self.layer = nn.TransformerEncoderLayer(8, 2, 8)
        self.shared = self.again = nn.Linear(8, 8)
        self.emb, self.tied = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.tied.weight = self.emb.weight


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj' matches no module; near names: .*q_proj"),
        ({"target_modules": ["q_proj", "k_proj"]}, "'k_proj' matches no module"),
        ({"target_modules": "model.*"}, "'model.*' matches no module"),
        ({"target_modules": ["act"]}, "'act' is a ReLU; a LoRA goes on"),
        ({"target_modules": ["out_proj"]}, "would do nothing"),
        ({"target_modules": ["grouped"]}, "groups=2"),
        ({"target_modules": ["bounded"]}, "max_norm"),
        ({"target_modules": ["conv"], "use_dora": True}, "DoRA is for nn.Linear"),
        ({"target_modules": ["half"]}, r"'half' has a forward of its own \(Half\)"),
        ({"target_modules": ["pruned"]}, "'pruned' has no plain weight"),
        ({"target_modules": ["q_proj", "zero_row"], "use_dora": True}, r"a row of zeros \(row 3\)"),
        ({"target_modules": ["linear1"]}, "nn.TransformerEncoderLayer reads this weight directly"),
        ({"target_modules": ["again"]}, "one module in two places"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["tied"]}, "'tied' shares a parameter with another module"),
        ({"target_modules": "q_proj2"}, "names go in a list"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["haed"]}, "exclude_modules: 'haed' matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no module is left"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "pattern 'k_proj' matches none"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["haed"]}, "modules_to_save: 'haed' matches no module"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "adapted and also trained whole"),
    ],
)
def test_what_cannot_be_added_leaves_the_model_as_it_was(options: dict[str, Any], says: str) -> None:
    model = Odd()
    before = frozen_copy(model)
    with pytest.raises(ValueError, match=says) as refusal:
        add_lora(model, LoRAConfig(**options))
    assert same(model, before) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("call", [remove_lora, merge_lora, unmerge_lora, lora_parameters])
def test_a_model_without_lora_is_told_so(call: Any) -> None:
    with pytest.raises(RuntimeError, match="no LoRA; add_lora first"):
        call(base())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"r": 0}, ValueError, "r must be at least 1; got 0"),
        ({"r": 2.0}, TypeError, "r must be an integer; got 2.0"),
        ({"r": True}, TypeError, "r must be an integer; got True"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite and not 0"),
        ({"lora_alpha": 0}, ValueError, "would switch the update off; got 0"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number; got '8'"),
        ({"lora_dropout": "0.1"}, TypeError, "lora_dropout must be a number"),
        ({"lora_dropout": 1.0}, ValueError, "0 <= lora_dropout < 1"),
        ({"bias": "some"}, ValueError, "bias is one of none, all, lora_only"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": "("}, ValueError, "not a regular expression"),
        ({"target_modules": [1]}, TypeError, "must be a list of names"),
        ({"modules_to_save": "head"}, TypeError, "must be a list of names"),
        ({"rank_pattern": {"x": 0}}, ValueError, r"rank_pattern\['x'\] must be at least 1"),
        ({"alpha_pattern": {"(": 1}}, ValueError, "not a regular expression"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LoRAConfig(**{"target_modules": ["q_proj"], **options})


def test_a_layer_that_has_no_weight_yet_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'1' has .*not there yet"):
        add_lora(model, LoRAConfig("all-linear"))
    assert all(p.requires_grad for p in model.parameters())


def test_numbers_of_numpy_and_none_are_taken_as_meant() -> None:
    np = pytest.importorskip("numpy")
    config = LoRAConfig(["q_proj"], r=np.int64(2), lora_alpha=np.float32(4), modules_to_save=None, exclude_modules=None)
    assert (type(config.r), type(config.lora_alpha)) == (int, float) and config.modules_to_save == ()


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    before = frozen_copy(model)
    monkeypatch.setattr(nn.init, "zeros_", lambda *_: (_ for _ in ()).throw(NotImplementedError("no such dtype")))
    with pytest.raises(NotImplementedError):
        add_lora(model, LoRAConfig(["emb", "q_proj", "seq_proj"]))
    assert same(model, before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("how", ["hook", "forward", "hook on lora_A", "global hook"])
def test_what_watches_or_replaces_a_part_is_called(how: str, dropout: float, dora: bool) -> None:
    seen: list[Any] = []

    def watch(*args: Any) -> None:
        seen.append(args[0] if args else None)

    model = add_lora(base().eval(), LoRAConfig(["q_proj"], lora_dropout=dropout, use_dora=dora))
    layer, handle = model.q_proj, None
    if how == "hook":
        layer.base_layer.register_forward_hook(watch)
    elif how == "forward":  # as libraries do that move weights
        layer.base_layer.forward = lambda x, call=layer.base_layer.forward: watch() or call(x)
    elif how == "hook on lora_A":
        layer.lora_A.register_forward_hook(watch)
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        layer(torch.ones(1, 8))
    finally:
        if handle:
            handle.remove()
    assert layer.base_layer in seen if how == "global hook" else seen


def test_a_pass_from_before_a_disabled_block_can_be_differentiated_after_it() -> None:
    model = add_lora(base(), LoRAConfig(["q_proj"], modules_to_save=["head"]))
    y = model(IDS).square().sum()
    with disabled(model):
        reference = model(IDS)
    y.backward()
    assert model.head.weight.grad is not None and torch.equal(reference, base()(IDS))


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_converted_after_it_was_adapted_is_switched_off_and_restored(merged: bool) -> None:
    model, plain = randomised(add_lora(base(), CONFIGS["head"])).eval(), base().eval().double()
    if merged:
        merge_lora(model)
    model.double()
    y = model(IDS)
    with disabled(model):
        assert torch.equal(model(IDS), plain(IDS))
    torch.testing.assert_close(model(IDS), y)
    assert torch.equal(remove_lora(model)(IDS), plain(IDS))


def test_a_shared_block_is_adapted_once_and_merges() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = add_lora(nn.Sequential(block, block), LoRAConfig(["0.0"], r=2)).eval()
    nn.init.normal_(block[0].lora_B.weight)
    x = torch.randn(3, 4)
    y = model(x)
    torch.testing.assert_close(merge_lora(model)(x), y)


def test_a_view_of_another_weight_is_shared_too() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 3)})
    model["b"].weight = nn.Parameter(model["a"].weight.data[3:])
    add_lora(model, LoRAConfig(["b"], r=1))
    with pytest.raises(ValueError, match=r"shared by a\.weight, b\.base_layer\.weight"):
        merge_lora(model)


def test_a_deepcopy_and_a_pickle_keep_the_lora() -> None:
    model = randomised(add_lora(base(), LoRAConfig(["emb", "q_proj"]))).eval()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    remove_lora(twin)
    assert isinstance(model.q_proj, LoRALinear)
