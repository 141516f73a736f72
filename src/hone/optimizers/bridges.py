"""Optimizers of other libraries by their own names: "torch:radam", "pytorch_optimizer:muon".

The names and the options are read from the library itself, so nothing is listed by hand but what cannot work here, each
with its reason. The loop calls `step()` after one backward pass, between which evaluation reads the weights, and a
checkpoint holds tensors and plain values.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn

from hone.errors import HoneError, MissingPackage, nearest
from hone.optimizers.base import Groups, Optimizer, Params
from hone.parts import part

# Muon and its kin orthogonalise the hidden matrices alone; embeddings and the head go to the AdamW inside them.
_EDGES = re.compile(r"embed|\bwte\b|\bwpe\b|\blm_head\b|^extras\.")


@dataclass(kw_only=True)
class Bridge(Optimizer):
    """An optimizer class of another library.

    Args:
        method: name of the class, in any case.
        options: arguments of its constructor besides the parameters and `lr`; their defaults are the library's.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    library: ClassVar[str]
    refused: ClassVar[dict[str, str]]

    @classmethod
    @abstractmethod
    def classes(cls) -> dict[str, type[torch.optim.Optimizer]]:
        """Return the optimizer classes of the library by lower-case name.

        Raises:
            MissingPackage: the library is not installed.
        """

    @classmethod
    def methods(cls) -> list[str]:
        """Return the lower-case names that can be trained with."""
        return [name for name, found in cls.classes().items() if not cls.refusal(name, found)]

    @classmethod
    def refusal(cls, method: str, found: type[torch.optim.Optimizer]) -> str:
        """Return why a class cannot be trained with here, or "" when it can.

        Args:
            method: its lower-case name.
            found: the class.
        """
        if method in cls.refused:
            return cls.refused[method]
        if next(iter(inspect.signature(found).parameters)) != "params":
            return "it wraps the model or another optimizer instead of taking parameters"
        if "hessian" in inspect.signature(found.step).parameters:
            return "it differentiates the gradient, and the loop keeps no graph of it"
        if hasattr(found, "eval"):
            return "it keeps two sets of weights, to be switched around every evaluation, which the loop does not do"
        return ""

    @classmethod
    def problems(cls, method: str, options: dict[str, Any]) -> list[tuple[str, str]]:
        """Return (option, message) for what is wrong; the option is "" where the method itself is.

        Args:
            method: the name after the colon.
            options: constructor arguments by name.
        """
        try:
            classes = cls.classes()
        except MissingPackage as error:
            return [("", str(error))]
        found = classes.get(method.lower())
        if found is None:
            hint = nearest(method.lower(), cls.methods()) or f"known: {', '.join(cls.methods())}"
            return [("", f"there is no optimizer '{method}' in {cls.library} ({hint})")]
        if reason := cls.refusal(method.lower(), found):
            return [("", f"'{cls.library}:{method}' cannot be used: {reason}")]
        return _misnamed(found, options) or _misfit(cls, method, options)

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        """Return the library's optimizer.

        Raises:
            HoneError: the method is unknown or refused, or refuses an option or a parameter.
        """
        found = self.classes().get(self.method.lower())
        if found is None or self.refusal(self.method.lower(), found):
            raise HoneError("; ".join(text for _, text in self.problems(self.method, self.options)))
        if wrong := _misnamed(found, self.options):
            raise HoneError("; ".join(f"optimizer option '{name}': {text}" for name, text in wrong))
        known = arguments(found)
        for group in groups if "weight_decay" not in known else []:
            group.pop("weight_decay", None)
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()}  # YAML has no tuples
        try:
            optimizer = cast("Any", found)(groups, lr=self.lr, **given)
        except (ValueError, TypeError, NotImplementedError) as error:
            shapes = sorted({p.ndim for group in groups for p in group["params"]})
            raise HoneError(
                f"optimizer '{self.library}:{self.method}' refused its options or the parameters (which have {shapes} "
                f"dimensions): {error}"
            ) from error
        optimizer.register_step_post_hook(_lay_out)
        return optimizer


def arguments(found: type[torch.optim.Optimizer]) -> dict[str, inspect.Parameter]:
    """Return the constructor arguments of an optimizer class that a recipe may give.

    Args:
        found: the class.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    everything = inspect.signature(found).parameters
    return {name: p for name, p in everything.items() if p.kind in named and name not in ("params", "lr")}


def _misnamed(found: type[torch.optim.Optimizer], options: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the options that the class has not, and those that it must be given."""
    known = arguments(found)
    wrong = [
        (name, f"unknown option of {found.__name__} ({nearest(name, known) or 'options: ' + ', '.join(known)})")
        for name in options
        if name not in known
    ]
    lacking = [n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in options]
    return wrong + [(name, f"is required by {found.__name__} and was not given") for name in lacking]


def _misfit(cls: type[Bridge], method: str, options: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the class itself says against the values, tried on one small matrix."""
    try:
        cls(method=method, options=options, lr=1e-3).build([("weight", nn.Parameter(torch.zeros(2, 2)))])
    except HoneError as error:
        return [("", str(error.__cause__ or error))]
    return []


def _lay_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Make state tensors contiguous, as a checkpoint gives them back: products in another layout round differently."""
    for key, value in optimizer.state.items():
        optimizer.state[key] = _contiguous(value)


def _contiguous(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.contiguous()
    if isinstance(value, dict):
        return {key: _contiguous(item) for key, item in value.items()}
    return [_contiguous(item) for item in value] if isinstance(value, list) else value


@part(
    "optimizer",
    "torch:",
    papers="original",
    deviations="Vectors (longer than 1 in at most one dimension) do not decay unless decay_all is set.",
)
@dataclass(kw_only=True)
class TorchOptimizer(Bridge):
    """Any optimizer class of torch.optim by name, e.g. torch:radam; its constructor's arguments are the options."""

    library: ClassVar[str] = "torch"
    refused: ClassVar[dict[str, str]] = {
        "lbfgs": "it evaluates the loss several times per step, and the loop gives it one gradient",
        "sparseadam": "it takes sparse gradients, and the parameters of a language model have dense ones",
    }

    @classmethod
    def classes(cls) -> dict[str, type[torch.optim.Optimizer]]:
        """Return the subclasses of Optimizer that torch.optim has, by lower-case name."""
        base = torch.optim.Optimizer
        every = vars(torch.optim).values()
        return {
            found.__name__.lower(): found
            for found in sorted((c for c in every if isinstance(c, type)), key=lambda c: c.__name__)
            if issubclass(found, base) and found is not base
        }


@part(
    "optimizer",
    "pytorch_optimizer:",
    papers="original",
    deviations="Vectors (longer than 1 in at most one dimension) do not decay unless decay_all is set. Methods that "
    "treat hidden matrices apart (muon, adamuon, adago, normuon) get as the rest what is no matrix, embeddings and the "
    "head.",
)
@dataclass(kw_only=True)
class PytorchOptimizer(Bridge):
    """Any optimizer of the package pytorch_optimizer by name, e.g. pytorch_optimizer:adabelief."""

    library: ClassVar[str] = "pytorch_optimizer"
    splits: ClassVar[frozenset[str]] = frozenset({"adago", "adamuon", "muon", "normuon"})
    refused: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("alig", "bsam", "lbfgs"), "it evaluates the loss in its step, and the loop does not pass it"),
        **dict.fromkeys(("demo", "distributedmuon"), "it replaces the loop's own communication between processes"),
        **dict.fromkeys(
            ("adashift", "conda", "kron", "rose", "scalableshampoo"),
            "its state holds objects that are neither tensors nor plain values, so no checkpoint can hold it",
        ),
        **dict.fromkeys(
            ("apollo", "fira", "galore"),
            "its projection needs a rank per tensor, without which it is plain AdamW, and no checkpoint can hold it",
        ),
        "adafactor": "it ignores lr and the schedule unless told otherwise; use the part 'adafactor'",
        "lorarite": "it moves only the factors of a product, which it cannot tell from other tensors",
        "muonclip": "it reads the largest attention logits, which the loop does not pass",
        "ranger": "its first steps climb the loss: it adds the gradient while its rectification is not yet defined",
        "sara": "it moves nothing without settings per tensor",
    }

    @classmethod
    def classes(cls) -> dict[str, type[torch.optim.Optimizer]]:
        """Return the optimizers of the package's registry by name.

        Raises:
            MissingPackage: pytorch_optimizer is not installed.
        """
        if importlib.util.find_spec("pytorch_optimizer") is None:
            raise MissingPackage("pytorch_optimizer", "an optimizer 'pytorch_optimizer:'", extra="peers")
        from pytorch_optimizer import get_supported_optimizers, load_optimizer

        return {name: load_optimizer(name) for name in get_supported_optimizers()}

    def groups(self, params: Params) -> Groups:
        """Divide parameters by weight decay and, for Muon and its kin, hidden matrices from the rest.

        Args:
            params: the named parameters that train.
        """
        if self.method.lower() not in self.splits:
            return super().groups(params)
        hidden = [(name, p) for name, p in params if p.ndim == 2 and not _EDGES.search(name)]
        inside = {id(p) for _, p in hidden}
        rest = [(name, p) for name, p in params if id(p) not in inside]
        matrices, others = super().groups(hidden), super().groups(rest)
        return [{**group, "use_muon": True} for group in matrices] + [{**group, "use_muon": False} for group in others]
