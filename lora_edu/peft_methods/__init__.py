"""Methods of parameter-efficient fine-tuning, each a short file behind one interface.

method = METHODS["ia3"]()       what it is, with its sizes
method.apply(model)             freezes the rest, adds what trains
method.trainable(model)         the parameters that train, by name
method.merge(model)             where method.mergeable; method.why says why, or why not
method.remove(model)            the base again, bit for bit
"""

from __future__ import annotations

from lora_edu.peft_methods.adalora import AdaLoRA
from lora_edu.peft_methods.base import Method
from lora_edu.peft_methods.bitfit import BitFit
from lora_edu.peft_methods.bottleneck import Bottleneck
from lora_edu.peft_methods.full import Full
from lora_edu.peft_methods.head import Head
from lora_edu.peft_methods.ia3 import IA3
from lora_edu.peft_methods.lora import DoRA, LoRA, RsLoRA, loraplus_groups
from lora_edu.peft_methods.norm import Norm
from lora_edu.peft_methods.pissa import PiSSA
from lora_edu.peft_methods.prefix import Prefix
from lora_edu.peft_methods.prompt import Prompt
from lora_edu.peft_methods.vera import VeRA

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "head": Head,
    "bitfit": BitFit,
    "norm": Norm,
    "ia3": IA3,
    "bottleneck": Bottleneck,
    "prompt": Prompt,
    "prefix": Prefix,
    "lora": LoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "pissa": PiSSA,
    "vera": VeRA,
    "adalora": AdaLoRA,
}

__all__ = [
    "IA3",
    "METHODS",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "Full",
    "Head",
    "LoRA",
    "Method",
    "Norm",
    "PiSSA",
    "Prefix",
    "Prompt",
    "RsLoRA",
    "VeRA",
    "loraplus_groups",
]
