"""What is wrong between the fields of a recipe rather than in one of them."""

from __future__ import annotations

from typing import Any

from hone import options as opt
from hone.errors import Problem, nearest

MEDIA = {"text": "text", "arrays": "arrays (points, images, series)"}
MIXING = ("average", "posthoc_ema", "lcsc")  # callbacks that end a run with a mix of its weights after several steps
LAST = (*MIXING, "fpf")  # callbacks that change the weights when a run ends, after one another
# Adapters whose entries change their meaning during a run, by the option that decides it, with its value if not.
EXCHANGING: dict[str, tuple[str, str | None]] = {"spiel": ("regrow", "none"), "sara": ("reselect", None)}

# Settings of TRL's, Axolotl's and LLaMA-Factory's recipes, and what they are here.
_ELSEWHERE = {
    "learning_rate": "optimizer.lr", "lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "warmup_ratio": "schedule.warmup", "warmup_steps": "schedule.warmup", "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule", "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps",
    "max_grad_norm": "clip", "gradient_clipping": "clip", "sequence_len": "data.max_tokens",
    "max_seq_length": "data.max_tokens", "max_length": "data.max_tokens", "cutoff_len": "data.max_tokens",
    "per_device_train_batch_size": "batch_tokens, the tokens of a whole step", "batch_size": "batch_tokens, in tokens",
    "micro_batch_size": "micro_tokens, in tokens", "gradient_checkpointing": "recompute",
    "gradient_accumulation_steps": "micro_tokens, the most tokens in one pass", "output_dir": "out",
    "gradient_accumulation": "micro_tokens, the most tokens in one pass", "sample_packing": "packing",
    "datasets": "data", "dataset": "data", "base_model": "model", "model_name_or_path": "model", "peft": "adapter",
    "save_steps": "checkpoint_every", "eval_steps": "eval_every", "save_total_limit": "keep", "lora_r": "adapter.rank",
    "bf16": "precision",
}  # fmt: skip
ELSEWHERE = {name: f"here it is {said}" for name, said in _ELSEWHERE.items()}


def combinations(raw: dict[str, Any], at: str, places: opt.Places) -> list[Problem]:
    """Return the problems that lie between fields rather than in one.

    Args:
        raw: the recipe's fields.
        at: dotted path of a stage, "" for the recipe itself.
        places: where each path was written.
    """

    def problem(name: str, message: str, hint: str = "") -> Problem:
        path = f"{at}.{name}".lstrip(".")
        return Problem(path, message, places.find(path), hint)

    found = []
    staged = bool(raw.get("stages")) and not at
    steps, epochs = raw.get("steps"), raw.get("epochs")
    if steps is not None and epochs is not None:
        found.append(problem("epochs", "is given together with 'steps'; give one of them"))
    if steps is None and epochs is None and not staged:
        found.append(problem("steps", "is required and was not given", "or give 'epochs'"))
    if raw.get("data") is None and not staged:
        hint = "a path, a Hub name, or a built-in such as chains"
        found.append(problem("data", "is required and was not given", hint))
    whole, micro = raw.get("batch_tokens", 4096), raw.get("micro_tokens")
    if isinstance(micro, int) and isinstance(whole, int) and micro > whole:
        found.append(problem("micro_tokens", f"expected at most batch_tokens ({whole}), got {micro}"))
    if not staged:  # each stage is looked at with all that it inherits
        found += [problem(*said) for said in _unevaluated(raw)]
        found += [problem(f"callbacks.{index}", text) for index, text in _conflicts(raw)]
    if unknown := _unknown_trackers(raw.get("trackers")):
        found.append(problem("trackers", *unknown))
    found += [problem(*said) for said in _mixed_media(raw, at)]
    found += [problem(*said) for said in _of_one_name(raw)]
    if _lacks_base(raw):
        hint = "use adapter: full, or a pretrained model"
        found.append(problem("adapter", "is saved beside its base, and a fresh model has none", hint))
    if isinstance(raw.get("data"), dict) and raw["data"].get("streaming") is True and epochs is not None:
        found.append(problem("epochs", "a stream has no known length", "give 'steps'"))
    return found


def _mixed_media(raw: dict[str, Any], at: str) -> list[tuple[str, str, str]]:
    """Return (field, message, hint) of every part that is for text where the objective is for arrays, or the reverse.

    Parts without a right name are passed over: they have been complained about.
    """
    media = {}
    fields = (("objective", "sft"), ("model", "base"), ("data", None), ("eval_data", None), ("general_data", None))
    for field, default in fields:
        spec, kind = raw.get(field, default), field.rpartition("_")[2]
        later = kind == "model" and at and spec == "base"  # what an earlier stage will have made
        if spec is not None and not later and (record := opt.record_of(kind, spec)):
            media[field] = record.medium
    wanted = media.pop("objective", None)
    hint = "for arrays: model: {name: denoiser}, data: points, digits, tones or images"
    found = [
        (name, f"is for {MEDIA[medium]}, but the objective learns {MEDIA[wanted]}", hint)
        for name, medium in media.items() if wanted is not None and medium != wanted and name != "general_data"
    ]  # fmt: skip
    if "arrays" in (wanted, media.get("general_data")) and raw.get("general_data") is not None:
        found.append(("general_data", "is text, whose loss a language model has; arrays show nothing of it", "drop it"))
    return found


def _unevaluated(raw: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (field, message, hint) where weights are chosen by evaluations that are not made."""
    if raw.get("final") != "best" or raw.get("eval_every") is not None:
        return []
    return [("final", "'best' needs evaluations during the run", "set eval_every")]


def _of_one_name(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (field, message) of every metric or distance whose figure another one of its name would overwrite."""
    found, seen = [], set[str]()
    for kind in ("metric", "distance"):
        specs = raw.get(f"{kind}s")
        for index, spec in enumerate(specs if isinstance(specs, list) else []):
            if (record := opt.record_of(kind, spec)) is None:
                continue
            if record.name in seen:
                said = f"there is a {kind} '{record.name}' already, and figures are known by their names"
                found.append((f"{kind}s.{index}", said))
            seen.add(record.name)
    return found


def _conflicts(raw: dict[str, Any]) -> list[tuple[int, str]]:
    """Return what callbacks cannot work with in a recipe, each with the callback's index; wrong callbacks have none."""
    callbacks = raw.get("callbacks")
    found: list[tuple[int, str]] = []
    before: list[str] = []  # callbacks that change the weights in the end, so far
    for index, spec in enumerate(callbacks if isinstance(callbacks, list) else []):
        if opt.check_part("callback", spec, "", opt.Places()):
            continue
        found += [(index, text) for text in opt.build_part("callback", spec).conflicts(raw)]
        name, options = opt.split_spec("callback", spec)
        changes = name in LAST or (name == "intruders" and options.get("shrink") is not None)
        found += [(index, text) for text in (_undone(name, before) if changes else [])]
        before += [name] * changes
        if name in MIXING and (exchange := _exchange(raw)):
            found.append((index, f"'{name}' would mix {exchange}"))
    return found


def _undone(name: str, before: list[str]) -> list[str]:
    """Return what a callback that changes the weights in the end would undo of those that do so before it."""
    if name in MIXING and before:
        return [f"'{name}' gives the model a mix of its weights and drops what '{before[-1]}' does: put it first"]
    if "intruders" in before:
        return [f"'intruders' shrinks the factors that '{name}' has copies of: put it last"]
    return []


def _exchange(raw: dict[str, Any]) -> str:
    """Return what a mix of the weights of several steps would be one of, "" where the adapter bears it or is wrong."""
    spec = raw.get("adapter", "full")
    if opt.check_part("adapter", spec, "", opt.Places()):
        return ""
    name, _ = opt.split_spec("adapter", spec)
    option, still = EXCHANGING.get(name, ("", None))
    if not option or getattr(opt.build_part("adapter", spec), option) == still:
        return ""
    setting = f"adapter.{option}: {'null' if still is None else still}"
    return f"values of different entries, which adapter '{name}' exchanges during a run: take it away, or set {setting}"


def _lacks_base(raw: dict[str, Any]) -> bool:
    """Return whether an adapter would be saved that nothing could load; parts that are wrong do not count."""
    model, adapter = raw.get("model", "base"), raw.get("adapter", "full")
    if opt.check_part("model", model, "", opt.Places()) or opt.check_part("adapter", adapter, "", opt.Places()):
        return False
    return opt.part_class("model", model).from_nothing and not opt.part_class("adapter", adapter).saves_base


def _unknown_trackers(names: Any) -> tuple[str, str] | None:
    """Return the message and hint for the first name that is no tracker of Accelerate's, or None."""
    if not isinstance(names, list) or not names:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    wrong = next((name for name in names if name not in known), None)
    if wrong is None:
        return None
    return f"there is no tracker called '{wrong}'", nearest(str(wrong), known) or f"known: {', '.join(known)}"
