"""A reward model as a reward: one that hone has trained, or a classifier of transformers with one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.data.formats import CONTINUES
from hone.data.sample import Sample, opened
from hone.errors import HoneError, ModelError
from hone.parts import part
from hone.rewards.base import Attempt, Reward
from hone.text.heads import saved_names
from hone.text.model import LanguageModel
from hone.text.pack import SCORE, Packed, Tree, divide, pack
from hone.text.render import Renderer

if TYPE_CHECKING:
    from hone.data.source import Source
    from hone.recipe import Recipe

Batch = Annotated[int, Field(ge=64)]
Judge = Callable[[Packed], Tensor]  # -> (A,) rewards of a batch's answers, in packed order


@part("reward", "reward-model", papers="original")
@dataclass(kw_only=True)
class ModelReward(Reward):
    """Reward answers by a reward model.

    `path` is the run folder, or the model's folder, of a run with the objective 'reward-model', or a classifier of
    transformers with one output (AutoModelForSequenceClassification, from safetensors). An answer that was cut off is
    read without the end-of-text token.

    Args:
        path: folder of the model, e.g. "runs/reward", or Hub name of a classifier.
        batch_tokens: most tokens in one forward pass.
    """

    path: str
    batch_tokens: Batch = 8192
    _judge: Judge | None = field(init=False, default=None, repr=False)
    _renderer: Renderer | None = field(init=False, default=None, repr=False)
    _context: int | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Load the model onto the run's device, in the run's precision.

        Args:
            run: the run in progress.

        Raises:
            HoneError: there is no model, or it gives no single number.
        """
        self._load(run.cluster.device, run.cluster.dtype)

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.

        Raises:
            HoneError: the model is missing, or an answer is longer than it can read.
        """
        if self._judge is None:
            self._load(torch.device("cpu"), torch.float32)
        assert self._judge is not None
        if not attempts:
            return []
        found = torch.full((len(attempts),), float("nan"), dtype=torch.float64)
        with torch.no_grad():
            for trees in divide(self._trees(attempts), self.batch_tokens):
                batch = pack(trees)
                numbers = batch.fields[SCORE].double()
                found[numbers[~numbers.isnan()].long()] = self._judge(batch).cpu().double()
        return [float(value) for value in found]

    def _trees(self, attempts: Sequence[Attempt]) -> list[Tree]:
        """Return the attempts as trees, those on one prompt as one, with the number of each in the field of scores."""
        assert self._renderer is not None
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, attempt in enumerate(attempts):
            groups.setdefault((id(attempt.sample), attempt.stopped or not attempt.whole), []).append(i)
        trees = []
        for (_, ended), members in groups.items():
            sample = attempts[members[0]].sample
            prompt = opened(sample).prompt
            for start in range(0, len(members), 64):
                some = members[start : start + 64]
                asked = Sample(
                    kind="list", prompt=prompt, answers=tuple(attempts[i].whole for i in some),
                    scores=tuple(float(i) for i in some), extra={CONTINUES: not ended}, where=sample.where,
                    tools=sample.tools,
                )  # fmt: skip
                trees += self._renderer.render(asked)
        return [self._fitting(tree) for tree in trees]

    def _fitting(self, tree: Tree) -> Tree:
        first = len(tree.tokens[0]) if len(tree.parents) > 1 and tree.parents[-1] == 0 else 0
        longest = first + max(len(segment) for segment in tree.tokens[bool(first) :])
        if self._context is not None and longest > self._context:
            raise HoneError(
                f"{tree.where}: the answer with its prompt has {longest} tokens, and the reward model '{self.path}' "
                f"reads {self._context}; lower max_new_tokens"
            )
        return tree

    def _load(self, device: torch.device, dtype: torch.dtype) -> None:
        from hone.engine.run import last_stage

        folder = Path(self.path).expanduser()
        made = folder / "model" if (folder / "recipe.yaml").is_file() else folder
        last = last_stage(folder) if made != folder else None
        if saved_names(made) is not None or (last is not None and _makes_rewards(last)):
            self._load_own(made, last, device, dtype)
        else:
            self._load_classifier(str(made) if made.exists() else self.path, device, dtype)

    def _load_own(self, made: Path, last: Recipe | None, device: torch.device, dtype: torch.dtype) -> None:
        """Load a model with the head that hone has trained, of a run as its last stage says."""
        from hone.engine.use import ready_objective
        from hone.objectives.answers import Answers
        from hone.objectives.reward_model import RewardModel

        names = saved_names(made)
        if names is not None and len(names) != 1:
            raise ModelError(
                f"reward 'reward-model': '{made}' tells the classes {', '.join(names)}; expected a model with one "
                "output, made by objective: reward-model"
            )
        model = LanguageModel.load(made, device=device, dtype=dtype)
        objective = RewardModel()
        if last is not None:
            objective = ready_objective(last, model, made)
        else:
            objective.equip(model)
            model.load_extras(made)
        model.eval().requires_grad_(False)

        def judge(batch: Packed) -> Tensor:
            segments = _answers(batch)
            none = torch.zeros(0, dtype=torch.int64)
            answers = Answers(segments, batch.trees[segments], torch.ones(len(segments)), none)
            return objective.rewards(model, batch.to(device), answers)

        self._judge, self._renderer, self._context = judge, model.renderer, model.context

    def _load_classifier(self, path: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load a classifier of transformers, which reads rows."""
        from hone.text.tokenizer import load_tokenizer

        model, tokenizer = read_classifier(path, dtype), load_tokenizer(path)
        model.to(device).eval().requires_grad_(False)
        pad = model.config.pad_token_id

        def judge(batch: Packed) -> Tensor:
            rows = [torch.cat([_segment(batch, s) for s in batch.chain(int(answer))]) for answer in _answers(batch)]
            if pad is None:  # it takes the last token of a row, and rows of one length only
                return torch.cat([model(input_ids=row[None].to(device)).logits[:, 0] for row in rows])
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            return model(input_ids=ids, attention_mask=mask.long()).logits[:, 0]

        self._judge, self._renderer = judge, Renderer(tokenizer, None, model.config.eos_token_id)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _answers(batch: Packed) -> Tensor:
    """Return the segments that are answers: those with a number."""
    return (~batch.fields[SCORE].isnan()).nonzero().squeeze(1).cpu()


def _makes_rewards(last: Recipe) -> bool:
    """Return whether a stage makes a reward model, of which some have no single head (dmoerm)."""
    from hone.objectives.reward_model import RewardModel

    return isinstance(last.build("objective"), RewardModel)


def _segment(batch: Packed, number: int) -> Tensor:
    return batch.tokens[batch.starts[number] : batch.starts[number + 1]]


def read_classifier(path: str, dtype: torch.dtype) -> Any:
    """Read a classifier with one output from safetensors, running no code that comes with it.

    Args:
        path: folder or Hub name.
        dtype: of the weights.

    Raises:
        ModelError: it is missing, damaged, or gives several numbers.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from hone.text.loading import LOADING_FAULTS, find_model

    source = find_model(path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.num_labels != 1:
            raise ModelError(
                f"reward 'reward-model': '{path}' has {config.num_labels} outputs; expected a classifier with one "
                "(num_labels: 1), or a run of objective: reward-model"
            )
        auto: Any = AutoModelForSequenceClassification
        model, report = auto.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"'{path}' cannot be loaded as a reward model from safetensors: {error}") from error
    if wrong := [f"{what}: {', '.join(map(str, report[key]))}" for key, what in LOADING_FAULTS.items() if report[key]]:
        raise ModelError(f"'{path}' is no reward model: {'; '.join(wrong)}")
    return model
