"""LoRA that starts from what is known: the weights (PiSSA, OLoRA) or data (EVA, CorDA)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.calibration import Calibration, general_data, required, watch_inputs
from hone.adapters.layers import LINEAR, Layout, Lookup, layout_of
from hone.adapters.lora import LoRA, LowRank
from hone.adapters.spectrum import SharedInputs, Survey
from hone.parts import part
from hone.precision import wide


@dataclass(kw_only=True)
class FromWeight(LoRA):
    """LoRA whose factors start as a part of each weight, which is taken off the product again."""

    folds: ClassVar[bool] = True

    def split(self, matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A0 (rank, in) and B0 (out, rank).

        Args:
            matrix: a weight, (out, in).
            rank: rows of A0 and columns of B0.
            scale: s of s B A.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say where it starts")

    @torch.no_grad()
    def initialise(self, layer: LowRank) -> None:
        """Set the factors to a part of the weight; those of embeddings start as LoRA's do.

        Args:
            layer: a fresh layer.
        """
        if isinstance(layer.layout, Lookup):
            super().initialise(layer)
            return
        layer.start(*self.split(layer.matrix().to(layer.lora_A.dtype), layer.rank, layer.scale))


@part(
    "adapter",
    "pissa",
    papers=[
        (
            "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
            "arXiv:2404.02948",
        )
    ],
    claim="Starting the factors at the largest singular values of the weight converges faster, and ends better, than "
    "LoRA's start.",
    deviations="The base weight stays what it is and the start's product is taken off the adapter's instead: the same "
    "function and the same gradients, but the base can be had back to the bit. With dropout, A0 too "
    "sees the thinned input, W x + s (B A - B0 A0) drop(x), where the official residual sees all of it, "
    "(W - s B0 A0) x + s B A drop(x). The official scripts train with weight_decay 0. The decomposition is "
    "exact, in float32 or wider.",
)
@dataclass(kw_only=True)
class PiSSA(FromWeight):
    """Train the largest singular values and vectors of each weight; the rest of it is frozen.

    W = U S V^T;  B0 = U_r sqrt(S_r / s), A0 = sqrt(S_r / s) V_r^T;  W' = (W - s B0 A0) + s B A

    Saved as a plain LoRA of twice the rank. In embeddings the factors start as LoRA's do.
    """

    def split(self, matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A0 and B0: the largest singular values and vectors.

        Args:
            matrix: a weight, (out, in).
            rank: rows of A0 and columns of B0.
            scale: s.
        """
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = (values[:rank] / scale).sqrt()
        return root[:, None] * right[:rank], left[:, :rank] * root


@part(
    "adapter",
    "olora",
    papers=[("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", "arXiv:2406.01775")],
    claim="Starting the factors from a QR decomposition of the weight, one of them orthonormal, converges faster, and "
    "ends better, than LoRA's start.",
    deviations="The base weight stays what it is and the start's product is taken off the adapter's instead: the same "
    "function and the same gradients, but the base can be had back to the bit. With dropout, A0 too "
    "sees the thinned input, W x + s (B A - B0 A0) drop(x), where the official residual sees all of it, "
    "(W - s B0 A0) x + s B A drop(x). The official scripts train with weight_decay 0.",
)
@dataclass(kw_only=True)
class OLoRA(FromWeight):
    """Train the first columns of an orthonormal basis of each weight, and their coefficients.

    W = Q R;  B0 = Q_r, the first r columns, A0 = R_r, the first r rows;  W' = (W - s B0 A0) + s B A

    Saved as a plain LoRA of twice the rank. In embeddings the factors start as LoRA's do.
    """

    def split(self, matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A0 and B0: the beginning of a QR decomposition.

        Args:
            matrix: a weight, (out, in).
            rank: rows of A0 and columns of B0.
            scale: s, which leaves the start as it is.
        """
        basis, coefficients = torch.linalg.qr(matrix)
        return coefficients[:rank], basis[:, :rank]


@part(
    "adapter",
    "eva",
    papers=[("One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", "arXiv:2410.07170")],
    claim="Starting A from the principal components of each layer's input, with ranks where they explain most, "
    "converges faster, and ends better, than LoRA's start.",
    deviations="All tokens of a batch are looked at, where the official code leaves out those that are not trained on. "
    "Components of inputs up to 512 wide are exact instead of found by a random sketch, and after `batches` those that "
    "have not converged are taken as they are. The scale stays the same whatever rank a layer gets, as in PEFT. "
    "Embeddings and convolutions start as LoRA's do.",
)
@dataclass(kw_only=True)
class EVA(LoRA):
    """Start A from the directions in which a layer's input varies most; B starts at zero.

    X - mean(X) = U S V^T over some batches;  A0 = V_r^T;  r is given out over all layers by S_i^2 / sum S^2, the
    explained variance ratios, under the budget of `rank` per layer; a layer that gets none is left alone. The scale s
    stays what it is at `rank`.

    Args:
        rho: the most ranks that a layer may get, as a multiple of its `rank`; 1 leaves every layer its own.
        tau: cosine between a component and what it was one batch before, from which on it counts as converged.
        batches: the most batches to look at.
    """

    rho: Annotated[float, Field(ge=1)] = 2.0
    tau: Annotated[float, Field(ge=0, le=1)] = 0.99
    batches: Annotated[int, Field(ge=1)] = 20
    _starts: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Find the principal components of the layers' inputs, and each layer's rank.

        Args:
            model: a plain network.
            names: dotted names of the layers to adapt.
            calibration: the data.

        Raises:
            HoneError: there are no data.
        """
        data = required(calibration, self.name)
        shapes = _linear_shapes(model, names)
        own = {name: self.rank_of(name) for name in shapes}
        most = {name: min(round(own[name] * self.rho), *shape) for name, shape in shapes.items()}
        survey = Survey(own, most, {name: inputs for name, (_, inputs) in shapes.items()}, self.tau)
        rounds = dataclasses.replace(data, batches=survey.rounds(data.batches, self.batches))
        # One more than there are, so that the rounds end by themselves and conclude after the last batch.
        watch_inputs(model, list(shapes), rounds, self.batches + 1, survey.visit)
        self._starts = {name: survey.components(name) for name in survey.ranks}

    def install(self, model: nn.Module, names: list[str]) -> None:
        """Adapt the named layers that have got a rank.

        Args:
            model: a plain network.
            names: dotted names of layers.
        """
        super().install(model, [n for n in names if n not in self._starts or len(self._starts[n])])
        self._starts = {}

    @torch.no_grad()
    def wrap(self, name: str, base: nn.Module, layout: Layout) -> LowRank:
        """Return the layer with the rank that it has got, starting from the components of its input.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: the rank is more than the rank that the matrix can have.
        """
        layer = super().wrap(name, base, layout)
        start = self._starts.get(name)
        if start is None:
            return layer
        layer.rank = len(start)
        layer.alpha = layer.scale * (math.sqrt(layer.rank) if layer.stabilized else layer.rank)
        layer.lora_A = nn.Parameter(start.to(layer.lora_A, copy=True))
        layer.lora_B = nn.Parameter(layer.lora_B.new_zeros(len(layer.lora_B), layer.rank))
        return layer


def oriented(weight: Tensor, covariance: Tensor, rank: int, scale: float, *, largest: bool) -> tuple[Tensor, Tensor]:
    """Return factors of the part of a weight that matters most, or least, for inputs of a covariance.

    W C = U S V^T, so that W = U S (V^T C^-1);  B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T C^-1. Because
    S V^T C^-1 = U^T W, no inverse is needed: A = U_r^T W / sqrt(S_r s), and s B A = U_r U_r^T W.

    Args:
        weight: (out, in) W.
        covariance: (in, in) sum of x x^T; 1% of its mean diagonal is added to it, as in the official code. In float64
            that bounds the condition of C by 100 times the width, so that it need never be doubled.
        rank: r.
        scale: s.
        largest: take the r largest singular values, otherwise the smallest.

    Returns:
        A (rank, in) and B (out, rank), in float64.
    """
    weight, covariance = weight.double(), covariance.double().clone()
    covariance.diagonal().add_(0.01 * float(covariance.diagonal().mean()) or 1.0)
    left, values, _ = torch.linalg.svd(weight @ covariance, full_matrices=False)
    pick = slice(rank) if largest else slice(len(values) - rank, None)
    left, values = left[:, pick], values[pick].clamp_min(1e-12 * float(values[0]) or 1e-30)
    root = (values / scale).sqrt()
    return (left.t() @ weight) / (root * scale)[:, None], left * root


@part(
    "adapter",
    "corda",
    papers=[("CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", "arXiv:2406.05223")],
    claim="Decomposing weights in the context of some data finds what of them to train: what matters most for a task "
    "learns it faster than LoRA does, and what matters least for other text forgets less of it.",
    deviations="The base weight stays what it is and the start's product is taken off the adapter's instead: the same "
    "function and the same gradients, but the base can be had back to the bit. With dropout, A0 too "
    "sees the thinned input, W x + s (B A - B0 A0) drop(x), where the official residual sees all of it, "
    "(W - s B0 A0) x + s B A drop(x). The official scripts train with weight_decay 0. Decomposed in float64 "
    "without the inverse of the covariance. What is to be kept is the recipe's general data instead of questions and "
    "answers. "
    "The unit of the covariance, on which the balance of A and B depends, is by default its mean variance; that of the "
    "official code, `unit: largest`, grows with the tokens of a batch. Embeddings and convolutions start as LoRA's do.",
)
@dataclass(kw_only=True)
class CorDA(LoRA):
    """Train the part of each weight that matters most, or least, for inputs like those of some data.

    C = X^T X / unit;  W C = U S V^T;  B0 = U_r sqrt(S_r / s), A0 = sqrt(S_r / s) V_r^T C^-1;
    W' = (W - s B0 A0) + s B A

    Saved as a plain LoRA of twice the rank.

    Args:
        mode: "instruction-previewed" trains the largest components for the data of the task, "knowledge-preserved" the
            smallest for the recipe's general data, so that what those need stays frozen.
        unit: of C, which leaves B0 A0 as it is, but multiplies A0 and divides B0: "variance" is its mean diagonal, so
            that inputs without a preferred direction give PiSSA's start; "largest" is the official code's: the mean
            over batches of X^T X / max(X)^2.
        batches: how many batches to look at.
    """

    mode: Literal["instruction-previewed", "knowledge-preserved"] = "instruction-previewed"
    unit: Literal["variance", "largest"] = "variance"
    batches: Annotated[int, Field(ge=1)] = 16
    folds: ClassVar[bool] = True
    _covariances: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Sum up the covariances of the layers' inputs.

        Args:
            model: a plain network.
            names: dotted names of the layers to adapt.
            calibration: the data.

        Raises:
            HoneError: there are no data of the kind that the mode looks at.
        """
        find = general_data if self.mode == "knowledge-preserved" else required
        inputs, sums = SharedInputs(), dict[str, Tensor]()

        def visit(name: str, rows: Tensor) -> None:
            if inputs.leader(name, rows) != name:
                return
            rows = wide(rows)
            if self.unit == "largest":
                rows = rows / rows.max().abs().clamp_min(torch.finfo(rows.dtype).tiny)
            sums[name] = sums[name] + rows.t() @ rows if name in sums else rows.t() @ rows

        data = find(calibration, self.name)
        ran = watch_inputs(model, list(_linear_shapes(model, names)), data, self.batches, visit)
        means = {name: total / ran for name, total in sums.items()}
        if self.unit == "variance":
            means = {name: c / c.diagonal().mean().clamp_min(torch.finfo(c.dtype).tiny) for name, c in means.items()}
        self._covariances = {name: means[leader] for name, leader in inputs.leaders.items()}

    def install(self, model: nn.Module, names: list[str]) -> None:
        """Adapt the named layers.

        Args:
            model: a plain network.
            names: dotted names of layers.
        """
        super().install(model, names)
        self._covariances = {}

    @torch.no_grad()
    def wrap(self, name: str, base: nn.Module, layout: Layout) -> LowRank:
        """Return the layer starting from the part of its weight that the mode picks.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: the rank is more than the rank that the matrix can have.
        """
        layer = super().wrap(name, base, layout)
        if name in self._covariances:
            largest = self.mode == "instruction-previewed"
            down, up = oriented(layer.matrix(), self._covariances[name], layer.rank, layer.scale, largest=largest)
            layer.start(down, up)
        return layer


def _linear_shapes(model: nn.Module, names: list[str]) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of the weights of those layers that are linear."""
    modules = {name: module for name in names if isinstance(module := model.get_submodule(name), LINEAR)}
    layouts = {name: cast(Layout, layout_of(module)) for name, module in modules.items()}
    shapes = {name: layouts[name].matrix(module.weight).shape for name, module in modules.items()}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}
