"""Denoising: part of a text is taken out, and the model writes it from what is left; a mixture of ways to do so (UL2).

A text becomes an input and a target. Three modes, each flagged by a token of its own at the start of the input:

    r, x   spans are replaced by sentinels; the target gives every sentinel with the tokens that it stands for
    s      the text is cut in two; the input is its beginning, the target the rest of it

    text      t1 t2 t3 t4 t5 t6 t7            r and x differ in the length of the spans and in the share of the text
    r, x      [X] t1 A t4 t5 B  ->  A t2 t3 B t6 t7 <end>
    s         [S] t1 t2 t3 t4   ->  t5 t6 t7

The input is seen in both directions, the target from left to right: one tree of two segments, the child trained. What
is taken out of a text is a function of its tokens, the step and the seed of the run, so no division of a step into
micro-batches changes it; evaluation takes out the same of a text at every step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.errors import DataError, nearest
from hone.objectives.base import Objective, trained
from hone.parts import part
from hone.text.pack import Packed, Tree, as_prefixes, pack
from hone.text.spans import corrupt, span_mask
from hone.text.special import mask_id, spare_ids
from hone.text.vocabulary import token_logprobs

if TYPE_CHECKING:
    from hone.text.generate import Generation
    from hone.text.model import LanguageModel

Mode = Literal["r", "x", "s"]
MODES: tuple[Mode, ...] = ("r", "x", "s")


# {mode: r | x | s, rate: share of the tokens that is taken out, span: their mean length (not for s), weight: 1}
Denoiser = dict[str, Any]
Denoisers = Literal["ul2", "ul2r"] | Annotated[list[dict[str, Any]], Field(min_length=1)]

MIXTURES: dict[str, list[Denoiser]] = {
    "ul2": [
        {"mode": "r", "rate": 0.15, "span": 3.0},
        {"mode": "r", "rate": 0.15, "span": 8.0},
        {"mode": "s", "rate": 0.25},
        {"mode": "x", "rate": 0.5, "span": 3.0},
        {"mode": "x", "rate": 0.5, "span": 8.0},
        {"mode": "x", "rate": 0.15, "span": 64.0},
        {"mode": "x", "rate": 0.5, "span": 64.0},
    ],
    "ul2r": [
        {"mode": "r", "rate": 0.15, "span": 3.0, "weight": 0.25},
        {"mode": "x", "rate": 0.15, "span": 32.0, "weight": 0.125},
        {"mode": "x", "rate": 0.5, "span": 3.0, "weight": 0.125},
        {"mode": "s", "rate": 0.5, "weight": 0.5},
    ],
}


@dataclass(frozen=True)
class Marks:
    """The tokens that stand for something else than text.

    Args:
        start: what a text begins with, which stays in front of the flag.
        end: what ends a text and a target, None where the tokenizer has no such token.
        flags: the token of each mode.
        sentinels: what stands for the spans of a text, in order.
    """

    start: tuple[int, ...]
    end: int | None
    flags: dict[Mode, int]
    sentinels: tuple[int, ...]

    @classmethod
    def of(cls, model: LanguageModel) -> Marks:
        """Return a model's, taken from the tokens that no text is made of; the mask token is left alone.

        Args:
            model: the language model.

        Raises:
            ModelError: its tokenizer has fewer than four such tokens, and one for the mask.
        """
        mask = mask_id(model.tokenizer)
        found = [token for token in spare_ids(model.tokenizer, len(MODES) + 2) if token != mask]
        flags = dict(zip(MODES, found, strict=False))
        return cls(tuple(model.renderer.start), model.renderer.eos, flags, tuple(found[len(MODES) :]))


@dataclass(frozen=True)
class Corrupted:
    """A batch of denoising tasks.

    Args:
        batch: inputs with their targets as children, T' tokens.
        modes: (T',) number in `MODES` of the mode of a target's token that is the text's own, -1 elsewhere.
    """

    batch: Packed
    modes: Tensor


@part(
    "objective",
    "ul2",
    papers=[("UL2: Unifying Language Learning Paradigms", "arXiv:2205.05131")],
    claim="A mixture of denoisers learns both to fill gaps and to go on with a text, and is near the best single "
    "denoiser at either.",
    deviations="Spans are T5's (checked against ports of its random_spans_noise_mask). The seven settings are those "
    "that Levanter's port gives for the paper, each drawn equally often; the paper's text itself was not at hand. The "
    "rest of a cut text has a length uniform on 1 to 2 r L - 1; that mean is from memory, and ports disagree. Flags "
    "and sentinels are tokens that the model has and no text is made of (13 bytes in the shipped model), so no "
    "embedding is added; where a text has more spans than "
    "there are sentinels, they are used again in order. Inputs are as long as the data's passages; the paper's fill "
    "the context. The target of a cut text ends only where the text does.",
)
@dataclass(kw_only=True)
class UL2(Objective):
    """Learn to give back what was taken out of a text, in a mixture of ways.

    loss = sum_t -log p(target_t | input, target_<t), summed over texts; one denoiser is drawn for each

    The unit is the trained token: those of the targets, sentinels and the end among them. Reported beside the loss, for
    each mode m of the mixture: "m_loss", the part of the loss on the text's own tokens, and "m_tokens", the number of
    these. Both are shares of all units, so "r_loss" / "r_tokens" is the mean loss of a token in an r-span, in nats.

    Texts grow by a flag and two sentinels a span, up to a third. Answers to prompts are generated behind the flag of
    mode "s", with the prompt seen in both directions.

    Args:
        denoisers: "ul2" (the seven of UL2), "ul2r" (the four of UL2R), or a list of denoisers {mode: r, x or s, rate:
            share of a text's tokens that is taken out (for s in the mean), span: mean length of a span in tokens (not
            for s), weight: how often it is drawn beside the others, 1 by default}.
        prefix: whether inputs are seen in both directions; otherwise attention stays causal.
        flags: whether inputs carry the token of their mode.
        roll: move the spans of a text round by a random distance; otherwise the last is always at its end.
    """

    consumes: ClassVar[str] = "tokens"
    denoisers: Denoisers = "ul2"
    prefix: bool = True
    flags: bool = True
    roll: bool = False
    _marks: Marks | None = field(init=False, default=None, repr=False)
    _model: Any = field(init=False, default=None, repr=False)
    _salt: str = field(init=False, default="", repr=False)
    _made: tuple[Packed, str, Corrupted] | None = field(init=False, default=None, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the denoisers."""
        for number, denoiser in enumerate(self.mixture):
            if wrong := _wrong(denoiser):
                yield f"denoisers.{number}", wrong

    @property
    def mixture(self) -> list[Denoiser]:
        """The denoisers."""
        return MIXTURES[self.denoisers] if isinstance(self.denoisers, str) else self.denoisers

    def equip(self, model: LanguageModel) -> None:
        """Find the tokens for flags and sentinels.

        Args:
            model: the language model.

        Raises:
            ModelError: its tokenizer has too few tokens that no text is made of.
        """
        self._model, self._marks = model, Marks.of(model)

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Note the step, on which it depends what is taken out.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        self._salt = f"{run.recipe.seed}:{run.step}"

    def count(self, batch: Packed) -> float:
        """Return the number of tokens of all targets.

        Args:
            batch: texts as a packed forest of T tokens.

        Raises:
            DataError: see `corrupted`.
        """
        return float(self.corrupted(batch).batch.weights.sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of the targets, and the part and number of the text's own tokens by mode.

        Args:
            model: the language model that trains.
            batch: texts as a packed forest of T tokens.

        Raises:
            DataError: see `corrupted`.
        """
        made = self.corrupted(batch)
        predictors, targets, weights = trained(made.batch)
        logprobs = token_logprobs(model.hidden(made.batch)[predictors], model.head, targets)
        modes, losses = made.modes[made.batch.weights != 0], -logprobs.detach()
        metrics: dict[str, Tensor] = {}
        for number, mode in enumerate(MODES):
            if any(denoiser["mode"] == mode for denoiser in self.mixture):
                chosen = modes == number
                metrics |= {f"{mode}_loss": losses[chosen].sum(), f"{mode}_tokens": chosen.sum().to(losses)}
        return -(weights * logprobs).sum(), metrics

    def generate(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Answer prompts as beginnings of texts, behind the flag of mode "s" where it is learnt.

        Args:
            model: the language model.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`.
        """
        from hone.text.generate import generate

        marks = self._marks or Marks.of(model)
        if self.flags and any(denoiser["mode"] == "s" for denoiser in self.mixture):
            room = np.inf if model.context is None else model.context - 1  # one that fills the context goes without
            flagged = [np.concatenate(_flagged(np.asarray(ids), marks, "s")).astype(np.int32) for ids in prompts]
            prompts = [new if len(new) <= room else old for new, old in zip(flagged, prompts, strict=True)]
        return generate(model, prompts, prefix=self.prefix, **options)

    def corrupted(self, batch: Packed) -> Corrupted:
        """Return a batch's texts as denoising tasks; a tree with several leaves is a text for each.

        Args:
            batch: texts as a packed forest of T tokens.

        Raises:
            DataError: a text has no token beside those that begin and end it, or a task does not fit into the model's
                context.
        """
        salt = self._salt if self._model is None or self._model.training else "evaluation"
        if self._made is None or self._made[0] is not batch or self._made[1] != salt:
            self._made = batch, salt, self._corrupted(batch, salt)
        return self._made[2]

    def _corrupted(self, batch: Packed, salt: str) -> Corrupted:
        if self._marks is None:
            raise RuntimeError("equip(model) comes first: it finds the tokens for flags and sentinels")
        tokens, starts = batch.tokens.cpu().numpy().astype(np.int32), batch.starts.tolist()
        leaves = sorted(set(range(batch.segments)) - set(batch.parents.tolist()))
        trees: list[Tree] = []
        modes: list[np.ndarray] = []
        for leaf in leaves:
            text = np.concatenate([tokens[starts[s] : starts[s + 1]] for s in batch.chain(leaf)])
            tree, own = self._task(text, batch.where[int(batch.trees[leaf])], salt)
            trees.append(tree)
            modes += [*(np.full(len(segment), -1) for segment in tree.tokens[:-1]), own]
        packed = pack(trees)
        packed = (as_prefixes(packed) if self.prefix else packed).to(batch.tokens.device)
        return Corrupted(packed, torch.from_numpy(np.concatenate(modes)).to(batch.tokens.device))

    def _task(self, text: np.ndarray, where: str, salt: str) -> tuple[Tree, np.ndarray]:
        """Return a text as a denoising task, and the modes of the target's tokens."""
        assert self._marks is not None
        digest = hashlib.blake2b(text.tobytes() + salt.encode(), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        chances = np.array([denoiser.get("weight", 1.0) for denoiser in self.mixture])
        denoiser = self.mixture[int(rng.choice(len(chances), p=chances / chances.sum()))]
        mode = denoiser["mode"]
        head, body = _flagged(text, self._marks, mode if self.flags else None)
        end = np.array([] if self._marks.end is None else [self._marks.end], np.int32)
        closed = len(end) == 1 and body[-1:].tolist() == end.tolist()
        body = body[: len(body) - closed]
        if "span" in denoiser:
            mask = span_mask(len(body), denoiser["rate"], denoiser["span"], rng, roll=self.roll)
            kept, target, own = corrupt(body, mask, self._marks.sentinels)
            kept, target = np.concatenate([kept, end[:closed]]), np.concatenate([target, end])
            own = np.append(own, np.zeros(len(end), bool))
        else:
            mean = max(1, round(denoiser["rate"] * len(body)))
            cut = len(body) - min(int(rng.integers(1, 2 * mean)), len(body))
            kept, target = body[:cut], np.concatenate([body[cut:], end[:closed]])
            own = np.ones(len(target), bool)
        if not len(body) or not len(target):
            raise DataError(f"{where}: expected a text to take something out of, found none; leave it out of the data")
        given = np.concatenate([head, kept])
        self._require_room(len(text), len(given) + len(target), where)
        weights = np.zeros(len(given), np.float32), np.ones(len(target), np.float32)
        if not len(given):  # nothing is left before the target: its first token is predicted from nothing
            return Tree((target,), (weights[1],), (-1,), where=where), np.where(own, MODES.index(mode), -1)
        return Tree((given, target), weights, (-1, 0), where=where), np.where(own, MODES.index(mode), -1)

    def _require_room(self, before: int, after: int, where: str) -> None:
        context = None if self._model is None else self._model.context
        if context is not None and after > context:
            fitting = max(1, int(before * context / after * 0.95))
            raise DataError(
                f"{where}: a text of {before} tokens becomes {after} with flag and sentinels, which the model's "
                f"context of {context} tokens does not hold; set data.max_tokens to about {fitting}"
            )


def _wrong(denoiser: Denoiser) -> str:
    """Return what is wrong with a denoiser of a recipe, "" when nothing is."""
    names = ("mode", "rate", "span", "weight")
    if unknown := [name for name in denoiser if name not in names]:
        return f"unknown option '{unknown[0]}' ({nearest(str(unknown[0]), names) or 'options: ' + ', '.join(names)})"
    mode = denoiser.get("mode")
    if mode not in MODES:
        return f"expected mode: r, x or s, got {mode!r}"
    if mode == "s" and "span" in denoiser:
        return "mode s cuts a text in two; give no span"
    wanted = {"rate": "above 0 and below 1, for s at most 0.5", "weight": "above 0", "span": "of at least 1 token"}
    for name in ("rate", "weight") if mode == "s" else ("rate", "weight", "span"):
        value = denoiser.get(name, 1.0 if name == "weight" else None)
        least, most = (1.0, math.inf) if name == "span" else (1e-9, math.inf)
        if name == "rate":
            most = 0.5 if mode == "s" else 1 - 1e-9
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None or not number or not least <= value <= most or math.isinf(value):
            return f"mode {mode} needs a {name} {wanted[name]}, got {value!r}"
    return ""


def _flagged(text: np.ndarray, marks: Marks, mode: Mode | None) -> tuple[np.ndarray, np.ndarray]:
    """Return what stands in front of a text, with a mode's flag, and the text without what it begins with."""
    begin = len(marks.start) if text[: len(marks.start)].tolist() == list(marks.start) else 0
    flag = [] if mode is None else [marks.flags[mode]]
    return np.concatenate([text[:begin], np.array(flag, text.dtype)]), text[begin:]


@part(
    "objective",
    "ul2r",
    papers=[("Transcending Scaling Laws with 0.1% Extra Compute", "arXiv:2210.11399")],
    claim="A few more steps with a mixture of denoisers teach a causal language model to fill gaps and make it better "
    "at language, at 0.1% of its compute.",
    deviations="As for ul2. Half of the texts are cut in two, a quarter each have short and extreme spans; the "
    "settings of the spans are those of Levanter's port of the paper, whose text itself was not at hand.",
)
@dataclass(kw_only=True)
class UL2R(UL2):
    """UL2's objective with the mixture that turns a finished causal model into one that fills gaps too.

    loss = sum_t -log p(target_t | input, target_<t), with half of the texts cut in two

    It is `ul2` with `denoisers: ul2r` and `roll: true`.

    Args:
        denoisers: as for `ul2`.
        roll: as for `ul2`.
    """

    denoisers: Denoisers = "ul2r"
    roll: bool = True
