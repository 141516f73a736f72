"""Fine-tuning with noise inside the network: on the embeddings, or on the states of some layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.modes import evaluating
from hone.networks import blocks_of
from hone.objectives.base import trained
from hone.objectives.draws import Disturbed, Share, normal, places, uniform
from hone.objectives.language import next_token_loss
from hone.parts import part
from hone.text.inside import Change, inside
from hone.text.pack import divide, pack
from hone.text.vocabulary import CrossEntropy, vocabulary_sum

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed, Tree

Positive = Annotated[float, Field(ge=0)]
LIMIT = 5.0  # most that the variance of a token's state raises its noise


@part(
    "objective",
    "neftune",
    papers=[("NEFTune: Noisy Embeddings Improve Instruction Finetuning", "arXiv:2310.05914")],
    claim="Uniform noise on the embeddings in training makes the answers of instruction-tuned models better, as judged "
    "in conversation (AlpacaEval of LLaMA-2-7B from 29.8 to 64.7).",
    deviations="The length L is that of each sample (of a tree of answers, of all its segments), never of padding.",
)
@dataclass(kw_only=True)
class NEFTune(Disturbed):
    """Supervised fine-tuning with noise on the embeddings.

    e_t + alpha / sqrt(L D) u_t,  u_t uniform in [-1, 1)^D,  for the L tokens of a sample, prompts included

    Evaluation adds no noise. The options of `sft` are there too.

    Args:
        alpha: size of the noise; the noise on a whole sample has a norm of about alpha / sqrt(3). The paper tries 5,
            10 and 15.
    """

    alpha: Positive = 5.0

    def disturbed(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss with noise on the embeddings.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        with inside(model, batch, {model.hf.get_input_embeddings(): self._noise(batch)}):
            return next_token_loss(model, batch, trained(batch), CrossEntropy(label_smoothing=self.label_smoothing))

    def _noise(self, batch: Packed) -> Change:
        def noise(states: Tensor) -> Tensor:
            drawn = 2 * uniform(batch, self._salt, states.shape[-1]) - 1
            return drawn * self.alpha * (lengths(batch) * states.shape[-1]).rsqrt()[:, None]

        return noise


def lengths(batch: Packed) -> Tensor:
    """Return for each token how many tokens its tree has, (T,).

    Args:
        batch: B trees as a packed forest of T tokens.
    """
    sizes = torch.tensor([place.stop - place.start for place in places(batch)], device=batch.tokens.device)
    return sizes.repeat_interleave(sizes).float()


def noise_scale(states: Tensor, size: float, decay: float) -> Tensor:
    """Return the standard deviation of the noise on each number of the states of one sample (n, D).

    s_td = size m_t exp(-decay |h_td - med_t| / m_t) min(exp(var_t / mean_t var_t), 5)

    with med_t the median of a token's state and m_t its median absolute deviation.

    Args:
        states: h (n, D).
        size: of the noise, relative to m_t.
        decay: how fast the noise falls off for numbers far from the median.
    """
    variance = states.var(-1, keepdim=True)
    lift = (variance / (variance.mean() + 1e-6)).exp().clamp(max=LIMIT)
    middle = states.median(-1, keepdim=True).values
    gap = (states - middle).abs()
    spread = gap.median(-1, keepdim=True).values.clamp(min=1e-6)
    spread = torch.maximum(spread, 1e-6 * states.norm(dim=-1, keepdim=True))
    return size * spread * (-decay * gap / spread).exp() * lift


def at_least_single(states: Tensor) -> Tensor:
    """Return states in float32 where they have fewer bits."""
    return states.float() if states.dtype.itemsize < 4 else states


def two_views(logits: Tensor, targets: Tensor, clean: Tensor, *, soft: float, consistency: float) -> Tensor:
    """Return for each token how far two noisy predictions p1, p2 are from the clean one q, and from each other.

    soft [KL(q || p1) + KL(q || p2)] / 2 + consistency KL(p2 || p1)

    Args:
        logits: (n, 2 V), those of p1 and of p2 side by side.
        targets: not used.
        clean: (n, V) logits of q.
        soft: weight of the first term.
        consistency: weight of the second.
    """
    first, second = (half.log_softmax(-1) for half in logits.chunk(2, -1))
    log_q = clean.to(logits.dtype).log_softmax(-1)
    gaps = (log_q.exp() * (log_q - (first + second) / 2)).sum(-1)
    return soft * gaps + consistency * (second.exp() * (second - first)).sum(-1)


def two_heads(head: Any, hidden: Tensor) -> Tensor:
    """Return the logits (n, 2 V) of two states side by side (n, 2 D).

    Args:
        head: (n, D) -> (n, V).
        hidden: (n, 2 D).
    """
    return torch.cat([head(half) for half in hidden.chunk(2, -1)], -1)


@part(
    "objective",
    "noisefit",
    papers=[
        (
            "Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models",
            "arXiv:2504.03302",
        )
    ],
    claim="Noise in the layers that stand it best, with outputs held near those without noise, reduces hallucinations "
    "at equal or better accuracy.",
    deviations="Follows the authors' code, except that: the noise is proportional to the states (their code multiplies "
    "it by the states' standard deviation once more, so that the same option drowns a model with large states and does "
    "nothing to one with small states, and by the option itself once more: their 0.1 is 0.01 here where states have "
    "standard deviation 1); statistics are taken over each sample instead of the batch; the expected noise "
    "of the signal-to-noise ratio is computed on the first step's data instead of averaged over ten draws; the scale "
    "of the noise and the clean distribution are constants in the backward pass.",
)
@dataclass(kw_only=True)
class NoiseFiT(Disturbed):
    """Supervised fine-tuning with noise in a few layers, and outputs held near those without noise.

    loss = sum_t w_t {hard (-log q_t(token_t)) + (1 - hard) [KL(q'_t || p1_t) + KL(q'_t || p2_t)] / 2
                      + consistency KL(p2_t || p1_t)}

    q is the model without noise, q' the same at `temperature` and held fixed, p1 and p2 are two passes with normal
    noise on the states of `layers` layers, those with the highest (or lowest) ratio of signal to noise on the first
    step's data. The noise follows each token's state: see `noise_scale`. Three forward passes a step; evaluation makes
    one and reports the loss of `sft`, whose options are there too.

    Args:
        noise: size of the noise, relative to the median absolute deviation of a token's state.
        decay: how fast the noise falls off for numbers far from the median of a token's state.
        layers: number of layers with noise.
        choose: those with the highest ("high") or the lowest ("low") signal-to-noise ratio.
        hard: weight of the cross-entropy without noise, in [0, 1]; the rest is that of the soft cross-entropy.
        consistency: weight of the divergence between the two noisy passes.
        temperature: of the clean distribution that the noisy ones are held to.
    """

    noise: Positive = 0.1
    decay: Positive = 0.1
    layers: Annotated[int, Field(ge=1)] = 3
    choose: Literal["high", "low"] = "high"
    hard: Share = 0.5
    consistency: Positive = 0.1
    temperature: Annotated[float, Field(gt=0)] = 1.0
    _chosen: list[int] = field(init=False, default_factory=list, repr=False)  # the first ones before any data is seen

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Choose the layers before the first step.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        super().before_step(run, trees)
        if not self._chosen:
            groups = divide(trees, run.recipe.micro_tokens or run.recipe.batch_tokens)
            with run.cluster.autocast():
                ratios = self.ratios(run.model, [pack(group).to(run.cluster.device) for group in groups])
            order = ratios.argsort(descending=self.choose == "low", stable=True)
            self._chosen = sorted(order[: self.layers].tolist())

    def ratios(self, model: LanguageModel, batches: Sequence[Packed]) -> Tensor:
        """Return the noise-to-signal ratio of each layer (L,), over all tokens of some batches.

        Args:
            model: the language model.
            batches: packed trees.
        """
        blocks = list(blocks_of(model.decoder).values())
        sums = torch.zeros(len(blocks), 2, dtype=torch.float64)

        def look(states: Tensor, layer: int, batch: Packed) -> None:
            for place in places(batch):
                own = at_least_single(states[place])
                scale = noise_scale(own, self.noise, self.decay)
                sums[layer] += torch.stack([scale.cpu().double().sum(), own.abs().cpu().double().sum()])

        with torch.no_grad(), evaluating(model):
            for batch in batches:
                with inside(model, batch, {b: partial(look, layer=n, batch=batch) for n, b in enumerate(blocks)}):
                    model.hidden(batch)
        return math.sqrt(2 / math.pi) * sums[:, 0] / sums[:, 1]

    def state_dict(self) -> dict[str, Any]:
        """Return which layers are noisy."""
        return {"chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over which layers are noisy.

        Args:
            state: as `state_dict` returned it.
        """
        self._chosen = list(state.get("chosen", []))

    def disturbed(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of a clean and two noisy passes, and what `sft` reports of the clean one.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        predictors, targets, weights = trained(batch)
        views = [self._noisy(model, batch, view)[predictors] for view in (1, 2)]
        clean = model.hidden(batch)[predictors]
        hits, head = torch.empty_like(weights), model.head
        smoothed = CrossEntropy(label_smoothing=self.label_smoothing)
        hard = vocabulary_sum(clean, head, targets, weights, smoothed, hits=hits)
        fixed = clean.detach()
        soft = vocabulary_sum(
            torch.cat(views, -1), partial(two_heads, head), targets, weights,
            partial(two_views, soft=1 - self.hard, consistency=self.consistency),
            extras=[lambda rows: head(fixed[rows]) / self.temperature],
        )  # fmt: skip
        return self.hard * hard + soft, {"token_accuracy": (weights * hits).sum()}

    def _noisy(self, model: LanguageModel, batch: Packed, view: int) -> Tensor:
        """Return the last hidden states (T, D) of a pass with noise."""
        blocks = list(blocks_of(model.decoder).values())
        chosen = self._chosen or range(min(self.layers, len(blocks)))

        def noise(states: Tensor, layer: int) -> Tensor:
            scales = [noise_scale(at_least_single(states[place]), self.noise, self.decay) for place in places(batch)]
            return torch.cat(scales) * normal(batch, f"{self._salt}:{view}:{layer}", states.shape[-1])

        with inside(model, batch, {blocks[layer]: partial(noise, layer=layer) for layer in chosen}):
            return model.hidden(batch)
