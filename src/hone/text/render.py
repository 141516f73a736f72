"""Text to tokens and weights: one object renders training samples and the prompts of generation.

A sample becomes a chain of pieces (prompt, answer, what stands between turns, ...). Each piece is tokenised on its own,
so the tokens of a prompt do not depend on what follows it: training and generation see the same ids by construction,
and a weight never straddles a border. A tree is one chain, or, for a preference pair, two that share their beginning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from hone.data.formats import CONTINUES
from hone.data.sample import Message, Sample, opened
from hone.errors import DataError, ModelError, nearest
from hone.text.pack import Tree
from hone.text.template import FIX, ChatTemplate, Piece, find_template, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SILENT = "hone:silent"  # in `extra`: per answer the (begin, end) spans of its characters that are not trained
VERSION = 1  # of the rendering; part of the fingerprint that keys the token cache
Chain = list[tuple[Piece, float]]  # pieces from the start of a text to an end of it, each with its weight
Segment = tuple[np.ndarray, np.ndarray]  # token ids and their weights


class Renderer:
    """Turns samples into trees, and prompts into ids for generation, with one tokenizer and one chat template.

    Plain text begins with what the tokenizer puts before every text (its BOS, if it has that custom); where there is no
    prompt, it begins with the BOS or end-of-text token in any case, so that the first trained token is predicted from
    something. A document and an answer end with the end-of-text token, which is trained. A conversation is exactly what
    the chat template writes, BOS included; the trained part of an assistant's turn is what follows the generation
    prompt, up to and including the token that ends the turn.

    A special token that is written out in a text becomes that token, as everywhere in transformers.

    Where a template rewrites earlier turns (Qwen3 drops their thinking), each assistant turn becomes a tree of its own,
    behind the prompt that generation would see. Where no token ends a turn, the end-of-text token does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        eos_ids: int | Sequence[int] | None = None,
    ) -> None:
        """Settle the tokenizer's conventions.

        Args:
            tokenizer: the model's tokenizer.
            template: chat template: "chatml", the path of a .jinja file, Jinja text, or None for the tokenizer's own.
                The built-in "chatml" ends turns with <|im_end|> where that is a token, else with the end-of-text token.
            eos_ids: `eos_token_id` of the model's generation_config, if it has one.

        Raises:
            ModelError: there is no such template.
        """
        self.tokenizer: Any = tokenizer
        self.eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or ())
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.eos: int | None = next(iter(self.eos_ids), None) if eos is None else eos
        self.prefix = _prefix(tokenizer)
        first = self.eos if bos is None else bos
        self.start = self.prefix or ([] if first is None else [first])  # what a text without a prompt begins with
        self.puts_space = self._ids("\na") != self._ids("\n") + self._ids("a")
        self.template = find_template(tokenizer, template, bool(self.prefix) and self.prefix == [bos])
        self.chat = None if self.template is None else ChatTemplate(self.template, tokenizer, self._company)

    def _ids(self, text: str) -> list[int]:
        return plain_ids(self.tokenizer, text)

    def _company(self, before: str) -> str:
        """Return in whose company to tokenise the piece that follows a text.

        A tokenizer with the custom of putting a space before a text (SentencePiece) must not do so before a piece
        inside it, unless that follows a special token, where the same tokenizer does so in a whole text too.
        """
        if not self.puts_space:
            return ""
        return next((token for token in self.tokenizer.added_tokens_encoder if before.endswith(token)), "\n")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the rendering depends on: tokenizer, template and the version of this module."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            state: Any = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        else:  # truncation and padding are left as somebody's last call set them; rendering uses neither
            state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        named = sorted(self.tokenizer.special_tokens_map.items())
        whole = [VERSION, state, named, self.template, self.prefix, self.start, self.eos]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids at which generation stops: end of text, the template's end of turn, and what the model's files add."""
        found = [*self.eos_ids, self.eos]
        if self.chat is not None:
            try:
                found.append(self.chat.manner.stop)
            except ModelError as error:  # no matter to plain text; the first conversation to render raises it
                log.warning("the end of a turn is not known: %s", error)
        return sorted({token for token in found if token is not None})

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of generated ids, without special tokens and the tokens that end an answer.

        Args:
            ids: token ids.
        """
        listed = [int(token) for token in ids]
        while listed and listed[-1] in self.stop_ids:
            listed.pop()
        return self._text(listed, skip_special_tokens=True)

    def show(self, tree: Tree) -> list[tuple[str, bool]]:
        """Return the text of a tree in stretches, each with whether it is trained, for coloured previews.

        Args:
            tree: a rendered sample.
        """
        shown = []
        for tokens, weights in zip(tree.tokens, tree.weights, strict=True):
            pairs = zip(tokens.tolist(), weights.tolist(), strict=True)
            for trained, run in groupby(pairs, key=lambda pair: pair[1] != 0):
                shown.append((self._text([token for token, _ in run], skip_special_tokens=False), trained))
        return shown

    def _text(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def prompt_ids(self, sample: Sample) -> np.ndarray:
        """Return what precedes a sample's answer: (T,) int32, the very ids that `render` puts before it.

        For a conversation that is what precedes its last assistant turn.

        Args:
            sample: a sample of any kind.

        Raises:
            DataError: the chat template refuses the conversation.
            ModelError: the sample is a conversation and there is no chat template for it, or nothing to start from.
        """
        messages = opened(sample).prompt
        if isinstance(messages, str):
            pieces = [Piece(messages)] if messages else []
        else:
            pieces = self._chat(sample.where).prompt(messages, sample.where, sample.tools)
        ids, _ = self._segment([(piece, False) for piece in pieces], plain=isinstance(sample.prompt, str))
        if not len(ids):
            raise ModelError(f"{sample.where}: the prompt is empty and the tokenizer has no token to start a text with")
        return ids

    def worded(self, sample: Sample) -> Sample:
        """Return a sample whose reference is the text that the chat template writes, where it calls tools.

        Args:
            sample: a sample of any kind; those whose last answer calls no tool come back as they are.

        Raises:
            DataError: the chat template refuses the conversation.
            ModelError: there is no chat template, or it leaves the calls out.
        """
        asked = opened(sample)
        last = asked.answers[-1] if asked.kind == "completion" else ""
        if isinstance(last, str) or isinstance(asked.prompt, str) or not last[-1].calls:
            return sample
        *_, turn = self._chat(sample.where).turns((*asked.prompt, *last), sample.where, sample.tools)
        return replace(asked, answers=(self.decode(self._tokens(turn.answer)),))

    def render(self, sample: Sample) -> list[Tree]:
        """Return the trees of a sample: one, except for a conversation whose template rewrites earlier turns.

        Args:
            sample: a sample of any kind.

        Returns:
            Trees whose weights are 1 on what is trained and 0 elsewhere. A pair is a prompt with the children chosen
            and rejected, marked by the field "chosen" (1, 0, and NaN at the prompt), a list one with the field "score".
            The steps of an answer are a chain behind the prompt with the field "value" (NaN at the prompt). A number in
            `sample.fields` is repeated for each segment.

        Raises:
            DataError: the chat template refuses the conversation.
            ModelError: the tokenizer or the template lacks what the sample needs.
        """
        if sample.kind == "pair":
            return [self._answers(sample, {"chosen": (1.0, 0.0)})]
        if sample.kind == "list":
            return [self._answers(sample, {"score": sample.scores})]
        if sample.kind == "steps":
            return [self._steps(sample)]
        if sample.kind == "prompt":
            ids = self.prompt_ids(sample)
            return [_tree(sample, [(ids, np.zeros(len(ids), np.float32))], (-1,))]
        plain = isinstance(sample.prompt, str)
        chains = [self._stretches(sample)] if sample.kind == "pieces" else self._chains(sample, 0)
        return [_tree(sample, [self._segment(chain, plain)], (-1,)) for chain in chains]

    def piece_ids(self, text: str) -> list[int]:
        """Return the ids of one piece of an answer in pieces, which do not depend on what stands around it.

        Args:
            text: the piece.
        """
        return self._tokens(self._inner(text))

    def _inner(self, text: str) -> Piece:
        return Piece(text, self._company(""))

    def _stretches(self, sample: Sample) -> Chain:
        """Return the chain of an answer in pieces, each with its own weight; the last one ends the text."""
        if not isinstance(sample.prompt, str) or not all(isinstance(answer, str) for answer in sample.answers):
            raise DataError(f"{sample.where}: an answer in pieces needs a plain prompt and plain pieces")
        pieces = [self._inner(str(answer)) for answer in sample.answers]
        pieces[-1] = replace(pieces[-1], closed=True)
        weighed = zip(pieces, sample.scores or (1.0,) * len(pieces), strict=True)
        return [*([(Piece(sample.prompt), 0.0)] if sample.prompt else []), *weighed]

    def _answers(self, sample: Sample, fields: dict[str, tuple[float, ...]]) -> Tree:
        """Return a prompt with its answers as children; without a prompt, each answer is a root."""
        every = [self._chains(sample, which) for which in range(len(sample.answers))]
        if any(len(chains) > 1 for chains in every):
            raise ModelError(
                f"{sample.where}: the chat template rewrites earlier turns, so that an answer of several assistant "
                f"turns cannot be compared as one text. Keep one assistant turn per answer, or: {FIX}"
            )
        own = [chains[0] for chains in every]
        shared = takewhile(
            lambda pieces: all(piece == pieces[0] for piece in pieces) and not pieces[0][1], zip(*own, strict=False)
        )
        cut = len(list(shared))
        root = self._segment(own[0][:cut], plain=isinstance(sample.prompt, str))
        answers = [self._segment(chain[cut:], plain=False) for chain in own]
        if not len(root[0]):
            return _tree(sample, answers, (-1,) * len(answers), fields)
        marked = {name: (float("nan"), *values) for name, values in fields.items()}
        return _tree(sample, [root, *answers], (-1, *(0 for _ in answers)), marked)

    def _steps(self, sample: Sample) -> Tree:
        """Return a prompt and the steps of an answer as a chain of segments, each with what is reached by it."""
        if not isinstance(sample.prompt, str) or not all(isinstance(answer, str) for answer in sample.answers):
            raise DataError(f"{sample.where}: an answer in steps needs a plain prompt and plain steps")
        *steps, last = (self._inner(str(answer)) for answer in sample.answers)
        pieces = [*steps, replace(last, closed=not sample.extra.get(CONTINUES, False))]
        root = self._segment([(Piece(sample.prompt), False)] if sample.prompt else [], plain=True)
        chain = [root, *(self._segment([(piece, True)], plain=False) for piece in pieces)]
        return _tree(sample, chain, tuple(range(-1, len(pieces))), {"value": (float("nan"), *sample.scores)})

    def classified(self, sample: Sample, classes: Sequence[str]) -> Tree:
        """Return the tree of a text or of tagged words: what is classified, with the number of its class.

        A text is one segment with the field "class", none of whose tokens are trained. Words are a chain of segments,
        one each, with the field "class"; the last token of a word weighs 1, since its state has seen all of the word.

        Args:
            sample: a text with a label, or words with theirs.
            classes: names of the classes, in the order of their numbers.

        Raises:
            DataError: the sample has no label, or one that is no class.
        """
        if not sample.labels:
            raise DataError(
                f"{sample.where}: expected a class in a column called 'label', found none; name the column with "
                "columns: {label: COLUMN}"
            )
        known = {name: float(number) for number, name in enumerate(classes)}
        for label in sample.labels:
            if label not in known:
                hint = nearest(label, classes) or f"classes: {', '.join(classes)}"
                raise DataError(f"{sample.where}: '{label}' is none of the classes ({hint})")
        numbers = tuple(known[label] for label in sample.labels)
        if sample.kind == "tagged":
            texts = [f" {word}" if place else str(word) for place, word in enumerate(sample.answers)]
            parts = [(np.array(self._ids(text) or self._ids(str(sample.answers[place])), np.int32))
                     for place, text in enumerate(texts)]  # fmt: skip
            parts[0] = np.concatenate([np.array(self.start, np.int32), parts[0]])
            weights = [np.eye(1, len(part), len(part) - 1, dtype=np.float32)[0] for part in parts]
            chain = tuple(range(-1, len(parts) - 1))
            return Tree(tuple(parts), tuple(weights), chain, {"class": numbers}, sample.where)
        ids, _ = self._segment([(Piece(str(sample.answers[0])), False)], plain=True)
        return _tree(sample, [(ids, np.zeros(len(ids), np.float32))], (-1,), {"class": numbers})

    def _chains(self, sample: Sample, which: int) -> list[Chain]:
        """Return the chains that train answer number `which` of a sample; a conversation holds its answers itself."""
        answer = sample.answers[which] if sample.answers else ()
        if not isinstance(sample.prompt, str):
            more = (Message("assistant", answer),) if isinstance(answer, str) else answer
            return self._conversation(sample, (*sample.prompt, *more), len(sample.prompt) if more else 0)
        if not isinstance(answer, str):
            raise DataError(f"{sample.where}: a plain prompt needs a plain answer, found a list of turns")
        closed = not sample.extra.get(CONTINUES, False)  # a passage of a longer text does not end it
        spans = sample.extra[SILENT][which] if SILENT in sample.extra else ()
        if not sample.prompt:
            return [_parted(Piece(answer, closed=closed), spans, self._inner)]
        own = Piece(answer, self._company(sample.prompt), closed)
        return [[(Piece(sample.prompt), False), *_parted(own, spans, self._inner)]]

    def _conversation(self, sample: Sample, messages: tuple[Message, ...], first: int) -> list[Chain]:
        """Return the chains that train the assistant's turns from message number `first` on, each of them once."""
        chains: list[Chain] = []
        for turn in self._chat(sample.where).turns(messages, sample.where, sample.tools):
            if turn.index < first:
                continue
            if not chains or [piece for piece, _ in chains[-1]] != turn.prompt[: len(chains[-1])]:
                chains.append([])
            chain = chains[-1]
            chain += [(piece, False) for piece in turn.prompt[len(chain) :]]
            chain.append((turn.answer, messages[turn.index].weight))
        if not chains:
            raise DataError(f"{sample.where}: expected an assistant turn to train on, found none")
        return chains

    def _chat(self, where: str) -> ChatTemplate:
        if self.chat is None:
            raise ModelError(f"{where}: this is a conversation, but the tokenizer has no chat template. {FIX}")
        return self.chat

    def _segment(self, chain: Chain, plain: bool) -> Segment:
        """Return the tokens and weights of a chain; a plain one begins with what begins a text."""
        ids: list[int] = []
        weights: list[float] = []
        for piece, trained in chain:
            own = self._tokens(piece)
            ids += own
            weights += [float(trained)] * len(own)
        if plain:
            has_prompt = bool(chain) and not chain[0][1]
            head = self.prefix if has_prompt else self.start
            head = [] if ids[: len(head)] == head else head  # the text may bring its own BOS
            ids, weights = head + ids, [0.0] * len(head) + weights
        return np.array(ids, np.int32), np.array(weights, np.float32)

    def _tokens(self, piece: Piece) -> list[int]:
        before = self._ids(piece.after) if piece.after else []
        together = self._ids(piece.after + piece.text)
        # Where the border melts (the text begins with what merges with `after`), the piece is tokenised alone.
        ids = together[len(before) :] if together[: len(before)] == before else self._ids(piece.text)
        if not piece.closed:
            return ids
        if self.eos is None:
            raise ModelError(
                "the tokenizer has no end-of-text token, so that a model would never learn where an answer ends. "
                "Set eos_token in the model's tokenizer_config.json"
            )
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]


def _parted(answer: Piece, spans: Sequence[tuple[int, int]], inner: Callable[[str], Piece]) -> Chain:
    """Return an answer as a chain in which the characters of some spans are not trained."""
    if not spans:
        return [(answer, True)]
    chain: Chain = []
    at = 0
    for begin, end in spans:
        texts = (answer.text[at:begin], True), (answer.text[begin:end], False)
        chain += [(inner(text), trained) for text, trained in texts if text]
        at = end
    chain.append((replace(inner(answer.text[at:]), closed=answer.closed), True))
    chain = [(piece, trained) for piece, trained in chain if piece.text or piece.closed]
    chain[0] = replace(chain[0][0], after=answer.after), chain[0][1]
    return chain


def _prefix(tokenizer: Any) -> list[int]:
    """Return what a tokenizer puts before a text, found by looking at what it does."""
    bare, dressed = plain_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    places = (at for at in range(len(dressed)) if bare and dressed[at : at + len(bare)] == bare)
    return dressed[: next(places, 0)]


def _tree(
    sample: Sample,
    segments: Sequence[Segment],
    parents: tuple[int, ...],
    fields: dict[str, tuple[float, ...]] | None = None,
) -> Tree:
    for (_, weight), parent in zip(segments, parents, strict=True):
        if parent < 0:
            weight[:1] = 0  # nothing precedes it that it could be predicted from
    repeated = {name: (value,) * len(segments) for name, value in sample.fields.items()}
    tokens, weights = (tuple(segment[column] for segment in segments) for column in (0, 1))
    return Tree(tokens, weights, parents, {**repeated, **(fields or {})}, sample.where)
