"""Conformance with the installed peft: one seed, one start; same outputs, gradients, losses; files both ways."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from torch import nn  # noqa: E402

from lora_edu import (  # noqa: E402
    LoRAConfig,
    add_lora,
    combine,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
)
from lora_edu.adapters import PREFIX, adapter_state  # noqa: E402
from lora_edu.cost import saved_bytes  # noqa: E402

IDS = torch.arange(20).reshape(4, 5) % 11


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=0)
        self.lin = nn.Linear(8, 10)
        self.body = nn.Sequential(nn.Linear(10, 10, bias=False), nn.ReLU())
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(200, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.body(self.lin(self.emb(ids)))
        return self.head(self.conv(h[:, None]).flatten(1))


def base() -> Model:
    torch.manual_seed(0)
    return Model()


def grid() -> dict[str, dict[str, Any]]:
    """Layers x rslora x dora x patterns x bias x modules_to_save: what a file can say."""
    found: dict[str, dict[str, Any]] = {}
    for targets in (["lin"], ["emb"], ["conv"], ["emb", "lin", "conv", "body.0"], r".*(lin|0)", "all-linear"):
        for rslora in (False, True):
            found[f"{targets}, rslora {rslora}"] = {"target_modules": targets, "use_rslora": rslora}
    for targets in (["lin"], ["lin", "body.0"], "all-linear"):
        for rslora in (False, True):
            found[f"{targets}, dora, rslora {rslora}"] = {
                "target_modules": targets,
                "use_dora": True,
                "use_rslora": rslora,
            }
    for bias in ("lora_only", "all"):
        for targets in (["lin"], ["lin", "conv"], ["body.0"]):
            found[f"{targets}, bias {bias}"] = {"target_modules": targets, "bias": bias}
    for saved in (["head"], ["head", "conv"]):
        for dora in (False, True):
            found[f"saved {saved}, dora {dora}"] = {
                "target_modules": ["lin"],
                "modules_to_save": saved,
                "use_dora": dora,
            }
    patterns = {"rank_pattern": {"lin": 5}, "alpha_pattern": {"body.0": 7}}
    for targets in (["lin", "body.0"], "all-linear"):
        for rslora in (False, True):
            found[f"{targets}, patterns, rslora {rslora}"] = {
                "target_modules": targets,
                "use_rslora": rslora,
                **patterns,
            }
    found["excluded"] = {"target_modules": "all-linear", "exclude_modules": ["head"]}
    found["dropout"] = {"target_modules": ["lin", "conv"], "lora_dropout": 0.3}
    return {name: {"r": 4, "lora_alpha": 6, **options} for name, options in found.items()}


GRID = grid()
assert len(GRID) >= 30


def ours(options: dict[str, Any]) -> nn.Module:
    model = base()
    torch.manual_seed(1)
    return add_lora(model, LoRAConfig(**options))


def theirs(options: dict[str, Any]) -> Any:
    model = base()
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names of the file."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".default", "")
            found[name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter
    return found


def randomise(*models: nn.Module) -> None:
    """Give the models' adapters the same random values."""
    for name, parameter in sorted(trainable(models[0]).items()):
        value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        for model in models:
            with torch.no_grad():
                trainable(model)[name].copy_(value)


@pytest.mark.parametrize("options", GRID.values(), ids=GRID)
def test_one_seed_one_start(options: dict[str, Any]) -> None:
    a, b = trainable(ours(options)), trainable(theirs(options))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", GRID.values(), ids=GRID)
def test_outputs_and_gradients_are_pefts(options: dict[str, Any]) -> None:
    a, b = ours(options).eval().double(), theirs(options).eval().double()
    randomise(a, b)
    ya, yb = a(IDS), b(IDS)
    torch.testing.assert_close(ya, yb, rtol=1e-9, atol=1e-9)  # float64: no room for a near miss
    ya.square().mean().backward(), yb.square().mean().backward()
    for name, parameter in trainable(a).items():
        grad = trainable(b)[name].grad
        assert parameter.grad is not None and grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [o for o in GRID.values() if not o.get("lora_dropout")], ids=[n for n in GRID if n != "dropout"]
)
def test_thirty_steps_have_equal_losses(options: dict[str, Any]) -> None:
    a, b = ours(options), theirs(options)
    with torch.no_grad():  # one start also where the order of drawing differs
        for name, parameter in trainable(b).items():
            parameter.copy_(trainable(a)[name])
    steps = [torch.optim.AdamW([p for _, p in sorted(trainable(m).items())], 3e-3) for m in (a, b)]
    label = torch.tensor([0, 1, 2, 0])
    for _ in range(30):
        pair = []
        for model, optimizer in zip((a, b), steps, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(IDS), label)
            loss.backward()
            optimizer.step()
            pair.append(loss.item())
        assert abs(pair[0] - pair[1]) < 1e-6


@pytest.mark.parametrize("options", GRID.values(), ids=GRID)
def test_files_go_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    a, b = ours(options).eval(), theirs(options).eval()
    randomise(a, b)
    save_adapter(a, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(there(IDS), a(IDS), rtol=1e-6, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks for its base model's card
        b.save_pretrained(tmp_path / "theirs")
    here = load_adapter(base(), tmp_path / "theirs").eval()
    torch.testing.assert_close(here(IDS), b(IDS), rtol=1e-6, atol=1e-5)
    again = load_adapter(base(), tmp_path / "ours").eval()
    assert torch.equal(again(IDS), a(IDS))
    assert adapter_state(again).keys() == adapter_state(a).keys()


def test_merged_is_pefts_merged() -> None:
    options = GRID["['emb', 'lin', 'conv', 'body.0'], rslora True"]
    a, b = ours(options).eval(), theirs(options).eval()
    randomise(a, b)
    merge_lora(a)
    flat = b.merge_and_unload()
    for path in ("emb", "lin", "conv", "body.0"):
        torch.testing.assert_close(
            a.get_submodule(path).base_layer.weight, flat.get_submodule(path).weight, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_gets_a_float32_adapter(dtype: torch.dtype) -> None:
    def half() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5)).to(dtype)

    a = add_lora(half(), LoRAConfig(["0"], r=2))
    b = peft.get_peft_model(half(), peft.LoraConfig(target_modules=["0"], r=2))
    randomise(a, b)
    x = torch.randn(3, 6, dtype=dtype)
    assert {p.dtype for p in lora_parameters(a).values()} == {torch.float32} and a(x).dtype == dtype
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_under_autocast_it_is_peft_but_maps_with_one_input_keep_it_once(dropout: float) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x)

    def run(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).sum()

    x, base, options = torch.randn(64, 6).bfloat16(), Two().bfloat16(), {"r": 2, "lora_dropout": dropout}
    a = add_lora(copy.deepcopy(base), LoRAConfig(["q", "k"], **options))
    b = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q", "k"], **options))
    randomise(a, b)
    torch.testing.assert_close(run(a), run(b), rtol=0.01, atol=0.01)
    assert saved_bytes(lambda: run(a), a) < saved_bytes(lambda: run(b), b) or dropout


# Where peft is silently wrong, ours is right or refuses (the refusals are tested with the injection).


@pytest.mark.parametrize(
    "convolution",
    [
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
        {"dilation": 2},
        {"stride": 2, "padding": 1},
    ],
)
def test_convolutions_merge_exactly(convolution: dict[str, Any]) -> None:
    model = add_lora(nn.Sequential(nn.Conv2d(3, 6, 3, **convolution)), LoRAConfig(["0"], r=2)).eval()
    nn.init.normal_(model[0].lora_B.weight)
    x = torch.randn(2, 3, 9, 9)
    y = model(x)
    torch.testing.assert_close(merge_lora(model)(x), y, rtol=1e-4, atol=1e-4)


def test_combining_by_concatenation_is_exact_and_adding_the_factors_is_wrong() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(r, 9, dtype=torch.float64), torch.randn(7, r, dtype=torch.float64)) for r in (2, 2)]
    exact = sum(w * B @ A for (A, B), w in zip(pairs, (0.5, -2.0), strict=True))
    A, B = combine(pairs, (0.5, -2.0))
    torch.testing.assert_close(B @ A, exact)
    assert A.shape == (4, 9) and B.shape == (7, 4)
    s = torch.linalg.svdvals(exact)
    for r in (1, 3, 4):
        A, B = combine(pairs, (0.5, -2.0), r=r)
        assert A.shape == (r, 9)
        torch.testing.assert_close((exact - B @ A).norm(), (s[r:] ** 2).sum().sqrt(), atol=1e-9, rtol=1e-9)
    added = sum(B for _, B in pairs) @ sum(A for A, _ in pairs)
    plain = sum(B @ A for A, B in pairs)
    assert (added - plain).norm() > 0.5 * plain.norm()


@pytest.mark.parametrize(
    ("pairs", "weights", "says"),
    [
        ([], [], "one weight per adapter"),
        ([(torch.ones(2, 3), torch.ones(4, 2))], [1, 2], "got 1 adapters and 2 weights"),
        ([(torch.ones(2, 3), torch.ones(4, 2)), (torch.ones(2, 5), torch.ones(4, 2))], [1, 1], "do not fit together"),
        ([(torch.ones(2, 3), torch.ones(4, 1))], [1], "do not fit together"),
    ],
)
def test_what_cannot_be_combined_is_refused(pairs: Any, weights: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        combine(pairs, weights)


# Strict loading: everything fits, or nothing is loaded and the model is as it was.


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    model = ours({"target_modules": ["lin", "body.0"], "r": 4})
    randomise(model)
    return save_adapter(model, tmp_path / "adapter")


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


SPOILT = {
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop(f"{PREFIX}lin.lora_A.weight")),
        "missing in the file: lin.lora_A.weight",
    ),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({f"{PREFIX}new.lora_A.weight": torch.ones(2)})),
        "not in the model: new.lora_A.weight",
    ),
    "shape": (lambda f: edit(f, r=3), "has shape .* in the file and .* in the model"),
    "unknown mathematics": (lambda f: edit(f, lora_bias=True), "uses lora_bias, which changes the mathematics"),
    "another field of tomorrow": (lambda f: edit(f, use_magic=1.5), "uses use_magic"),
    "pissa": (
        lambda f: edit(f, init_lora_weights="pissa"),
        "init_lora_weights='pissa', which may have changed the base",
    ),
    "not a lora": (lambda f: edit(f, peft_type="IA3"), "does not say peft_type LORA"),
    "no rank": (lambda f: edit(f, r=None), "must state r"),
    "targets": (lambda f: edit(f, target_modules=["linn"]), "'linn' matches no module"),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:200]),
        "damaged or cut short",
    ),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "damaged or cut short"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_fit_is_not_loaded(name: str, adapted: bool, stored: Path) -> None:
    spoil, says = SPOILT[name]
    spoil(stored)
    model = ours({"target_modules": ["lin", "body.0"], "r": 4}) if adapted else base()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    if adapted and name in ("shape", "targets"):
        says = r"scale of 'lin'|has shape|differ" if name == "shape" else "matches"
    if adapted and name == "targets":
        pytest.skip("when a model has its adapter already, the file's keys decide")
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_adapter(model, stored)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_the_targets_are_a_list_of_paths_unless_one_is_anothers_ending(tmp_path: Path) -> None:
    def written(model: nn.Module) -> Any:
        return json.loads((save_adapter(model, tmp_path) / "adapter_config.json").read_text())["target_modules"]

    assert written(ours({"target_modules": r".*(lin|0)"})) == ["body.0", "lin"]
    nested = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    add_lora(nested, LoRAConfig("0"))
    assert written(nested) == "0"


def test_a_module_named_default_keeps_its_name(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"enc": nn.ModuleDict({"default": nn.Linear(3, 3)})})

    saved = add_lora(nested(), LoRAConfig(["default"], r=1))
    again = load_adapter(nested(), save_adapter(saved, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), again.parameters(), strict=True))


def test_a_saved_modules_buffers_travel_with_it(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model = add_lora(normed(), LoRAConfig(["0"], r=2, modules_to_save=["1"]))
    x = torch.randn(16, 4) + 3
    model.train()(x)
    again = load_adapter(normed(), save_adapter(model, tmp_path)).eval()
    assert torch.equal(again(x), model.eval()(x))
    assert torch.equal(remove_lora(model)(x), normed().eval()(x))


def test_a_model_that_has_the_adapter_gets_its_values(stored: Path) -> None:
    model = ours({"target_modules": ["lin", "body.0"], "r": 4})
    load_adapter(model, stored)
    assert torch.equal(model(IDS), load_adapter(base(), stored)(IDS))
    other = ours({"target_modules": ["lin", "body.0"], "r": 4, "lora_alpha": 99})
    with pytest.raises(ValueError, match="scale of 'lin' differs"):
        load_adapter(other, stored)


@pytest.mark.parametrize("moment", ["save_file", "os.replace"])
def test_a_crash_while_saving_leaves_the_old_files(moment: str, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in stored.iterdir()}
    model = ours({"target_modules": ["lin"], "r": 2})
    replace = os.replace

    def crash(source: Any, target: Any, **_: Any) -> None:
        if moment == "os.replace" and target.name == "adapter_model.safetensors":
            return replace(source, target)
        raise OSError("disk full")

    monkeypatch.setattr(f"lora_edu.adapters.{moment}", crash)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, stored)
    assert {p.name: p.read_bytes() for p in stored.iterdir()} == before
