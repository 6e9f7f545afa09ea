"""Chapter 04: what a training step costs at 7 billion parameters, measured on one GPU and stored.

    python -m lora_edu.lab.at_scale     measure what is missing, on a GPU of about 110 GB, with transformers and peft

The model has the shape of Llama-2-7B and random weights: it costs what the trained one costs. A step is forward,
backward and Adam, on texts of random tokens, attention by a fused kernel, all products in bfloat16.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from lora_edu import cost
from lora_edu.config import LoRAConfig
from lora_edu.inject import add_lora

SHAPE, TEXTS, TOKENS = cost.SHAPES["Llama-2-7B"], 4, 2048  # with fewer tokens the GPU waits for Python
REPEATS, STEPS = 3, 10
STORED = Path(__file__).with_name("at_scale.jsonl")

# What a row is about: the recipe of the ledger, the rank, its targets. "frozen" trains nothing: it is the gradient of
# the model's input, what any LoRA in the first block must pay.
CASES: dict[str, tuple[str, int, str]] = {
    "full": ("full, bf16", 0, ""),
    "LoRA": ("LoRA, bf16 base", 16, "all-linear"),
    "LoRA, peft": ("LoRA, bf16 base", 16, "all-linear"),
    "LoRA, peft, no cast": ("LoRA, bf16 base", 16, "all-linear"),  # without its copies of the inputs in fp32
    "LoRA in bf16": ("LoRA, bf16", 16, "all-linear"),
    "LoRA in bf16, r 64": ("LoRA, bf16", 64, "all-linear"),
    "LoRA in bf16, q, v": ("LoRA, bf16", 16, "q,v"),
    "frozen": ("", 0, ""),
}


def load() -> list[dict[str, Any]]:
    """The stored rows: case, repeat, the bytes of weights, gradients, optimizer, the highest point, ms a step."""
    return [json.loads(line) for line in STORED.read_text(encoding="utf-8").splitlines()]


def llama(shape: cost.Shape) -> Any:
    """The configuration, in transformers, of a model of this shape without biases."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        head_dim=shape.head_dim or shape.hidden // shape.heads,
        tie_word_embeddings=shape.tied,
    )
    config._attn_implementation = "sdpa"
    return config


def prepare(case: str, shape: cost.Shape = SHAPE) -> nn.Module:
    """A model of `shape` on the GPU in bfloat16, made ready for the case."""
    from transformers import LlamaForCausalLM

    recipe, r, targets = CASES[case]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(llama(shape)).train()
    finally:
        torch.set_default_dtype(torch.float32)
    if not r:
        return model.requires_grad_(case == "full")
    if "peft" in case:
        from peft import LoraConfig, get_peft_model

        adapted: nn.Module = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))
        for layer in adapted.modules():
            if case.endswith("no cast") and hasattr(layer, "cast_input_dtype_enabled"):
                setattr(layer, "cast_input_dtype_enabled", False)  # noqa: B010
        return adapted
    add_lora(model, LoRAConfig(cost.GROUPS[targets], r=r, lora_alpha=2 * r))
    return model.bfloat16() if recipe == "LoRA, bf16" else model


def milliseconds(step: Callable[[], object]) -> float:
    """The time of one step, from event to event on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def measure(case: str, shape: cost.Shape = SHAPE, texts: int = TEXTS, tokens: int = TOKENS) -> dict[str, Any]:
    """One row, without its repeat. The A and B of a LoRA are fp32 and run under autocast, unless it says bf16."""
    model = prepare(case, shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True) if trained else None
    ids = torch.randint(shape.vocab, (texts, tokens), device="cuda")
    mixed = CASES[case][0] == "LoRA, bf16 base"

    def step() -> None:
        given: dict[str, Any] = {"input_ids": ids}
        if optimizer:
            optimizer.zero_grad()
        else:
            given = {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_()}  # type: ignore[operator]
        with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
            loss = model(**given, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer:
            optimizer.step()

    step()
    row = {
        "case": case,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "weights": cost.weight_bytes(model),
        "gradients": cost.gradient_bytes(model),
        "optimizer": cost.optimizer_bytes(optimizer) if optimizer else 0,
    }
    for suffix in ("", "_checkpointing"):
        if suffix:
            how = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
            step()
        torch.cuda.reset_peak_memory_stats()
        row["ms" + suffix] = round(
            median([milliseconds(step) for _ in range(2 + STEPS)][2:]), 1
        )  # the first two warm up
        row["highest" + suffix] = torch.cuda.max_memory_allocated()
    return row


def main() -> None:
    """Measure what is missing of the stored rows; each is stored as soon as it is there."""
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none; the stored rows are read with load().")
    import peft
    import transformers

    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    rows = load() if STORED.is_file() else []
    if any({key: row[key] for key in machine} != machine for row in rows):
        sys.exit(f"{STORED} was measured elsewhere or with other versions; move it away to measure all of it here.")
    for repeat in range(REPEATS):
        for case in CASES:
            if any((row["repeat"], row["case"]) == (repeat, case) for row in rows):
                continue
            torch.manual_seed(repeat)
            rows.append({**measure(case), "repeat": repeat, **machine})
            print(rows[-1], flush=True)
            rows.sort(key=lambda row: (row["repeat"], list(CASES).index(row["case"])))
            STORED.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            gc.collect()  # two of these models do not fit
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
