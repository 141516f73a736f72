"""The host of every adapter that goes around layers: wrap, merge, unmerge, save, load, enable, disable.

A method is a `Wrapped` layer, which supplies a delta of its weight matrix, and a `Host` part, which makes those layers
and says what to write into adapter_config.json. `delta` alone is enough for a right forward pass, merge and round trip;
`adapted` is overridden where the forward pass can do without the whole matrix. The axes in which methods differ:

    initialisation    `Host.wrap`, which makes a layer; data-driven methods look at the calibration data in `attach`
    delta             `Wrapped.delta`, or `Wrapped.effective` where the change is no sum
    what trains       the parameters of the layer that require a gradient; others are frozen factors
    kind of layer     `Layout`: how a layer stores and applies its weight matrix

While merged, a layer holds both weights: `unmerge` puts the very tensor back that was there, so its bits and its ties
to other layers survive. `strip` drops it.
"""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hone.adapters import base as files
from hone.adapters.base import Adapter, is_glob, select
from hone.adapters.layers import LINEAR, Layout, Whole, Wrapped, layout_of, refusal
from hone.errors import HoneError

PREFIX = "base_model.model."  # PEFT puts it before every key
_RECORD = "_hone_adapter"  # attribute of a model with an adapter


@dataclass
class Attachment:
    """What a model remembers of the adapter on it, beside its adapted layers.

    Args:
        bias: which biases train: "none", "adapted" or "all".
        originals: values before training of the base parameters that train in place.
    """

    bias: str
    originals: dict[str, Tensor]


@dataclass(kw_only=True)
class Host(Adapter):
    """Put layers of a model inside adapted ones.

    A pattern names modules: a name, its last components ("q_proj", "self_attn.q_proj"), or a shell pattern of either
    ("layers.0.*").

    Args:
        targets: patterns of the layers to adapt; "all-linear" is every linear layer but the output head.
        exclude: patterns of modules that are left alone, with all inside them.
        train_also: patterns of modules that train as a whole and are saved with the adapter; not adapted inside.
        bias: biases that train too: none, those of the adapted layers, or all of the model.
    """

    targets: list[str] | Literal["all-linear"] = "all-linear"
    exclude: list[str] = field(default_factory=list)
    train_also: list[str] = field(default_factory=list)
    bias: Literal["none", "adapted", "all"] = "none"

    peft_type: ClassVar[str]

    @abstractmethod
    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Wrapped:
        """Return the adapted layer around a base layer, initialised.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: an option does not fit the layer.
        """

    @abstractmethod
    def config(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Return the method's own entries of adapter_config.json.

        Args:
            layers: the adapted layers by name; a loaded adapter's settings are theirs, not this part's options.
        """

    @abstractmethod
    def rebuild(self, model: nn.Module, config: dict[str, Any], saved: dict[str, Tensor]) -> None:
        """Attach to a plain model as a saved adapter was attached.

        Args:
            model: a plain network.
            config: what adapter_config.json says.
            saved: the saved tensors by key, `PREFIX` taken off.
        """

    @abstractmethod
    def verify(self, layers: dict[str, Any], config: dict[str, Any]) -> None:
        """Check that adapted layers compute what a saved adapter of the same tensors computed.

        Args:
            layers: the adapted layers by name.
            config: what adapter_config.json says.

        Raises:
            HoneError: a setting that no tensor shows, such as a scale, differs.
        """

    def attach(self, model: nn.Module, calibration: Iterable[Any] | None = None) -> None:
        """Freeze a model and put the target layers inside adapted ones.

        Args:
            model: a plain network.
            calibration: batches for methods that look at data.

        Raises:
            HoneError: a pattern matches nothing, a layer cannot be adapted, or there is an adapter already; the model
                is unchanged.
        """
        if attached(model):
            raise HoneError("the model has an adapter already; strip() merges it for good")
        self.install(model, self.chosen(model))

    def chosen(self, model: nn.Module) -> list[str]:
        """Return the names of the layers to adapt, in the order of the model."""
        modules = {name: module for name, module in model.named_modules() if name}
        if self.targets == "all-linear":
            output = cast(Any, getattr(model, "get_output_embeddings", None))
            head = output() if output else None
            found = {n for n, module in modules.items() if isinstance(module, LINEAR) and module is not head}
        else:
            found = {n for pattern in self.targets for n in _adaptable(pattern, modules)}
        left_out = {n for pattern in self.exclude for n in select(pattern, modules, "adapter.exclude")}
        left_out.update(self.whole(model))
        names = [n for n in modules if n in found and not inside(n, left_out)]
        if not names:
            raise HoneError("adapter.targets: no layer is left to adapt; see adapter.exclude and adapter.train_also")
        return names

    def whole(self, model: nn.Module) -> list[str]:
        """Return the names of the modules that train as a whole, outermost ones only."""
        modules = [name for name, _ in model.named_modules() if name]
        found = {n for pattern in self.train_also for n in select(pattern, modules, "adapter.train_also")}
        return [n for n in modules if n in found and not inside(n.rpartition(".")[0], found)]

    def install(self, model: nn.Module, names: list[str]) -> None:
        """Freeze a model and adapt the named layers.

        Args:
            model: a plain network.
            names: dotted names of layers.

        Raises:
            HoneError: a layer cannot be adapted; the model is unchanged.
        """
        modules = dict(model.named_modules())
        for name in names:
            if reason := refusal(modules[name]):
                raise HoneError(f"adapter.targets: '{name}' cannot be adapted: it is {reason}")
        _refuse_shared(model, names)
        new: dict[str, nn.Module] = {}
        for name in names:
            new[name] = self.wrap(name, modules[name], cast(Layout, layout_of(modules[name])))
        new.update({name: Whole(modules[name]) for name in self.whole(model)})
        model.requires_grad_(False)
        for name, module in new.items():
            _replace(model, name, module.train(modules[name].training))
        biases = _biases(model, self.bias, set(names))
        setattr(model, _RECORD, Attachment(self.bias, {n: p.detach().clone() for n, p in biases.items()}))
        for parameter in biases.values():
            parameter.requires_grad_(True)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the live tensors that are saved, by PEFT's key without `PREFIX`."""
        found: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, Wrapped):
                found.update({f"{name}.{suffix}": tensor for suffix, tensor in module.tensors().items()})
            elif isinstance(module, Whole):
                state = module.trained.state_dict(keep_vars=True)
                found.update({f"{name}.{suffix}": tensor for suffix, tensor in state.items()})
        found.update({name: model.get_parameter(name) for name in _record(model).originals})
        return found

    def save(self, model: nn.Module, folder: Path, *, base: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT does.

        Args:
            model: the network this adapter is attached to.
            folder: where; made when it is missing.
            base: path or Hub name of the base model.
        """
        layers, bias = adapted_layers(model), _record(model).bias
        config = {
            "peft_type": self.peft_type, "task_type": files.task_type(model), "base_model_name_or_path": base,
            "inference_mode": True, "target_modules": list(layers),
            "modules_to_save": [n for n, module in model.named_modules() if isinstance(module, Whole)] or None,
            "bias": bias if bias != "adapted" else f"{self.peft_type.lower()}_only", **self.config(layers),
        }  # fmt: skip
        tensors = {PREFIX + key: tensor.detach().contiguous() for key, tensor in self.tensors(model).items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / files.WEIGHTS_FILE, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, model: nn.Module, folder: Path) -> None:
        """Read an adapter that this host or PEFT saved; the model is unmerged afterwards.

        A plain model gets the adapter as it was saved, whatever this part's own options say.

        Args:
            model: a plain network, or one that this adapter is attached to.
            folder: holds adapter_config.json and adapter_model.safetensors.

        Raises:
            HoneError: tensors are missing, left over or of another shape; or the adapter is of another type.
        """
        config = files.read_config(folder)
        if config["peft_type"] != self.peft_type:
            kind = config["peft_type"].lower()
            raise HoneError(f"'{folder}' holds an adapter of type '{kind}', not '{self.name}'; use 'peft:{kind}'")
        saved = {key.removeprefix(PREFIX): tensor for key, tensor in files.read_weights(folder).items()}
        if not attached(model):
            with torch.random.fork_rng(devices=[]):  # reading must not change what a run draws afterwards
                self.rebuild(model, config, saved)
        self.unmerge(model)
        layers = adapted_layers(model)
        self.verify(layers, config)
        live = self.tensors(model)
        # PEFT saves adapted embeddings with their base weight, which it also loads.
        live.update({key: cast(Tensor, layers[name].base_layer.weight)
                     for key in saved if (name := key.removesuffix(".base_layer.weight")) in layers})  # fmt: skip
        files.check_keys(live, saved, folder)
        for key, tensor in live.items():
            tensor.copy_(saved[key])

    def merge(self, model: nn.Module) -> None:
        """Fold every delta into its layer's weight; the base weights are kept aside and take their memory again."""
        for layer in adapted_layers(model).values():
            layer.merge()

    def unmerge(self, model: nn.Module) -> None:
        """Put back the very tensors that were there before `merge`."""
        for layer in adapted_layers(model).values():
            layer.unmerge()

    def strip(self, model: nn.Module) -> None:
        """Merge for good, layer by layer, and leave the plain module tree.

        Weights that were tied and now differ are saved apart: `model.config.tie_word_embeddings` becomes False and a
        warning says so.
        """
        self.unmerge(model)
        ties = _ties(model)
        for name in [name for name, module in model.named_modules() if isinstance(module, Wrapped | Whole)]:
            module = model.get_submodule(name)  # held by nothing else, so that memory grows by one layer at most
            if isinstance(module, Wrapped):
                module.merge()
            _replace(model, name, cast(nn.Module, module.base_layer if isinstance(module, Wrapped) else module.trained))
        delattr(model, _RECORD)
        model.requires_grad_(False)
        _untie(model, ties)

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which every layer, module and bias is the base's own."""
        return _disabled(self, model)


@contextmanager
def _disabled(host: Host, model: nn.Module) -> Iterator[None]:
    parts = [m for m in model.modules() if isinstance(m, Wrapped | Whole) and m.enabled]
    merged = any(isinstance(m, Wrapped) and m.merged for m in parts)
    biases = [(model.get_parameter(name), value) for name, value in _record(model).originals.items()]
    trained = [parameter.data for parameter, _ in biases]
    if merged:
        host.unmerge(model)
    try:
        for part in parts:
            part.enabled = False
        for parameter, value in biases:
            parameter.data = value.to(parameter)
        yield
    finally:
        for part in parts:
            part.enabled = True
        for (parameter, _), data in zip(biases, trained, strict=True):
            parameter.data = data
        if merged:
            host.merge(model)


def attached(model: nn.Module) -> bool:
    """Return whether a model has an adapter, of this host or of PEFT."""
    return hasattr(model, _RECORD) or hasattr(model, "peft_config")


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Wrapped)}


def _adaptable(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    """Return the layers that a target pattern names; a shell pattern passes over what cannot be adapted."""
    found = select(pattern, modules, "adapter.targets")
    reasons = {name: reason for name in found if (reason := refusal(modules[name]))}
    if reasons and (len(reasons) == len(found) or not is_glob(pattern)):
        name, reason = next(iter(reasons.items()))
        raise HoneError(f"adapter.targets: '{pattern}' names '{name}', which cannot be adapted: it is {reason}")
    return [name for name in found if name not in reasons]


def inside(name: str, modules: Collection[str]) -> bool:
    """Return whether a dotted name is one of the modules or inside one."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


def _biases(model: nn.Module, which: str, names: set[str]) -> dict[str, nn.Parameter]:
    """Return the biases of a wrapped model that train in place; those of modules that train as a whole do so there."""
    if which == "none":
        return {}
    apart = {id(p) for module in model.modules() if isinstance(module, Whole) for p in module.parameters()}
    found = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias" and id(p) not in apart}
    if which == "adapted":
        return {n: p for n, p in found.items() if n.removesuffix(".base_layer.bias") in names}
    return found


def _record(model: nn.Module) -> Attachment:
    record = getattr(model, _RECORD, None)
    if not isinstance(record, Attachment):
        raise HoneError("the model has no adapter; attach one or load one first")
    return record


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    shared = next((group for group in places.values() if len(group) > 1 and set(group) & set(names)), None)
    if shared:
        raise HoneError(f"adapter.targets: one layer stands at several places ({', '.join(shared)}); exclude it")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _ties(model: nn.Module) -> list[list[str]]:
    """Return the groups of names under which one base parameter is known, as a plain model spells them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        groups.setdefault(id(parameter), []).append(plain)
    return [group for group in groups.values() if len(group) > 1]


def _untie(model: nn.Module, ties: list[list[str]]) -> None:
    """Tell a model's configuration which ties a merge has dissolved, lest they be restored on loading."""
    now = dict(model.named_parameters(remove_duplicate=False))
    apart = [group for group in ties if len({id(now[name]) for name in group}) > 1]
    if not apart:
        return
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    groups = "; ".join(" and ".join(group) for group in apart)
    warnings.warn(f"merging made tied weights differ, so they are no longer tied: {groups}", stacklevel=3)
