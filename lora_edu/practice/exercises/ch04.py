"""Exercises of chapter 04, training with LoRA and what it saves."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_edu import cost
from lora_edu.practice.exercise import Case, Exercise, Mistake, Property, arrays

Maps = dict[str, tuple[int, int]]


def _is_whole(got: Any, *args: Any) -> bool:
    """Whether the answer is one whole number, of whatever type."""
    return bool(got[0].shape == () and got[0] % 1 == 0)


# C9 lora_param_count


def lora_param_count(maps: Maps, layers: int, r: int, targets: list[str]) -> int:
    """layers x the sum of r (out + in) over the targets: A is (r, in), B is (out, r), and `maps` has the (out, in)."""
    return layers * sum(r * sum(maps[name]) for name in targets)


def _count_cases() -> list[Case]:
    # Queries wider than the model, keys and values narrower: no attention map is square.
    block = cost.Shape(hidden=6, intermediate=15, layers=3, vocab=1, heads=4, kv_heads=2, head_dim=2).maps
    cases = [
        Case(({"up_proj": (7, 4)}, 1, 3, ["up_proj"])),
        Case(({"up_proj": (7, 4)}, 5, 2, ["up_proj"])),
        Case((block, 3, 2, ["q_proj", "v_proj"])),
    ]
    for model, r, group in (
        ("Llama-2-7B", 8, "q,v"),
        ("Llama-2-7B", 16, "all-linear"),
        ("Mistral-7B", 16, "all-linear"),
        ("Llama-2-70B", 16, "all-linear"),
    ):
        shape = cost.SHAPES[model]
        cases.append(Case((shape.maps, shape.layers, r, list(cost.GROUPS[group]))))
    return cases


def _by_arrays(maps: Maps, layers: int, r: int, targets: list[str]) -> int:
    """The entries of every A and B, made and counted."""
    pairs = ((np.empty((r, maps[name][1])), np.empty((maps[name][0], r))) for name in targets for _ in range(layers))
    return sum(A.size + B.size for A, B in pairs)


def _right_count(where: Any) -> Any:
    """Whether the count is right, asked only of cases with so many layers and targets."""
    return lambda got, maps, layers, r, targets: (
        not where(layers, len(targets)) or got[0] == _by_arrays(maps, layers, r, targets)
    )


def _keys_like_queries(maps: Any, layers: int, r: int, targets: Any) -> Any:
    wide = {name: maps.get("q_proj", shape) if name in ("k_proj", "v_proj") else shape for name, shape in maps.items()}
    return lora_param_count(wide, layers, r, targets)


def _all_hidden(maps: Any, layers: int, r: int, targets: Any) -> Any:
    hidden = next(iter(maps.values()))[1]
    return layers * len(targets) * 2 * hidden * r


def _inputs_twice(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return layers * sum(2 * r * maps[name][1] for name in targets)


def _outputs_twice(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return layers * sum(2 * r * maps[name][0] for name in targets)


def _a_alone(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return layers * sum(r * maps[name][1] for name in targets)


def _b_alone(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return layers * sum(r * maps[name][0] for name in targets)


def _one_layer(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return lora_param_count(maps, 1, r, targets)


def _weights_of_w(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return layers * sum(maps[name][0] * maps[name][1] for name in targets)


def _w_and_lora(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return _weights_of_w(maps, layers, r, targets) + lora_param_count(maps, layers, r, targets)


def _sides_multiplied(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return r * _weights_of_w(maps, layers, r, targets)


def _every_map(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return lora_param_count(maps, layers, r, list(maps))


def _no_rank(maps: Any, layers: int, r: int, targets: Any) -> Any:
    return lora_param_count(maps, layers, 1, targets)


_SQUARE = (
    "2 d r a map is the paper's count, where every map is square; gate, up and down are not, and k and v need not be."
)
_ONE_FACTOR = "You count one of the two factors; A and B both train."

C9 = Exercise(
    number="C9",
    chapter="04",
    minutes=10,
    level="screen",
    importance=4,
    task="Count what a LoRA trains.",
    returns="one whole number",
    reference=lora_param_count,
    parse=arrays(1),
    cases=_count_cases,
    properties=(
        Property(
            "WHOLE",
            "Return one whole number, the sum over all adapted maps.",
            _is_whole,
        ),
        Property(
            "ONE_MAP",
            "Wrong for a single map in a single layer: which shapes have A and B?",
            _right_count(lambda layers, targets: layers == targets == 1),
        ),
        Property(
            "LAYERS",
            "Wrong for one map in several layers: each layer has an A and a B of its own.",
            _right_count(lambda layers, targets: layers > targets == 1),
        ),
        Property(
            "TARGETS",
            "Wrong for several maps: each has its own (out, in), and only those in targets count.",
            _right_count(lambda layers, targets: targets > 1),
        ),
    ),
    mistakes=(
        Mistake(
            "GQA",
            "You take k_proj and v_proj to be as wide as q_proj; where queries share keys and values they are narrower.",
            _keys_like_queries,
        ),
        Mistake("SQUARE", _SQUARE, _all_hidden),
        Mistake("SQUARE", _SQUARE, _inputs_twice),
        Mistake("SQUARE", _SQUARE, _outputs_twice),
        Mistake("ONE_FACTOR", _ONE_FACTOR, _a_alone),
        Mistake("ONE_FACTOR", _ONE_FACTOR, _b_alone),
        Mistake("LAYERS", "That is one layer; each layer has an A and a B of its own.", _one_layer),
        Mistake("DENSE", "Those are the weights of W, which are frozen; r does not enter.", _weights_of_w),
        Mistake("TOTAL", "You count W too, which is frozen; asked for is what trains.", _w_and_lora),
        Mistake(
            "PRODUCT",
            "You multiply out, in and r. A has one side of W and B the other: their sizes are added.",
            _sides_multiplied,
        ),
        Mistake("EVERY_MAP", "You count every map of the block; only those in targets get a LoRA.", _every_map),
        Mistake("NO_RANK", "The rank does not enter; your count is that of r = 1.", _no_rank),
    ),
    hints=(
        "For one map: A is (r, in) and B is (out, r). How many numbers have the two together?",
        "maps[name] is (out, in), for each name in targets; the shapes differ, so sum over the names.",
        "All layers are alike: the sum over the targets, times layers.",
    ),
)


# C12 training_gb


def training_gb(mode: str, base: float, adapter: float, linear: float) -> float:
    """GB (1e9 bytes) of weights, gradients and Adam's state, for a model of `base` parameters.

    "full"     every parameter trains: bf16 weight and gradient, fp32 copy of the weight and two moments
    "lora"     the base frozen in bf16; the `adapter` parameters fp32, as their gradients and two moments
    "qlora"    the same, but `linear` of the base's weights take 4.127 bits, the constants included
    """
    if mode == "full":
        return (2 + 2 + 4 + 4 + 4) * base / 1e9
    narrow = {"lora": 0, "qlora": linear}[mode]
    frozen = 2 * (base - narrow) + 4.127 / 8 * narrow
    return (frozen + (4 + 4 + 4 + 4) * adapter) / 1e9


def _memory_cases() -> list[Case]:
    """All three modes for a small model and for a 7B; then large tables beside the maps, a large adapter, a large base."""
    cases = [Case((mode, 1_236_000_000, 11_300_000, 973_000_000)) for mode in ("full", "lora", "qlora")]
    for model, r, modes in (
        ("Llama-2-7B", 16, ("full", "lora", "qlora")),
        ("Llama-3.2-3B", 8, ("qlora",)),
        ("Llama-2-7B", 256, ("lora",)),
        ("Llama-2-70B", 64, ("qlora",)),
    ):
        shape = cost.SHAPES[model]
        sizes = cost.parameters(shape), cost.lora_parameters(shape, r), cost.linear_weights(shape)
        cases += [Case((mode, *sizes)) for mode in modes]
    return cases


def _gb(mode: str, base: float, adapter: float, linear: float) -> float:
    recipe, sizes = {
        "full": ("full, mixed", (base,)),
        "lora": ("LoRA, bf16 base", (base, adapter)),
        "qlora": ("QLoRA, NF4, double", (base, adapter, linear)),
    }[mode]
    return cost.training_memory(recipe, *sizes).total / 1e9


def _near(got: Any, *args: Any) -> bool:
    """Right, also with 4.127 for the bits that have more digits."""
    return bool(np.isclose(got[0], _gb(*args), rtol=1e-4, atol=0))


def _not_rounded(got: Any, *args: Any) -> bool:
    return _near(got, *args) or all(got[0] != round(_gb(*args), digits) for digits in range(4))


def _in_gb(got: Any, *args: Any) -> bool:
    """False where the right number stands in bytes, kB, MB, or a binary unit."""
    return _near(got, *args) or not any(
        np.isclose(got[0] * unit, 1e9 * _gb(*args), rtol=1e-4) for unit in (1, 1e3, 1e6, 2**20, 2**30)
    )


def _only_in(mode: str, holds: Any) -> Any:
    return lambda got, *args: args[0] != mode or bool(holds(got[0], *args))


def _ledger(
    args: tuple[str, float, float, float],
    full: float = 16,
    frozen: float = 0,
    trained: float = 16,
    rest: float = 2,
    bits: float = 4.127,
) -> float:
    """GB as training_gb counts them, with parts to go wrong.

    Bytes a parameter in full fine-tuning, of a frozen one on top of its weight, of a trained one, and of a frozen weight
    that is not in few bits; bits of the others.
    """
    mode, base, adapter, linear = args
    if mode == "full":
        return full * base / 1e9
    narrow = linear if mode == "qlora" else 0
    return (rest * (base - narrow) + bits / 8 * narrow + frozen * base + trained * adapter) / 1e9


def _base_forgotten(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), rest=0, bits=0)


def _gradients_of_frozen(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), frozen=2)


def _moments_of_frozen(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), frozen=8)


def _adam_of_frozen(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), frozen=12)


def _full_and_adapter(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), frozen=14)


def _all_in_four_bits(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return training_gb(mode, base, adapter, base)


def _no_constants(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), bits=4)


def _bits_for_bytes(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), bits=8 * 4.127)


def _only_the_linear(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return training_gb(mode, linear if mode == "qlora" else base, adapter, linear)


def _gib(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return training_gb(mode, base, adapter, linear) * 1e9 / 2**30


def _no_adam(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), full=4, trained=8)


def _one_moment(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), full=12, trained=12)


def _no_copy(mode: Any, base: Any, adapter: Any, linear: Any) -> Any:
    return _ledger((mode, base, adapter, linear), full=12)


_ADAM_FROZEN = "Adam keeps its moments, and the fp32 copy, of what it updates; it never updates a frozen weight."

C12 = Exercise(
    number="C12",
    chapter="04",
    minutes=15,
    level="mid",
    importance=5,
    task="The memory that full fine-tuning, LoRA and QLoRA need from step to step.",
    returns="one number, in GB",
    reference=training_gb,
    parse=arrays(1),
    observe=lambda got, *args: (np.round(got[0], 2),),  # 4.127 bits and all the digits are one behaviour
    cases=_memory_cases,
    properties=(
        Property("NUMBER", "Return one number, the sum of all parts.", lambda got, *args: got[0].shape == ()),
        Property("UNIT", "The number is right, in another unit: a GB is 1e9 bytes.", _in_gb),
        Property("ROUNDED", "Do not round: the reader of the number does that.", _not_rounded),
        Property(
            "FULL",
            '"full" is wrong: five things are kept for every parameter of the base, and there is no adapter.',
            lambda got, *args: args[0] != "full" or _near(got, *args),
        ),
        Property(
            "LORA_LOW",
            '"lora" is less than the frozen weights alone: those stay in memory, in bf16.',
            _only_in("lora", lambda gb, mode, base, *rest: gb >= 2 * base / 1e9),
        ),
        Property(
            "LORA",
            '"lora" is wrong: what is kept of a frozen parameter, and what of a trained one?',
            lambda got, *args: args[0] != "lora" or _near(got, *args),
        ),
        Property(
            "QLORA_LOW",
            '"qlora" is too low. Two kinds of frozen weights stay in memory, `linear` and the others; and the adapter is '
            "that of LoRA.",
            _only_in("qlora", lambda gb, *args: gb >= _gb(*args) * (1 - 1e-4)),
        ),
        Property(
            "QLORA",
            '"qlora" is too high: `linear` weights take 4.127 bits each, and nothing else is kept of them.',
            lambda got, *args: args[0] != "qlora" or _near(got, *args),
        ),
    ),
    mistakes=(
        Mistake("NO_BASE", "Frozen is not free: the weights of the base are missing.", _base_forgotten),
        Mistake(
            "GRADIENTS", "A frozen weight has no gradient: nothing is computed or kept for it.", _gradients_of_frozen
        ),
        Mistake("ADAM_FROZEN", _ADAM_FROZEN, _moments_of_frozen),
        Mistake("ADAM_FROZEN", _ADAM_FROZEN, _adam_of_frozen),
        Mistake(
            "ALL_TRAINS",
            "You add the adapter to full fine-tuning; a frozen base has no gradients and no state in Adam.",
            _full_and_adapter,
        ),
        Mistake(
            "ALL_4BIT",
            "You put the whole base in 4 bits; embeddings, head and norms, all but `linear`, stay in bf16.",
            _all_in_four_bits,
        ),
        Mistake(
            "NO_CONSTANTS",
            "Exactly 4 bits: each block of weights also has a constant, without which it cannot be read.",
            _no_constants,
        ),
        Mistake("BITS", "You take 4.127 for bytes; a byte has 8 bits.", _bits_for_bytes),
        Mistake(
            "LINEAR_ALONE",
            "Of the base you count `linear` alone; embeddings, head and norms are in memory too, in bf16.",
            _only_the_linear,
        ),
        Mistake("GIB", "That is in GiB, 2**30 bytes; a GB is 1e9.", _gib),
        Mistake("NO_ADAM", "The optimizer is missing: Adam keeps more than weight and gradient together.", _no_adam),
        Mistake("ONE_MOMENT", "Adam has two moments, of the gradient and of its square; you count one.", _one_moment),
        Mistake(
            "NO_COPY",
            "The fp32 copy is missing: mixed precision updates a copy of the weights, small steps are lost in bf16.",
            _no_copy,
        ),
    ),
    hints=(
        "Make a table: a row for each of weight, gradient, copy, first and second moment; a column for trained and frozen.",
        "bf16 has 2 bytes and fp32 has 4. Of a frozen parameter only the weight is there.",
        'In "qlora" the base has two parts, `linear` at 4.127 / 8 bytes and base - linear at 2; the adapter is as in "lora".',
    ),
    after="Activations come on top; with a LoRA on every map they are about those of full fine-tuning.",
)


# C22 make_labels


def make_labels(ids: np.ndarray, prompt_len: int, pad: int, eos: int) -> np.ndarray:
    """The labels (T,) of one sequence `ids` (T,): prompt, answer, eos, and padding on the right.

    `ids` is a NumPy array of integers.
    The answer and its eos keep their ids, each at its own place: the model shifts. The prompt and the padding are -100.
    An answer that was cut off has no eos.
    """
    labels = ids.copy()
    labels[:prompt_len] = -100
    if pad != eos:
        labels[labels == pad] = -100
    ends = np.flatnonzero(labels == eos)  # the first is the answer's; where pad is eos, the others are padding
    if len(ends):
        labels[ends[0] + 1 :] = -100
    return labels


def _sequences() -> list[Case]:
    one, own = (2, 2), (0, 2)  # pad and eos
    gpt = (50256, 50256)
    return [
        Case((np.array(ids), prompt, *tokens))
        for ids, prompt, tokens in (
            ([5, 6, 7, 8, 2, 2, 2], 2, one),
            ([9, 4, 4, 7, 2, 0, 0], 3, own),
            ([3, 4, 5, 2], 1, one),  # nothing is padded
            ([3, 4, 5, 6, 7], 2, one),  # cut off
            ([3, 4, 5, 6, 0, 0], 2, own),  # cut off, and padded
            ([8, 9, 2, 2], 2, one),  # an empty answer
            ([8, 9, 7, 2, 2], 0, one),  # no prompt
            ([1, 5, 2, 6, 7, 8, 2, 2, 2], 4, one),  # a prompt of two turns
            ([1, 5, 2, 6, 7, 8, 2, 0], 4, own),
            ([50256, 318, 257, 1332, 198, 3363, 11, 340, 318, 13, 50256, 50256, 50256, 50256], 5, gpt),
        )
    ]


def _end(ids: np.ndarray, prompt_len: int, pad: int, eos: int) -> int:
    """The place after the answer's last token, where its eos stands if it has one."""
    return next((i for i in range(prompt_len, len(ids)) if ids[i] in (pad, eos)), len(ids))


def _answer_kept(got: Any, ids: np.ndarray, prompt_len: int, pad: int, eos: int) -> bool:
    answer = slice(prompt_len, _end(ids, prompt_len, pad, eos))
    return np.array_equal(got[0][answer], ids[answer])


def _eos_kept(got: Any, ids: np.ndarray, prompt_len: int, pad: int, eos: int) -> bool:
    end = _end(ids, prompt_len, pad, eos)
    return end == len(ids) or ids[end] != eos or got[0][end] == eos


def _padding_masked(got: Any, ids: np.ndarray, prompt_len: int, pad: int, eos: int) -> bool:
    end = _end(ids, prompt_len, pad, eos)
    return bool((got[0][end + (ids[end : end + 1] == eos).sum() :] == -100).all())


def _every_pad(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    labels = make_labels(ids, prompt_len, pad, eos)
    labels[ids == pad] = -100
    return labels


def _ids_themselves(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    return ids.copy()


def _prompt_learned(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    labels = make_labels(ids, prompt_len, pad, eos)
    labels[:prompt_len] = ids[:prompt_len]
    return labels


def _prompt_but_one(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    return make_labels(ids, max(prompt_len - 1, 0), pad, eos)


def _prompt_and_one(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    labels = make_labels(ids, prompt_len, pad, eos)
    labels[: prompt_len + 1] = -100
    return labels


def _shifted(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    return np.append(make_labels(ids, prompt_len, pad, eos)[1:], -100)


def _padding_learned(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    return np.where(np.arange(len(ids)) < prompt_len, -100, ids)


def _eos_learned_twice(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    labels = make_labels(ids, prompt_len, pad, eos)
    labels[prompt_len:][ids[prompt_len:] == eos] = eos
    return labels


def _eos_masked(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    labels = make_labels(ids, prompt_len, pad, eos)
    labels[labels == eos] = -100
    return labels


def _eos_of_the_prompt(ids: Any, prompt_len: int, pad: int, eos: int) -> Any:
    return np.where(np.arange(len(ids)) < prompt_len, -100, make_labels(ids, 0, pad, eos))


_PADDING = (
    "The padding is learned: after its eos the model is trained to write eos or pad again, and the loss counts it."
)

C22 = Exercise(
    number="C22",
    chapter="04",
    minutes=10,
    level="screen",
    importance=4,
    task="Labels for fine-tuning on answers, where pad may be eos.",
    returns="one array of the length of ids",
    reference=make_labels,
    parse=arrays(1),
    cases=_sequences,
    properties=(
        Property("SHAPE", "labels should have the shape of ids.", lambda got, ids, *rest: got[0].shape == ids.shape),
        Property(
            "NO_SHIFT",
            "Every label is -100 or the id at the same place: the loss skips -100 and nothing else, and the model shifts.",
            lambda got, ids, *rest: bool(((got[0] == -100) | (got[0] == ids)).all()),
        ),
        Property(
            "PROMPT",
            "A token of the prompt has a label: the model is trained to write the question.",
            lambda got, ids, prompt_len, *rest: bool((got[0][:prompt_len] == -100).all()),
        ),
        Property("ANSWER", "A token of the answer is masked, and is never learned.", _answer_kept),
        Property(
            "KEEP_FIRST_EOS", "The eos that ends the answer is masked: the model never learns to stop.", _eos_kept
        ),
        Property(
            "PAD", "Something after the end of the answer has a label: padding is no text to learn.", _padding_masked
        ),
    ),
    mistakes=(
        Mistake(
            "EVERY_PAD",
            "You mask every pad id. Where pad is eos that includes the eos of the answer: the model never learns to stop.",
            _every_pad,
        ),
        Mistake("EOS_MASKED", "You mask from the eos on, not after it: the model never learns to stop.", _eos_masked),
        Mistake(
            "IDS", "The labels are the ids: prompt and padding are learned as well as the answer.", _ids_themselves
        ),
        Mistake(
            "PROMPT_LEARNED",
            "The prompt is not masked: the model is also trained to write the question.",
            _prompt_learned,
        ),
        Mistake(
            "PROMPT_SHIFT",
            "The last token of the prompt has a label. Its output predicts the first token of the answer, but that label "
            "stands one place later: the model shifts.",
            _prompt_but_one,
        ),
        Mistake(
            "FIRST_TOKEN", "You mask one place too many: the first token of the answer is not learned.", _prompt_and_one
        ),
        Mistake(
            "SHIFTED", "You shift the labels, and the model shifts them again: it learns the next but one.", _shifted
        ),
        Mistake("PADDING_LEARNED", _PADDING, _padding_learned),
        Mistake("PADDING_LEARNED", _PADDING, _eos_learned_twice),
        Mistake(
            "EOS_OF_PROMPT",
            "You look for the first eos from the start; a prompt can hold one, and then the answer is masked.",
            _eos_of_the_prompt,
        ),
    ),
    hints=(
        "Copy ids and write -100 where nothing is to be learned: first ids[:prompt_len].",
        "Where pad is eos, ids do not tell the two apart and places do: the first eos after the prompt ends the answer.",
        "np.flatnonzero(labels == eos), once the prompt is masked, lists its places; keep the first, mask all after it. "
        "An answer that was cut off has none.",
    ),
    after="A test for any data set: decode the labels that are not -100. It reads as the answer, and ends in one eos.",
)


# E4.1 step_flops


def step_flops(m: int, n: int, r: int, dx: bool = True) -> int:
    """FLOPs per token of a training step of W (m, n), the sum over its matrix products; a multiply-add is 2 FLOPs.

    r = 0    W trains                 2 m n each: W x, dW = g x^T
    r > 0    W is frozen, a LoRA      2 m n: W x;  2 r n each: z = A x, dA = dz x^T;  2 r m each: B z, dz = B^T g, dB = g z^T
    dx       something below trains   2 m n more: W^T g;  2 r n more: A^T dz
    """
    W, A, B = 2 * m * n, 2 * r * n, 2 * r * m
    return (W + 2 * A + 3 * B if r else 2 * W) + (W + A) * dx


def _step_cases() -> list[Case]:
    # At (40, 30, 1) W is so much larger than A and B that a product with it cannot be mistaken for theirs.
    sizes = ((3, 2, 0), (40, 30, 1), (30, 40, 3), (16, 64, 16), (6, 4, 12), (4096, 4096, 0), (4096, 11008, 16))
    return [Case((*size, dx)) for dx in (True, False) for size in sizes]


def _thin(m: int, n: int, r: int) -> bool:
    return 0 < 6 * r * (m + n) < m * n


def _right_step(got: Any, m: int, n: int, r: int, dx: bool) -> bool:
    return bool(got[0] == cost.linear_flops(m, n, r, trains=r == 0, dx=dx).total)


def _more(size: tuple[int, int, int, bool], W: int = 0, A: int = 0, B: int = 0) -> int:
    """The right FLOPs and, where there is a LoRA, so many products with W, A and B more."""
    m, n, r, _ = size
    return step_flops(*size) + 2 * (W * m * n + A * r * n + B * r * m) * (r > 0)


def _trained_only(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), W=-1 - dx)


def _no_dx(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), W=-dx)


def _dw_computed(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), W=1)


def _lora_is_free(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), A=-2 - dx, B=-3)


def _ab_twice(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), A=-dx, B=-1)


def _product_formed(m: int, n: int, r: int, dx: bool) -> Any:
    return _lora_is_free(m, n, r, dx) + 6 * r * m * n


def _sum_formed(m: int, n: int, r: int, dx: bool) -> Any:
    return step_flops(m, n, 0, dx) + 6 * r * m * n


def _multiply_adds(m: int, n: int, r: int, dx: bool) -> Any:
    return step_flops(m, n, r, dx) // 2


def _forward_alone(m: int, n: int, r: int, dx: bool) -> Any:
    return 2 * m * n + 2 * r * (m + n)


def _backward_once(m: int, n: int, r: int, dx: bool) -> Any:
    return 2 * _forward_alone(m, n, r, dx)


def _always_frozen(m: int, n: int, r: int, dx: bool) -> Any:
    return step_flops(m, n, r, dx) - 2 * m * n * (r == 0)


def _ratio(m: int, n: int, r: int, dx: bool) -> Any:
    return step_flops(m, n, r, dx) / step_flops(m, n, 0, dx)


def _dx_ignored(m: int, n: int, r: int, dx: bool) -> Any:
    return step_flops(m, n, r)


def _dx_ignored_in_full(m: int, n: int, r: int, dx: bool) -> Any:
    return step_flops(m, n, r, dx or r == 0)


def _dz_dropped(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), B=-(not dx))


def _w_kept(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), W=not dx)


def _a_kept(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), A=not dx)


def _dz_for_a(m: int, n: int, r: int, dx: bool) -> Any:
    return _more((m, n, r, dx), A=not dx, B=-(not dx))


_FORMED = "You form B A, a matrix of the size of W. The layer does A x first and then B: two thin products."

STEP = Exercise(
    number="E4.1",
    chapter="04",
    minutes=15,
    level="mid",
    importance=5,
    task="The FLOPs of a training step of one map, with and without LoRA, and where nothing below it trains.",
    returns="one whole number",
    reference=step_flops,
    parse=arrays(1),
    cases=_step_cases,
    properties=(
        Property(
            "WHOLE",
            "Return one whole number, the FLOPs of all products together.",
            _is_whole,
        ),
        Property(
            "FULL",
            "Wrong at r = 0, where W itself trains: which products with W are needed, forward and backward, and what is "
            "a multiply-add?",
            lambda got, m, n, r, dx: r > 0 or _right_step(got, m, n, r, dx),
        ),
        Property(
            "W_LOW",
            "Too few, by more than A and B could cost: frozen stops the update of W. Which products with W are left?",
            lambda got, m, n, r, dx: not _thin(m, n, r) or got[0] >= 2 * (1 + dx) * m * n,
        ),
        Property(
            "W_HIGH",
            "Too many, by more than A and B could cost: whose result does nobody use, with W frozen? And B A is never "
            "formed.",
            lambda got, m, n, r, dx: not _thin(m, n, r) or got[0] <= 2 * (1 + dx) * m * n + 12 * r * (m + n),
        ),
        Property(
            "THIN",
            "The products with A and B are counted wrongly: which matrices are in them, and in how many is each?",
            lambda got, m, n, r, dx: not dx or _right_step(got, m, n, r, dx),
        ),
        Property(
            "THIN_BELOW",
            "The products with A and B are counted wrongly at dx=False: who uses the result of each?",
            _right_step,
        ),
    ),
    mistakes=(
        Mistake(
            "TRAINED_ONLY",
            "You count A and B alone, the trained numbers. Frozen is not free: y and dx still go through W.",
            _trained_only,
        ),
        Mistake(
            "NO_DX",
            "dx = W^T g is missing: frozen stops the update of W, not the signal through it to what trains below.",
            _no_dx,
        ),
        Mistake("DW", "You still compute dW; W is frozen and nobody uses its gradient.", _dw_computed),
        Mistake("LORA_FREE", "A and B cost nothing in your count; their products come on top of W's.", _lora_is_free),
        Mistake(
            "AB_TWICE",
            "Two products each are too few for A and B: both train, and the signal to what is below also goes through them.",
            _ab_twice,
        ),
        Mistake("BA_FORMED", _FORMED, _product_formed),
        Mistake("BA_FORMED", _FORMED, _sum_formed),
        Mistake("MULTIPLY_ADDS", "You count multiply-adds; each is 2 FLOPs.", _multiply_adds),
        Mistake("FORWARD", "That is the forward pass alone.", _forward_alone),
        Mistake(
            "BACKWARD_ONCE",
            "You count the backward pass like the forward one; a map that trains has two products there, dx and dW.",
            _backward_once,
        ),
        Mistake("RANK_ZERO", "r = 0 is full fine-tuning here: W trains, and dW is computed.", _always_frozen),
        Mistake("RATIO", "That is the share of full fine-tuning; the FLOPs themselves are asked for.", _ratio),
        Mistake(
            "DX_IGNORED",
            "dx changes nothing in your count; at dx=False nobody uses the gradient of x, and it is not computed.",
            _dx_ignored,
        ),
        Mistake(
            "DX_FULL",
            "dx changes your count with a LoRA only; at r = 0 too nobody uses the gradient of x.",
            _dx_ignored_in_full,
        ),
        Mistake(
            "DZ",
            "At dx=False you drop dz = B^T g together with dx; A still trains, and dA = dz x^T is made of it.",
            _dz_dropped,
        ),
        Mistake(
            "W_KEPT",
            "At dx=False you still compute W^T g: it is a part of dx, and neither dA nor dB uses it.",
            _w_kept,
        ),
        Mistake(
            "A_KEPT",
            "At dx=False you still compute A^T dz: dx is W^T g + A^T dz, and nobody uses either part.",
            _a_kept,
        ),
        Mistake(
            "DZ_FOR_A",
            "At dx=False you drop a product with B and keep all with A: are m and n exchanged? A is (r, n), B is (m, r).",
            _dz_for_a,
        ),
    ),
    hints=(
        "Three products with W in full fine-tuning: y = W x, W^T g for dx, dW = g x^T. Which of them are needed with W "
        "frozen, and which at dx=False?",
        "A product of a matrix of k numbers with one token's vector is k multiply-adds, so 2 k FLOPs; dW is as large.",
        "A and B have six: z = A x, B z, dz = B^T g, A^T dz, dB = g z^T, dA = dz x^T. At dx=False drop those whose result "
        "only dx uses.",
    ),
    after="At a small rank that is about two thirds of full fine-tuning, for only dW falls away; at dx=False it is half.",
)
