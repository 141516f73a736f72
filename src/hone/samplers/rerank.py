"""Answering by choosing among many answers: majority vote, best of n, and clusters weighted by a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from hone.options import Nested
from hone.parts import part
from hone.samplers.text import Sample, greedy, pick

if TYPE_CHECKING:
    from hone.text.generate import Generation, History
    from hone.text.model import LanguageModel

By = Literal["majority", "best", "weighted"]


def elect(answers: Sequence[str], confidence: Sequence[float], by: By, clusters: int | None = None) -> int:
    """Return which of several solutions is chosen.

    Solutions with the same final answer are a cluster. majority: the largest cluster; best: the solution of the largest
    confidence; weighted: the cluster of the largest summed confidence. Of a chosen cluster the solution of the largest
    confidence stands for it; the first of equals is taken everywhere.

    Args:
        answers: the final answer of each solution.
        confidence: how likely each is right.
        by: who is chosen.
        clusters: only the solutions in so many of the largest clusters are looked at; None for all.
    """
    sizes: dict[str, int] = {}
    worth: dict[str, float] = {}
    for answer, weight in zip(answers, confidence, strict=True):
        sizes[answer] = sizes.get(answer, 0) + 1
        worth[answer] = worth.get(answer, 0.0) + (1.0 if by == "majority" else weight)
    largest = sorted(sizes, key=lambda answer: -sizes[answer])[:clusters]  # the order in which they came is kept
    if by != "best":
        largest = [max(largest, key=lambda answer: worth[answer])]
    candidates = [place for place, answer in enumerate(answers) if answer in largest]
    return max(candidates, key=lambda place: confidence[place])


@part(
    "sampler",
    "rerank",
    papers=[
        ("Improving Large Language Model Fine-tuning for Solving Math Problems", "arXiv:2310.10047"),
        ("Self-Consistency Improves Chain of Thought Reasoning in Language Models", "arXiv:2203.11171"),
    ],
    claim="Clusters of solutions with one final answer, each weighted by how sure a trained evaluator is of its "
    "members, give more right answers than majority voting and than the best solution by itself.",
    deviations="Final answers are compared as texts. Verified from the abstract and summaries: the weighted sum over a "
    "cluster and the restriction to the largest clusters are as we read them.",
)
@dataclass(kw_only=True)
class Rerank:
    """Draw several answers and give one of them: solution-cluster re-ranking, majority vote or best of n.

    majority: argmax_a |C_a|;  best: argmax_i c_i;  weighted: argmax_a sum_(i in C_a) c_i

    C_a are the solutions with final answer a (see `hone.data.answers`), c_i the evaluator's probability
    that solution i is right, which data `verdicts` trains. Answers that ran out of tokens have no vote.

    Args:
        count: answers that are drawn for each that is given.
        by: majority, best or weighted.
        clusters: only the solutions in so many of the largest clusters are re-ranked; None for all.
        evaluator: folder or Hub name of the model that judges; None asks the model that answers.
        then: sampler that draws the answers; None draws from the model's distribution.
    """

    looks_back: ClassVar[bool] = True
    count: Annotated[int, Field(ge=1)] = 8
    by: By = "weighted"
    clusters: Annotated[int, Field(ge=1)] | None = None
    evaluator: str | None = None
    then: Annotated[Any, Nested("sampler")] = None
    _judge: Any = field(default=None, init=False, repr=False)

    def each(self) -> Any:
        """Return the sampler that draws the answers."""
        return self.then or Sample()

    def __call__(self, logits: Tensor, uniforms: Tensor, history: History) -> Tensor:
        """Return (N,) token ids, where a single token is asked for: those of `then`, else the most probable.

        Args:
            logits: (N, V) scores of the next token.
            uniforms: (N,) numbers in [0, 1).
            history: what each row has drawn.
        """
        return pick(self.then or greedy, logits, uniforms, history)

    def choose(
        self, model: LanguageModel, prompts: Sequence[np.ndarray], groups: list[list[Generation]]
    ) -> list[list[Generation]]:
        """Return one generation out of every `count` of them.

        Args:
            model: the one that answered.
            prompts: token ids of each prompt.
            groups: per prompt its generations, `count` for each that is wanted.
        """
        from hone.data.answers import final_answer

        asked = [model.renderer.decode(prompt) for prompt in prompts]
        votes = [  # per election the prompt's text and the generations that stand
            (text, [one for one in voters if one.stopped] or voters)
            for text, group in zip(asked, groups, strict=True)
            for voters in (group[at : at + self.count] for at in range(0, len(group), self.count))
        ]
        texts = [(text, model.renderer.decode(one.tokens)) for text, voters in votes for one in voters]
        sure = self._confidence(model, texts)
        chosen, at = [], 0
        for _, voters in votes:
            own = slice(at, at + len(voters))
            answers = [final_answer(solution) for _, solution in texts[own]]
            chosen.append(voters[elect(answers, [sure[text] for text in texts[own]], self.by, self.clusters)])
            at += len(voters)
        each = len(votes) // max(1, len(groups))
        return [chosen[begin : begin + each] for begin in range(0, len(chosen), each)]

    def _confidence(self, model: LanguageModel, texts: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Return how likely each solution is right, 1 where nobody asks; each is judged once."""
        different = list(dict.fromkeys(texts))
        if self.by == "majority":
            return dict.fromkeys(different, 1.0)
        from hone.data.scoring import confidences

        if self._judge is None and self.evaluator is not None:
            weight = next(model.hf.parameters())
            self._judge = type(model).load(self.evaluator, device=weight.device, dtype=weight.dtype).eval()
        return dict(zip(different, confidences(self._judge or model, different).tolist(), strict=True))
