"""Forgetting prioritized finetuning: train the modules that a new task moves most on a small buffer of other data."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.base import matches, select
from hone.callbacks.base import Callback
from hone.engine import guard
from hone.engine.devices import seed_all
from hone.engine.loop import divide_among
from hone.engine.sharding import copy_into, whole
from hone.errors import HoneError
from hone.options import Nested
from hone.parts import part
from hone.text.pack import Tree

if TYPE_CHECKING:
    from hone.engine.loop import Run

FILE = "fpf.json"
_PHASES = 1 << 40  # added to the step when torch is seeded: no run has so many steps
Named = Sequence[tuple[str, nn.Parameter]]


@torch.no_grad()
def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how much each module has changed.

    |after - before| / max(|before|, |after|), L2 norms over all parameters of a module; 0 where both are zero

    Args:
        before: parameters by dotted name.
        after: the same later.

    Returns:
        By dotted name of the module.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, old in before.items():
        new = after[name].to(old.dtype)
        for place, tensor in enumerate((new - old, old, new)):
            sums[owner(name)][place] += float(whole(tensor.square().sum()))
    return {name: (moved / most) ** 0.5 if (most := max(a, b)) else 0.0 for name, (moved, a, b) in sums.items()}


def owner(name: str) -> str:
    """Return the module that holds a parameter."""
    return name.rpartition(".")[0]


def most_sensitive(scores: Mapping[str, float], sizes: Mapping[str, int], share: float) -> set[str]:
    """Return the modules with the largest scores that fit into a share of all numbers; where none does, the first.

    Args:
        scores: how much each module changes.
        sizes: how many numbers it holds.
        share: of all numbers that may be chosen.
    """
    order = sorted(scores, key=lambda name: (-scores[name], name))
    chosen, room = set[str](), share * sum(sizes.values())
    for name in order:
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return chosen or set(order[:1])


@part(
    "callback",
    "fpf",
    papers=[("Does Continual Learning Equally Forget All Parameters?", "arXiv:2304.04158")],
    claim="A few modules change most when the task changes; training them alone on a small buffer of earlier data, at "
    "the end or now and then, brings back much of what was forgotten at little cost.",
    deviations="The change of a module is relative to its size and is measured over the first steps of a run, which "
    "begin with the change of task, and over windows later on; the paper has its own measures over epochs and tasks. "
    "The buffer is drawn at once from data that are at hand, not gathered from a stream. There is no distillation.",
)
@dataclass(kw_only=True)
class FPF(Callback):
    """Trains only the sensitive modules on a buffer: once at the end (FPF), or every some steps (k-FPF).

    A module is sensitive when |W_w - W_0| / |W_0| is large, w being the window after the change of task at the start of
    the run. Each phase has a fresh AdamW without weight decay; what the run's optimizer holds is left alone. A phase at
    the end is not part of the training seconds. Costs one copy of the trained weights.

    Args:
        data: where the buffer comes from, such as the data of an earlier task; None takes the run's own data.
        buffer: samples in it.
        steps: optimizer steps of a phase.
        every: steps of the run between phases; None makes one phase at the end.
        lr: learning rate in a phase, constant; None takes the optimizer's own.
        share: most trained parameters that the sensitive modules may have, as a share of all.
        modules: patterns of the modules to train in place of those that are measured, such as ["norm", "lm_head"].
        measure: "switch" looks at the first window of the run, "training" at the mean over all windows.
        window: steps of a window.
    """

    data: Annotated[Any, Nested("data")] = None
    buffer: Annotated[int, Field(ge=1)] = 64
    steps: Annotated[int, Field(ge=1)] = 20
    every: Annotated[int, Field(ge=1)] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    modules: list[str] | None = None
    measure: Literal["switch", "training"] = "switch"
    window: Annotated[int, Field(ge=1)] = 10
    trees: list[Tree] = field(init=False, default_factory=list, repr=False)
    source: str = field(init=False, default="")
    anchor: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)
    since: int = field(init=False, default=0)
    seen: list[dict[str, float]] = field(init=False, default_factory=list, repr=False)
    last: int = field(init=False, default=-1)

    def on_start(self, run: Run) -> None:
        """Draw the buffer and begin to measure, or go on where a checkpoint left off.

        Raises:
            HoneError: the objective has several players, the run's own data is a stream, a pattern names nothing, or
                the buffer's data is not what it was.
        """
        if len(run.players) > 1:
            raise HoneError(f"callback 'fpf' trains one player; this objective has {', '.join(run.players)}")
        for pattern in self.modules or ():
            select(pattern, [*{owner(name): None for name, _ in run.trainable}], "fpf.modules")
        begun = self.source
        trees, self.source = self._open(run)
        if begun and begun != self.source:
            raise HoneError(
                "callback 'fpf': its data has changed since this run began; put it back, or start a new run"
            )
        count = min(self.buffer, len(trees))
        drawn = np.random.default_rng([run.recipe.seed, 0]).choice(len(trees), size=count, replace=False)
        self.trees = [trees[int(index)] for index in sorted(drawn)]
        saved, self.anchor = self.anchor, {name: p.detach().clone() for name, p in run.trainable}
        for name, tensor in saved.items():
            copy_into(self.anchor[name], tensor)

    def _open(self, run: Run) -> tuple[Sequence[Tree], str]:
        """Return the samples to draw from, and what identifies them."""
        if self.data is None:
            trees = getattr(run.loader, "trees", None)
            if trees is None:
                raise HoneError(
                    "callback 'fpf': the run's data is a stream; name data for the buffer: callbacks.fpf.data"
                )
            return trees, "own"
        from hone.engine.assemble import acquaint, open_split

        model, more = run.model, {}
        if model.medium == "text":
            acquaint([self.data], lambda: model, run.recipe.build("model"), run.objective)
            more = {"context": model.context}
        opened = open_split(self.data, model, run.objective, "train", **more)
        if opened.trees is None:
            raise HoneError(
                "callbacks.fpf.data: a buffer is drawn from data that is read as a whole; set streaming: false"
            )
        return opened.trees, self.data.fingerprint()

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Measure at the end of a window, and begin a phase when its time has come."""
        if run.step - self.since == self.window:
            self._measure(run)
        if self.every is not None and run.step % self.every == 0:
            began = time.perf_counter()
            row["fpf/loss"] = self._phase(run)
            row["seconds"] = round(row.get("seconds", 0.0) + time.perf_counter() - began, 4)

    def on_end(self, run: Run) -> None:
        """Begin a phase, unless one has just ended."""
        if self.last != run.step:
            self._phase(run)

    def _measure(self, run: Run) -> None:
        """Note what has changed since the window began, and begin the next."""
        now = {name: p.detach() for name, p in run.trainable}
        self.seen.append(changes(self.anchor, now))
        self._anchor(run)

    @torch.no_grad()
    def _anchor(self, run: Run) -> None:
        self.since = run.step
        for name, p in run.trainable:
            self.anchor[name].copy_(p)

    def scores(self, run: Run) -> dict[str, float]:
        """Return how sensitive each module is, by what has been measured so far.

        Args:
            run: the run in progress.
        """
        if not self.seen:  # the run is shorter than a window
            return changes(self.anchor, {name: p.detach() for name, p in run.trainable})
        rows = self.seen[:1] if self.measure == "switch" else self.seen
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def chosen(self, scores: Mapping[str, float], params: Named) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that a phase trains.

        Args:
            scores: how sensitive each module is.
            params: the named parameters that the run trains.
        """
        sizes: dict[str, int] = defaultdict(int)
        for name, p in params:
            sizes[owner(name)] += p.numel()
        if self.modules is None:
            names = most_sensitive(scores, sizes, self.share)
        else:
            names = {module for module in sizes if any(matches(pattern, module) for pattern in self.modules)}
        return [(name, p) for name, p in params if owner(name) in names]

    def _phase(self, run: Run) -> float:
        """Train the sensitive modules on the buffer; return the mean loss of the last step."""
        if not self.seen and run.step > self.since:  # phases come before the first window has ended
            self._measure(run)
        scores = self.scores(run)
        chosen = self.chosen(scores, run.trainable)
        self._record(run, scores, {name for name, _ in chosen})
        flags = [(p, p.requires_grad) for _, p in run.trainable]
        for _, p in run.trainable:
            p.requires_grad_(False)
        for _, p in chosen:
            p.requires_grad_(True)
        rate = self.lr or run.players["model"].rates[0]
        optimizer = torch.optim.AdamW([p for _, p in chosen], lr=rate, weight_decay=0.0)
        loss = 0.0
        try:
            run.model.train()
            for number in range(self.steps):
                seed_all(run.recipe.seed, _PHASES + run.step * self.steps + number, run.cluster.rank)
                loss = self._descend(run, [p for _, p in chosen], self._draw(run, number))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
        self.last = run.step
        self._anchor(run)  # what the phase moves is no sign of the task
        return loss

    def _draw(self, run: Run, number: int) -> list[Tree]:
        """Return the samples of a step: as many of the buffer, in random order, as `batch_tokens` holds."""
        order = np.random.default_rng([run.recipe.seed, 1, run.step, number]).permutation(len(self.trees))
        drawn, room = [self.trees[int(order[0])]], run.recipe.batch_tokens - len(self.trees[int(order[0])])
        for index in order[1:]:
            tree = self.trees[int(index)]
            if len(tree) > room:
                break
            drawn.append(tree)
            room -= len(tree)
        return drawn

    def _descend(self, run: Run, params: list[nn.Parameter], trees: list[Tree]) -> float:
        """Set the gradients of a step, clipped as the run clips; return its mean loss."""
        cluster, recipe, where = run.cluster, run.recipe, tuple(tree.where for tree in trees)
        shares = divide_among(trees, recipe.micro_tokens or recipe.batch_tokens, cluster, run.model.collate)
        units = cluster.sum(sum(float(run.objective.count(share.batch)) for share in shares if share.counts))
        if units <= 0:
            raise HoneError("callback 'fpf': the samples of its buffer have no token that is trained on")
        total = 0.0
        for share in shares:
            with cluster.autocast():
                loss, _ = run.objective.loss(run.model, share.batch)
            guard.check_loss(loss.detach(), run.step, where)
            (loss * share.counts / units).backward()
            total += share.counts * float(loss.detach())
        cluster.reduce_gradients(params)
        guard.clip(params, recipe.clip, run.step, where)
        return cluster.sum(total) / units

    def _record(self, run: Run, scores: Mapping[str, float], trained: Iterable[str]) -> None:
        """Write what was measured and what is trained into the run folder."""
        if run.folder is None or not run.cluster.main:
            return
        modules = {owner(name) for name in trained}
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        table = {name: {"change": score, "trained": name in modules} for name, score in ranked}
        run.folder.write(FILE, {"step": run.step, "windows": len(self.seen), "modules": table})

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured, and the weights that the current window began with."""
        return {"anchor": dict(self.anchor), "since": self.since, "seen": list(self.seen), "last": self.last,
                "source": self.source}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it; its tensors are copied when the run starts.
        """
        self.anchor, self.since, self.seen = dict(state["anchor"]), state["since"], list(state["seen"])
        self.last, self.source = state["last"], state["source"]
