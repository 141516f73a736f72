"""Every registered adapter keeps the promises of the contract, on a Llama and a GPT-2."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hone import parts
from hone.adapters.base import Adapter, load_adapter
from hone.errors import HoneError

BRIDGED = {
    "lora": {"target_modules": "all-linear"},
    "vera": {"target_modules": ["q_proj", "v_proj"]},
    "ia3": {},
    "loha": {"target_modules": "all-linear", "r": 4},
}
# Options beyond the defaults with which a part is checked too.
ROWS = {
    "full": [{"train": ["layers.0", "h.0"]}, {"freeze": ["*.bias"]}],
    "lora": [
        {"rank_stabilized": True, "bias": "all"},
        {"weight_decomposed": True, "bias": "adapted"},
        {"rank": 4, "alpha": 3.0, "train_also": ["norm", "ln_f"], "exclude": ["layers.0", "h.0"]},
    ],
}
# Promises that a part cannot keep, and why.
EXCEPTIONS = {
    ("full", "disabled"): "it trains the base weights themselves, so no base is left",
    ("full", "peft"): "it saves whole weights in Hugging Face format",
    ("full", "attached once"): "attaching only says which weights train, so doing it again is harmless",
}
ONLY = {"vera": "llama", "loha": "llama"}  # methods or options for one architecture: LoHa has no GPT-2 layers


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2}
IDS = torch.arange(24).view(2, 12) % 31


def cases() -> list[object]:
    """One case per part, per row of options, and per bridged method."""
    found = []
    for record in parts.catalogue():
        if record.kind != "adapter":
            continue
        if record.name == "peft:":
            found += [(f"peft:{m}", {"method": m, "options": o}, m) for m, o in BRIDGED.items()]
        else:
            found += [(record.name, options, record.name) for options in ({}, *ROWS.get(record.name, []))]
    return [
        pytest.param(name, options, model, id=f"{name}-{i}-{model}")
        for i, (name, options, key) in enumerate(found)
        for model in MODELS
        if ONLY.get(key, model) == model
    ]


CASES = cases()
pytestmark = [
    pytest.mark.parametrize(("name", "options", "kind"), CASES),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),  # PEFT finds out by itself and says so
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]


def promised(name: str, promise: str) -> None:
    if reason := EXCEPTIONS.get((name, promise)):
        pytest.skip(reason)


def fits(options: dict[str, object], model: nn.Module) -> dict[str, object]:
    """Keep the patterns that name something in this architecture."""
    if "method" in options:
        return options
    names = [n for n, _ in model.named_modules()]
    known = [f".{n}." for n in names]
    return {
        key: [p for p in value if "*" in p or any(f".{p}." in n for n in known)] if isinstance(value, list) else value
        for key, value in options.items()
    }


def build(name: str, options: dict[str, object], model: nn.Module) -> Adapter:
    adapter: Adapter = parts.load("adapter", name)(**fits(options, model))
    return adapter


def attach(name: str, options: dict[str, object], kind: str, *, moved: bool = True) -> tuple[Adapter, nn.Module]:
    """Return an adapter and its model, by default with every trained tensor away from its start."""
    model = MODELS[kind]()
    adapter = build(name, options, model)
    torch.manual_seed(1)
    adapter.attach(model)
    if moved:
        move(adapter, model)
    return adapter, model.eval()


@torch.no_grad()
def move(adapter: Adapter, model: nn.Module) -> None:
    torch.manual_seed(2)
    for _, parameter in adapter.trainable(model):
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_model_is_the_base_at_the_start(name: str, options: dict[str, object], kind: str) -> None:
    _, model = attach(name, options, kind, moved=False)
    torch.testing.assert_close(logits(model), logits(MODELS[kind]()), rtol=0, atol=1e-12)


def test_only_what_is_declared_trains(name: str, options: dict[str, object], kind: str) -> None:
    adapter, model = attach(name, options, kind)
    declared = dict(adapter.trainable(model))
    assert declared
    before = snapshot(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for key, parameter in model.named_parameters():
        assert (key in declared) == (parameter.grad is not None), key
        assert (key in declared) or torch.equal(parameter, before[key]), key
    changed = [key for key in declared if not torch.equal(before[key], declared[key])]
    assert len(changed) == len(declared)


def test_merged_is_unmerged_and_back_to_the_bit(name: str, options: dict[str, object], kind: str) -> None:
    adapter, model = attach(name, options, kind)
    adapted, before = logits(model), snapshot(model)
    adapter.merge(model)
    adapter.merge(model)  # merging twice must not add twice
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-10)
    adapter.unmerge(model)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(model), adapted)


def test_save_and_load_round_trip(name: str, options: dict[str, object], kind: str, tmp_path: Path) -> None:
    adapter, model = attach(name, options, kind)
    adapter.save(model, tmp_path / "saved", base="the/base")
    fresh = MODELS[kind]()
    again = build(name, options, fresh)
    generator = torch.get_rng_state()
    again.load(fresh, tmp_path / "saved")
    assert name.startswith("peft:") or torch.equal(generator, torch.get_rng_state())
    assert torch.equal(logits(fresh.eval()), logits(model))
    wanted = logits(model)
    move(adapter, model)
    assert not torch.equal(logits(model), wanted)
    adapter.load(model, tmp_path / "saved")  # into a model that has the adapter already
    assert torch.equal(logits(model), wanted)
    again.save(fresh, tmp_path / "again", base="the/base")
    for file in (tmp_path / "saved").glob("*.json"):
        assert json.loads(file.read_text()) == json.loads((tmp_path / "again" / file.name).read_text())


def test_peft_loads_what_is_saved(name: str, options: dict[str, object], kind: str, tmp_path: Path) -> None:
    promised(name, "peft")
    adapter, model = attach(name, options, kind)
    adapter.save(model, tmp_path, base="the/base")
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-12)
    fresh = MODELS[kind]()
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh.eval()), logits(model), rtol=0, atol=1e-12)


def test_loading_is_strict(name: str, options: dict[str, object], kind: str, tmp_path: Path) -> None:
    adapter, model = attach(name, options, kind)
    adapter.save(model, tmp_path, base="")
    (file,) = tmp_path.glob("*.safetensors")
    whole = load_file(file)
    key = next(key for key in whole if ".0." in key or ".1." in key)
    for broken, word in (
        ({k: v for k, v in whole.items() if k != key}, key.removeprefix("base_model.model.")),
        ({**whole, "base_model.model.stray.weight": torch.zeros(2)}, "stray"),
        ({**whole, key: torch.zeros(3, 3, dtype=torch.float64)}, key.removeprefix("base_model.model.")),
    ):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(HoneError, match=word.replace(".", r"\.")):
            adapter.load(model, tmp_path)


def test_disabling_restores_the_base_to_the_bit(name: str, options: dict[str, object], kind: str) -> None:
    adapter, model = attach(name, options, kind)
    if (name, "disabled") in EXCEPTIONS:
        with pytest.raises(HoneError, match="base"):
            adapter.disabled(model)
        return
    adapted, base = logits(model), logits(MODELS[kind]())
    trained = [n for n, _ in adapter.trainable(model)]
    assert not torch.equal(adapted, base)
    with adapter.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert [n for n, _ in adapter.trainable(model)] == trained


def test_one_seed_gives_one_start(name: str, options: dict[str, object], kind: str) -> None:
    first, second = (snapshot(attach(name, options, kind, moved=False)[1]) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_strip_leaves_the_plain_model(name: str, options: dict[str, object], kind: str, tmp_path: Path) -> None:
    adapter, model = attach(name, options, kind)
    adapted = logits(model)
    adapter.strip(model)
    plain = MODELS[kind]()
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert not adapter.trainable(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)


def test_attaching_twice_is_refused(name: str, options: dict[str, object], kind: str) -> None:
    promised(name, "attached once")
    adapter, model = attach(name, options, kind)
    with pytest.raises(HoneError, match="already"):
        copy.copy(adapter).attach(model)
