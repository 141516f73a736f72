"""Discriminative fine-tuning: the right answer against all that the model could have said, estimated by its samples.

    P_d(y|x) = exp(s(y) / tau) / sum_y' exp(s(y') / tau)

The normaliser is an expectation inside a logarithm, of which a few samples give a biased gradient. So every prompt has
a moving average u of its estimates, which stands in the denominator (finite-sum coupled compositional optimisation).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.answers import answers_of, best_of, pairs_of, token_values, tree_field
from hone.objectives.preference import Positive
from hone.objectives.reference import Referring
from hone.parts import part

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed, Tree


def log_means(exponents: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return log mean exp of the exponents of each group (G,), without overflow.

    Args:
        exponents: (K,) constants.
        groups: (K,) the group of each, every group having one at least.
        count: G.
    """
    peak = exponents.new_full((count,), float("-inf")).scatter_reduce(0, groups, exponents, "amax")
    sums = torch.zeros_like(peak).index_add(0, groups, (exponents - peak[groups]).exp())
    return peak + sums.log() - torch.zeros_like(peak).index_add(0, groups, torch.ones_like(exponents)).log()


def averaged(estimate: Tensor, before: Tensor, share: float) -> Tensor:
    """Return log[(1 - share) u + share estimate] of logarithms (G,), `share` in (0, 1].

    Args:
        estimate: (G,) log of the new estimates.
        before: (G,) log u so far.
        share: weight of the new ones.
    """
    if share == 1:
        return estimate
    return torch.logaddexp(before + math.log1p(-share), estimate + math.log(share))


def prompt_key(tokens: np.ndarray) -> str:
    """Return what stands for a prompt of some token ids (n,): a hash in hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, np.int32).tobytes(), digest_size=16).hexdigest()


@part(
    "objective",
    "dft",
    papers=[
        (
            "Discriminative Finetuning of Generative Large Language Models without Reward Models and Preference Data",
            "arXiv:2502.18679",
        )
    ],
    claim="Raising the probability of the right answer among all possible ones beats fine-tuning on it alone and comes "
    "up to preference optimisation, without preference data or a reward model.",
    deviations="Checked against the authors' code. Their value of the loss is that of the surrogate whose gradient is "
    "right; here it is -s + tau log of the batch's estimate, with the same gradient. A prompt that comes several times "
    "in one step moves its average by the mean of the logarithms.",
)
@dataclass(kw_only=True)
class DFT(Referring):
    """Discriminative fine-tuning against negatives that the starting model gave, e.g. data sampled, make: rivals.

    loss = sum_prompts -s(y) + tau log mean_k e^(e_k);  gradient -ds(y) + mean_k e^(e_k) / u ds(y_k)

    with e_k = s(y_k) / tau - log P0(y_k|x) over the prompt's negatives, s = log pi (DFT), or e_k = s(y_k) / tau with
    s = log pi / |y| (DFT2), and u <- (1 - gamma) u + gamma mean_k e^(e_k), kept for each prompt. The best answer of a
    pair or list is the positive one, those worse than it are the negatives. The unit is the prompt. Reported beside the
    loss: "margin" (s of the positive answer less the mean of the negatives') and "pressure" (summed weight of the
    negatives, 1 where u is exact).

    Args:
        score: "sum" (log-probability, and the starting model as P0: DFT) or "mean" (per token, without it: DFT2).
        tau: temperature of the softmax over answers; the paper takes 1 for sums and 0.3 for means.
        gamma: weight of a new estimate in a prompt's average; 1 keeps no average.
    """

    consumes: ClassVar[str] = "pairs"
    score: Literal["sum", "mean"] = "sum"
    tau: Positive = 1.0
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.9
    _averages: dict[str, float] = field(init=False, default_factory=dict, repr=False)  # log u by prompt
    _fresh: dict[str, list[float]] = field(init=False, default_factory=dict, repr=False)  # of the step under way
    _step: list[str] = field(init=False, default_factory=list, repr=False)  # its prompts, the same on every process

    def setup(self, run: Any) -> None:
        """Prepare the reference, which means do without.

        Args:
            run: the run in progress.
        """
        if self.score == "sum":
            super().setup(run)

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Note the prompts of the step.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        self._step = list(dict.fromkeys(prompt_key(tree.tokens[0]) for tree in trees))
        self._fresh.clear()

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Take the averages of the step's prompts further.

        Args:
            run: the run in progress.
            row: its metrics.
        """
        for key in self._step:
            found = self._fresh.get(key, [])
            many = run.cluster.sum(float(len(found)))
            total = run.cluster.sum(math.fsum(found))
            if many:
                self._averages[key] = total / many
        self._fresh.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by prompt."""
        return {"averages": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the averages.

        Args:
            state: as `state_dict` returned it.
        """
        self._averages = dict(state.get("averages", {}))

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's prompts.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(tree_field(batch, "weight", torch.arange(len(batch.where)), 1.0).sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's prompts, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        pairs, best = pairs_of(batch, answers), best_of(batch, answers)
        trees = pairs.trees.to(best.device)
        kept = pairs.chosen == best[trees]
        negatives, trees = pairs.rejected[kept], trees[kept]
        scores, exponents = self._scores(model, batch, answers, negatives)
        count = len(batch.where)
        estimate = log_means(exponents, trees, count)
        averages = self._average(batch, estimate)
        many = torch.zeros_like(estimate).index_add(0, trees, torch.ones_like(exponents))
        pressure = (exponents - averages[trees]).exp() / many[trees]
        weights = tree_field(batch, "weight", torch.arange(count), 1.0).to(scores.dtype)
        gradient = (weights * -scores[best]).sum() + (weights[trees] * pressure * scores[negatives]).sum()
        with torch.no_grad():
            value = (weights * (self.tau * estimate - scores[best])).sum()
            apart = scores[best] - torch.zeros_like(estimate).index_add(0, trees, scores[negatives]) / many
            metrics = {"margin": (weights * apart).sum(), "pressure": (weights[trees] * pressure).sum()}
        return value + (gradient - gradient.detach()), metrics

    def _scores(self, model: LanguageModel, batch: Packed, answers: Any, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Return s of every answer (A,), and the exponents of the negatives (K,), which carry no gradient."""
        reference = self.reference_values(model, batch) if self.score == "sum" else None
        sums = answers.sums(token_values(model, batch))
        if reference is None:
            scores = sums / answers.tokens
            return scores, scores.detach()[negatives] / self.tau
        base = answers.sums(reference.to(sums.dtype))
        return sums, (sums.detach() / self.tau - base)[negatives]

    def _average(self, batch: Packed, estimate: Tensor) -> Tensor:
        """Return log u of each prompt (B,) with the new estimate in it; in training it is noted for the next step."""
        tokens, first = batch.tokens.cpu().numpy(), torch.searchsorted(batch.trees, torch.arange(len(batch.where)))
        spans = zip(batch.starts[first].tolist(), batch.starts[first + 1].tolist(), strict=True)
        keys = [prompt_key(tokens[begin:end]) for begin, end in spans]
        before = estimate.new_tensor([self._averages.get(key, 0.0) for key in keys])  # u = 1, as the authors begin
        after = averaged(estimate, before, self.gamma)
        if torch.is_grad_enabled():
            for key, value in zip(keys, after.tolist(), strict=True):
                self._fresh.setdefault(key, []).append(value)
        return after
