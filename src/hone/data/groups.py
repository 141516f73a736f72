"""Groups of answers to one prompt, and the trees that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hone.data.sample import opened
from hone.rewards.judge import Appraised
from hone.text.generate import Generation
from hone.text.pack import CHOSEN, SCORE, Tree, some_segments

if TYPE_CHECKING:
    from hone.data.phases import Asked
    from hone.data.rollouts import Rollouts
    from hone.data.sample import Sample
    from hone.text.render import Renderer

REWARD = "reward"  # per-segment field of an answer: what it is worth in all
FOREIGN = "foreign"  # per-segment field of an answer: 1 where the model did not write it
LOGPROB = "logprob"  # per-token value: log-probability under the model that sampled it
CREDIT = "credit"  # per-token value: what the answer earns at this token
HINT = "hint"  # per-segment field: 1 for what the model was given of an answer


@dataclass(frozen=True, eq=False)
class Group:
    """The answers to one prompt.

    Args:
        place: of the prompt among those of the phase.
        asked: the prompt.
        answers: what the model said.
        judged: what each answer is worth; one more than answers where the source's own joins the group.
    """

    place: int
    asked: Asked
    answers: list[Generation]
    judged: list[Appraised]

    def dump(self) -> dict[str, Any]:
        """Return what other processes need of it, as JSON can hold it."""
        return {
            "place": self.place,
            "answers": [
                [a.tokens.tolist(), a.logprobs.tolist(), a.stopped, a.stop_token, a.stop_logprob] for a in self.answers
            ],
            "judged": [asdict(one) for one in self.judged],
            "index": self.asked.index,
        }

    @classmethod
    def load(cls, row: dict[str, Any], asked: Sequence[Asked]) -> Group:
        """Invert `dump`.

        Args:
            row: what it returned.
            asked: the prompts of the process that it comes from.
        """
        mine = next(one for one in asked if one.index == row["index"])
        answers = [
            Generation(np.array(tokens, np.int32), np.array(logprobs), stopped, token, logprob)
            for tokens, logprobs, stopped, token, logprob in row["answers"]
        ]
        judged = [
            Appraised(**{**one, "steps": tuple((end, worth) for end, worth in one["steps"])}) for one in row["judged"]
        ]
        return cls(row["place"], mine, answers, judged)


def made_of(
    groups: Sequence[Group], source: Rollouts, renderer: Renderer, generator: np.random.Generator
) -> list[Tree]:
    """Return the trees that a source makes of groups; those of which nothing can be made are left out.

    Args:
        groups: the groups of a phase.
        source: its options say what is made.
        renderer: decodes answers, to find the tokens that parts of them end with.
        generator: for choices.
    """
    trees = []
    for group in groups:
        whole = tree_of(group, source, renderer)
        worth = np.array([judged.total for judged in group.judged])
        own = len(group.answers)
        trees.append(whole if source.made == "groups" else _choice(whole, worth, own, source, generator))
    return [tree for tree in trees if tree is not None]


def _choice(whole: Tree, worth: np.ndarray, own: int, source: Rollouts, generator: np.random.Generator) -> Tree | None:
    """Return a tree with what is chosen of a group; None where there is nothing to choose.

    Args:
        whole: the group.
        worth: (A,) of its answers, a demonstration the last of them.
        own: how many of them are the model's.
        source: says what is made.
        generator: for choices.
    """
    first = len(whole.tokens) - len(worth)
    usable = np.flatnonzero([weight.any() for weight in whole.weights[first:]])
    if not len(usable):
        return None
    best, worst = int(usable[worth[usable].argmax()]), int(usable[worth[usable].argmin()])
    if source.made == "list":
        differ = np.float32(worth[best]) > np.float32(worth[worst])  # as objectives will see them
        return _picked(whole, first, usable, {SCORE: worth}) if differ or not source.compares else None
    if source.made == "pairs":
        marks = np.full(len(worth), np.nan)
        marks[[best, worst]] = 1.0, 0.0
        return _picked(whole, first, (best, worst), {CHOSEN: marks}) if worth[best] > worth[worst] else None
    if source.made == "curated":
        drawn = usable[usable < own]  # real data are mixed in whatever they are worth: they do not compete
        odds = np.exp((worth[drawn] - worth[drawn].max(initial=-np.inf)) / source.curation)
        chosen = [int(drawn[generator.choice(len(drawn), p=odds / odds.sum())])] if len(drawn) else []
        return _picked(whole, first, [*chosen, *(int(i) for i in usable[usable >= own])], {})
    return _picked(whole, first, (best,), {})


def trains(tree: Tree) -> bool:
    """Return whether an answer of a tree is trained on; what the model was given of one is no answer.

    Args:
        tree: made of a group.
    """
    hints = tree.fields.get(HINT, (0.0,) * len(tree.tokens))
    return any(weight.any() and hint != 1 for weight, hint in zip(tree.weights, hints, strict=True))


def tree_of(group: Group, source: Rollouts, renderer: Renderer) -> Tree:
    """Return a prompt, what was given of the answer, and all answers as one tree.

    Args:
        group: the answers to a prompt.
        source: says what becomes of answers that ran out of tokens.
        renderer: decodes answers, to find the tokens that parts of them end with.
    """
    asked = group.asked
    tokens, weights, parents = [asked.prompt], [np.zeros(len(asked.prompt), np.float32)], [-1]
    fields: dict[str, list[float]] = {REWARD: [np.nan], FOREIGN: [np.nan], HINT: [0.0]}
    values: dict[str, list[np.ndarray]] = {name: [np.zeros(len(asked.prompt))] for name in (LOGPROB, CREDIT)}
    hint = asked.own[: asked.given]
    if len(hint):
        tokens.append(hint)
        weights.append(np.ones(len(hint), np.float32))
        parents.append(0)
        for name, value in ((REWARD, np.nan), (FOREIGN, 1.0), (HINT, 1.0)):
            fields[name].append(value)
        for name in values:
            values[name].append(np.zeros(len(hint)))
    drawn = [(*one.trajectory(), one.stopped, 0.0) for one in group.answers]
    if len(group.judged) > len(drawn):
        rest = asked.own[asked.given :]
        drawn.append((rest, np.zeros(len(rest)), True, 1.0))
    for (ids, logprobs, stopped, foreign), judged in zip(drawn, group.judged, strict=True):
        trains = 1.0 if stopped or source.unfinished == "train" else 0.0
        tokens.append(ids.astype(np.int32))
        weights.append(np.full(len(ids), trains, np.float32))
        parents.append(1 if len(hint) else 0)
        for name, value in ((REWARD, judged.total), (FOREIGN, foreign), (HINT, 0.0)):
            fields[name].append(value)
        values[LOGPROB].append(logprobs.astype(np.float64))
        values[CREDIT].append(credits(ids, judged, renderer))
        for name, worth in judged.parts.items():
            fields.setdefault(f"{REWARD}/{name}", [np.nan] * (len(tokens) - 1)).append(worth)
    return Tree(
        tuple(tokens), tuple(weights), tuple(parents), {name: tuple(row) for name, row in fields.items()},
        asked.sample.where, {name: tuple(rows) for name, rows in values.items()},
    )  # fmt: skip


def own_answer(renderer: Renderer, sample: Sample) -> np.ndarray:
    """Return the ids of the source's own answer as training would see them, its end included.

    Of a conversation that is its last turn, which is what `prompt_ids` asks for.

    Args:
        renderer: renders it.
        sample: a prompt with an answer; of another kind, nothing is returned.
    """
    if sample.kind not in ("completion", "messages"):
        return np.zeros(0, np.int32)
    tree = renderer.render(opened(sample))[0]
    return np.concatenate(tree.tokens)[np.concatenate(tree.weights) != 0].astype(np.int32)


def step_ends(renderer: Renderer, ids: np.ndarray) -> list[int]:
    """Return after how many tokens each line of an answer ends, the last one at its end.

    Args:
        renderer: decodes.
        ids: (n,) token ids.
    """
    lines = [place + 1 for place, token in enumerate(ids) if "\n" in renderer.tokenizer.decode([int(token)])]
    return sorted({*lines, len(ids)})


def credits(ids: np.ndarray, judged: Appraised, renderer: Renderer) -> np.ndarray:
    """Return what an answer earns at each of its tokens (n,): its parts where they end, the rest at its last token.

    Args:
        ids: (n,) token ids.
        judged: what the answer is worth.
        renderer: decodes, to find the token in which a part ends.
    """
    found = np.zeros(len(ids))
    rest = judged.total
    if judged.steps:
        ends = np.array([len(renderer.decode(ids[: n + 1])) for n in range(len(ids))])
        for end, worth in judged.steps:
            found[min(int(np.searchsorted(ends, end)), len(ids) - 1)] += worth
            rest -= worth
    found[-1] += rest
    return found


def _picked(tree: Tree, first: int, which: Sequence[int] | np.ndarray, fields: dict[str, np.ndarray]) -> Tree:
    """Return a tree with some of its answers alone, trained on as they were, and with fields of the answers.

    Args:
        tree: a whole group.
        first: number of the first answer's segment.
        which: numbers of the answers.
        fields: (A,) numbers of all answers by name.
    """
    kept = [*range(first), *(first + int(number) for number in which)]
    weights = [np.zeros_like(tree.weights[i]) if i < first else tree.weights[i] for i in kept]
    own = {name: tuple(np.nan if i < first else float(row[i - first]) for i in kept) for name, row in fields.items()}
    return replace(some_segments(tree, kept), weights=tuple(weights), fields=own, values={})
