"""LQ-LoRA: weights as a few-bit and a low-rank part, with bits given to each matrix by an integer programme."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor, nn

from hone.adapters.calibration import Calibration, mean_gradients, required
from hone.adapters.layers import Layout, layout_of
from hone.adapters.qlora import Decomposing, Start, leading
from hone.adapters.quantize import Blocks, Format, Quantized
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide

OVERSAMPLING, SWEEPS = 10, 2  # more columns than the rank, and passes over the matrix, of the randomised SVD
# Turns after which configurations are compared: more lower the errors of all formats alike, by 15 to 20% from 2 to 10.
TRIAL = 2
SOLVER_SECONDS = 60.0  # the best assignment found by then is taken
GAP = 1e-4  # relative distance from the optimum at which the solver may stop


class Scaling(NamedTuple):
    """Weights of a matrix's errors as a row and a column factor, by which a weighted SVD has a closed form.

    Args:
        rows: (out, 1).
        columns: (1, in).
    """

    rows: Tensor
    columns: Tensor


def scaling(fisher: Tensor) -> Scaling:
    """Return the roots of the means of the Fisher information over each row and each column, over the largest.

    Those below a thousandth are raised to it, so that one can divide by them.

    Args:
        fisher: (out, in) estimates of the diagonal of the Fisher information.
    """

    def root(dimension: int) -> Tensor:
        means = fisher.mean(dimension, keepdim=True).sqrt()
        return (means / means.max()).clamp_min(1e-3)

    return Scaling(root(1), root(0))


def leading_fast(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return nearly the best approximation of a rank as L R, by a randomised SVD; the exact one of a small matrix.

    The start is drawn from a generator of its own, so that one matrix gives one result.

    Args:
        matrix: (out, in).
        rank: columns of L and rows of R.
    """
    columns = rank + OVERSAMPLING
    if 2 * columns >= min(matrix.shape):
        return leading(matrix, rank)
    draws = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ draws.to(matrix)).Q
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    up, down = leading(basis.mT @ matrix, rank)
    return basis @ up, down


def decompose(
    weight: Tensor, rank: int, code: Format, block: int, iterations: int, fisher: Tensor | None = None
) -> tuple[Start, float]:
    """Take a weight apart by turns, as LQ-LoRA does, and return the parts with their squared error.

    L R = D^-1 SVD_r(D (W - Q) E) E^-1,  Q = quantise(W - L R), from Q = 0 until the error grows; D and E scale rows and
    columns, and are the identity without Fisher information F. The error is |sqrt(F) * (W - Q - L R)|^2.

    Args:
        weight: W, (out, in).
        rank: of L R.
        code: format of Q.
        block: numbers of Q that share a scale.
        iterations: most turns.
        fisher: F, (out, in); None weighs all errors alike.
    """
    if fisher is not None and not fisher.any():
        return decompose(weight, rank, code, block, iterations)[0], 0.0
    weight = wide(weight)
    factors = None if fisher is None else scaling(fisher)
    best, least, rest = None, math.inf, weight
    for _ in range(iterations):
        if factors is None:
            up, down = leading_fast(rest, rank)
        else:
            up, down = leading_fast(factors.rows * rest * factors.columns, rank)
            up, down = up / factors.rows, down / factors.columns
        found = Start(Blocks(weight - up @ down, code, block, double=True, kept=True), up, down)
        squares = found.error(weight).square()
        error = float((squares if fisher is None else squares * fisher).sum())
        if best is not None and error >= least:
            break
        best, least = found, error
        rest = weight - found.blocks.matrix(weight.dtype)
    assert best is not None
    return best, least


def assign(costs: np.ndarray, sizes: np.ndarray, budget: float) -> list[int]:
    """Choose one configuration for each matrix, of the least total cost within a budget: an integer programme.

    min sum_ij c_ij x_ij  where  sum_ij s_ij x_ij <= budget,  sum_j x_ij = 1,  x_ij in {0, 1}

    Args:
        costs: (matrices, configurations).
        sizes: (matrices, configurations), in the budget's unit.
        budget: most that the sizes may add up to.

    Raises:
        HoneError: even the smallest configurations take more.
    """
    smallest = sizes.min(1).sum()
    if smallest > budget:
        raise HoneError(f"the smallest of the configurations take {smallest:g}, the budget is {budget:g}")
    count, choices = costs.shape
    places = np.arange(count * choices)
    once = coo_array((np.ones(count * choices), (places // choices, places)), shape=(count, count * choices))
    # Numbers near 1 keep the solver's absolute tolerances small beside them.
    found = milp(
        c=costs.ravel() / max(costs.max(), 1e-300),
        constraints=[LinearConstraint(sizes.reshape(1, -1) / budget, ub=1), LinearConstraint(once.tocsr(), 1, 1)],
        integrality=np.ones(count * choices), bounds=Bounds(0, 1),
        options={"time_limit": SOLVER_SECONDS, "mip_rel_gap": GAP},
    )  # fmt: skip
    if found.x is None:
        raise HoneError(f"the integer programme that gives bits to matrices was not solved: {found.message}")
    return [int(row.argmax()) for row in found.x.reshape(count, choices)]


@part(
    "adapter",
    "lq-lora",
    papers=[
        (
            "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
            "arXiv:2311.12023",
        )
    ],
    claim="Taken apart into a few-bit and a low-rank part, with bits given to each matrix under a budget, a model of "
    "less than 3 bits per weight is trained nearly as well as a 4-bit one under QLoRA.",
    deviations="Integer formats stand beside 4-bit NormalFloat by default, since at 2 and 3 bits hone's lose less than "
    "NormalFloat (nf2 and nf3 can be chosen). Scales have 8 bits and a float32 for 256 of them; the paper's programme "
    "chooses these too. The Fisher information is of batches, not of single sequences. HiGHS solves the "
    "programme, not Gurobi. Configurations are compared after two turns of the "
    "decomposition, which returns its best turn, not the one after it. The factors are divided by "
    "the root of LoRA's scale each. While disabled, the model computes the start Q + s B0 A0.",
)
@dataclass(kw_only=True)
class LQLoRA(Decomposing):
    """LoRA over weights taken apart as Q + s B0 A0, whose bits and block sizes an integer programme chooses.

    W ~ Q + s B0 A0 by turns of SVD and quantisation;  W' = Q + s B A.  For matrices i and configurations j with
    errors c_ij and sizes s_ij in bits: min sum c_ij x_ij where sum s_ij x_ij <= budget x weights, sum_j x_ij = 1

    Layers that are not adapted are left as they are. Saved in hone's own format with Q.

    Args:
        budget: bits per weight of the adapted layers, scales included, on average.
        formats: formats to choose from.
        blocks: block sizes to choose from; multiples of 8.
        iterations: most turns of a decomposition.
        fisher_batches: batches of data from which the Fisher information is estimated that weighs the errors; 0 weighs
            all alike.
    """

    budget: Annotated[float, Field(gt=0)] = 2.75
    formats: Annotated[list[Format], Field(min_length=1)] = field(
        default_factory=lambda: ["int2", "int3", "nf4", "int8"]
    )
    blocks: Annotated[list[Annotated[int, Field(ge=8, multiple_of=8)]], Field(min_length=1)] = field(
        default_factory=lambda: [16, 32, 64]
    )
    iterations: Annotated[int, Field(ge=1)] = 10
    fisher_batches: Annotated[int, Field(ge=0)] = 8
    quantize: Literal["none"] = field(init=False, default="none")
    quantize_block: int = field(init=False, default=64)
    double_quantize: bool = field(init=False, default=True)

    def decompose(
        self, model: nn.Module, weights: dict[str, Tensor], calibration: Calibration | None
    ) -> dict[str, Start]:
        """Choose a configuration for each weight and take it apart.

        Args:
            model: a plain network.
            weights: matrices (out, in) by name of the layer.
            calibration: the data, None when there is none.

        Raises:
            HoneError: the budget is too small for all configurations, or there are no data to estimate Fisher
                information from.
        """
        fisher: dict[str, Tensor] = {}
        if self.fisher_batches:
            data = required(calibration, self.name)
            for name, squares in mean_gradients(model, weights, data, self.fisher_batches, squared=True).items():
                layout = layout_of(model.get_submodule(name))
                assert isinstance(layout, Layout)
                fisher[name] = layout.matrix(squares)
        if not any(squares.any() for squares in fisher.values()):  # an objective without gradient at the start
            fisher = {}
        choices = list(product(self.formats, self.blocks))
        costs, sizes = np.zeros((len(weights), len(choices))), np.zeros((len(weights), len(choices)))
        for i, (name, weight) in enumerate(weights.items()):
            for j, (code, block) in enumerate(choices):
                turns = min(TRIAL, self.iterations)
                found, costs[i, j] = decompose(weight, self.rank_of(name), code, block, turns, fisher.get(name))
                sizes[i, j] = found.blocks.bytes() * 8
        total = sum(weight.numel() for weight in weights.values())
        if (least := sizes.min(1).sum() / total) > self.budget:
            raise HoneError(
                f"adapter.budget: {self.budget:g} bits per weight are less than the {least:.3f} of the smallest of "
                "adapter.formats in the largest of adapter.blocks; raise it, or add smaller formats or larger blocks"
            )
        chosen = [choices[j] for j in assign(costs, sizes, self.budget * total)]
        return {
            name: decompose(weight, self.rank_of(name), code, block, self.iterations, fisher.get(name))[0]
            for (name, weight), (code, block) in zip(weights.items(), chosen, strict=True)
        }

    def base_of(self, name: str, layer: nn.Module) -> nn.Module:
        """Return the few-bit part of a layer, or what stands for it while a saved one is loaded.

        Args:
            name: dotted name of the layer.
            layer: the layer.
        """
        if name in self.made:
            return super().base_of(name, layer)
        return Quantized(layer, self.formats[0], self.blocks[0])  # `resize` gives it the format that was saved
