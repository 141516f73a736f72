"""Generation for many prompts at once; the samples of a prompt share its prefill and one copy of its keys.

What a sample draws depends on (seed, index of its prompt, index of the sample) and on the model alone: every step takes
one uniform number per sample from a counter-based generator, so that neither the batch size nor which other samples
have ended changes a token, up to the rounding of floating-point sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hone.errors import ModelError, NumericError
from hone.modes import evaluating
from hone.precision import wide
from hone.samplers.text import greedy, pick
from hone.text.attention import Plan
from hone.text.cache import DecodeCache, PromptPlan
from hone.text.model import LanguageModel
from hone.text.narrow import narrow_linears
from hone.text.pack import Packed, Tree, pack, seen_both_ways
from hone.text.steering import steering_of

PREFILL_TOKENS = 16384  # most prompt tokens in one forward pass, which bounds its activations
COMPACT_BELOW = 0.75  # finished samples are dropped when fewer than this fraction of the rows still run

# (logits, uniforms), and a History where `looks_back` is true. One that has beside(model) names language models that
# read along behind caches of their own; their logits come with the History. One that has choose(model, prompts, groups)
# picks among whole answers instead: each() draws `count` of them for each answer that is asked for.
Sampler = Callable[..., Tensor]
Progress = Callable[[int, int], None]
Decode = Callable[[LanguageModel, list[np.ndarray], int, Any], None]
Choose = Callable[[LanguageModel, Sequence[np.ndarray], list[list["Generation"]]], list[list["Generation"]]]
Around = Callable[[Packed], AbstractContextManager[None]]


@dataclass(frozen=True)
class History:
    """What a sampler that looks back sees of the answers so far.

    Args:
        tokens: (N, n) int32 ids that each row has drawn.
        stop: ids that end an answer.
        which: (N,) number of the prompt that each row answers.
        prompts: ids of every prompt, by number.
        tokenizer: the model's; None where it is not known.
        beside: (N, V) logits of the next token by each of the models that the sampler has beside the one that answers.
    """

    tokens: np.ndarray
    stop: np.ndarray
    which: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    prompts: Sequence[np.ndarray] = ()
    tokenizer: Any = None
    beside: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Generation:
    """One sample of one prompt.

    Log-probabilities are the model's own: of softmax(logits / scored_at), whatever temperature or truncation the
    sampler used. They equal `LanguageModel.logprobs` of the same tokens as a child of the prompt.

    Args:
        tokens: (n,) int32 ids of the answer, without the prompt and without the stop token.
        logprobs: (n,) float64 log-probability of each.
        stopped: whether a stop token ended it; False when it ran out of `max_new_tokens` or of the model's context.
        stop_token: the stop token that was drawn, -1 when none was.
        stop_logprob: log-probability of drawing it, NaN when none was.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool
    stop_token: int = -1
    stop_logprob: float = float("nan")

    def trajectory(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and log-probabilities of everything that was drawn, the stop token included."""
        if not self.stopped:
            return self.tokens, self.logprobs
        ids = np.append(self.tokens, np.array(self.stop_token, self.tokens.dtype))
        return ids, np.append(self.logprobs, np.array(self.stop_logprob, self.logprobs.dtype))


def generate(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    *,
    samples: int = 1,
    max_new_tokens: int = 256,
    sampler: Sampler = greedy,
    stop: Sequence[int] = (),
    seed: int = 0,
    batch: int = 64,
    prefix: bool = False,
    around: Around | None = None,
    decode: Decode | None = None,
    scored_at: float = 1.0,
    on_progress: Progress | None = None,
) -> list[list[Generation]]:
    """Continue each prompt `samples` times.

    The model runs in evaluation mode without gradients and is left in the mode it was in. A generation ends at a stop
    token, after `max_new_tokens`, or where prompt and answer fill the model's context (`max_position_embeddings`).
    Models that cannot run packed (`packs` False, such as recurrent ones) go through transformers' own `generate`.

    Args:
        model: the language model, with or without an adapter.
        prompts: token ids of each prompt, none empty.
        samples: answers to each prompt.
        max_new_tokens: most tokens of an answer, a stop token included.
        sampler: called with logits (N, V) and uniforms (N,) in [0, 1), returns (N,) ids; see `Sampler`.
        stop: ids that end an answer.
        seed: seeds the uniforms; the same seed draws the same answers again.
        batch: most samples that run at once, which bounds memory; the samples of one prompt always run together.
        prefix: whether the tokens of a prompt see each other in both directions, as in a prefix language model.
        around: called with each packed forest of prompts, returns what they run within, e.g. changed embeddings.
        decode: runs prompts in another way than token by token behind a cache: (model, prompts, samples, draws), which
            calls draws.take(logits (n, V), rows (n,), step) until no row of `draws.running()` is left.
        scored_at: temperature of the distribution whose log-probabilities are returned.
        on_progress: called with (finished samples, all samples) whenever some finish.

    Returns:
        Per prompt, in the order given, its `samples` generations.

    Raises:
        ModelError: a prompt is empty or leaves no room in the model's context.
        NumericError: the model's logits are not finite.
        ValueError: `samples`, `max_new_tokens` or `batch` is below 1.
    """
    if min(samples, max_new_tokens, batch) < 1:
        raise ValueError(f"samples {samples}, max_new_tokens {max_new_tokens} and batch {batch} must be at least 1")
    samples, sampler, beside, choose = _roles(model, samples, sampler)
    lengths, room = _room((model, *beside), prompts, max_new_tokens)
    found: dict[int, list[Generation]] = {}
    report = partial(_report, on_progress, samples * len(prompts))
    run = decode or _decoder(model, prefix, around)
    with evaluating(model), narrow_linears(model, *beside), torch.no_grad():
        for wave in _waves(lengths, max(1, batch // samples), equal=not model.packs):
            draws = _Draws(wave, room[wave], samples, sampler, stop, seed, partial(report, samples * len(found)))
            draws.asked, draws.tokenizer, draws.temperature, draws.beside = prompts, model.tokenizer, scored_at, beside
            run(model, [np.asarray(prompts[i]) for i in wave], samples, draws)
            found.update(zip(wave.tolist(), draws.generations(samples), strict=True))
        return choose(model, prompts, [found[i] for i in range(len(prompts))])


def _roles(model: LanguageModel, samples: int, sampler: Any) -> tuple[int, Any, Sequence[LanguageModel], Choose]:
    """Return how many answers are drawn, what draws their tokens, who reads along, and what picks those that stay."""

    def all_stay(model: LanguageModel, prompts: Any, groups: list[list[Generation]]) -> list[list[Generation]]:
        return groups

    choose = getattr(sampler, "choose", None)
    if choose is not None:
        samples, sampler = samples * sampler.count, sampler.each()
    beside = sampler.beside(model) if hasattr(sampler, "beside") else ()
    return samples, sampler, beside, choose or all_stay


def _report(on_progress: Progress | None, total: int, before: int, count: int) -> None:
    if on_progress is not None:
        on_progress(before + count, total)


def _decoder(model: LanguageModel, prefix: bool, around: Around | None) -> Decode:
    """Return what runs prompts token by token, behind a cache of ours or of transformers."""
    if model.packs:
        return partial(_decode, prefix=prefix, around=around)
    if prefix or around is not None:
        raise ModelError(
            f"{type(model.hf).__name__} does not run packed, so that its prompts cannot be prefixes or hold thoughts"
        )
    return _decode_with_transformers


def _room(
    models: Sequence[LanguageModel], prompts: Sequence[np.ndarray], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts' lengths, and the most tokens of each answer, so that it fits all models that read it."""
    context = min((model.context for model in models if model.context is not None), default=None)
    room = np.full(len(prompts), max_new_tokens, dtype=np.int64)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ModelError(f"prompt {i} has no tokens; begin it with the tokenizer's first token (BOS)")
        if context is not None:
            room[i] = min(max_new_tokens, context - len(prompt))
            if room[i] < 1:
                raise ModelError(
                    f"prompt {i} has {len(prompt)} tokens and leaves no room for an answer in the model's context of "
                    f"{context} tokens; shorten it or use a model with a longer context"
                )
    return np.array([len(prompt) for prompt in prompts], dtype=np.int64), room


def _waves(lengths: np.ndarray, size: int, *, equal: bool) -> Iterator[np.ndarray]:
    """Yield the indices of the prompts that run together: at most `size`, of similar (or of equal) length."""
    order = np.argsort(lengths, kind="stable")
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or end - begin == size or (equal and lengths[order[end]] != lengths[order[begin]]):
            yield order[begin:end]
            begin = end


class _Draws:
    """Picks the tokens of N samples, step by step, and keeps them; row i * samples + j is sample j of prompt i.

    Its state lives on the CPU in numpy: one step's worth is a few hundred bytes.
    """

    def __init__(
        self,
        prompts: np.ndarray,
        room: np.ndarray,
        samples: int,
        sampler: Sampler,
        stop: Sequence[int],
        seed: int,
        on_finish: Callable[[int], None],
    ) -> None:
        rows = len(prompts) * samples
        self.sampler, self.stop = sampler, np.array(list(stop), dtype=np.int64)
        self.prompts, self.room = np.repeat(prompts, samples), np.repeat(room, samples)
        self.keys = _keys(seed, self.prompts, np.tile(np.arange(samples), len(prompts)))
        self.tokens = np.zeros((rows, int(room.max())), dtype=np.int32)
        self.logprobs = np.zeros(self.tokens.shape)
        self.lengths = np.zeros(rows, dtype=np.int64)  # tokens drawn, 0 while it runs
        self.on_finish = on_finish  # called with how many have ended
        self.asked: Sequence[np.ndarray] = ()  # for samplers that look back
        self.tokenizer: Any = None
        self.temperature = 1.0  # of the log-probabilities that are kept
        self.beside: Sequence[LanguageModel] = ()  # models that read along, for samplers that look at them

    def running(self) -> np.ndarray:
        """Return the rows that have not ended."""
        return np.flatnonzero(self.lengths == 0)

    def take(self, logits: Tensor, rows: np.ndarray, step: int, beside: Sequence[Tensor] = ()) -> Tensor:
        """Pick token `step` of each row from its logits (n, V); rows that ended before are picked for, not kept."""
        logits = wide(logits)
        kind = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
        uniforms = torch.from_numpy(_uniforms(self.keys[rows], step, 24 if kind == torch.float32 else 53))
        uniform = uniforms.to(kind).to(logits.device)
        drawn = History(self.tokens[rows, :step], self.stop, self.prompts[rows], self.asked, self.tokenizer, beside)
        ids = pick(self.sampler, logits, uniform, drawn)
        scores = logits if self.temperature == 1.0 else logits / self.temperature
        logprobs = (scores.gather(-1, ids[:, None])[:, 0] - scores.logsumexp(dim=-1)).cpu().numpy()
        if not np.isfinite(logprobs).all():
            prompt = self.prompts[rows[~np.isfinite(logprobs)][0]]
            raise NumericError(f"the logits of generated token {step} after prompt {prompt} are not finite")
        running = self.lengths[rows] == 0
        picked, mine = ids.cpu().numpy()[running], rows[running]
        self.tokens[mine, step], self.logprobs[mine, step] = picked, logprobs[running]
        ended = np.isin(picked, self.stop) | (step + 1 >= self.room[mine])
        self.lengths[mine[ended]] = step + 1
        if ended.any():
            self.on_finish(int(np.count_nonzero(self.lengths)))
        return ids

    def generations(self, samples: int) -> list[list[Generation]]:
        """Return what was drawn, `samples` generations per prompt."""
        made = [self._generation(row) for row in range(len(self.lengths))]
        return [made[i : i + samples] for i in range(0, len(made), samples)]

    def _generation(self, row: int) -> Generation:
        count = int(self.lengths[row])
        tokens, logprobs = self.tokens[row, :count].copy(), self.logprobs[row, :count].copy()
        if not np.isin(tokens[-1], self.stop):
            return Generation(tokens, logprobs, False)
        return Generation(tokens[:-1], logprobs[:-1], True, int(tokens[-1]), float(logprobs[-1]))


def _decode(
    model: LanguageModel,
    prompts: list[np.ndarray],
    samples: int,
    draws: _Draws,
    *,
    prefix: bool = False,
    around: Around | None = None,
) -> None:
    """Run prompts and their samples through packed models until all samples have ended."""
    room = int(draws.room.max())
    own = Reader(model, prompts, samples, room, prefix, around)
    others = [Reader(other, prompts, samples, room, prefix) for other in draws.beside]
    rows = np.arange(len(prompts) * samples)
    for step in range(room):
        ids = draws.take(own.logits, rows, step, [other.logits.to(own.logits.device) for other in others])
        running = np.flatnonzero(draws.lengths[rows] == 0)
        if len(running) == 0:
            return
        if len(running) < COMPACT_BELOW * len(rows):
            ids, rows = ids[torch.from_numpy(running).to(ids.device)], rows[running]
            for reader in (own, *others):
                reader.keep(running)
        for reader in (own, *others):
            # A row that ended but is still carried along stays at its last position, inside the model's context.
            reader.read(ids, np.minimum(step, draws.room[rows] - 1))


class Reader:
    """A model that reads prompts, and then what is drawn after them, behind a key-value cache of its own."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[np.ndarray],
        samples: int,
        room: int,
        prefix: bool = False,
        around: Around | None = None,
    ) -> None:
        """Read the prompts.

        Args:
            model: the language model; it must pack.
            prompts: token ids of each prompt.
            samples: samples per prompt; row `i * samples + j` is sample j of prompt i.
            room: most tokens of an answer.
            prefix: as for `generate`, like the next.
            around: what the prompts run within.
        """
        lengths = np.array([len(prompt) for prompt in prompts]) + model.front
        steering = steering_of(model.hf)
        self.model, self.device = model, next(model.parameters()).device
        self.watcher = None if steering is None else steering.watch(prompts, samples)
        self.cache = DecodeCache(lengths.tolist(), samples, room - 1, self.device)
        self.logits = prefill(model, prompts, self.cache, prefix, around).repeat_interleave(samples, dim=0)
        self.lengths = lengths.repeat(samples)

    def keep(self, running: np.ndarray) -> None:
        """Drop every row but some.

        Args:
            running: ascending indices of those to keep.
        """
        self.cache.keep(torch.from_numpy(running).to(self.device))
        self.lengths = self.lengths[running]
        if self.watcher is not None:
            self.watcher.keep(running)

    def read(self, ids: Tensor, places: np.ndarray) -> None:
        """Read one token of each row; `logits` (N, V) are then those of what follows it.

        Args:
            ids: (N,) the tokens.
            places: (N,) place of each in its answer, from 0.
        """
        if self.watcher is not None:
            self.cache.unseen = self.watcher.unseen(ids.cpu().numpy(), self.cache)
        positions = torch.from_numpy(self.lengths + places).to(self.device)
        self.logits = self.model.head(self.model.states(ids.to(self.device), positions, self.cache))


def prefill(
    model: LanguageModel,
    prompts: list[np.ndarray],
    cache: DecodeCache,
    prefix: bool = False,
    around: Around | None = None,
) -> Tensor:
    """Run the prompts as packed forests of bounded size; return the (prompts, V) logits of what follows each.

    Args:
        model: the language model.
        prompts: token ids of each prompt.
        cache: made for them; it is filled.
        prefix: as for `generate`, like the next.
        around: what each forest runs within.
    """
    device = next(model.parameters()).device
    logits: list[Tensor] = []
    first = 0
    while first < len(prompts):
        end, total = first + 1, len(prompts[first])
        while end < len(prompts) and total + len(prompts[end]) <= PREFILL_TOKENS:
            total += len(prompts[end])
            end += 1
        forest = pack([Tree((p,), (np.zeros(len(p), np.float32),), (-1,)) for p in prompts[first:end]]).to(device)
        forest = seen_both_ways(forest) if prefix else forest
        run = model.arrange(forest, partial(_storing, cache, first, forest, model.front))
        with nullcontext() if around is None else around(forest):
            hidden = run.own(model.states(run.tokens, run.positions, run.plan))
        logits.append(model.head(hidden[(forest.starts[1:] - 1).to(device)]))
        first = end
    return torch.cat(logits)


def _storing(cache: DecodeCache, first: int, forest: Packed, front: int, plan: Plan) -> PromptPlan:
    """Return a plan that keeps what it sees in the cache."""
    return PromptPlan(cache, plan, first, forest.starts, front)


class _Picker(LogitsProcessor):
    """Lets transformers' greedy search return what the sampler picks: all but the picked token are excluded."""

    def __init__(self, draws: _Draws, prompt_length: int) -> None:
        self.draws, self.prompt_length = draws, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (N, V) scores that leave one token each."""
        ids = self.draws.take(scores, np.arange(len(scores)), input_ids.shape[1] - self.prompt_length)
        return torch.full_like(scores, float("-inf")).scatter(-1, ids[:, None], 0.0)


def _decode_with_transformers(model: LanguageModel, prompts: list[np.ndarray], samples: int, draws: _Draws) -> None:
    """Run prompts of one length, without sharing, through `hf.generate`.

    Equal lengths need no padding, which several recurrent models would take into their state.
    """
    hf: Any = model.hf
    tokens = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(next(model.parameters()).device)
    tokens = tokens.repeat_interleave(samples, dim=0)
    stop = draws.stop.tolist()
    plain = GenerationConfig(
        max_new_tokens=int(draws.room.max()), do_sample=False, eos_token_id=stop or None, pad_token_id=(stop or [0])[0]
    )
    accepted = inspect.signature(hf.forward).parameters
    mask = {"attention_mask": torch.ones_like(tokens)} if "attention_mask" in accepted else {}
    kept = hf.generation_config
    hf.generation_config = plain  # the model's own would add penalties and stop tokens that nobody asked for here
    try:
        picker = LogitsProcessorList([_Picker(draws, tokens.shape[1])])
        hf.generate(tokens, generation_config=plain, logits_processor=picker, **mask)
    finally:
        hf.generation_config = kept


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64-bit words whose outputs look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _advance(state: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the word `count` + 1 steps along the SplitMix64 stream that starts at `state`."""
    return _mix(state + (count.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _keys(seed: int, prompts: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the (N,) uint64 stream of each (prompt, sample)."""
    root = np.full(len(prompts), seed % 2**64, dtype=np.uint64)
    return _advance(_advance(_mix(root), prompts), samples)


def _uniforms(keys: np.ndarray, step: int, bits: int = 53) -> np.ndarray:
    """Return number `step` of each stream: (N,) float64 in [0, 1), multiples of 2^-bits."""
    return (_advance(keys, np.full(len(keys), step)) >> np.uint64(64 - bits)) * 2.0**-bits
