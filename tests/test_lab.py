"""The laboratory: the model, its training, the shipped checkpoint, and the stored runs."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from lora_edu import LoRAConfig, add_lora, cost, parameter_report  # noqa: E402
from lora_edu.lab import at_scale, corpus, model, runs  # noqa: E402
from lora_edu.lab.model import GPT, TARGETS, bits_per_character, generate, load_base, provenance  # noqa: E402
from lora_edu.lab.progress import track  # noqa: E402
from lora_edu.lab.training import Recipe, choose_rate, train  # noqa: E402

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def small() -> GPT:
    torch.manual_seed(0)
    return GPT(d=32, layers=2, heads=2)


def weights(net: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_gpt_has_the_stated_size_and_shapes() -> None:
    V, d, layers = len(corpus.CHARACTERS), 128, 4
    block = 4 * (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 4 * d
    net = GPT()
    assert sum(p.numel() for p in net.parameters()) == 2 * V * d + 64 * d + layers * block + 2 * d
    ids = torch.zeros(3, 10, dtype=torch.long)
    assert net(ids).shape == (3, 10, V)
    # A method may put vectors of its own before the text.
    x = torch.cat([torch.zeros(3, 5, d), net.embed(torch.zeros(3, 64, dtype=torch.long))], dim=1)
    assert net.decode(x).shape == (3, 69, V)


def test_a_later_character_never_changes_an_earlier_prediction(small: GPT) -> None:
    ids = torch.randint(96, (2, 64))
    before = small(ids)
    for place in (0, 17, 63):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 96
        after = small(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.isclose(after[:, place], before[:, place]).all()
    assert not torch.isclose(small(ids.flip(1))[:, -1], before[:, -1]).all()  # the order counts, and the context


def test_attention_is_torchs_own(small: GPT) -> None:
    attn, x = small.blocks[0].attn, torch.randn(2, 64, 32)
    q, k, v = (attn.split(p(x)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attn(x), attn.o_proj(theirs.transpose(1, 2).flatten(2)))


def test_bits_per_character_of_no_knowledge_and_of_a_sure_thing(small: GPT) -> None:
    torch.nn.init.zeros_(small.head.weight)
    small.train()
    assert bits_per_character(small, TEXT, windows=7) == pytest.approx(math.log2(96))
    assert small.training

    class Next(torch.nn.Module):  # knows that each character is followed by the next of the vocabulary
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert not self.training and ids.shape[1] == 64
            return 50.0 * torch.nn.functional.one_hot((ids + 1) % 96, 96)

    assert bits_per_character(Next(), corpus.CHARACTERS * 5) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 65 characters; it has 64"):
        bits_per_character(small, "a" * 64)


def test_generation_is_reproducible(small: GPT) -> None:
    torch.nn.init.normal_(small.head.weight)
    text = generate(small, "def f(x):\n", length=80, temperature=1.0, seed=3)
    assert text == generate(small, "def f(x):\n", length=80, temperature=1.0, seed=3)
    assert text != generate(small, "def f(x):\n", length=80, temperature=1.0, seed=4)
    assert text.startswith("def f(x):\n") and len(text) == 90
    assert generate(small, TEXT, 5, temperature=0, seed=1) == generate(small, TEXT, 5, temperature=0, seed=2)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(small, "")


def test_generation_draws_from_the_distribution_after_the_last_64_characters() -> None:
    widths = []

    class Fixed(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            widths.append(ids.shape[1])
            logits = torch.full((*ids.shape, 96), -math.inf)
            logits[..., [1, 2]] = torch.tensor([0.8, 0.2]).log()
            return logits

    text = generate(Fixed(), "x", length=2000, temperature=1.0)[1:]
    assert set(text) == set(corpus.CHARACTERS[1:3])
    assert text.count(corpus.CHARACTERS[1]) / 2000 == pytest.approx(0.8, abs=0.03)
    assert widths == [min(n, 64) for n in range(1, 2001)]


def test_peft_and_add_lora_attach_to_the_targets_alike(small: GPT) -> None:
    peft = pytest.importorskip("peft")
    ours = add_lora(copy.deepcopy(small), LoRAConfig(list(TARGETS), r=3))
    theirs = peft.get_peft_model(small, peft.LoraConfig(target_modules=list(TARGETS), r=3))
    d, layers, r = 32, 2, 3
    assert parameter_report(ours).trainable == layers * (4 * r * 2 * d + 2 * r * 5 * d)
    assert parameter_report(theirs).trainable == parameter_report(ours).trainable
    assert bits_per_character(theirs, TEXT, windows=4) == bits_per_character(ours, TEXT, windows=4)


# --- training --------------------------------------------------------------------------------------------------------


def test_training_learns_and_touches_only_what_requires_a_gradient(small: GPT) -> None:
    small.requires_grad_(False)
    small.head.weight.requires_grad_(True)
    small.blocks[1].mlp.up_proj.bias.requires_grad_(True)
    before = weights(small)
    run = train(small.eval(), TEXT, Recipe(steps=30, rate=1e-2, batch=4), validation=TEXT, every=20)
    changed = {name for name, tensor in weights(small).items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "blocks.1.mlp.up_proj.bias"}
    assert run.losses[0] == pytest.approx(math.log2(96), abs=0.2) and run.losses[-1] < run.losses[0] - 1
    assert [step for step, _ in run.validation] == [20, 30]
    assert run.validation[-1][1] == bits_per_character(small, TEXT)
    assert not small.training
    with pytest.raises(ValueError, match="nothing to train"):
        train(small.requires_grad_(False), TEXT, Recipe())


def test_the_seed_decides_the_batches_and_nothing_else_does(small: GPT) -> None:
    recipe = Recipe(steps=5, batch=2)
    one, two, three = (copy.deepcopy(small) for _ in range(3))
    first = train(one, TEXT, recipe)
    torch.manual_seed(99)  # the global generator does not matter
    state = torch.get_rng_state()
    assert train(two, TEXT, recipe, validation=TEXT, every=1).losses == first.losses
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert train(three, TEXT, Recipe(steps=5, batch=2, seed=1)).losses != first.losses


def test_the_schedule_rises_to_the_rate_and_falls_to_zero(small: GPT) -> None:
    recipe = Recipe(steps=100, rate=0.5, warmup=0.1)
    scales = [recipe.scale(step) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert scales[10] == 1 and scales[55] == pytest.approx(0.5) and 0 < scales[-1] < 0.001
    assert Recipe(steps=1).scale(0) == 1 and len(train(small, TEXT, Recipe(steps=1)).losses) == 1
    seen = []

    def watching(net: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(net.parameters(), lr=recipe.rate)
        sgd.register_step_pre_hook(lambda *_: seen.append((sgd.param_groups[0]["lr"], _norm(net))))
        return sgd

    train(small, TEXT, Recipe(steps=4, rate=0.5, batch=1, warmup=0.5, clip=1e-3), optimizer=watching)
    assert [rate for rate, _ in seen] == pytest.approx([0.25, 0.5, 0.5, 0.25])
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for _, norm in seen)


def _norm(net: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))


def test_the_rate_is_chosen_on_the_validation_text() -> None:
    def fresh() -> GPT:
        torch.manual_seed(0)
        return GPT(d=16, layers=1, heads=1)

    choice = choose_rate(fresh, [1e30, 1e-5, 1e-2], TEXT, TEXT[7:], Recipe(steps=20, batch=2))
    assert choice.best is choice.runs[2] and [run.recipe.rate for run in choice.runs] == [1e30, 1e-5, 1e-2]
    assert math.isnan(choice.runs[0].validation[-1][1])  # diverged, and first: a plain minimum would choose it


def test_progress_is_silent_unless_somebody_watches_something_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(seconds_each: float) -> str:
        clock = itertools.count(0, seconds_each)
        monkeypatch.setattr("lora_edu.lab.progress.monotonic", lambda: next(clock))
        assert list(track("abcdef", 6)) == list("abcdef")
        return capsys.readouterr().err

    monkeypatch.delenv("LORA_EDU_PROGRESS", raising=False)
    assert shown(3) == ""  # not a terminal
    monkeypatch.setenv("LORA_EDU_PROGRESS", "1")
    assert shown(0.8) == ""
    assert "3 of 6, 12 s left" in shown(3) and shown(3).endswith(" \r")  # drawn, and wiped in the end


# --- the checkpoint --------------------------------------------------------------------------------------------------


def test_the_shipped_base_is_what_its_provenance_says() -> None:
    state = torch.get_rng_state()
    base = load_base()
    assert torch.equal(torch.get_rng_state(), state)
    made = provenance()
    assert not base.training and {p.dtype for p in base.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in base.parameters())
    assert sum(p.numel() for p in base.parameters()) == made["parameters"]
    assert model.BASE.stat().st_size < 2_000_000
    text = corpus.load("manual")
    if text.complete:
        assert {name: corpus.load(name).sha256 for name in made["corpora"]} == made["corpora"]
        assert bits_per_character(base, text.test) == pytest.approx(made["bits_per_character"]["manual test"], abs=5e-4)


def test_a_changed_missing_or_undescribed_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(model.BASE.read_bytes())
    content[-1] ^= 1
    monkeypatch.setattr(model, "BASE", tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"^base.safetensors, the base model, is missing; restore it"):
        load_base()
    model.BASE.write_bytes(content)
    with pytest.raises(ValueError, match=r"^base.safetensors is not the base model that base.json describes; restore"):
        load_base()
    monkeypatch.setattr(model, "PROVENANCE", tmp_path / "base.json")
    with pytest.raises(ValueError, match=r"base\.json, which describes the base model, cannot be read"):
        load_base()


# --- stored runs -----------------------------------------------------------------------------------------------------


GRID = [{"kind": "square", "x": x} for x in (3, 1, 2)]
CALLS: list[int] = []


def square(config: runs.Config) -> runs.Numbers:
    CALLS.append(config["x"])
    return {"y": config["x"] ** 2 / 3}


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Experiment:
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(runs, "_refuse_another_corpus", lambda: None)
    CALLS.clear()
    return use(monkeypatch, GRID)


def use(monkeypatch: pytest.MonkeyPatch, grid: list[dict[str, Any]]) -> runs.Experiment:
    made = runs.experiment(grid)(square)
    monkeypatch.setattr(runs, "find", lambda name: made)
    return made


def test_stored_runs_come_back_in_the_grids_order(squares: runs.Experiment) -> None:
    assert squares.name == "test_lab.square" and squares(GRID[0]) == {"y": 3.0}
    with pytest.raises(
        ValueError, match=r"3 of 3 configurations are not computed.*python -m lora_edu.lab run test_lab"
    ):
        runs.load("test_lab.square")
    runs.run(squares)
    assert runs.load("test_lab.square") == [
        {"kind": "square", "x": 3, "y": 3.0},
        {"kind": "square", "x": 1, "y": 0.333333},
        {"kind": "square", "x": 2, "y": 1.33333},
    ]


def test_an_interrupted_run_goes_on_and_ends_in_the_same_file(
    squares: runs.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run(squares)
    whole = squares.path.read_text()
    first, second, third = whole.splitlines(keepends=True)
    squares.path.write_text(third + second[:-9])  # out of order, and cut in the middle of a line
    CALLS.clear()
    runs.run(squares)
    assert CALLS == [3, 1] and squares.path.read_text() == whole

    def stops(config: runs.Config) -> runs.Numbers:
        if config["x"] == 2:
            raise KeyboardInterrupt
        return square(config)

    squares.path.unlink()
    with pytest.raises(KeyboardInterrupt):
        runs.run(runs.Experiment(squares.name, stops, squares.grid))
    assert squares.path.read_text() == first + second


SLOW = """
import os, sys, time
from pathlib import Path
from lora_edu.lab import runs
runs.FOLDER, runs._refuse_another_corpus = Path(sys.argv[1]), lambda: None
@runs.experiment([{"x": x} for x in range(4)])
def slow(config):
    if config["x"] == 2 and sys.argv[2] == "hang":
        while len(next(runs.FOLDER.glob("*.jsonl")).read_text().splitlines()) < 2:
            time.sleep(0.01)
        print(os.getpid(), flush=True)
        time.sleep(60)
    return {"y": config["x"]}
if __name__ == "__main__":
    runs.run(slow, int(sys.argv[3]))
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_kill_loses_only_the_rows_under_way(jobs: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path)]
    with subprocess.Popen(
        [*command, "hang", jobs], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        worker = int(process.stdout.readline())
        assert (worker == process.pid) == (jobs == "1")
        os.kill(process.pid, signal.SIGKILL)
        assert process.stdout.read() == ""  # returns when the workers, which hold the pipe too, are gone
    (file,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line)["config"]["x"] for line in file.read_text().splitlines()] == [0, 1]
    done = subprocess.run([*command, "on", jobs], capture_output=True, text=True, check=True)
    assert '{"x": 2}' in done.stderr and '{"x": 1}' not in done.stderr
    assert [json.loads(line)["config"]["x"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_rate_is_chosen_by_the_mean_on_validation_and_a_diverged_one_loses() -> None:
    numbers = {  # rate: (validation, test) of two seeds
        ("a", 1): ((2.0, 1.0), (2.0, 3.0)),
        ("a", 3): ((1.0, 4.0), (2.8, 5.0)),  # the best mean, and neither the best test nor always the best seed
        ("a", 10): ((0.5, 0.0), (math.nan, 0.0)),
        ("b", 1): ((3.0, 1.0), (3.0, 1.0)),
        ("b", 10): ((2.0, 2.0), (2.0, 2.0)),
    }
    rows = [
        {"kind": kind, "size": 7, "rate": rate, "seed": seed, "validation": validation, "test": test}
        for (kind, rate), pairs in numbers.items()
        for seed, (validation, test) in enumerate(pairs)
    ]
    found = runs.tuned(rows, "kind")
    assert {kind: (t.rate, t.mean("test"), t.edge) for kind, t in found.items()} == {
        "a": (3, 4.5, False),
        "b": (10, 2.0, True),
    }
    assert found["a"].spread("test") == pytest.approx(math.sqrt(0.5)) and [*found["a"].sweep] == [1, 3, 10]
    assert runs.tuned(rows, "kind", "size")["a", 7].rate == 3


def test_a_chapters_name_means_all_its_experiments() -> None:
    assert [e.name for e in runs.of_chapter("chapter02")] == ["chapter02.truncation"]
    assert [e.name for e in runs.of_chapter("chapter04.cuts")] == ["chapter04.cuts"]
    with pytest.raises(ValueError, match="there is no experiment 'chapter99'"):
        runs.of_chapter("chapter99")


def test_data_of_another_base_or_another_grid_are_refused_and_renewed(
    squares: runs.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run(squares)
    use(monkeypatch, [*GRID, {"kind": "square", "x": 5}])
    with pytest.raises(ValueError, match=r'1 of 4 configurations .*"x": 5.*renew the stored runs: python -m'):
        runs.load(squares.name)
    fewer = use(monkeypatch, GRID[1:])
    with pytest.raises(ValueError, match=r'grid has changed and holds .*"x": 3.* no longer; renew'):
        runs.load(squares.name)
    runs.run(fewer)
    assert len(runs.load(squares.name)) == 2

    monkeypatch.setattr(runs, "_base", lambda: "another")
    with pytest.raises(ValueError, match=r"computed with the base model \w{16} and the base model is another; renew"):
        runs.load(squares.name)
    CALLS.clear()
    runs.run(fewer)
    assert CALLS == [1, 2] and len(runs.load(squares.name)) == 2

    fewer.path.write_text("{\n")
    with pytest.raises(ValueError, match="damaged; delete it"):
        runs.load(squares.name)


def test_the_costs_stored_at_seven_billion_are_complete_and_those_of_the_ledger() -> None:
    rows = at_scale.load()
    assert [(row["repeat"], row["case"]) for row in rows] == [
        (repeat, case) for repeat in range(at_scale.REPEATS) for case in at_scale.CASES
    ]
    for row in rows:
        recipe, r, targets = at_scale.CASES[row["case"]]
        adapter = cost.lora_parameters(at_scale.SHAPE, r, targets) if r else 0
        assert row["parameters"] == cost.parameters(at_scale.SHAPE) + adapter
        if recipe:
            wanted = cost.training_memory(recipe, cost.parameters(at_scale.SHAPE), adapter)
            assert [row[part] for part in ("weights", "gradients")] == [wanted.weights, wanted.gradients]
            assert 0 <= row["optimizer"] - wanted.optimizer < 4096  # one step count a tensor


def test_every_stored_grid_is_complete_and_made_with_the_shipped_base() -> None:
    stored = {path.stem for path in runs.FOLDER.glob("*.jsonl")}
    assert stored == set(runs.names())
    for name in stored:
        assert len(runs.load(name)) == len(runs.find(name).grid)


def test_an_unknown_experiment_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no experiment 'chapter02.cut'; there are .*chapter02.truncation"):
        runs.find("chapter02.cut")


def test_importing_the_lab_and_its_corpus_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import lora_edu.lab; from lora_edu.lab import corpus, runs, progress"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
