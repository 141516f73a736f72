"""A contest of variants: what each costs, at which setting it does best, and how it fares on every seed."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hone import options as opt
from hone import parts
from hone.engine.progress import Display
from hone.errors import HoneError, RecipeError, nearest
from hone.evidence.beginnings import share
from hone.evidence.budget import Budget
from hone.evidence.cells import TO_READ, Job, Store, judged, values
from hone.evidence.pool import Pool
from hone.evidence.variants import Settings, Variant, grid, show
from hone.figures import is_share, lower_is_better
from hone.recipe import Recipe

log = logging.getLogger(__name__)
TUNING_SEED = 1_000_003  # apart from the seeds that are compared, so that no variant is chosen on them
LEVEL = 0.95  # of every interval
_DEARER = ("batch_tokens", "micro_tokens", "adapter", "model", "data", "precision")  # change what a step costs
SAVE_SECONDS = 30.0  # of training between checkpoints: what a run loses when its process is killed
COSTS = ("training_seconds", "tokens_per_second", "peak_memory", "trained", "flops", "tokens", "steps")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Args:
        name: of the comparison.
        variants: what competes.
        seeds: how many paired seeds; the first is that of the recipes.
        budget: what every run may spend.
        tune: values by dotted path; every variant tries every combination on one seed and keeps its best.
        metric: what ranks the variants; "" takes accuracy where there is one, else the loss.
        baseline: label of the variant that the others are compared with; "" takes the first.
        command: what the user typed.
    """

    name: str
    variants: tuple[Variant, ...]
    seeds: int = 3
    budget: Budget = field(default_factory=Budget)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    metric: str = ""
    baseline: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            HoneError: a baseline that is no variant, a metric that no variant has, a tuned setting that a variant does
                not have, or stages under a budget.
        """
        labels = [variant.label for variant in self.variants]
        if self.baseline and self.baseline not in labels:
            hint = nearest(self.baseline, labels) or f"variants: {', '.join(labels)}"
            raise HoneError(f"--baseline: there is no variant '{self.baseline}' ({hint})")
        names = {name for variant in self.variants for name in metric_names(variant.recipe())}
        if self.metric and self.metric not in names and self.metric.partition("@")[0] + "@n" not in names:
            _refuse_unknown(self.metric, names)
        if clash := [path for variant in self.variants for path in variant.settings if path in self.tune]:
            raise HoneError(f"--tune: {clash[0]} is varied already; a setting is either varied or tuned")
        if self.budget.measured and self.dearer:
            raise HoneError(
                f"--tune: {self.dearer[0]} changes what a step costs, so that trials under a budget of "
                f"{self.budget.kind} would not be equal; --vary it instead, or give the budget in steps"
            )
        for variant in self.variants:
            if self.budget.kind != "recipe" and variant.fields.get("stages"):
                raise HoneError(f"--budget: '{variant.label}' has stages, whose lengths only the recipe can give")
            for trial in grid(self.tune):
                try:
                    variant.recipe(**trial)
                except RecipeError as error:
                    raise HoneError(f"--tune: does not fit '{variant.label}': {error}") from error

    @property
    def dearer(self) -> list[str]:
        """What is tuned and changes what a step costs."""
        return [path for path in self.tune if path.partition(".")[0] in _DEARER]

    @property
    def key(self) -> str:
        """Return a hash of what is compared, apart from the number of seeds and how the result is shown."""
        content = [[(v.label, v.fields) for v in self.variants], self.budget.plain(), dict(self.tune)]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass
class Entrant:
    """A variant on its way through a comparison.

    Args:
        variant: what competes.
        steps: optimizer steps of its runs, None until the budget is known, and where stages have lengths of their own.
        flops: operations of a step; None for stages, of which the first alone is measured.
        saves: steps between the checkpoints of runs whose recipe asks for none.
        reason: why it is out, "" while it is not.
        tuned: the settings it does best with.
        trials: what each setting that was tried gave.
        note: what a reader should know of the tuning.
        jobs: its runs by seed.
        figures: what each finished run found, by seed.
        failures: why runs failed, by seed.
    """

    variant: Variant
    steps: int | None = None
    flops: float | None = None
    saves: int | None = None
    reason: str = ""
    tuned: Settings = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    jobs: dict[int, Job] = field(default_factory=dict)
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """Optimizer steps of its runs, or those that the first of them has taken."""
        return self.steps or next((int(found["steps"]) for found in self.figures.values()), None)

    @property
    def failure(self) -> str:
        """Why it is out or the first of its runs failed, "" when neither."""
        return next((text for text in (self.reason, *self.failures.values()) if text), "")

    def fields(self, budget: Budget, settings: Settings, seed: int) -> dict[str, Any]:
        """Return what a run of this variant sets beyond its recipe.

        Args:
            budget: what it may spend.
            settings: tuned settings.
            seed: its seed.
        """
        length = {} if budget.kind == "recipe" else {"steps": self.steps, "epochs": None}
        own = self.variant.fields.get("checkpoint_every") or not self.saves
        return {**settings, **length, **({} if own else {"checkpoint_every": self.saves}), "seed": seed}


class Contest:
    """Runs a comparison phase by phase: measure, tune, run."""

    def __init__(
        self,
        comparison: Comparison,
        store: Store,
        pool: Pool,
        display: Display,
        *,
        keeps: str = "model",
        retry: bool = False,
        alone: bool = False,
    ) -> None:
        """Prepare a comparison.

        Args:
            comparison: what is compared.
            store: where cells lie.
            pool: what computes them.
            display: says how it goes.
            keeps: what stays of the compared runs besides their figures: "model", `TO_READ` or nothing.
            retry: compute cells again that failed before.
            alone: compute one cell at a time.
        """
        self.retry, self.alone = retry, alone
        self.comparison, self.store, self.pool, self.display, self.keeps = comparison, store, pool, display, keeps
        self.entrants = [Entrant(variant) for variant in comparison.variants]
        self._judged: dict[tuple[Path, str], int] = {}  # how many samples a share of a finished run is a mean over
        self.width = self.threads = 1
        first = comparison.variants[0].recipe().seed
        self.seeds = list(range(first, first + comparison.seeds))

    @property
    def going(self) -> list[Entrant]:
        """The variants that have not failed."""
        return [entrant for entrant in self.entrants if not entrant.reason]

    def run(self, report: Callable[[], None]) -> None:
        """Go through all phases.

        Args:
            report: writes down how it stands between two phases.

        Raises:
            Interrupted: the user stopped it.
        """
        self._measure()
        report()
        self._tune()
        report()
        self._race()

    def _measure(self) -> None:
        """Find out what a step of each variant costs, and from the budget how many steps it takes."""
        trials = len(grid(self.comparison.tune)) if self.comparison.tune else 0
        coming = max(self.comparison.seeds, trials) * len(self.entrants)
        self.width = 1 if self.alone else self.pool.width(0, coming)
        peaks = self._measured(self.going[:1]) + self._measured(self.going[1:])  # the first shows how many fit
        width = 1 if self.alone else self.pool.width(max(peaks, default=0), coming)
        if width != self.width and self.comparison.budget.kind == "seconds":  # others share the machine differently
            self.width = width
            self._measured(self.entrants)
        self.width = width

    def _measured(self, entrants: Sequence[Entrant]) -> list[int]:
        self.threads = self.pool.threads(self.width)
        singly = self.comparison.budget.kind == "seconds"  # a neighbour slows a cell down, and not all have one
        also = f"{self.threads} threads{', singly' * singly}"
        jobs = {}
        for entrant in entrants:
            recipe = entrant.variant.recipe(**entrant.fields(Budget(), {}, self.seeds[0]))
            label = f"{entrant.variant.label} measured"
            try:
                jobs[entrant.variant.label] = self.store.job("measure", recipe, label, keeps="", also=also)
            except HoneError as error:  # its data cannot be read
                entrant.reason = str(error)
        self._compute("measuring", list(jobs.values()), singly)
        peaks = []
        for entrant in (entrant for entrant in entrants if entrant.variant.label in jobs):
            job = jobs[entrant.variant.label]
            found = job.result()
            entrant.reason = job.failure()
            if found is None:
                entrant.reason = entrant.reason or "it was stopped while it was measured"
                continue
            try:
                if not entrant.variant.fields.get("stages"):
                    entrant.steps = self.comparison.budget.steps(found)
                    entrant.flops = None if self.comparison.dearer else found["step_flops"]  # of the untuned recipe
                    entrant.saves = max(1, round(SAVE_SECONDS / found["step_seconds"]))
            except HoneError as error:
                entrant.reason = str(error)
            peaks.append(int(found["peak_memory"]))
        return peaks

    def _tune(self) -> None:
        """Give every variant the same number of trials on one seed, and choose its best."""
        tried = grid(self.comparison.tune) if self.comparison.tune else []
        if not tried:
            return
        jobs = {}
        for entrant in self.going:
            for number, settings in enumerate(tried):
                fields = entrant.fields(self.comparison.budget, settings, TUNING_SEED)
                label = f"{entrant.variant.label} {describe(settings)}"
                jobs[entrant.variant.label, number] = self.store.job(
                    "run", entrant.variant.recipe(**fields), label, keeps=""
                )
        self._compute("tuning", list(jobs.values()))
        found = {
            entrant.variant.label: [self._figures(entrant, jobs[entrant.variant.label, n]) for n in range(len(tried))]
            for entrant in self.going
        }
        # One metric for all: a variant whose answers are all wrong is not tuned by its loss beside one that is not.
        metric = self.metric([figures for own in found.values() for figures in own if isinstance(figures, dict)])
        for entrant in self.going:
            self._choose(entrant, tried, found[entrant.variant.label], metric)

    def _choose(
        self, entrant: Entrant, tried: Sequence[Settings], found: Sequence[dict[str, float] | str], metric: str
    ) -> None:
        sign = 1 if better(metric) == "higher" else -1
        best = (-math.inf, -math.inf)
        entrant.trials = []
        for settings, figures in zip(tried, found, strict=True):
            value = None if isinstance(figures, str) else figures.get(metric)
            reason = figures if isinstance(figures, str) else ""
            entrant.trials.append({"settings": settings, "metric": metric, "value": value, "reason": reason})
            if value is None or isinstance(figures, str):
                continue
            rank = (sign * value, -figures.get("loss", math.inf))  # accuracies over a few answers are often equal
            if rank > best:
                best, entrant.tuned = rank, dict(settings)
        if not entrant.tuned:
            entrant.reason = f"every trial failed; the first: {entrant.trials[0]['reason']}"
            return
        entrant.note = _at_the_edge(self.comparison.tune, entrant.tuned)

    def _race(self) -> None:
        """Run every variant at its best setting on all seeds."""
        for entrant in self.going:
            for seed in self.seeds:
                fields = entrant.fields(self.comparison.budget, entrant.tuned, seed)
                label = f"{entrant.variant.label} seed {seed}"
                # A neighbour slows a run down: one that had the machine to itself is another cell.
                also = f"alone, {self.threads} threads" if self.alone else ""
                entrant.jobs[seed] = self.store.job(
                    "run", entrant.variant.recipe(**fields), label, keeps=self.keeps, also=also
                )
        # Seed by seed: what a comparison has found when it is stopped is as paired as it can be.
        self._compute("running", [entrant.jobs[seed] for seed in self.seeds for entrant in self.going])

    def collect(self) -> None:
        """Read what the runs have found so far."""
        for entrant in self.entrants:
            for seed, job in entrant.jobs.items():
                if job.result() is not None or job.failure():
                    found = self._figures(entrant, job)
                    if isinstance(found, str):
                        entrant.failures[seed] = found
                    else:
                        entrant.figures[seed] = found

    def _figures(self, entrant: Entrant, job: Job) -> dict[str, float] | str:
        """Return the figures of a finished run, or why there are none."""
        if reason := job.failure():
            return reason
        if job.result() is None:
            return "it was stopped"
        try:
            return values(job, entrant.flops)
        except HoneError as error:
            return str(error)

    def _compute(self, what: str, jobs: Sequence[Job], singly: bool = False) -> None:
        """Compute the cells that are not finished, each once; `singly` one after the other."""
        for job in jobs if self.retry else []:
            job.forget_failure()
        open_jobs = list({job.folder: job for job in jobs if not job.done}.values())
        if not open_jobs:
            return
        open_jobs, firsts = self._beginnings(jobs, open_jobs)
        total = len({job.folder for job in jobs})
        done = total - len(open_jobs)
        for job in open_jobs:
            job.prepare()
        self.display.start(what, total, done)

        def tick(running: Sequence[Job], finished: int) -> None:
            self.display.update(done + finished, "now: " + ", ".join(job.label for job in running))

        try:
            for batch in [[job] for job in open_jobs] if singly else [open_jobs]:
                self.pool.run(batch, self.width, tick)  # the width of all, which their threads follow from
                done += len(batch)
        finally:
            self.display.stop()
        for first in firsts:
            if first.keeps == TO_READ:
                first.drop_models()

    def _beginnings(self, jobs: Sequence[Job], open_jobs: list[Job]) -> tuple[list[Job], list[Job]]:
        """Compute the first stages that several cells begin with; return the open cells, told of them, and theirs."""
        training = [] if self.alone else [job for job in jobs if job.task == "run"]  # whose seconds are to be its own
        keeps = "model" if any(job.keeps == "model" for job in training) else TO_READ
        told, firsts = share(list({job.folder: job for job in training}.values()), self.store, keeps)
        ways = {job.folder: job for job in told}
        open_jobs = [ways.get(job.folder, job) for job in open_jobs]
        wanted = [first for first in firsts if any(job.begins == first.folder for job in open_jobs)]
        self._compute("training what several begin with", wanted)
        return open_jobs, wanted

    def metric(self, found: Sequence[Mapping[str, float]]) -> str:
        """Return the metric that ranks the variants; the usual one where no run has the one that was asked for.

        Args:
            found: the figures of runs.
        """
        names = {name for figures in found for name in figures}
        if self.comparison.metric and (self.comparison.metric in names or not names):
            return self.comparison.metric
        if self.comparison.metric:  # what has been computed is not thrown away for a word
            hint = nearest(self.comparison.metric, names) or f"they have {', '.join(sorted(names))}"
            log.warning("--metric: the runs have no '%s' (%s)", self.comparison.metric, hint)
        recipe = self.entrants[0].variant.recipe()
        if draws_arrays(recipe):
            shared = names.intersection(*found)
            return _fewest(recipe, shared) or _fewest(recipe, names) or "loss"
        coming = not names and recipe.eval_samples and "accuracy" in recipe.metrics  # nothing has been found yet
        answered = any(figures.get("accuracy") for figures in found)
        # Whole free answers are never given word for word: an accuracy of 0 everywhere ranks nothing.
        return "accuracy" if coming or answered or "loss" not in names else "loss"

    def resolution(self, metric: str) -> float:
        """Return the smallest step of a share: an accuracy over 100 answers moves by 0.01.

        Args:
            metric: its name.
        """
        if not is_share(metric) and parts.find("metric", metric) is None:
            return 0.0
        jobs = [job for entrant in self.entrants for job in entrant.jobs.values()]
        for job in jobs:  # a finished run's files are read once, however many rows and figures ask
            if (job.folder, metric) not in self._judged and job.result() is not None:
                self._judged[job.folder, metric] = judged(job, metric)
        counts = [count for job in jobs if (count := self._judged.get((job.folder, metric)))]
        return 1 / min(counts) if counts else 0.0


def metric_names(recipe: Recipe) -> set[str]:
    """Return the names of the figures that a run of a recipe may have; "energy@n" for those after n evaluations.

    Args:
        recipe: a checked recipe.
    """
    last = recipe.staged()[-1]
    if draws_arrays(last):
        return {"loss", *COSTS, *(f"{name}@n" for name in _distances(last) if last.eval_samples and last.solvers)}
    objective: Any = parts.load("objective", opt.split_spec("objective", last.objective)[0])
    answers = last.eval_samples and objective.generates
    judges = {opt.split_spec("metric", spec)[0] for spec in last.metrics} if answers else set()
    general = set() if last.general_data is None else {"general_loss", "forgetting"}
    return {"loss", *COSTS, *judges, *general}


def _refuse_unknown(metric: str, names: set[str]) -> None:
    """Refuse a metric that no run can have; what an objective reports besides, e.g. pair_accuracy, shows in its runs.

    Raises:
        HoneError: it is a slip of a known name, or judges answers where none are given.
    """
    slips = difflib.get_close_matches(metric, names, n=1, cutoff=0.85)
    if slips or "@" in metric or metric in ("general_loss", "forgetting") or parts.find("metric", metric) is not None:
        hint = nearest(metric, names) or f"metrics: {', '.join(sorted(names))}"
        raise HoneError(f"--metric: the runs have no '{metric}' ({hint})")


def draws_arrays(recipe: Recipe) -> bool:
    """Return whether a recipe trains what draws arrays.

    Args:
        recipe: a checked recipe.
    """
    record = opt.record_of("objective", recipe.staged()[-1].objective)
    return record is not None and record.medium == "arrays"


def _distances(recipe: Recipe) -> list[str]:
    return [opt.split_spec("distance", spec)[0] for spec in recipe.distances]


def _fewest(recipe: Recipe, names: Iterable[str]) -> str:
    """Return a recipe's first distance after the fewest evaluations of the network, "" where none was measured."""
    first = _distances(recipe.staged()[-1])[:1]
    found = [name for name in names if name.partition("@")[0] in first and "@" in name]
    return min(found, key=lambda name: (float(name.partition("@")[2].split()[0]), name), default="")


def better(metric: str) -> str:
    """Return "lower" for losses and costs, "higher" for everything else."""
    return "lower" if lower_is_better(metric) else "higher"


def describe(settings: Settings) -> str:
    """Return settings as a label."""
    return " ".join(f"{path}={show(value)}" for path, value in settings.items())


def _at_the_edge(tune: Mapping[str, Sequence[Any]], chosen: Settings) -> str:
    """Return a warning where the best value of a number is the smallest or largest that was tried."""
    notes = []
    for path, tried in tune.items():
        numbers = [value for value in tried if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(numbers) > 1 and len(numbers) == len(tried) and chosen[path] in (min(numbers), max(numbers)):
            end = "largest" if chosen[path] == max(numbers) else "smallest"
            notes.append(f"its best {path}, {show(chosen[path])}, is the {end} that was tried")
    return "; ".join(notes)
