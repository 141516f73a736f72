"""What the conformance tests of adapters share: models, data to look at, and the cases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hone import parts
from hone.adapters.base import Adapter
from hone.adapters.calibration import Calibration

BRIDGED: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "vera": {"target_modules": ["q_proj", "v_proj"]},
    "ia3": {},
    "loha": {"target_modules": "all-linear", "r": 4},
}
ONLY = {"peft:vera": "llama", "peft:loha": "llama"}  # options for one architecture: LoHa has no GPT-2 layers
IDS = torch.arange(24).view(2, 12) % 31
OTHER_IDS = (torch.arange(24).view(2, 12) * 7 + 3) % 31


def copied(build: Callable[[], Any]) -> Callable[[], Any]:
    """Return what builds a model once and copies it from then on, with the random numbers that follow a build."""
    kept: list[tuple[Any, torch.Tensor]] = []

    def made() -> Any:
        if not kept:
            kept.append((build(), torch.get_rng_state()))
        torch.set_rng_state(kept[0][1])
        return copy.deepcopy(kept[0][0])

    return made


@copied
def llama() -> LlamaForCausalLM:
    """Return a random Llama of two layers in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@copied
def gpt2() -> GPT2LMHeadModel:
    """Return a random GPT-2 of two layers in float64."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2}


@cache
def about(name: str) -> dict[str, Any]:
    """Return what the file of a part says."""
    path = Path(__file__).parent / f"{name}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def options_to_test(name: str) -> list[dict[str, Any]]:
    """Return the options with which a part is tested."""
    found = about(name)
    return [*([{}] if found.get("defaults", True) else []), *found.get("rows", [])]


QUIET = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),  # PEFT finds out by itself and says so
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # of PEFT's own AdaLoRA files
]


def cases(once: bool = False) -> list[Any]:
    """Return one case per part, per row of options, and per bridged method, on every architecture that it fits.

    Args:
        once: on the first of them alone, for promises that no architecture changes.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for record in parts.catalogue():
        if record.kind == "adapter" and record.name == "peft:":
            found += [(f"peft:{method}", {"method": method, "options": o}) for method, o in BRIDGED.items()]
        elif record.kind == "adapter":
            found += [(record.name, options) for options in options_to_test(record.name)]
    fitting = {
        i: [model for model in MODELS if about(name).get("only", ONLY.get(name, model)) == model]
        for i, (name, _) in enumerate(found)
    }
    return [
        pytest.param(name, options, model, id=f"{name}-{i}-{model}")
        for i, (name, options) in enumerate(found)
        for model in fitting[i][: 1 if once else None]
    ]


def excused(name: str, promise: str) -> str:
    """Return why a part cannot keep a promise, "" when it can."""
    return str(about(name).get("exceptions", {}).get(promise, ""))


def keep_or_skip(name: str, promise: str) -> None:
    """Skip a test whose promise a part cannot keep."""
    if reason := excused(name, promise):
        pytest.skip(reason)


def fits(options: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Keep the patterns that name something in this architecture."""
    if "method" in options:
        return options
    names = [f".{name}." for name, _ in model.named_modules()]

    def known(pattern: object) -> bool:
        return not isinstance(pattern, str) or "*" in pattern or any(f".{pattern}." in name for name in names)

    lists = {k for k, v in options.items() if isinstance(v, list)} - {"formats"}  # formats of numbers, not patterns
    return {k: [p for p in v if known(p)] if k in lists else v for k, v in options.items()}


def build(name: str, options: dict[str, Any], model: nn.Module) -> Adapter:
    """Return a part with its options."""
    adapter: Adapter = parts.load("adapter", name)(**fits(options, model))
    return adapter


def calibration(model: nn.Module) -> Calibration:
    """Return two batches of a task, and two of other text."""
    network: Any = model

    def data(batches: list[Tensor], general: Calibration | None = None) -> Calibration:
        def loss(ids: Tensor) -> Tensor:
            return network(input_ids=ids, labels=ids).loss * (ids.numel() - len(ids))

        return Calibration(
            batches=batches, forward=lambda ids: network(input_ids=ids), loss=loss,
            count=lambda ids: float(ids.numel() - len(ids)), general=general,
        )  # fmt: skip

    return data([IDS, IDS.flip(1)], data([OTHER_IDS, OTHER_IDS.flip(1)]))


def attach(name: str, options: dict[str, Any], kind: str, *, moved: bool = True) -> tuple[Adapter, nn.Module]:
    """Return an adapter and its model, by default with every trained tensor away from its start."""
    model = MODELS[kind]()
    adapter = build(name, options, model)
    torch.manual_seed(1)
    adapter.attach(model, calibration(model))
    if moved:
        move(adapter, model)
    return adapter, model.eval()


@torch.no_grad()
def move(adapter: Adapter, model: nn.Module) -> None:
    """Move every trained tensor a little."""
    torch.manual_seed(2)
    for _, parameter in adapter.trainable(model):
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


def logits(model: nn.Module) -> Tensor:
    """Return the logits of a model on fixed ids."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer."""
    everything = [*model.named_parameters(), *model.named_buffers()]
    return {name: p.detach().clone() for name, p in everything}
