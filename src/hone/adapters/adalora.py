"""AdaLoRA: updates in the form of a singular value decomposition, whose least important values are taken away."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hone.adapters import saving
from hone.adapters.host import Host, adapted_layers
from hone.adapters.layers import Factors, Layout, Transposed, check_rank, matrix_shape
from hone.adapters.lora import LowRank
from hone.adapters.quantize import Quantized
from hone.adapters.tree import refuse_missing
from hone.callbacks.base import Callback
from hone.engine import sharding
from hone.errors import HoneError
from hone.parts import part
from hone.penalties.base import Penalty

if TYPE_CHECKING:
    from hone.engine.loop import Run

_SOFT = 1e-5  # PEFT adds it to the rank that it divides by, and the files have to mean the same
_KINDS = (nn.Linear, nn.Conv2d, Quantized)  # and Conv1D: those that PEFT has an AdaLoRA for


class Triplets(LowRank):
    """W x + s P diag(E) Q x, with P (out, rank) as `lora_B`, Q (rank, in) as `lora_A` and E (rank, 1) as `lora_E`.

    Args:
        base: the layer that the factors go around.
        layout: how the layer stores its weight.
        rows: triplets that this layer has.
        start_rank: what the scale divides alpha by; it stays when triplets are dropped.
        target: mean number of triplets that the layers of a model shall end with.
        alpha: numerator of the scale.
        dropout: probability of dropping an input of Q in training.
    """

    kept: Tensor  # (rank,) which triplets the last allocation has left; beside the weights, so that it goes with them

    def __init__(
        self, base: nn.Module, layout: Layout, *, rows: int, start_rank: int, target: int, alpha: float, dropout: float
    ) -> None:
        """Draw P and Q with a deviation of 0.02, as the authors do, and set E to zero."""
        super().__init__(base, layout, rank=1, alpha=alpha, stabilized=False, dropout=dropout)
        self.start_rank, self.target = start_rank, target
        self.scale = alpha / (start_rank + _SOFT)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(1, 1))
        self.hold(rows)
        with torch.no_grad():
            self.lora_A.copy_(torch.randn(self.lora_A.shape) * 0.02)
            self.lora_B.copy_(torch.randn(self.lora_B.shape) * 0.02)

    def hold(self, rows: int) -> None:
        """Make room for a number of triplets, which are zero; matrices are flat, as in PEFT's files."""
        weight = cast(Tensor, self.base_layer.weight)  # asked for here alone: few bits are dequantised for it
        outputs, inputs = self.layout.matrix(weight).shape
        self.rank, self.shapes = rows, self.layout.shapes(weight, rows)
        self.lora_A = nn.Parameter(self.lora_A.new_zeros(rows, inputs))
        self.lora_B = nn.Parameter(self.lora_B.new_zeros(outputs, rows))
        self.lora_E = nn.Parameter(self.lora_E.new_zeros(rows, 1))
        self.register_buffer("kept", torch.ones(rows, dtype=torch.bool, device=self.lora_E.device))

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Drop triplets for good, with their memory.

        Args:
            kept: (rank,) whether each one stays.
        """
        down, up, values = self.lora_A[kept], self.lora_B[:, kept], self.lora_E[kept]
        self.hold(len(values))
        self.lora_A.copy_(down)
        self.lora_B.copy_(up)
        self.lora_E.copy_(values)

    def resize(self, saved: dict[str, Tensor]) -> None:
        """Make room for as many triplets as were saved.

        Args:
            saved: the layer's tensors by key suffix.
        """
        self.hold(len(saved["lora_E"]))

    def delta(self) -> Tensor:
        """Return s P diag(E) Q, (out, in)."""
        return self.lora_B @ (self.lora_A * self.lora_E) * self.scale

    def add(self, out: Tensor, rows: Tensor) -> Tensor:
        """Add s P diag(E) Q x to an output in place."""
        if not self.rank:
            return out
        down, up = self.shapes
        scaled = (self.lora_A * self.lora_E).view(down)
        inner = self.layout.project(self.base_layer, rows, scaled.to(out.dtype))
        return self.layout.add(out, inner, self.lora_B.view(up).to(out.dtype), self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """Return the three factors under PEFT's names."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_E": self.lora_E}

    def factors(self) -> Factors | None:
        """Return None: the file is PEFT's for AdaLoRA, which keeps the factors apart so that they can train on."""
        return None


def budget_at(step: int, total: int, start: int, target: int, first: int, last: int) -> int:
    """Return how many triplets all layers may have together.

    b(t) = start                                                        up to t_i
         = target + (start - target) (1 - (t - t_i) / (T - t_f - t_i))^3   up to T - t_f
         = target                                                       from there on

    Args:
        step: t, finished steps.
        total: T, steps of the whole run.
        start: triplets at the start.
        target: triplets at the end.
        first: t_i, steps before any is taken away.
        last: t_f, steps at the end, during which none is.
    """
    if step >= total - last:
        return target
    if step <= first:
        return start
    left = 1 - (step - first) / (total - last - first)
    return int((start - target) * left**3 + target)


class Allocation(Callback):
    """Scores every triplet from gradients, and sets to zero the values of those that the budget has no room for.

    I_t = |w dL/dw|;  mean: I~ = b1 I~ + (1 - b1) I_t;  spread: U = b2 U + (1 - b2) |I_t - I~|;  s(w) = I~ U
    score of a triplet = s(E_i) + mean of s over its row of Q + mean of s over its column of P

    A value that was set to zero trains on, so that it can come back until the budget is final.
    """

    def __init__(self, options: AdaLoRA) -> None:
        """Begin without scores.

        Args:
            options: the adapter.
        """
        self.options = options
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    def on_start(self, run: Run) -> None:
        """Begin the running means at zero, or put resumed ones where the weights are."""
        for name, weight in self._weights(run):
            for running in (self.mean, self.spread):
                begun = torch.zeros_like(weight, requires_grad=False)
                if name in running:
                    sharding.copy_into(begun, running[name])
                running[name] = begun

    def on_gradients(self, run: Run) -> None:
        """Follow the sensitivity of every weight until the budget is final."""
        if run.step + 1 >= run.total - self._spans(run)[1]:
            return
        keep_mean, keep_spread = self.options.mean_decay, self.options.spread_decay
        for name, weight in self._weights(run):
            if weight.grad is None:
                continue
            now = (weight.detach() * weight.grad).abs()
            self.mean[name].lerp_(now, 1 - keep_mean)
            self.spread[name].lerp_((now - self.mean[name]).abs_(), 1 - keep_spread)

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Take values away when it is time to."""
        first, last = self._spans(run)
        step, final = run.step, run.total - last
        layers = triplet_layers(run.model)
        if step == final or (first < step < final and step % self.options.interval == 0):
            start, target = sum(layer.rank for layer in layers.values()), self.options.rank * len(layers)
            self.allocate(layers, budget_at(step, run.total, start, min(start, target), first, last))
            self._apply(layers)
        elif step > final:
            self._apply(layers)
        row["rank"] = sum(int(layer.kept.sum()) for layer in layers.values()) / len(layers)
        if step == final:
            self.mean.clear()
            self.spread.clear()

    def on_end(self, run: Run) -> None:
        """Drop the triplets that the last allocation before these weights, which may be the best ones, has left out."""
        layers = triplet_layers(run.model)
        self._apply(layers)
        for layer in layers.values():
            if not isinstance(layer.lora_E, DTensor) and not layer.kept.all():
                layer.keep(layer.kept)

    @torch.no_grad()
    def allocate(self, layers: dict[str, Triplets], budget: int) -> None:
        """Choose the triplets with the highest scores.

        Args:
            layers: the adapted layers by name.
            budget: how many triplets stay; fewer do where scores are equal.
        """
        scores = {name: self.scores(name) for name in layers}
        every = torch.cat(list(scores.values()))
        out = len(every) - budget
        bar = every.kthvalue(out).values if out > 0 else every.new_tensor(-math.inf)
        for name, score in scores.items():
            layers[name].kept.copy_(score > bar)

    def scores(self, name: str) -> Tensor:
        """Return the score of every triplet of a layer, (rank,).

        Args:
            name: dotted name of the layer.
        """
        left, values, right = (
            _whole(self.mean[f"{name}.{key}"]) * _whole(self.spread[f"{name}.{key}"])
            for key in ("lora_B", "lora_E", "lora_A")
        )
        return values.view(-1) + (right.mean(1) + left.mean(0))

    @torch.no_grad()
    def _apply(self, layers: dict[str, Triplets]) -> None:
        """Set the values to zero that were left out."""
        for layer in layers.values():
            sharding.copy_into(layer.lora_E.data, _whole(layer.lora_E).masked_fill(~layer.kept[:, None], 0.0))

    def _spans(self, run: Run) -> tuple[int, int]:
        """Return t_i and t_f in steps."""
        return round(self.options.warmup * run.total), round(self.options.settle * run.total)

    def _weights(self, run: Run) -> list[tuple[str, nn.Parameter]]:
        layers = triplet_layers(run.model)
        found = [(f"{name}.{key}", t) for name, layer in layers.items() for key, t in layer.tensors().items()]
        return cast(list[tuple[str, nn.Parameter]], found)

    def state_dict(self) -> dict[str, Any]:
        """Return the running means; which triplets are left stands beside the weights."""
        return {"mean": dict(self.mean), "spread": dict(self.spread)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it; its running means are copied when the run starts.
        """
        self.mean, self.spread = dict(state["mean"]), dict(state["spread"])


@dataclass(kw_only=True)
class Orthogonality(Penalty):
    """Draws P and Q towards orthonormal columns and rows, so that the values between them can be told apart.

    strength * mean over all P and Q of |P^T P - I|_F and |Q Q^T - I|_F

    Args:
        strength: factor on the mean.
    """

    name = "orthogonality"
    strength: float

    def of_weights(self, model: Any) -> Tensor | None:
        """Return the term.

        Args:
            model: the model that trains.
        """
        layers = [layer for layer in triplet_layers(model).values() if layer.rank]
        terms = [_distance(layer.lora_A @ layer.lora_A.T) for layer in layers]
        terms += [_distance(layer.lora_B.T @ layer.lora_B) for layer in layers]
        return self.strength * torch.stack(terms).mean() if terms else None


@part(
    "adapter",
    "adalora",
    papers=[("AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "arXiv:2303.10512")],
    claim="A budget of ranks that goes to the layers where it matters most is better than the same rank everywhere, "
    "above all when the budget is small.",
    deviations="t_i and t_f are shares of the run. The sensitivity takes the weight and the gradient of the same "
    "moment, before clipping; PEFT's takes the weight after the step. The default scale is 2, as LoRA's here.",
)
@dataclass(kw_only=True)
class AdaLoRA(Host):
    """Train P diag(E) Q beside each frozen weight, and give the model's budget of ranks to the most important values.

    W' = W + s P diag(E) Q, s = alpha / start_rank;  loss + orthogonality * mean(|P^T P - I|_F, |Q Q^T - I|_F)

    All layers start with `start_rank` triplets of a value and its two vectors. Between `warmup` and `settle` the budget
    falls with the cube of the steps that are left, and the values with the lowest scores are set to zero: see
    `Allocation`. In the end they are dropped. Saved in PEFT's format of AdaLoRA.

    Args:
        rank: mean rank of the layers in the end.
        start_rank: rank of every layer at the start; None means 1.5 times `rank`, or what the layer can have.
        alpha: numerator of the scale; None means 2 start_rank.
        dropout: probability of dropping an input of Q in training.
        warmup: share of the run before the budget falls.
        settle: share of the run, at its end, in which the ranks stay as they are.
        interval: steps from one allocation to the next.
        mean_decay: b1, the share of the running mean of the sensitivity that stays each step.
        spread_decay: b2, the same for the running mean of its spread.
        orthogonality: strength of the penalty that keeps P and Q near orthonormal.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    start_rank: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    settle: Annotated[float, Field(ge=0, lt=1)] = 0.3
    interval: Annotated[int, Field(ge=1)] = 1
    mean_decay: Annotated[float, Field(gt=0, lt=1)] = 0.85
    spread_decay: Annotated[float, Field(gt=0, lt=1)] = 0.85
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    saved_ranks: dict[str, int] = field(init=False, default_factory=dict, repr=False)

    peft_type: ClassVar[str] = "ADALORA"

    def chosen(self, model: nn.Module) -> list[str]:
        """Return the names of the layers to adapt.

        Args:
            model: a plain network.

        Raises:
            HoneError: the options contradict each other.
        """
        if self.warmup + self.settle >= 1:
            raise HoneError(
                f"adapter.warmup and adapter.settle: {self.warmup:g} and {self.settle:g} of the run leave no steps in "
                "which ranks move; their sum must be below 1"
            )
        if self.start_rank is not None and self.start_rank < self.rank:
            raise HoneError(
                f"adapter.start_rank: {self.start_rank} is below adapter.rank, {self.rank}, to which ranks shall fall"
            )
        return super().chosen(model)

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Triplets:
        """Return the layer with its triplets drawn.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: it is of a kind that has no AdaLoRA, or the rank is more than the matrix can have.
        """
        if not (isinstance(base, _KINDS) or type(layout) is Transposed):
            raise HoneError(
                f"adapter.targets: '{name}' is a {type(base).__name__}; adalora goes around Linear, Conv1D and Conv2d "
                "layers, exclude it"
            )
        start = self.start_rank or math.ceil(1.5 * self.rank)
        shape = matrix_shape(base)
        if not self.saved_ranks:
            check_rank(name, shape, self.rank)
            check_rank(name, shape, self.start_rank or 0, "adapter.start_rank")
        return Triplets(
            base, layout, rows=self.saved_ranks.get(name, min(start, *shape)), start_rank=start, target=self.rank,
            alpha=2.0 * start if self.alpha is None else self.alpha, dropout=self.dropout,
        )  # fmt: skip

    def callbacks(self) -> list[Callback]:
        """Return what moves the ranks."""
        return [Allocation(self)]

    def penalties(self) -> list[Penalty]:
        """Return what keeps the vectors near orthonormal."""
        return [Orthogonality(strength=self.orthogonality)] if self.orthogonality else []

    def config(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Return what PEFT's AdaLoraConfig needs; ranks that fell are in its pattern, so its schedule is over.

        Args:
            layers: the adapted layers by name.
        """
        first: Triplets = next(iter(layers.values()))
        ranks = {name: layer.rank for name, layer in layers.items()}
        start = first.start_rank
        pattern = {f"{name}.lora_E": [i < rank for i in range(start)] for name, rank in ranks.items()}
        return {
            "init_r": start, "target_r": first.target, "lora_alpha": first.alpha, "lora_dropout": first.dropout,
            "tinit": 0, "tfinal": 0, "deltaT": self.interval, "beta1": self.mean_decay, "beta2": self.spread_decay,
            "orth_reg_weight": self.orthogonality, "total_step": 1, "init_lora_weights": True,
            "rank_pattern": pattern if any(rank < start for rank in ranks.values()) else None,
            "fan_in_fan_out": any(type(layer.layout) is Transposed for layer in layers.values()),
        }  # fmt: skip

    def rebuild(self, model: nn.Module, config: dict[str, Any], note: dict[str, Any], saved: dict[str, Tensor]) -> None:
        """Attach to a plain model the layers that the saved keys name, each with as many triplets as it has there.

        Args:
            model: a plain network.
            config: what adapter_config.json says.
            note: what hone.json says.
            saved: the saved tensors by key.

        Raises:
            HoneError: the model lacks such a layer.
        """
        ranks = {k.removesuffix(".lora_E"): len(tensor) for k, tensor in saved.items() if k.endswith(".lora_E")}
        modules = dict(model.named_modules())
        refuse_missing(ranks, modules)
        maker = AdaLoRA(
            rank=config["target_r"], start_rank=config["init_r"], alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0), **saving.beside_layers(config, note, modules),
        )  # fmt: skip
        maker.saved_ranks = ranks
        maker.install(model, [name for name in modules if name in ranks])

    def verify(self, layers: dict[str, Any], config: dict[str, Any], note: dict[str, Any]) -> None:
        """Check that the scale of every layer is the one that the factors were trained with.

        Args:
            layers: adapted layers by name.
            config: what adapter_config.json says.
            note: what hone.json says.

        Raises:
            HoneError: a scale differs.
        """
        scale = config["lora_alpha"] / (config["init_r"] + _SOFT)
        for name, layer in layers.items():
            if not math.isclose(scale, layer.scale):
                raise HoneError(
                    f"the adapter was trained with scale {scale:g} in '{name}', this one has {layer.scale:g}; set "
                    "adapter.alpha and adapter.start_rank as they were"
                )


def triplet_layers(model: nn.Module) -> dict[str, Triplets]:
    """Return the layers of a model that AdaLoRA has adapted, by dotted name."""
    return {name: layer for name, layer in adapted_layers(model).items() if isinstance(layer, Triplets)}


def _distance(product: Tensor) -> Tensor:
    """Return the Frobenius norm of a square matrix less the identity."""
    if isinstance(product, DTensor):  # as small as the rank; of parts of a sum there is no norm
        product = product.full_tensor()
    return torch.linalg.matrix_norm(product - torch.eye(len(product), dtype=product.dtype, device=product.device))


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor that processes share as one, on its device."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found
