"""From a path or a configuration to a Hugging Face causal model, with errors that say what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hone.adapters.base import CONFIG_FILE, Adapter, load_adapter, read_config
from hone.errors import ModelError, nearest
from hone.text.tokenizer import load_tokenizer

# What transformers only warns of. Tensors left over are not among them: many published models bring some.
LOADING_FAULTS = {"missing_keys": "missing", "mismatched_keys": "of another shape"}


def shipped_base() -> Path:
    """Return the folder of the small pretrained model that ships with the package."""
    return Path(__file__).parent.parent / "base"


def find_model(path: str | Path) -> str:
    """Return the folder or Hub name that a path means.

    Args:
        path: "base" for the shipped model, a folder in Hugging Face or PEFT format, or a Hub name "owner/name".

    Raises:
        ModelError: there is no such folder, or it holds no model; the message gives the nearest folders.
    """
    folder = shipped_base() if str(path) == "base" else Path(path).expanduser()
    if (folder / "config.json").is_file() or (folder / CONFIG_FILE).is_file():
        return str(folder)
    if folder.is_dir():
        inside = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
        inside = ["model"] if (folder / "recipe.yaml").is_file() and (folder / "model").is_dir() else inside
        hint = f"; it has models in: {', '.join(inside[:5])}" if inside else ""
        raise ModelError(f"'{path}' holds no model: it has neither config.json nor {CONFIG_FILE}{hint}")
    is_hub_name = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if is_hub_name and not folder.parent.is_dir():
        return str(path)
    around = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, around) or (f"folders there: {', '.join(sorted(around)[:5])}" if around else "")
    expected = "expected 'base', a folder in Hugging Face or PEFT format, or a Hub name 'owner/name'"
    raise ModelError(f"there is no model folder '{path}'; {expected}" + (f" ({hint})" if hint else ""))


def read_pretrained(
    path: str | Path, dtype: torch.dtype, *, merge: bool = True
) -> tuple[PreTrainedModel, Any, Adapter | None]:
    """Return a model, its tokenizer, and its adapter where it stays on its base: others are merged into it.

    Args:
        path: as for `find_model`.
        dtype: of the weights.
        merge: False leaves every adapter on its base, whose frozen weights are read as `stored_dtype` says.

    Raises:
        ModelError: something is missing, is not a causal language model, or does not fit.
    """
    source = find_model(path)
    if not (Path(source) / CONFIG_FILE).is_file():
        return _read_model(source, dtype), load_tokenizer(source), None
    base = read_config(Path(source)).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"'{path}' is an adapter whose {CONFIG_FILE} does not name its base_model_name_or_path")
    try:
        base = find_model(base)
    except ModelError as error:
        if not (moved := _moved(Path(source), Path(base))):
            raise ModelError(f"'{path}' is an adapter, and its base is missing: {error}") from error
        base = moved
    model = _read_model(base, dtype if merge else stored_dtype(base, dtype))
    adapter = load_adapter(model, Path(source))
    merge = merge and not adapter.unmergeable
    if merge:
        adapter.strip(model)
        for parameter in model.parameters():  # stripping froze them; a loaded model trains unless something says not to
            parameter.requires_grad_(parameter.is_floating_point())
    has_tokenizer = (Path(source) / "tokenizer_config.json").is_file()
    return model, load_tokenizer(source if has_tokenizer else base), None if merge else adapter


def stored_dtype(path: str | Path, dtype: torch.dtype) -> torch.dtype:
    """Return bfloat16 where a model is stored in two bytes a weight, else the type that was asked for.

    Args:
        path: as for `find_model`. An adapter's base is read as asked for: merging would round it.
        dtype: what a model in float32, or one that does not say, is read as.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    source = find_model(path)
    if (Path(source) / CONFIG_FILE).is_file():
        return dtype
    try:
        stored = AutoConfig.from_pretrained(source, trust_remote_code=False).dtype
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"the configuration of '{source}' cannot be read: {error}") from error
    return torch.bfloat16 if stored in (torch.bfloat16, torch.float16) else dtype


def _moved(adapter: Path, base: Path) -> str:
    """Return where the base of an adapter lies when a run of several stages has been moved, "" when not in that run.

    Args:
        adapter: the adapter's folder.
        base: what it names: the model of an earlier stage; one of adapters is kept beside them.
    """
    inside = Path(*base.parts[-2:])  # stage-1/model
    places = [adapter / "base", *(folder / inside for folder in adapter.absolute().parents[:2] if base.name == "model")]
    return next((str(place) for place in places if (place / "config.json").is_file()), "")


def _read_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """Read weights from safetensors only, never running code that comes with them, and refuse to invent any."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(f"'{source}' is a {config.model_type} model; expected a causal language model, e.g. llama")
        model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"'{source}' cannot be loaded as a causal language model from safetensors: {error}") from error
    wrong = [f"{what}: {_few(report[key])}" for key, what in LOADING_FAULTS.items() if report[key]]
    if wrong:
        raise ModelError(f"the weights in '{source}' are not those of a {type(model).__name__}; {'; '.join(wrong)}")
    return model


def _few(keys: Any) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def build_fresh(config: Mapping[str, Any], tokenizer: Any) -> PreTrainedModel:
    """Build a model with random weights.

    Args:
        config: configuration in the words of transformers, with `model_type`; what it leaves out of the vocabulary's
            size and the special tokens' ids follows from the tokenizer.
        tokenizer: the model's tokenizer.

    Raises:
        ModelError: the model type or a key of the configuration is unknown, or a value does not fit.
    """
    options = dict(config)
    kind = options.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        hint = nearest(str(kind), CONFIG_MAPPING.keys()) or "for example llama"
        raise ModelError(f"model_type: expected a model type of transformers, got {kind!r} ({hint})")
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model_type: expected a causal language model, e.g. llama; '{kind}' is not one")
    default = CONFIG_MAPPING[kind]()
    known = {*default.to_dict(), *vars(default), *default.attribute_map}
    for key in options:
        if key not in known:
            raise ModelError(
                f"{kind} has no configuration key '{key}' ({nearest(key, known) or 'see its documentation'})"
            )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    options = {"vocab_size": len(tokenizer), **special, **options}
    if options["vocab_size"] < len(tokenizer):
        raise ModelError(f"vocab_size: {options['vocab_size']} is less than the tokenizer's {len(tokenizer)} tokens")
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{kind}: no model can be built from this configuration: {error}") from error
