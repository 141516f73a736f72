"""Data that the model makes while it trains: its own answers of now, with what they are worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hone.data.derived import Derived
from hone.data.open import on_policy_error
from hone.engine.progress import log
from hone.options import Nested
from hone.parts import part
from hone.rewards.exact import Exact

if TYPE_CHECKING:
    from hone.data.open import Rendering
    from hone.data.phases import Phases

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Make = Literal["auto", "groups", "best", "curated", "pairs", "list"]
FITTING: dict[str, tuple[str, ...]] = {  # what an objective consumes -> what may be made for it, the default first
    "rollouts": ("groups",),
    "sequences": ("best", "curated"),
    "tokens": ("best", "curated"),
    "pairs": ("pairs", "list"),
    "judged": ("list", "pairs"),
}


@part(
    "data",
    "rollouts",
    papers=[
        ("RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment", "arXiv:2304.06767"),
        ("Self-Consuming Generative Models with Curated Data Provably Optimize Human Preferences", "arXiv:2407.09499"),
        ("Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training", "arXiv:2507.05386"),
    ],
    claim="Training on the best of the model's own answers, made anew as it learns, raises what they are worth.",
    deviations="RAFT is make: best, with the best answer to each prompt; the paper's variant that ranks a whole "
    "batch is left out. Curated self-consumption is make: curated, its mixture with real data is demonstrations, one "
    "to each chosen answer (lambda = 1). The "
    "filter of instances on which no rollout earns a reward is drop: unsolved, applied in every phase rather than "
    "once.",
)
@dataclass(kw_only=True)
class Rollouts(Derived):
    """Sample answers from the model that trains, score them, and train on them, phase by phase.

    A phase takes `prompts` prompts of `of`, samples `samples_each` answers to each from the model as it is, and scores
    them with `rewards`. A prompt with its answers is one tree, so that the prompt is computed once. What is made of a
    group: "groups" (all answers with their log-probabilities and rewards, for policy objectives), "best" (the best
    answer, for sft: RAFT), "curated" (one of its own answers, drawn with probability proportional to
    exp(reward / curation), and the demonstration where there is one), "pairs" (the best against the worst, for dpo),
    "list" (all, scored). One phase gives `updates` optimizer steps a pass, and is passed
    over `passes` times. A recipe's `batch_tokens` bounds a forward pass here, not a step.

    Args:
        of: the source whose prompts are answered, which also knows which answers are right.
        rewards: what an answer is worth; several are added up. None takes `exact`.
        make: what is made of a group of answers; "auto" takes what fits the objective.
        prompts: prompts in a phase.
        samples_each: answers to each prompt.
        temperature: of the sampling; policy objectives measure log-probabilities at the same one.
        max_new_tokens: longest answer in tokens.
        updates: optimizer steps that a phase's groups are divided into.
        passes: how often a phase is passed over.
        replay: earlier groups that are trained on again beside each phase's own, as many as this share of it.
        buffer: how many earlier groups are kept for that.
        drop: groups that are left out: "even" ones, whose answers are all worth the same, "unsolved" ones, no answer of
            which is worth `solved`, or "none".
        refill: how often more prompts are asked to make up for groups that were dropped.
        solved: an answer passes when it is worth at least this.
        least: prompts whose latest rate of passing is below are not asked again.
        most: prompts whose latest rate of passing is above are not asked again.
        unfinished: what becomes of answers that ran out of tokens: "train" on them, or "mask" them out of the loss; a
            phase that leaves nothing to train on is asked again with other prompts, at most eight times.
        demonstrations: answers of the source's own that join each group, 0 or 1; they are marked as not the model's.
        hints: steps of the source's own answer that the model is given: "none", or a number drawn from a binomial
            distribution whose mean share falls from `hint_from` to `hint_to` over `hint_until` of the run along a
            cosine; none are given behind it, nor of an answer that has no room in `max_tokens` with its prompt.
        hint_from: share of the steps that is given at first.
        hint_to: share of the steps that is given at the end of that time.
        hint_until: share of the run after which nothing is given any more.
        curation: of make: curated, the temperature of the choice.
        engine: what generates: "hone", or "vllm" where that is installed.
        on_error: what is done when a reward fails or hangs on a sample: "raise", or "skip" its group and count it.
        patience: seconds that one call of a reward may take; it is called for all answers of a phase together.
        batch: most samples that are generated at once.
    """

    rewards: Annotated[Any, Nested("reward", several=True)] = None
    make: Make = "auto"
    prompts: Count = 8
    samples_each: Count = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Count = 64
    updates: Count = 1
    passes: Count = 1
    replay: Annotated[float, Field(ge=0)] = 0.0
    buffer: Count = 256
    drop: Literal["none", "even", "unsolved"] = "none"
    refill: Annotated[int, Field(ge=0)] = 0
    solved: float = 1.0
    least: Share = 0.0
    most: Share = 1.0
    unfinished: Literal["train", "mask"] = "train"
    demonstrations: Annotated[int, Field(ge=0, le=1)] = 0
    hints: Literal["none", "binomial"] = "none"
    hint_from: Share = 0.95
    hint_to: Share = 0.05
    hint_until: Annotated[float, Field(gt=0, le=1)] = 0.5
    curation: Annotated[float, Field(gt=0)] = 1.0
    engine: Literal["hone", "vllm"] = "hone"
    on_error: Literal["raise", "skip"] = "raise"
    patience: Annotated[float, Field(gt=0)] = 600.0
    batch: Count = 256
    _made: str = field(default="", init=False, repr=False)
    _compares: bool = field(default=False, init=False, repr=False)

    def is_on_policy(self) -> bool:
        """Return that the model makes the samples while it trains."""
        return True

    def judges(self) -> list[Any]:
        """Return the rewards as a list."""
        if self.rewards is None:
            self.rewards = Exact()
        return list(self.rewards) if isinstance(self.rewards, list) else [self.rewards]

    def suit(self, consumes: str) -> None:
        """Settle what is made of a group for an objective.

        Args:
            consumes: what the objective consumes.

        Raises:
            DataError: nothing that is made here, or not what `make` says.
        """
        super().suit(consumes)
        fitting = FITTING.get(consumes, ())
        if not fitting or self.make not in ("auto", *fitting):
            raise on_policy_error(consumes, self.make, fitting, FITTING)
        self._made = fitting[0] if self.make == "auto" else self.make
        self._compares = consumes == "pairs"

    @property
    def made(self) -> str:
        """What is made of a group, once the objective is known."""
        return self._made

    @property
    def compares(self) -> bool:
        """Whether the objective, once it is known, needs answers to a prompt that differ in worth."""
        return self._compares

    def describe(self) -> str:
        """Return what is answered, how often, and what for."""
        return f"{self.samples_each} answers of the model itself to each prompt of {self.of.describe()}"

    def own_loader(self, rendering: Rendering, seed: int) -> Phases:
        """Return what samples and hands out the steps of a run.

        Prompts that leave no room for an answer are left out, as a phase that met one could not go on.

        Args:
            rendering: gives the renderer.
            seed: the order of the prompts and the answers are drawn from it.
        """
        from hone.data.phases import Phases

        samples = list(self.samples("train"))
        fitting = [one for one in samples if len(rendering.renderer.prompt_ids(one)) < self.max_tokens]
        if len(fitting) < len(samples):
            log.warning(
                "%d of %d prompts have %d tokens or more (data.max_tokens) and are not asked",
                len(samples) - len(fitting), len(samples), self.max_tokens,
            )  # fmt: skip
        return Phases(self, fitting, rendering.renderer, seed)
