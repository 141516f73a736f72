"""Reward models that ask their training data: a reward is averaged with those of the most similar known answers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.data.sample import Sample
from hone.objectives.reward_model import RewardModel
from hone.parts import part
from hone.text.pack import Tree, pack

if TYPE_CHECKING:
    from hone.data.source import Source
    from hone.objectives.answers import Answers
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

WIDTH = 4096  # numbers of a vector of token counts
Count = Annotated[int, Field(ge=1)]


def token_vector(tokens: np.ndarray) -> np.ndarray:
    """Return a unit vector (WIDTH,) of how often each token and each two in a row occur, hashed.

    Args:
        tokens: (n,) ids.
    """
    ids = tokens.astype(np.int64)
    counts = np.bincount(ids * 2654435761 % WIDTH, minlength=WIDTH).astype(np.float64)
    if len(ids) > 1:
        counts += np.bincount((ids[:-1] * 2246822519 + ids[1:] * 3266489917) % WIDTH, minlength=WIDTH)
    return counts / max(float(np.linalg.norm(counts)), 1e-12)


def fused(own: Tensor, alike: Tensor, rewards: Tensor) -> Tensor:
    """Return [r + sum_k s_k r_k] / [1 + sum_k s_k] of each answer (A,).

    Args:
        own: r (A,), its own reward.
        alike: s_k (A, K), similarity to each known answer, 0 to those that do not count.
        rewards: r_k (K,), their rewards.
    """
    return (own + alike @ rewards) / (1 + alike.sum(1))


def nearest(alike: np.ndarray, most: int, least: float) -> np.ndarray:
    """Return similarities (A, K) with 0 for all but the largest of each row, the first ones of equals.

    Args:
        alike: the similarities (A, K).
        most: how many of a row are kept.
        least: smallest one that is kept.
    """
    kept = np.zeros(alike.shape, bool)
    np.put_along_axis(kept, np.argsort(-alike, axis=1, kind="stable")[:, :most], True, axis=1)
    return np.where(kept & (alike >= least), alike, 0.0)


@part(
    "objective",
    "reward-fusion",
    papers=[("The Trickle-down Impact of Reward (In-)consistency on RLHF", "arXiv:2309.16155")],
    claim="Averaging a reward with those of similar training examples makes a reward model more consistent, without "
    "any further training.",
    deviations="Checked against the authors' code: up to five neighbours with a cosine of 0.9 or more, weighted by it, "
    "the answer itself by 1. Counts of tokens stand for SimCSE's embeddings.",
)
@dataclass(kw_only=True)
class RewardFusion(RewardModel):
    """A reward model whose rewards are fused, in evaluation, with those of similar preferred answers it trained on.

    r'(x, y) = [r(x, y) + sum_k s_k r(x_k, y_k)] / [1 + sum_k s_k],  s_k the cosine to the k-th neighbour

    In training it is `reward-model`, whose options are there too.

    Args:
        neighbours: most known answers that a reward is averaged with.
        alike: least cosine of the token counts of prompt and answer.
        bank: most training pairs whose preferred answers are kept, each answer to a prompt once.
    """

    neighbours: Count = 5
    alike: Annotated[float, Field(ge=0, le=1)] = 0.9
    bank: Count = 1000
    _known: list[Sample] = field(init=False, default_factory=list, repr=False)
    _tokens: list[np.ndarray] = field(init=False, default_factory=list, repr=False)
    _vectors: np.ndarray | None = field(init=False, default=None, repr=False)

    def look(self, source: Source) -> None:
        """Keep the preferred answers of the training data, each once.

        Args:
            source: the training data.
        """
        super().look(source)
        known: dict[Any, Sample] = {}
        for sample in itertools.islice(source.samples("train"), self.bank):
            if isinstance(sample, Sample) and sample.answers:
                best = max(range(len(sample.scores)), key=sample.scores.__getitem__) if sample.scores else 0
                answer = sample.answers[best]
                known[sample.prompt, answer] = Sample(kind="completion", prompt=sample.prompt, answers=(answer,))
        self._known = list(known.values())

    def equip(self, model: LanguageModel) -> None:
        """Put the head beside the model, and take the known answers as tokens.

        Args:
            model: the language model, as the run starts from it.
        """
        super().equip(model)
        trees = [tree for sample in self._known for tree in model.renderer.render(sample)]
        self._tokens = [tree.tokens[0] for tree in trees]
        self._vectors = np.stack([token_vector(tokens) for tokens in self._tokens]) if trees else None

    def rewards(self, model: LanguageModel, batch: Packed, answers: Answers) -> Tensor:
        """Return the reward of each answer (A,), fused where the model is evaluated.

        Args:
            model: the language model with its head.
            batch: packed forest of T tokens.
            answers: its answers.
        """
        own = super().rewards(model, batch, answers)
        if model.training or self._vectors is None:
            return own
        tokens = batch.tokens.cpu().numpy()
        spans = [(int(a), int(b)) for a, b in itertools.pairwise(batch.starts)]
        texts = [
            np.concatenate([tokens[slice(*spans[part])] for part in batch.chain(int(segment))])
            for segment in answers.segments
        ]
        alike = np.stack([token_vector(text) for text in texts]) @ self._vectors.T
        weights = nearest(alike, self.neighbours, self.alike)
        used = np.flatnonzero(weights.any(0))
        if not len(used):
            return own
        rewards = self._bank_rewards(model, used).to(own)
        return fused(own, torch.from_numpy(weights[:, used]).to(own), rewards)

    def _bank_rewards(self, model: LanguageModel, used: Any) -> Tensor:
        """Return the rewards of some of the known answers (K,)."""
        known = [self._tokens[at] for at in used]
        trees = [Tree((ids,), (np.zeros(len(ids), np.float32),), (-1,)) for ids in known]
        batch = pack(trees).to(next(model.parameters()).device)
        ends = (batch.starts[1:] - 1).to(batch.tokens.device)
        return self.outputs(model, self.hidden(model, batch)[ends]).squeeze(-1)
