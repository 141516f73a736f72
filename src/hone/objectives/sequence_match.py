"""SequenceMatch: imitation of whole sequences by a soft Q-function, with an action that takes back a token.

Logits are soft Q-values: Q(s, a) is the logit of token a in state s, V(s) = logsumexp_a Q(s, a), and the reward that
makes them right is r(s, a) = Q(s, a) - gamma V(s'). With the chi^2-mixture divergence the objective is

    max_Q  E_data[r - alpha/4 r^2] - E_model[alpha/4 r^2] - E[V(s) - gamma V(s')].

Along a whole sequence the last term telescopes to V(s_0), whoever made it, and with it the linear terms become the
discounted log-likelihood of the data:

    loss = -sum_i gamma^i log pi(a_i | s_i) + alpha/4 [sum_i gamma^i r_i^2  over data  +  the same over the model's own]

so that alpha = 0 and gamma = 1 is maximum likelihood.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.errors import HoneError
from hone.objectives.base import Objective
from hone.objectives.reference import tree_key, tree_keys
from hone.objectives.walks import Episode, Walks, episodes_of, noised, pack_walks
from hone.parts import part
from hone.text.vocabulary import vocabulary_map

if TYPE_CHECKING:
    from hone.text.generate import Generation
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed, Tree

NAMES = ("<|backspace|>", "<backspace>", "<bkspc>")  # tokens that are taken for it without being named


class Terms(NamedTuple):
    """The sums of the loss over the steps of some episodes.

    Args:
        likelihood: -sum_i w_i gamma^i log pi(a_i | s_i).
        squares: sum_i w_i gamma^i r_i^2, with what comes after the end of an episode.
    """

    likelihood: Tensor
    squares: Tensor


def match_terms(q: Tensor, v: Tensor, v_next: Tensor, weights: Tensor, final: Tensor, gamma: float) -> Terms:
    """Return the two sums that SequenceMatch is made of.

    After its end an episode stays where it is for ever, which is rewarded with (1 - gamma) V(s_T) a step: r_i^2 of all
    these steps, discounted, comes to gamma^T (1 - gamma) V(s_T)^2.

    Args:
        q: (n,) Q(s_i, a_i) of each step.
        v: (n,) V(s_i).
        v_next: (n,) V(s_{i+1}) of the state that came of it.
        weights: (n,) w_i gamma^i.
        final: (n,) w_i gamma^{i+1} where the step ends its episode, 0 elsewhere.
        gamma: discount of a step.
    """
    rewards = q - gamma * v_next
    ends = (1 - gamma) * (final * v_next.square()).sum()
    return Terms((weights * (v - q)).sum(), (weights * rewards.square()).sum() + ends)


def logit(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the targets' logits (n,) of (n, V): Q(s, a)."""
    return logits.gather(-1, targets[:, None]).squeeze(-1)


def value(logits: Tensor, targets: Tensor) -> Tensor:
    """Return logsumexp of the logits (n, V): V(s), whatever the targets are."""
    return logits.logsumexp(-1)


@part(
    "objective",
    "sequence-match",
    papers=[
        (
            "SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with Backtracking",
            "arXiv:2306.05426",
        )
    ],
    claim="Matching whole sequences in the chi^2-mixture divergence, with a token that takes back a mistake, gives "
    "better generations than the likelihood.",
    deviations="Neither the paper's text nor the authors' code was found: the form is put together from the abstract "
    "and from reviews, which give pieces of the equations, and may differ from the paper's in its details. The "
    "terms E[V - gamma V'] are taken in their telescoped form, exactly V(s_0). States of a sequence with deletions are "
    "the nodes of a packed tree, each computed once, where the paper masks a flat sequence; the numbers are the same. "
    "A deletion of nothing cannot be drawn. The paper fine-tunes at alpha 0.01 and gamma 0.998 on long texts; our "
    "default of `noise` is for short answers.",
)
@dataclass(kw_only=True)
class SequenceMatch(Objective):
    """Imitation of whole sequences in the chi^2-mixture divergence, with backspaces.

    loss = -sum_i gamma^i log pi(a_i | s_i) + alpha/4 [sum over data + sum over the model's own of gamma^i r_i^2],
    r_i = logit(a_i | s_i) - gamma logsumexp(s_{i+1}).

    With probability `noise` another token than the right one gets into the text; then the right action is to delete it.
    Every few steps the model answers some of the step's prompts; its answers are kept and replayed, one beside each
    sample. The unit is the trained token; evaluation has neither noise nor the model's own answers.

    Args:
        alpha: strength of the squared rewards; 0 is the likelihood.
        gamma: discount of a step, in (0, 1].
        backspace: the token that deletes the one before it: its text, "auto" for one that is called so or else the
            padding token, which no text contains, or "none" to do without.
        noise: probability that a wrong token gets into the text at a step, in [0, 1).
        noise_from: where wrong tokens come from: the whole "vocabulary", or the same "answer".
        mixture: whether the model's own answers have their part in the loss.
        sample_every: optimizer steps between two times that the model answers.
        samples: prompts that it answers each time.
        rollout: longest of its answers in tokens, deletions included.
        replay: answers that are kept; the oldest leave.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.01
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.998
    backspace: Annotated[str, Field(min_length=1)] = "auto"
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.05
    noise_from: Literal["vocabulary", "answer"] = "vocabulary"
    mixture: bool = True
    sample_every: Annotated[int, Field(ge=1)] = 8
    samples: Annotated[int, Field(ge=1)] = 16
    rollout: Annotated[int, Field(ge=2)] = 64
    replay: Annotated[int, Field(ge=1)] = 256
    _token: int | None = field(default=None, init=False, repr=False)
    _stop: frozenset[int] = field(default=frozenset(), init=False, repr=False)
    _special: frozenset[int] = field(default=frozenset(), init=False, repr=False)
    _kept: list[Episode] = field(default_factory=list, init=False, repr=False)
    _beside: dict[bytes, Episode] = field(default_factory=dict, init=False, repr=False)
    _now: tuple[int, int] = field(default=(0, 0), init=False, repr=False)  # seed and step, which draws depend on

    def equip(self, model: LanguageModel) -> None:
        """Find the token that deletes.

        Args:
            model: the language model, as the run starts from it.

        Raises:
            HoneError: there is no such token.
        """
        tokenizer = model.tokenizer
        self._stop = frozenset(model.renderer.stop_ids)
        self._special = frozenset(tokenizer.all_special_ids) | self._stop
        self._token = None if self.backspace == "none" else find_backspace(self.backspace, model)

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Let the model answer when it is time, and lay one of its answers beside each sample.

        Args:
            run: the run in progress.
            trees: all trees of the step, the same on every process.
        """
        self._now = (run.recipe.seed, run.step)
        self._beside = {}
        if not (self.mixture and self.alpha):
            return
        if run.step % self.sample_every == 0:
            self._answer(run, trees)
        if not self._kept:
            return
        rng = np.random.default_rng([*self._now, 1])
        for tree, which in zip(trees, rng.integers(len(self._kept), size=len(trees)), strict=True):
            self._beside[tree_key(tree)] = self._kept[which]

    def _answer(self, run: Any, trees: Sequence[Tree]) -> None:
        """Let the model answer prompts of a step, and keep what it said."""
        from hone.engine.sharding import gathered
        from hone.samplers.text import Sample
        from hone.text.backspace import generate_deleting
        from hone.text.generate import generate
        from hone.text.pack import pack

        prompts = [episode.prompt for episode in episodes_of(pack(trees[: self.samples]), self._stop)][: self.samples]
        options: dict[str, Any] = {"max_new_tokens": self.rollout, "sampler": Sample(), "stop": sorted(self._stop),
                   "seed": int(np.random.default_rng([*self._now, 0]).integers(2**62))}  # fmt: skip
        with gathered(run.model), run.cluster.autocast():
            if self._token is None:
                made = generate(run.model, prompts, **options)
            else:
                made = generate_deleting(run.model, prompts, self._token, **options)
        for prompt, (drawn,) in zip(prompts, made, strict=True):
            tokens, _ = drawn.trajectory()
            self._kept.append(_own(prompt, tokens, drawn.stopped))
        self._kept = self._kept[-self.replay :]

    def state_dict(self) -> dict[str, Any]:
        """Return the answers that are kept, one after another in flat tensors."""
        return {
            "prompts": _flat([episode.prompt for episode in self._kept]),
            "drawn": _flat([episode.actions for episode in self._kept]),
            "lengths": torch.tensor([[len(e.prompt), len(e.actions)] for e in self._kept]).reshape(-1, 2),
            "ended": torch.tensor([episode.ended for episode in self._kept], dtype=torch.bool),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the answers that were kept.

        Args:
            state: as `state_dict` returned it.
        """
        self._kept = []
        begins = [0, 0]
        for lengths, ended in zip(state["lengths"].tolist(), state["ended"].tolist(), strict=True):
            ends = [begin + length for begin, length in zip(begins, lengths, strict=True)]
            prompt, drawn = (
                state[name][begin:end].cpu().numpy().astype(np.int32)
                for name, begin, end in zip(("prompts", "drawn"), begins, ends, strict=True)
            )
            self._kept.append(_own(prompt, drawn, ended))
            begins = ends

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss; beside it the plain likelihood and both sums of squares, "nll", "data" and "model".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        episodes = episodes_of(batch, self._stop)
        own: list[Episode] = []
        if model.training:
            own = [self._beside[key] for key in tree_keys(batch) if key in self._beside]
            if self.noise and self._token is not None:
                draw = self._wrong(len(model.tokenizer))
                episodes = [noised(e, self._token, self.noise, draw(e), self._rng(e)) for e in episodes]
        walks = pack_walks([*episodes, *own], self._token, self.gamma).to(batch.tokens.device)
        q, v = state_values(model, walks)
        data = walks.episodes < len(episodes)
        terms = [
            match_terms(q[rows], v[walks.states[rows]], v[walks.following[rows]], walks.weights[rows],
                        walks.final[rows], self.gamma)
            for rows in (data, ~data)
        ]  # fmt: skip
        loss = terms[0].likelihood + self.alpha / 4 * (terms[0].squares + terms[1].squares)
        found = {"nll": terms[0].likelihood, "squares_data": terms[0].squares, "squares_model": terms[1].squares}
        return loss, {name: figure.detach() for name, figure in found.items()}

    def _rng(self, episode: Episode) -> np.random.Generator:
        """Return a generator that is a function of the episode, the seed and the step."""
        digest = hashlib.blake2b(repr(self._now).encode(), digest_size=8)
        for part_of_it in (episode.prompt, episode.actions):
            digest.update(np.ascontiguousarray(part_of_it, np.int32).tobytes())
        return np.random.default_rng(int.from_bytes(digest.digest(), "big"))

    def _wrong(self, vocabulary: int) -> Callable[[Episode], np.ndarray]:
        """Return what gives the tokens that may get into an episode by mistake."""
        barred = np.array(sorted(self._special), np.int64)
        everything = np.setdiff1d(np.arange(vocabulary), barred)
        if self.noise_from == "vocabulary":
            return lambda episode: everything
        return lambda episode: np.setdiff1d(episode.actions, barred)

    def generate(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Answer prompts, letting the model delete what it said.

        Args:
            model: the language model.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`.
        """
        from hone.text.backspace import generate_deleting, left_of

        if self._token is None:
            return super().generate(model, prompts, **options)
        made = generate_deleting(model, prompts, self._token, **options)
        return [[left_of(drawn, self._token) for drawn in group] for group in made]


def state_values(model: LanguageModel, walks: Walks) -> tuple[Tensor, Tensor]:
    """Return Q(s_i, a_i) of each step (n,), and V of every state that walks visit (T,), 0 elsewhere.

    Args:
        model: the language model.
        walks: steps through the states of a packed forest.
    """
    hidden = model.hidden(walks.batch)
    visited = torch.cat([walks.states, walks.following]).unique()
    values = vocabulary_map(hidden[visited], model.head, torch.zeros_like(visited), value)
    v = values.new_zeros(len(walks.batch)).index_put((visited,), values)
    return vocabulary_map(hidden[walks.states], model.head, walks.actions, logit), v


def find_backspace(name: str, model: LanguageModel) -> int:
    """Return the id of the token that deletes.

    Args:
        name: its text, or "auto".
        model: the language model.

    Raises:
        HoneError: there is none, or it is in use.
    """
    tokenizer = model.tokenizer
    known = tokenizer.get_vocab()
    specials = [tokenizer.convert_ids_to_tokens(token) for token in sorted(set(tokenizer.all_special_ids))]
    used = {tokenizer.bos_token, tokenizer.eos_token}
    free = [token for token in specials if token not in used and known[token] not in model.renderer.stop_ids]
    embed: Any = model.hf.get_input_embeddings()
    choice = name
    if name == "auto":
        choice = next((token for token in (*NAMES, tokenizer.pad_token) if token in known and token not in used), "")
    if (
        choice not in known
        or choice in used
        or known[choice] in model.renderer.stop_ids
        or known[choice] >= len(embed.weight)
    ):
        wanted = "found no token that is called so and no padding token" if name == "auto" else f"got '{name}'"
        raise HoneError(
            "backspace: expected a token of the vocabulary that no text contains and that does not end one, "
            f"{wanted}; set backspace to a special token that your data does not use"
            + (f", e.g. {', '.join(free[:5])}" if free else "")
            + ", or to none"
        )
    return int(known[choice])


def _own(prompt: np.ndarray, drawn: np.ndarray, ended: bool) -> Episode:
    """Return an answer of the model as an episode."""
    return Episode(prompt, drawn, drawn, np.ones(len(drawn), np.float32), ended)


def _flat(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int64))
