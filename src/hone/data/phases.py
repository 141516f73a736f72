"""The steps of on-policy training: phases of sampling and scoring, cut into optimizer steps.

Everything that a phase does is a function of (seed, phase) and of the model's weights, and a checkpoint holds the trees
of the present phase that have not been handed out, so that a run goes on exactly wherever it was stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hone.data.engines import VLLM
from hone.data.groups import Group, made_of, own_answer, step_ends, trains
from hone.data.loader import State, Steps
from hone.data.sample import Sample
from hone.errors import DataError, HoneError
from hone.rewards.base import Attempt
from hone.text.flat import flatten, unflatten
from hone.text.pack import Tree

if TYPE_CHECKING:
    from hone.data.rollouts import Rollouts
    from hone.engine.loop import Run
    from hone.text.generate import Generation
    from hone.text.render import Renderer

log = logging.getLogger("hone")
AGAIN = 8  # how often a phase that leaves nothing to train on is asked again
SHOWN = 4  # groups of a phase whose first answer is written to rollouts.jsonl


@dataclass(frozen=True)
class Asked:
    """One prompt of a phase.

    Args:
        index: number of its sample in the data.
        sample: it.
        prompt: (n,) token ids.
        own: (m,) ids of the source's own answer, empty where it has none.
        given: how many of them the model is given.
    """

    index: int
    sample: Sample
    prompt: np.ndarray
    own: np.ndarray
    given: int

    @property
    def question(self) -> np.ndarray:
        """Token ids that the model goes on from."""
        return np.concatenate([self.prompt, self.own[: self.given]])


class Phases(Steps):
    """Steps over what the model itself answers. The state's `samples` counts the prompts asked since the beginning."""

    trees = None  # there is nothing that could be indexed

    def __init__(self, source: Rollouts, samples: Sequence[Sample], renderer: Renderer, seed: int) -> None:
        """Prepare to sample; `join` gives the run.

        Args:
            source: its options say how.
            samples: what is asked.
            renderer: makes the prompts.
            seed: the order of the prompts and the answers are drawn from it.

        Raises:
            DataError: there are no samples.
        """
        if not samples:
            raise DataError("there is nothing to ask: the data has no samples that fit data.max_tokens")
        super().__init__({})
        self.source, self.samples, self.renderer, self.seed = source, samples, renderer, seed
        self.run: Run | None = None
        self.asked = self.phase = self.skipped = 0
        self._told_long = False  # that some own answers have no room
        self.rates = np.full(len(samples), np.nan)  # share of the answers to each prompt that passed, when last asked
        self.queue: list[list[Tree]] = []
        self.kept: list[Tree] = []  # earlier groups, for replay
        self._figures: dict[str, float] = {}
        self._back = self.asked, self.phase, self.skipped, self.rates, self.queue, self.kept
        self._engine: VLLM | None = None
        self._ordered: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the prompts, were none left out."""
        return self.total_steps(1)

    def total_steps(self, epochs: float) -> int:
        """Return the number of steps of some passes over the prompts, were none left out.

        Args:
            epochs: passes, may be fractional.
        """
        phases = math.ceil(epochs * len(self.samples) / self.source.prompts)
        return phases * self.source.updates * self.source.passes

    def join(self, run: Run) -> None:
        """Take the run whose model answers, and let the rewards prepare.

        Args:
            run: the run in progress.
        """
        self.run = run
        if self.source.engine == "vllm":
            self._engine = VLLM(run)
        for reward in self.source.judges():
            reward.setup(run)

    def figures(self) -> dict[str, float]:
        """Return what the latest phase had to report; nothing twice."""
        found, self._figures = self._figures, {}
        return found

    def __next__(self) -> list[Tree]:
        """Return the trees of the next step, sampling a phase when none is left."""
        rates = self.rates if self.queue else self.rates.copy()
        self._back = self.asked, self.phase, self.skipped, rates, list(self.queue), self.kept
        if not self.queue:
            self.queue = self._sample()
        return self.queue.pop(0)

    def rewind(self) -> None:
        """Take back the latest `next()`, also one that failed; what it had sampled is sampled again."""
        self.asked, self.phase, self.skipped, self.rates, self.queue, self.kept = self._back
        self._figures = {}

    def state_dict(self) -> State:
        """Return the position, with the trees of the phase that are still to come."""
        return {
            "samples": self.asked, "phase": self.phase, "skipped": self.skipped, "rates": torch.from_numpy(self.rates),
            "sizes": [len(step) for step in self.queue],
            "queue": flatten([tree for step in self.queue for tree in step]), "kept": flatten(self.kept),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Go on from a position.

        Args:
            state: as `state_dict` returned it.

        Raises:
            DataError: the data is not what it was.
        """
        if len(state["rates"]) != len(self.samples):
            raise DataError(
                f"the checkpoint was made with {len(state['rates']):,} prompts, and the data has "
                f"{len(self.samples):,}: restore it, or start a new run"
            )
        self.asked, self.phase, self.skipped = state["samples"], state["phase"], state["skipped"]
        self.rates = state["rates"].cpu().numpy().copy()
        trees = iter(unflatten(state["queue"]))
        self.queue = [[next(trees) for _ in range(size)] for size in state["sizes"]]
        self.kept, self._figures = unflatten(state["kept"]), {}

    def _sample(self) -> list[list[Tree]]:
        """Return the steps of a new phase."""
        run = self.run
        if run is None:
            raise DataError(
                "data: rollouts are what the model answers while it trains, so nothing can look at them before; use an "
                "adapter that needs no data"
            )
        began = time.perf_counter()
        if run.display is not None:
            run.display.update(run.step, f"phase {self.phase + 1}: sampling answers")
        for again in range(AGAIN + 1):
            groups, spare = self._gather(run, again)
            if groups or spare:
                self._report(groups, spare, time.perf_counter() - began)
            if trees := self._trees(run, groups or spare):
                break
            log.warning("phase %d: try %d of %d left nothing to train on", self.phase + 1, again + 1, AGAIN + 1)
        self._show(run, groups or spare)
        if not trees:
            raise DataError(self._nothing(groups or spare))
        self.phase += 1
        return self._cut(trees)

    def _gather(self, run: Run, again: int) -> tuple[list[Group], list[Group]]:
        """Return groups that pass `drop`, after asking for more where it says so, and all of the first prompts.

        Args:
            run: the run in progress.
            again: how often this phase has been asked before.
        """
        source = self.source
        groups: list[Group] = []
        spare: list[Group] = []
        for attempt in range(source.refill + 1):
            found = self._groups(run, source.prompts - len(groups), again * (source.refill + 1) + attempt)
            kept = [group for group in found if not group.answers or self._keeps(group)]
            groups, spare = groups + kept, spare or found
            if len(groups) >= source.prompts:
                break
        return groups, spare

    def _trees(self, run: Run, groups: list[Group]) -> list[Tree]:
        """Return what groups give to train on. Those without it still count in what others are compared with."""
        generator = np.random.default_rng([self.seed, self.phase, 2])
        trees = made_of(groups, self.source, self.renderer, generator)
        if not any(map(trains, trees)):
            return []
        return [tree for tree in run.objective.appraise(run, trees) if trains(tree)]

    def _nothing(self, groups: list[Group]) -> str:
        """Return why there is nothing to train on in groups, and what to change."""
        if not groups:
            return (
                f"phase {self.phase + 1}: every sample of {AGAIN + 1} tries was left out: a reward failed on each, or "
                "none has an answer of its own to learn from"
            )
        source, masks = self.source, self.source.unfinished == "mask"
        ended = [one.stopped for group in groups for one in group.answers]
        if masks and ended and not any(ended):
            return (
                f"phase {self.phase + 1}: in the last of {AGAIN + 1} tries every answer ran out of tokens, and "
                "data.unfinished: mask trains on none of those; raise data.max_new_tokens, which is "
                f"{source.max_new_tokens}, or set data.unfinished=train"
            )
        which = "the answers to a prompt that ended" if masks else "the answers to a prompt"
        return (
            f"data.make: {source.made} left nothing of phase {self.phase + 1} to train on, in {AGAIN + 1} tries: "
            f"{which} are all worth the same; use more samples_each, other prompts, or a reward that tells answers "
            "apart"
        )

    def _cut(self, trees: list[Tree]) -> list[list[Tree]]:
        """Return a phase's trees, with earlier ones beside them, as optimizer steps."""
        source, generator = self.source, np.random.default_rng([self.seed, self.phase, 1])
        again: list[Tree] = []
        if source.replay:
            count = min(len(self.kept), round(source.replay * len(trees)))
            again = [self.kept[i] for i in generator.choice(len(self.kept), count, replace=False)] if count else []
            self.kept = (self.kept + trees)[-source.buffer :]
        everything = trees + again
        steps = []
        for number in range(source.passes):
            whole = number == 0 and source.updates == 1
            order = np.arange(len(everything)) if whole else generator.permutation(len(everything))
            parts = np.array_split(order, min(source.updates, len(everything)))
            steps += [[everything[i] for i in part] for part in parts]
        return steps

    def _keeps(self, group: Group) -> bool:
        """Return whether a group is trained on."""
        worth = [judged.total for judged in group.judged]
        if self.source.drop == "even":
            return max(worth) > min(worth)
        own = worth[: len(group.answers)] or worth  # what the data demonstrate solves nothing
        return self.source.drop == "none" or max(own) >= self.source.solved

    def _groups(self, run: Run, count: int, attempt: int) -> list[Group]:
        """Ask some prompts, each process its share, and return their groups on every process."""
        asked = list(self._next_prompts(count, run))
        cluster = run.cluster
        mine, trouble = list[Group](), ""
        try:
            mine = self._answer(run, asked[cluster.rank :: cluster.world], attempt)
        except HoneError as error:
            if cluster.world == 1:
                raise
            trouble = str(error)
        if trouble := cluster.agree(trouble):
            raise HoneError(trouble)
        shares = [mine]
        if cluster.world > 1:
            rows = cluster.gather([group.dump() for group in mine])
            shares = [[Group.load(one, asked[rank :: cluster.world]) for one in own] for rank, own in enumerate(rows)]
        groups = sorted((group for share in shares for group in share), key=lambda group: group.place)
        self.skipped += len(asked) - len(groups)
        for group in groups:
            passed = [judged.total >= self.source.solved for judged in group.judged[: len(group.answers)]]
            self.rates[group.asked.index] = sum(passed) / len(passed) if passed else np.nan
        return groups

    def _next_prompts(self, count: int, run: Run) -> Iterator[Asked]:
        """Yield the next prompts in the order of the epochs, passing over those that are too hard or too easy."""
        source, passed = self.source, 0
        while count:
            epoch, index = divmod(self.asked, len(self.samples))
            number, self.asked = int(self._order(epoch)[index]), self.asked + 1
            rate = self.rates[number]
            if not np.isnan(rate) and not source.least <= rate <= source.most and passed < len(self.samples):
                passed += 1
                continue
            count, passed = count - 1, 0
            yield self._ask(number, run)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of the prompts in an epoch; the latest is kept, since most prompts may be passed over."""
        if self._ordered is None or self._ordered[0] != epoch:
            order = np.arange(len(self.samples))
            if self.source.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
            self._ordered = epoch, order
        return self._ordered[1]

    def _ask(self, number: int, run: Run) -> Asked:
        """Return a prompt as it is asked now."""
        sample, source = self.samples[number], self.source
        prompt = self.renderer.prompt_ids(sample)
        own = np.zeros(0, np.int32)
        if source.hints != "none" or source.demonstrations:
            own = own_answer(self.renderer, sample)
        if len(own) and len(prompt) + len(own) > source.max_tokens:
            if not self._told_long:
                log.warning(
                    "%s: the prompt with its own answer has %d tokens, more than data.max_tokens (%d); such answers "
                    "are neither hints nor demonstrations", sample.where, len(prompt) + len(own), source.max_tokens,
                )  # fmt: skip
            self._told_long = True
            own = own[:0]
        given = 0
        if source.hints == "binomial" and len(own):
            progress = min(1.0, run.step / max(1, source.hint_until * run.total))
            share = source.hint_to + (source.hint_from - source.hint_to) * (1 + math.cos(math.pi * progress)) / 2
            ends = step_ends(self.renderer, own)
            drawn = np.random.default_rng([self.seed, self.phase, number, 3]).binomial(len(ends), share)
            given = 0 if progress >= 1 or not drawn else min(ends[drawn - 1], len(own) - 1)
        return Asked(number, sample, prompt, own, given)

    def _answer(self, run: Run, asked: list[Asked], attempt: int) -> list[Group]:
        """Sample and score the answers to some prompts, but for those on which a reward failed or without answers."""
        from hone.rewards.judge import judge

        if not asked:
            return []
        source, renderer = self.source, self.renderer
        now = not run.objective.spares_rollouts(run)
        if not now and not source.demonstrations:
            raise DataError(
                "this objective learns from the data's own answers in some phases; set data.demonstrations=1, and take "
                "data that has answers"
            )
        made = self._generate(run, asked, attempt) if now else [[] for _ in asked]
        attempts: list[Attempt] = []
        for place, (prompt, answers) in enumerate(zip(asked, made, strict=True)):
            before = renderer.decode(prompt.own[: prompt.given])
            attempts += [
                Attempt(prompt.sample, renderer.decode(one.tokens), one.tokens, one.stopped, place, before)
                for one in answers
            ]
            if source.demonstrations and len(prompt.own):
                rest = prompt.own[prompt.given :]
                if rest[-1] in renderer.stop_ids:  # which rewards are not shown of the model's own answers either
                    rest = rest[:-1]
                attempts.append(Attempt(prompt.sample, renderer.decode(rest), rest, True, place, before))
        judged = judge(source.judges(), attempts, source, on_error=source.on_error, patience=source.patience)
        groups = []
        for place, (prompt, answers) in enumerate(zip(asked, made, strict=True)):
            mine = [i for i, one in enumerate(attempts) if one.group == place]
            found = [judged[i] for i in mine]
            known = [one for one in found if one is not None]
            if known and len(known) == len(found):  # a prompt without an answer to learn from has none
                groups.append(Group(place * run.cluster.world + run.cluster.rank, prompt, answers, known))
        return groups

    def _generate(self, run: Run, asked: list[Asked], attempt: int) -> list[list[Generation]]:
        from hone.engine.sharding import gathered
        from hone.samplers.text import Sample as Sampler

        source = self.source
        drawn = np.random.default_rng([self.seed, self.phase, attempt, run.cluster.rank]).integers(2**62)
        if self._engine is not None:
            self._engine.update(run)
            return self._engine.generate(
                [prompt.question for prompt in asked], samples=source.samples_each, seed=int(drawn),
                max_new_tokens=source.max_new_tokens, temperature=source.temperature, stop=self.renderer.stop_ids,
            )  # fmt: skip
        # What is learned from is sampled as the objective answers, but for those that answer by a search.
        sample = getattr(run.objective, "roll_out", run.objective.generate)
        with gathered(run.model), run.cluster.autocast():
            found: list[list[Generation]] = sample(
                run.model, [prompt.question for prompt in asked], samples=source.samples_each,
                max_new_tokens=source.max_new_tokens, sampler=Sampler(temperature=source.temperature),
                stop=self.renderer.stop_ids, seed=int(drawn), batch=source.batch, scored_at=source.temperature,
            )  # fmt: skip
        return found

    def _report(self, groups: list[Group], spare: list[Group], seconds: float) -> None:
        """Note the figures of a phase."""
        shown = groups or spare
        answers = [one for group in shown for one in group.answers]
        judged = [one for group in shown for one in (group.judged[: len(group.answers)] or group.judged)]
        names = sorted({name for one in judged for name in one.parts})
        whole = [one.total for one in judged]
        self._figures = {
            "rollout/reward": float(np.mean(whole)),
            **{f"rollout/{name}": float(np.mean([one.parts.get(name, 0.0) for one in judged])) for name in names},
            "rollout/passed": float(np.mean([worth >= self.source.solved for worth in whole])),
            "rollout/length": float(np.mean([len(one.tokens) for one in answers] or [0])),
            "rollout/ended": float(np.mean([float(one.stopped) for one in answers] or [1.0])),
            "rollout/groups": float(len(groups)), "rollout/skipped": float(self.skipped),
            "rollout/seconds": round(seconds, 4),
        }  # fmt: skip
        if not groups:
            log.warning("phase %d: no group passed drop: %s; all are kept", self.phase + 1, self.source.drop)

    def _show(self, run: Run, groups: list[Group]) -> None:
        """Write some answers of a phase where people can read them."""
        if run.folder is None or not run.cluster.main:
            return
        for group in groups[:SHOWN]:
            shown = group.answers[0].tokens if group.answers else group.asked.own
            text = self.renderer.decode(shown)
            run.folder.append("rollouts.jsonl", {
                "step": run.step, "phase": self.phase + 1, "where": group.asked.sample.where,
                "prompt": self.renderer.decode(group.asked.question), "answer": text,
                "reward": group.judged[0].total, **group.judged[0].parts,
            })  # fmt: skip
