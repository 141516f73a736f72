"""What a model says of texts: how likely it finds answers, and whether it takes a solution to be right.

The verdict is asked for in words: behind a problem and its solution stands `ASK`, and the model's confidence is

    p(RIGHT) / [p(RIGHT) + p(WRONG)]

Whoever trains a model to judge (data `verdicts`) and whoever asks it (data `self-rewarded`, sampler `rerank`) use the
same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hone.data.sample import Sample
from hone.modes import evaluating
from hone.text.pack import Tree, pack

if TYPE_CHECKING:
    from hone.text.model import LanguageModel

ASK, RIGHT, WRONG = "\nverdict: ", "right", "wrong"
TOKENS = 8192  # most tokens in one forward pass


def question(prompt: str, solution: str) -> str:
    """Return the prompt that asks for a verdict.

    Args:
        prompt: the problem.
        solution: what is judged.
    """
    return f"{prompt}{solution}{ASK}"


def likelihoods(
    model: LanguageModel, asked: Sequence[tuple[str, Sequence[str]]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return log pi(y|x) (n,) and the number of tokens (n,) of the n answers to each prompt.

    Args:
        model: the language model, which is left in the mode it was in.
        asked: prompts, each with its answers, none empty.
    """
    from hone.objectives.answers import answer_logprobs, answers_of

    trees = [
        tree
        for prompt, answers in asked
        for tree in model.renderer.render(
            Sample(kind="list", prompt=prompt, answers=tuple(answers), scores=(0.0,) * len(answers))
        )
    ]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for group in _groups(trees):
            batch = pack(group).to(device)
            answers = answers_of(batch)
            sums, tokens = answer_logprobs(model, batch, answers).cpu().double().numpy(), answers.tokens.cpu().numpy()
            ends = np.cumsum(np.bincount(answers.trees.numpy(), minlength=len(group)))[:-1]
            found += list(zip(np.split(sums, ends), np.split(tokens, ends), strict=True))
    return found


def _groups(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    """Yield the trees in order, at most `TOKENS` tokens at once."""
    group: list[Tree] = []
    for tree in trees:
        if group and sum(map(len, group)) + len(tree) > TOKENS:
            yield group
            group = []
        group.append(tree)
    if group:
        yield group


def confidences(model: LanguageModel, solutions: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return the probability (n,) that a model gives to each solution's being right.

    Args:
        model: one that was trained to give verdicts.
        solutions: (problem, solution).
    """
    asked = [(question(prompt, solution), (RIGHT, WRONG)) for prompt, solution in solutions]
    sums = np.array([logprobs for logprobs, _ in likelihoods(model, asked)]).reshape(-1, 2)
    return 1 / (1 + np.exp(np.clip(sums[:, 1] - sums[:, 0], -700, 700)))
