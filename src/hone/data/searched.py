"""Data that a model makes by searching over the steps of its own answers, or by rolling out from them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hone.data.formats import CONTINUES
from hone.data.sample import Sample
from hone.data.sampled import ModelMade, Texts, model_content
from hone.data.source import Split
from hone.errors import DataError
from hone.parts import part

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.search import Node
    from hone.text.values import ValueHead

SEARCH = "search"  # begins the purpose of a wave whose answers are searched
OPEN, ENDED, CUT = 0, 1, 2  # what became of an answer: it goes on, it ended, it ran out of room
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Kept:
    """A node of a search tree as it is kept.

    Args:
        parent: number of its parent, -1 for the root.
        text: the step to it.
        state: OPEN, ENDED or CUT.
        visits: N, how often the search went through it.
        q: Q, the mean of the values that were backed up, between -1 and 1.
    """

    parent: int
    text: str
    state: int
    visits: int
    q: float


class Grown:
    """A kept search tree."""

    def __init__(self, rows: Sequence[Sequence[Any]]) -> None:
        """Read a tree.

        Args:
            rows: the fields of each node, parents first.
        """
        self.nodes = [Kept(*row) for row in rows]
        self.children: list[list[int]] = [[] for _ in self.nodes]
        for number, node in enumerate(self.nodes):
            if node.parent >= 0:
                self.children[node.parent].append(number)

    def path(self, number: int) -> list[Kept]:
        """Return the nodes from the first step to a node, which stands last.

        Args:
            number: of the node.
        """
        found = []
        while self.nodes[number].parent >= 0:
            found.append(self.nodes[number])
            number = self.nodes[number].parent
        return found[::-1]

    def text(self, number: int) -> str:
        """Return the answer up to a node.

        Args:
            number: of the node.
        """
        return "".join(node.text for node in self.path(number))

    def siblings(self) -> Iterator[tuple[int, list[Kept]]]:
        """Yield nodes with those of their children that can be compared, the most visited node first."""
        order = sorted(range(len(self.nodes)), key=lambda number: -self.nodes[number].visits)
        for number in order:
            known = [self.nodes[child] for child in self.children[number]]
            if len(usable := [node for node in known if node.visits and node.text.strip() and node.state != CUT]) > 1:
                yield number, usable


@part(
    "data",
    "searched",
    papers=[
        ("AlphaMath Almost Zero: process Supervision without process", "arXiv:2405.03553"),
        (
            "Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning",
            "arXiv:2405.00451",
        ),
        (
            "CPL: Critical Plan Step Learning Boosts LLM Generalization in Reasoning Tasks",
            "arXiv:2409.08642",
        ),
        (
            "RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning by Eight-Fold",
            "arXiv:2406.14532",
        ),
        (
            "Boosting Tool Use of Large Language Models via Iterative Reinforced Fine-Tuning",
            "arXiv:2501.09766",
        ),
    ],
    claim="Values of single steps, which a tree search or rollouts find from outcomes alone, make better training data "
    "than outcomes of whole answers.",
    deviations="One tree a prompt, of which the pairs of all nodes count, where MCTS-DPO takes those along one path. "
    "Outcomes alone are backed up: no model evaluates its own steps, as MCTS-DPO's and iTool's do. Ties of PUCT go to "
    "the first child. A step's prior is the geometric mean of its tokens' probabilities, as in AlphaMath; MCTS-DPO "
    "divides the sum of their logarithms by their number to the power of 1.25. `pivots` was verified from the paper's "
    "abstract and from summaries only: its code is not public.",
)
@dataclass(kw_only=True)
class Searched(ModelMade):
    r"""Search over a model's own steps and make training data of what the steps turn out to be worth.

    paths: right and wrong answers in steps with the value Q that the search has found after each, for objective
    `alphamath`; pairs: the best against the worst of the steps that continue one state, with margin log(N_w / N_l), the
    visits of the two, for `mcts-dpo`; advantages: steps with Q > 0 against siblings with Q < 0, with margin Q_w - Q_l,
    for `step-apo`; pivots: no tree, but rollouts from every step of a wrong answer; the step that lowers the share of
    right ones most is set against the step that right rollouts take there most often, for `dpo`. A rollout that runs
    out of room is no right one.

    A right answer is worth 1, any other -1. PUCT(s, a) = Q + c_puct prior sqrt(N(s)) / (1 + N(s, a)).

    Args:
        make: what is made: paths, pairs, advantages or pivots.
        samples_each: continuations of each state; of pivots, answers to each prompt and rollouts from each step.
        simulations: of each tree.
        c_puct: weight of steps that are probable and have been tried little.
        values: what a simulation does where it leaves the tree: "descend" to the end of an answer, whose outcome
            counts; ask the value "head" of the model; or take "zero", as a head says that has learnt nothing.
        value_model: folder of the model whose value head is asked; None takes the one that answers.
        separator: what ends a step, which some token must contain.
        most: most pairs, or right and as many wrong paths, to a prompt.
        hardest: share of the training prompts that are searched: those whose own answers the model finds least
            probable per token.
        search_held_out: held-out prompts that are searched as well, for a loss on held-out data; accuracy needs none.
    """

    make: Literal["paths", "pairs", "advantages", "pivots"] = "pairs"
    samples_each: Annotated[int, Field(ge=2)] = 4
    simulations: Annotated[int, Field(ge=1)] = 8
    c_puct: Annotated[float, Field(ge=0)] = 1.5
    values: Literal["descend", "head", "zero"] = "descend"
    value_model: str | None = None
    separator: Annotated[str, Field(min_length=1)] = "\n"
    most: Annotated[int, Field(ge=1)] = 4
    hardest: Share = 1.0
    search_held_out: Annotated[int, Field(ge=0)] = 0
    _judge: Any = field(init=False, default=None, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what does not go together."""
        if self.value_model is not None and self.values != "head":
            yield "value_model", f"a value model is asked with values: head, not with values: {self.values}"

    def _identity(self) -> list[Any]:
        valued = None if self.value_model is None else model_content(self.value_model)
        grader = self.of.fingerprint()  # its grades are in the trees
        searched = [self.simulations, self.c_puct, self.values, valued, self.separator, grader]
        return [*super()._identity(), _code(), *(searched if self.make != "pivots" else [self.separator])]

    def _choices(self) -> list[Any]:
        return [self.make, self.most, self.hardest, self.search_held_out]

    def describe(self) -> str:
        """Return what is made of what."""
        how = f"{self.simulations} simulations" if self.make != "pivots" else f"{self.samples_each} rollouts a step"
        return f"searched {self.make}: {how} for each prompt of {self.of.describe()}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield what is made of the trees or rollouts, in the order of the source's samples.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: the source cannot tell right answers, no model answers, or there is no value head to ask.
        """
        asked = self._asked(split)
        made = self._pivots(asked, split) if self.make == "pivots" else self._of_trees(asked, split)
        return itertools.islice(made, self.limit if split == "train" else None)

    def _asked(self, split: Split) -> list[Sample]:
        """Return the samples whose prompts are searched, in the source's order."""
        asked = self._plain(split)
        if split == "eval" or self.hardest == 1:
            return asked[: self.search_held_out] if split == "eval" else asked
        surprise = _surprise(self._answering(), asked)
        count = max(1, round(self.hardest * len(asked)))
        hard = sorted(range(len(asked)), key=lambda at: -surprise[at])[:count]
        return [asked[at] for at in sorted(hard)]

    def _of_trees(self, asked: list[Sample], split: Split) -> Iterator[Sample]:
        makers = {"paths": self._paths, "pairs": self._pairs, "advantages": self._advantages}
        rows: Iterator[Any] = self.answers(asked, f"{SEARCH}:{split}")
        for sample, tree in zip(asked, rows, strict=True):
            yield from makers[self.make](sample, Grown(tree))

    def _paths(self, sample: Sample, tree: Grown) -> Iterator[Sample]:
        """Yield the first right and as many wrong answers as there may be, in steps."""
        ended = [number for number, node in enumerate(tree.nodes) if node.state == ENDED and node.visits]
        for right in (True, False):
            found = [number for number in ended if (tree.nodes[number].q > 0) == right]
            for number in found[: self.most]:
                steps = tree.path(number)
                yield replace(
                    sample, kind="steps", answers=tuple(node.text for node in steps),
                    scores=tuple(node.q for node in steps), fields={**sample.fields, "label": float(right)},
                )  # fmt: skip

    def _pairs(self, sample: Sample, tree: Grown) -> Iterator[Sample]:
        """Yield the best against the worst continuation of the most visited nodes."""
        found = 0
        for number, nodes in tree.siblings():
            best, worst = max(nodes, key=lambda node: node.q), min(nodes, key=lambda node: node.q)
            if best.q > worst.q and best.text != worst.text and found < self.most:
                found += 1
                yield self._pair(sample, tree.text(number), best, worst, math.log(best.visits / worst.visits))

    def _advantages(self, sample: Sample, tree: Grown) -> Iterator[Sample]:
        """Yield each continuation with a positive value against each with a negative one."""
        pairs = (
            (number, first, second)
            for number, nodes in tree.siblings()
            for first, second in itertools.product(nodes, nodes)
            if first.q > 0 > second.q and first.text != second.text
        )
        for number, first, second in itertools.islice(pairs, self.most):
            yield self._pair(sample, tree.text(number), first, second, first.q - second.q)

    def _pair(self, sample: Sample, before: str, better: Kept, worse: Kept, margin: float) -> Sample:
        goes_on = OPEN in (better.state, worse.state)  # an end is left out where the other step has none
        return replace(
            sample, kind="pair", prompt=f"{sample.prompt}{before}", answers=(better.text, worse.text),
            fields={**sample.fields, "margin": margin}, extra={**sample.extra, CONTINUES: goes_on},
        )  # fmt: skip

    def _pivots(self, asked: list[Sample], split: Split) -> Iterator[Sample]:
        """Yield wrong answers cut at the step that costs most, against right continuations from before it."""
        wrong: list[tuple[Sample, list[str]]] = []
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            failed = [text for text in dict.fromkeys(texts) if text.strip() and not self.is_right(sample, text)]
            wrong += [(sample, lines(text, self.separator)) for text in failed[: self.most]]
        begun = [
            replace(sample, prompt=f"{sample.prompt}{''.join(steps[:count])}")
            for sample, steps in wrong
            for count in range(len(steps))
        ]
        rollouts = self.answers(begun, f"{split}:rollouts")
        for sample, steps in wrong:
            own = list(itertools.islice(rollouts, len(steps)))
            right = [
                [text for text in texts if self.is_right(sample, "".join(steps[:count]) + text)]
                for count, texts in enumerate(own)
            ]
            shares = [*(len(good) / self.samples_each for good in right), 0.0]  # of all: cut ones are not in `own`
            pivot = lowest_advantage(shares)
            begins = [lines(text, self.separator)[0] for text in right[pivot] if text]
            others = Counter(step for step in begins if step != steps[pivot])
            if others:
                usual = others.most_common(1)[0][0]
                goes_on = usual.endswith(self.separator) or pivot + 1 < len(steps)
                yield replace(
                    sample, kind="pair", prompt=f"{sample.prompt}{''.join(steps[:pivot])}",
                    answers=(usual, steps[pivot]), extra={**sample.extra, CONTINUES: goes_on},
                )  # fmt: skip

    def _answer(self, wave: Sequence[Sample], purpose: str) -> list[Any]:
        """Return the answers to a wave of prompts, or the rows of their trees."""
        return self._search(wave, purpose) if purpose.startswith(SEARCH) else super()._answer(wave, purpose)

    def _search(self, wave: Sequence[Sample], purpose: str) -> list[list[list[Any]]]:
        from hone.samplers.text import Greedy
        from hone.samplers.text import Sample as Sampler
        from hone.text.search import tree_search
        from hone.text.steps import Steps, step_ends

        model = self._answering()
        renderer = model.renderer
        steps = Steps(
            model, [renderer.prompt_ids(sample) for sample in wave], step_ends(model, self.separator),
            renderer.stop_ids, samples=self.samples_each, max_new_tokens=self.max_new_tokens,
            sampler=Sampler(temperature=self.temperature) if self.temperature > 0 else Greedy(),
            seed=int.from_bytes(hashlib.blake2b(f"{self.seed}:{purpose}".encode(), digest_size=5).digest(), "big"),
            outcome=lambda question, text: self.is_right(wave[question], text),
            judge=self._value_head() if self.values == "head" else None,
        )  # fmt: skip
        trees = tree_search(
            steps, steps.roots(), self.simulations, c_puct=self.c_puct, descend=self.values == "descend"
        )
        return [_rows(tree, steps) for tree in trees]

    def _value_head(self) -> tuple[LanguageModel, ValueHead]:
        """Return the model whose value head is asked, with its head, loaded once."""
        from hone.engine.devices import Cluster
        from hone.text.values import load_valued, value_head

        named = self.value_model or self.model
        if self._judge is None:
            self._judge = self._answering() if named is None else load_valued(named, Cluster().device)
        head = value_head(self._judge)
        if head is None or not head.known:
            raise DataError(
                f"{self.describe()}: no value head that has learnt anything was read with the model that the run "
                "starts from, as is done for the objectives alphamath and ovm alone, which train one. Set value_model: "
                "FOLDER of a model that has one, or values: zero"
            )
        return self._judge, head


def _rows(tree: Node[Any], steps: Any) -> list[list[Any]]:
    """Return a tree as plain rows: number of the parent, step, what became of the answer, visits and Q."""
    numbers, rows = {}, list[list[Any]]()
    for node in tree.walk():
        numbers[node] = len(rows)
        state = ENDED if node.state.stop >= 0 else CUT if node.state.cut else OPEN
        parent = -1 if node.parent is None else numbers[node.parent]
        rows.append([parent, steps.step_text(node.state), state, node.visits, node.q])
    return rows


def lines(text: str, separator: str) -> Texts:
    """Return a text cut behind each separator; joined, the parts are the text again.

    Args:
        text: it, not empty.
        separator: what ends a part.
    """
    parts = [f"{one}{separator}" for one in text.split(separator)]
    parts[-1] = parts[-1].removesuffix(separator)
    return [one for one in parts if one]


def lowest_advantage(values: Sequence[float]) -> int:
    """Return the number of the step that lowers the value most, the first of equals.

    Step i leads from a state of value v_i to one of v_{i+1}; its advantage is v_{i+1} - v_i.

    Args:
        values: of n + 1 states, n at least 1.
    """
    return min(range(len(values) - 1), key=lambda step: values[step + 1] - values[step])


def _surprise(model: LanguageModel, samples: Sequence[Sample]) -> list[float]:
    """Return the mean negative log-likelihood of a token of each sample's own answer."""
    import torch

    from hone.modes import evaluating
    from hone.text.pack import pack

    device = next(model.parameters()).device
    found = []
    with evaluating(model), torch.no_grad():
        for sample in samples:
            batch = pack(model.renderer.render(sample)).to(device)
            found.append(float(-(batch.weights * model.logprobs(batch)).sum() / batch.weights.sum().clamp(min=1)))
    return found


@cache
def _code() -> str:
    """Return a hash of the code that searches, so that changing it makes everything anew."""
    text = Path(__file__).parent.parent / "text"
    files = [Path(__file__), *(text / name for name in ("search.py", "steps.py", "values.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
