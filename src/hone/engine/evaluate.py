"""Evaluation: the loss on held-out data, and task accuracy of generated answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hone.data.mix import SOURCE
from hone.data.sample import Message, Sample
from hone.data.source import reference
from hone.engine.loop import divide_among
from hone.engine.progress import log
from hone.figures import lower_is_better
from hone.text.generate import generate
from hone.text.pack import Packed, Tree

if TYPE_CHECKING:
    from hone.data.open import Opened
    from hone.engine.devices import Cluster
    from hone.recipe import Recipe
    from hone.text.model import LanguageModel

UNITS = "units"  # among sums, what they are sums over
NO_PROMPT = ("text", "tagged")  # kinds of samples that ask nothing


@dataclass
class Evaluation:
    """What one evaluation found.

    Args:
        loss: mean loss per unit of the objective on the held-out data, None when there is none.
        general_loss: mean negative log-likelihood of the tokens of the general data, None when there is none.
        by_source: the mean loss on the held-out samples of each source, where the data says which is which.
        figures: mean per unit of what the objective reports beside its loss on the held-out data.
        scores: mean of each metric over the samples it applies to.
        answers: one row per answered sample, as written to samples.jsonl.
        drawn: some drawn arrays by what drew them, as kept in `samples/`.
    """

    loss: float | None = None
    general_loss: float | None = None
    by_source: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return the numbers alone."""
        losses = {"loss": self.loss, "general_loss": self.general_loss}
        known = {name: value for name, value in losses.items() if value is not None}
        return {**known, **self.by_source, **self.figures, **self.scores}

    def rank(self) -> list[float] | None:
        """Return what evaluations are ranked by, the smallest being the best; None when nothing was judged.

        That is accuracy, or for arrays the first distance, and then the loss: accuracies are all 0 where whole answers
        would have to be given word for word.
        """
        names = list(self.scores)[:1] if self.drawn else [name for name in self.scores if name == "accuracy"]
        ranked = [self.scores[name] * (1 if lower_is_better(name) else -1) for name in names]
        found = [*ranked, *([] if self.loss is None else [self.loss])]
        return [value if math.isfinite(value) else math.inf for value in found] or None  # NaN would never be beaten


@dataclass(frozen=True)
class Judges:
    """What a model is evaluated on and by.

    Args:
        data: the evaluation data; its source knows how to grade.
        metrics: judges of generated answers.
        sampler: picks tokens.
        general: text rendered as tokens, whose loss shows what is forgotten.
    """

    data: Opened
    metrics: Sequence[Any]
    sampler: Any
    general: Opened | None = None


class Text:
    """Next-token prediction of plain text, whatever the objective is."""

    def count(self, batch: Packed) -> float:
        """Return the number of predicted tokens."""
        return float(batch.weights.sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed negative log-likelihood, and no metrics.

        Args:
            model: the language model.
            batch: packed trees of T tokens.
        """
        return -(batch.weights * model.logprobs(batch)).sum(), {}


def judge(model: LanguageModel, objective: Any, recipe: Recipe, cluster: Cluster, judges: Judges) -> Evaluation:
    """Return the objective's mean loss on held-out data, and the scores of generated answers.

    Args:
        model: the language model.
        objective: gives the loss.
        recipe: says how many samples are answered, and how long answers may be.
        cluster: the processes and the device.
        judges: what to evaluate on and by.
    """
    limit = recipe.micro_tokens or recipe.batch_tokens
    sums = {n: totals(model, objective, group, limit, cluster) for n, group in _groups(judges.data.trees).items()}
    samples = judges.data.first(recipe.eval_samples) if judges.metrics and objective.generates else []
    with cluster.autocast():
        found = answer(
            model, judges.data.rendering.source, samples, judges.metrics, sampler=judges.sampler,
            max_new_tokens=recipe.max_new_tokens, seed=recipe.seed, generating=objective.generate,
        )  # fmt: skip
    whole = Counter[str]()
    for part in sums.values():
        whole.update(part)
    found.figures = means(whole)
    found.loss = found.figures.pop("loss", None)
    marked = {f"loss/{n}": means(part).get("loss") for n, part in sums.items() if n is not None}
    found.by_source = {name: loss for name, loss in marked.items() if loss is not None}
    if judges.general is not None:
        found.general_loss = mean_loss(model, Text(), judges.general.trees, limit, cluster)
    return found


def _groups(trees: Sequence[Tree] | None) -> dict[int | None, list[Tree]]:
    """Return trees by the number of their source where the data is a mixture that marks them, else all under None."""
    groups: dict[int | None, list[Tree]] = {}
    for tree in () if trees is None else (trees[index] for index in range(len(trees))):
        groups.setdefault(int(tree.fields[SOURCE][0]) if SOURCE in tree.fields else None, []).append(tree)
    return dict(sorted(groups.items(), key=lambda item: item[0] or 0))  # the same order on every process


def mean_loss(model: Any, objective: Any, trees: Sequence[Tree] | None, limit: int, cluster: Cluster) -> float | None:
    """Return the objective's mean loss over trees, shared among the processes.

    Args:
        model: the language model, put into evaluation mode meanwhile.
        objective: gives `loss` (a sum) and `count`.
        trees: held-out rendered samples; None or empty gives None.
        limit: most tokens in one forward pass.
        cluster: the processes and the device.
    """
    return means(totals(model, objective, trees, limit, cluster)).get("loss")


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Return sums divided by their units; nothing where there are none."""
    units = sums.get(UNITS, 0.0)
    return {name: value / units for name, value in sums.items() if name != UNITS} if units else {}


@torch.no_grad()
def totals(model: Any, objective: Any, trees: Sequence[Any] | None, limit: int, cluster: Cluster) -> dict[str, float]:
    """Return the sums of the loss and of what is reported beside it, and the units that they are sums over.

    Args:
        model: put into evaluation mode meanwhile.
        objective: gives `loss` (a sum) and `count`.
        trees: held-out samples; None or empty gives nothing.
        limit: most tokens in one forward pass.
        cluster: the processes and the device.
    """
    if trees is None or not len(trees):
        return {}
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {UNITS: 0.0}
    for share in divide_among([trees[i] for i in range(len(trees))], limit, cluster, model.collate):
        with cluster.autocast():
            value, metrics = objective.loss(model, share.batch)
        for name, part in {"loss": value, **metrics, UNITS: objective.count(share.batch)}.items():
            sums[name] = sums.get(name, 0.0) + share.counts * float(part)
    model.train(was_training)
    return {name: cluster.sum(value) for name, value in sums.items()}


def answer(
    model: LanguageModel,
    source: Any,
    samples: Sequence[Sample],
    metrics: Sequence[Any],
    *,
    sampler: Any,
    max_new_tokens: int,
    seed: int = 0,
    generating: Any = generate,
) -> Evaluation:
    """Generate an answer to each sample's prompt and judge it by each metric.

    Args:
        model: the language model.
        source: the data source, which knows how to grade.
        samples: held-out samples; texts and tagged words are passed over, since they have no prompt.
        metrics: called with (source, sample, text); None means that the metric does not apply.
        sampler: picks tokens.
        max_new_tokens: longest answer in tokens.
        seed: seeds the sampler.
        generating: answers prompts, with the arguments of `generate`.
    """
    renderer = model.renderer
    samples = [renderer.worded(sample) for sample in samples if sample.kind not in NO_PROMPT]
    pairs = [(sample, renderer.prompt_ids(sample)) for sample in samples]
    fitting = [(sample, ids) for sample, ids in pairs if model.context is None or len(ids) < model.context]
    if len(fitting) < len(pairs):
        log.warning("%d held-out prompts fill the model's context and are not asked", len(pairs) - len(fitting))
    if not fitting:
        return Evaluation()
    asked, prompts = zip(*fitting, strict=True)
    made = generating(model, prompts, max_new_tokens=max_new_tokens, sampler=sampler, stop=renderer.stop_ids, seed=seed)
    answers = []
    sums: dict[str, list[float]] = {}
    for sample, generations in zip(asked, made, strict=True):
        text = renderer.decode(generations[0].tokens)
        scores = {metric.name: metric(source, sample, text) for metric in metrics}
        for name, value in scores.items():
            if value is not None:
                sums.setdefault(name, []).append(float(value))
        row = {"where": sample.where, "prompt": show_prompt(sample), "expected": expected(sample), "answer": text}
        answers.append({**row, "stopped": bool(generations[0].stopped), **scores})
    return Evaluation(scores={name: sum(v) / len(v) for name, v in sums.items()}, answers=answers)


def show_prompt(sample: Sample) -> str:
    """Return a sample's prompt as text for people."""
    if isinstance(sample.prompt, str):
        return sample.prompt
    turns = list(sample.prompt)
    if sample.kind == "messages" and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return "\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def expected(sample: Sample) -> str:
    """Return a sample's reference answer as text, "" when it has none."""
    if sample.kind == "messages" and not isinstance(sample.prompt, str):
        last = [turn for turn in sample.prompt if turn.role == "assistant"]
        return last[-1].text if last else ""
    if not sample.answers:
        return reference(sample) or ""
    first = sample.answers[0]
    return first if isinstance(first, str) else "\n".join(t.text for t in first if isinstance(t, Message))
