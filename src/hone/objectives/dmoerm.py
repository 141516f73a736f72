"""A two-level mixture of experts for rewards: a router over tasks, and for each task experts, joined to one reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from hone.errors import HoneError
from hone.objectives.answers import Answers
from hone.objectives.classify import Classify
from hone.objectives.reward_model import RewardModel
from hone.parts import part
from hone.text.heads import Readout, new_head, saved_names
from hone.text.pack import Tree, pack

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

ONLY = "all"  # name of the category where there is no router


class Aggregation(nn.Module):
    """Joins the states of several experts to one reward: linear, PReLU, linear.

    Args:
        inputs: width of the joined states.
        width: D, of what stands between the two layers.
    """

    def __init__(self, inputs: int, width: int) -> None:
        """Make the two layers."""
        super().__init__()
        self.joined = nn.Linear(inputs, width)
        self.bend = nn.PReLU()
        self.reward = nn.Linear(width, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Return the rewards (n,) of joined states (n, inputs)."""
        return self.reward(self.bend(self.joined(states))).squeeze(-1)


@part(
    "objective",
    "dmoerm",
    papers=[("DMoERM: Recipes of Mixture-of-Experts for Effective Reward Modeling", "arXiv:2403.01197")],
    claim="Experts for single capabilities whose states are joined, behind a router over tasks, agree better with "
    "people than one reward model and than an ensemble, and are harder to over-optimise.",
    deviations="Checked against the authors' code. This objective is the third phase, the aggregation; the first two "
    "are stages with reward-model: one on all pairs, then a LoRA from it on the pairs of each capability, which a "
    "commercial model labels there. An expert is loaded with its adapter merged.",
)
@dataclass(kw_only=True)
class DMoERM(RewardModel):
    """Aggregate frozen experts to one reward: the last phase of a double-layer mixture of experts.

    r(x, y) = W2 prelu(W1 [h_1(x, y); ...; h_K(x, y)]),  h_k the last state of expert k at the answer's last token

    The loss is that of `reward-model`, whose options are there too. A prompt's category decides whose experts are asked
    and which aggregation joins them. The model that the run starts from carries the aggregation and is asked only where
    no expert is named; it must have no head of its own, as the run's own start ("stage:0") has none.

    Args:
        experts: folders of the experts of each category, e.g. {all: ["stage:2", "stage:3"]} or {math: [...], chat:
            [...]}; none takes the run's own model for the only one.
        router: folder of a model trained by `classify` on prompts, whose classes are the categories; None where there
            is one category. It reads prompts as the recipe of its run says, where the folder is that of a run.
    """

    experts: dict[str, Annotated[list[str], Field(min_length=1)]] = field(default_factory=dict)
    router: str | None = None
    _loaded: dict[str, list[Any]] = field(init=False, default_factory=dict, repr=False)
    _router: Any = field(init=False, default=None, repr=False)
    _reader: Any = field(init=False, default=None, repr=False)  # the objective that the router was trained by

    @property
    def categories(self) -> list[str]:
        """The names of the categories in the order of their aggregations."""
        return sorted(self.experts) or [ONLY]

    def equip(self, model: LanguageModel) -> None:
        """Load experts and router, and put the aggregations beside the model.

        Args:
            model: the language model, as the run starts from it.

        Raises:
            HoneError: several categories and no router that tells them, or an expert with other tokens.
        """
        weight = next(model.hf.parameters())
        where = {"device": weight.device, "dtype": weight.dtype}
        names = self.categories
        for name in names:
            loaded = [type(model).load(path, **where) for path in self.experts.get(name, [])]
            if any(one.tokenizer.get_vocab() != model.tokenizer.get_vocab() for one in loaded):
                raise HoneError(f"objective.experts.{name}: an expert has another tokenizer than the run's model")
            self._loaded[name] = [one.requires_grad_(False).eval() for one in loaded]
            widths = [one.hf.config.get_text_config().hidden_size for one in loaded or [model]]
            made = Aggregation(sum(widths), widths[0]).to(device=weight.device, dtype=weight.dtype)
            model.extras[f"aggregation_{names.index(name)}"] = made
        if self.router is not None or len(names) > 1:
            self._router = self._load_router(model, where)

    def _load_router(self, model: LanguageModel, where: dict[str, Any]) -> Any:
        classes = None if self.router is None else saved_names(Path(self.router).expanduser())
        if classes is None or set(classes) != set(self.categories):
            raise HoneError(
                "objective.router: expected a model trained by classify whose classes are "
                f"{', '.join(self.categories)}, found {', '.join(classes) if classes else 'no such model'}"
            )
        folder = Path(str(self.router)).expanduser()
        router = type(model).load(str(self.router), **where)
        self._reader = _classifier(folder, classes)
        self._reader.equip(router)
        router.load_extras(folder)
        return router.requires_grad_(False).eval()

    @torch.no_grad()
    def routed(self, batch: Packed) -> Tensor:
        """Return the number of each tree's category (B,), told from its prompt.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        first = torch.searchsorted(batch.trees, torch.arange(len(batch.where)))
        if self._router is None:
            return torch.zeros(len(first), dtype=torch.int64)
        tokens = batch.tokens.cpu().numpy().astype(np.int32)
        prompts = [tokens[int(batch.starts[at]) : int(batch.starts[at + 1])] for at in first]
        asked = pack([Tree((ids,), (np.zeros(len(ids), np.float32),), (-1,)) for ids in prompts])
        device = next(self._router.parameters()).device
        names: Sequence[str] = self._reader.class_names()
        found = self._reader.logits(self._router, asked.to(device)).argmax(-1).tolist()
        return torch.tensor([self.categories.index(names[number]) for number in found])

    def rewards(self, model: LanguageModel, batch: Packed, answers: Answers) -> Tensor:
        """Return the reward of each answer (A,).

        Args:
            model: the language model with the aggregations beside it.
            batch: packed forest of T tokens.
            answers: its answers.
        """
        ends = (batch.starts[answers.segments + 1] - 1).to(batch.tokens.device)
        categories = self.routed(batch)[answers.trees]
        rewards = batch.weights.new_zeros(len(answers))
        for number in categories.unique().tolist():
            own = (categories == number).nonzero().squeeze(1).to(ends.device)
            with torch.no_grad():
                experts = self._loaded.get(self.categories[number]) or [model]
                states = torch.cat([expert.hidden(batch)[ends[own]] for expert in experts], -1)
            found = model.extras[f"aggregation_{number}"](states.detach())
            rewards = rewards.to(found.dtype).index_put((own,), found)
        return rewards

    def readout(self, model: LanguageModel) -> Readout:
        """Return why other libraries cannot read it.

        Args:
            model: gives the width of a head that nobody reads.
        """
        return Readout(new_head(model, ["reward"], bias=False), "text", "it joins the states of several experts")


def _classifier(folder: Path, classes: list[str]) -> Classify:
    """Return the objective that a router was trained by, which says where it sees both ways and which states count.

    The recipe of the run or stage whose model it is tells that; elsewhere the options of `classify` are taken to be
    those by default.

    Args:
        folder: of the router.
        classes: of its head.
    """
    from hone.engine.run import last_stage

    of_run = folder.name == "model" and (folder.parent / "recipe.yaml").is_file()
    recipe = last_stage(folder.parent) if of_run else None
    found = Classify(classes=classes) if recipe is None else recipe.build("objective")
    if not isinstance(found, Classify) or not found.recall(folder):
        raise HoneError(f"objective.router: '{folder}' was trained by {type(found).__name__}; expected classify")
    return found
