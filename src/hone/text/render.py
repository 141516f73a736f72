"""Text to tokens and weights: one object renders training samples and the prompts of generation.

A sample becomes a chain of pieces (prompt, answer, what stands between turns, ...). Each piece is tokenised on its own, so
the tokens of a prompt do not depend on what follows it: training and generation see the same ids by construction, and a
weight never straddles a border. A tree is a chain, or, for a preference pair, two chains that share their beginning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, takewhile
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from hone.data.sample import Message, Sample
from hone.errors import DataError, ModelError, nearest
from hone.text.pack import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VERSION = 1  # of the rendering; part of the fingerprint that keys the token cache
CHATML = (
    "{% for message in messages %}"
    "{{ BOS'<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Templates that print today's date would render the same sample differently tomorrow. A macro of that name comes before
# the function that transformers offers; the date is the one that Llama 3.1's own template falls back to.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"
PROBE = (Message("user", "hone asks"), Message("assistant", "hone answers"))
FIX = "Set model.template to 'chatml' or to the path of a .jinja file."


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is tokenised on its own.

    Args:
        text: the text.
        after: text that stands before it, in whose company it is tokenised; "" at the start.
        closed: whether the end-of-text token follows.
    """

    text: str
    after: str = ""
    closed: bool = False


Chain = list[tuple[Piece, bool]]  # the pieces from the start to an end, each with whether it is trained


@dataclass(frozen=True)
class _Manner:
    """How a chat template writes an assistant's turn.

    Args:
        surplus: characters of white space at the end of the generation prompt that assistant turns lack.
        end: what ends the turn, up to and including its first special token; "" when no token does.
        tail: all that follows the content.
        stop: id of the token that ends the turn, None when no token does.
    """

    surplus: int
    end: str
    tail: str
    stop: int | None


class Renderer:
    """Turns samples into trees, and prompts into ids for generation, with one tokenizer and one chat template.

    Plain text begins with what the tokenizer puts before every text (its BOS, if it has that custom); where there is no
    prompt, it begins with the BOS or end-of-text token in any case, so that the first trained token is predicted from
    something. A document and an answer end with the end-of-text token, which is trained. A conversation is exactly what
    the chat template writes, BOS included; the trained part of an assistant's turn is what follows the generation
    prompt, up to and including the token that ends the turn.

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
        more = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or ())
        own = self.tokenizer.eos_token_id
        self.eos: int | None = own if own is not None else next(iter(more), None)
        self.prefix = self._find_prefix()
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eos
        self.start = self.prefix or ([] if start is None else [start])  # what a text without a prompt begins with
        self.template = self._find_template(template)
        self._eos_ids = more
        # A tokenizer with a custom of putting a space before a text must not do so before each piece.
        self._anchor = "" if self._ids("\na") == self._ids("\n") + self._ids("a") else "\n"

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_prefix(self) -> list[int]:
        """Return what the tokenizer puts before a text, found by looking at what it does."""
        bare, dressed = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        places = [at for at in range(len(dressed)) if bare and dressed[at : at + len(bare)] == bare]
        return dressed[: places[0]] if places else []

    def _find_template(self, template: str | None) -> str | None:
        if template is None:
            own = self.tokenizer.chat_template
            if isinstance(own, dict) and "default" not in own:
                names = ", ".join(sorted(own))
                raise ModelError(f"the tokenizer has several chat templates ({names}) and none is the default. {FIX}")
            return own.get("default") if isinstance(own, dict) else own
        if template == "chatml":
            return self._chatml()
        if "{%" in template or "{{" in template:
            return template
        path = Path(template).expanduser()
        if not path.is_file():
            siblings = [p.name for p in path.parent.glob("*.jinja")] if path.parent.is_dir() else []
            hint = nearest(path.name, ["chatml", *siblings]) or "expected 'chatml' or the path of a .jinja file"
            raise ModelError(f"model.template: there is no template file '{template}'; {hint}")
        return path.read_text(encoding="utf-8")

    def _chatml(self) -> str:
        if "<|im_end|>" in self.tokenizer.get_vocab():
            end = "'<|im_end|>'"
        elif self.tokenizer.eos_token is not None:
            end = "eos_token"
        else:
            raise ModelError("model.template: chatml needs a token that ends a turn: <|im_end|> or an eos_token")
        adds_bos = self.prefix and self.prefix == [self.tokenizer.bos_token_id]
        bos = "(bos_token if loop.first else '') + " if adds_bos else ""
        return CHATML.replace("BOS", bos).replace("END", end)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the rendering depends on: tokenizer, template and the version of this module."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state = json.loads(backend.to_str())
            state.pop("truncation"), state.pop("padding")  # set by whoever called it last; never used here
        else:
            state = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        named = sorted(self.tokenizer.special_tokens_map.items())
        whole = [VERSION, state, named, self.template, self.prefix, self.start, self.eos]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids at which generation stops: end of text, the template's end of turn, and what the model's files add."""
        found = [*self._eos_ids, self.eos]
        if self.template is not None:
            try:
                found.append(self._manner.stop)
            except ModelError:
                log.warning("the chat template cannot write a plain conversation, so its end of turn is not known")
        return sorted({token for token in found if token is not None})

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of generated ids, without special tokens and the tokens that end an answer.

        Args:
            ids: token ids.
        """
        listed = [int(token) for token in ids]
        while listed and listed[-1] in self.stop_ids:
            listed.pop()
        return str(self.tokenizer.decode(listed, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def show(self, tree: Tree) -> list[tuple[str, bool]]:
        """Return the text of a tree in stretches, each with whether it is trained, for coloured previews.

        Args:
            tree: a rendered sample.
        """
        shown = []
        for tokens, weights in zip(tree.tokens, tree.weights, strict=True):
            for trained, run in groupby(zip(tokens.tolist(), weights.tolist(), strict=True), key=lambda pair: pair[1] != 0):
                ids = [token for token, _ in run]
                text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                shown.append((str(text), trained))
        return shown

    def prompt_ids(self, sample: Sample) -> np.ndarray:
        """Return what precedes a sample's answer: (T,) int32, the very ids that `render` puts before it.

        For a conversation that is what precedes its last assistant turn.

        Args:
            sample: a sample of any kind.

        Raises:
            DataError: the chat template refuses the conversation.
            ModelError: the sample is a conversation and there is no chat template for it, or nothing to start from.
        """
        if isinstance(sample.prompt, str):
            pieces = [Piece(sample.prompt)] if sample.prompt else []
        else:
            turns = sample.prompt
            if sample.kind == "messages":
                spoken = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
                turns = turns[: spoken[-1]] if spoken else turns
            pieces = self._prompt_pieces(turns, sample.where)
        ids = self._join([(piece, False) for piece in pieces], plain=isinstance(sample.prompt, str))[0]
        if not len(ids):
            raise ModelError(f"{sample.where}: the prompt is empty and the tokenizer has no token to start a text with")
        return ids

    def render(self, sample: Sample) -> list[Tree]:
        """Return the trees of a sample: one, except for a conversation whose template rewrites earlier turns.

        Args:
            sample: a sample of any kind.

        Returns:
            Trees whose weights are 1 on what is trained and 0 elsewhere. A pair is a prompt with the children chosen and
            rejected, marked by the field "chosen" (1, 0, and NaN at the prompt); a number in `sample.fields` is
            repeated for each segment.

        Raises:
            DataError: the chat template refuses the conversation.
            ModelError: the tokenizer or the template lacks what the sample needs.
        """
        if sample.kind == "prompt":
            ids = self.prompt_ids(sample)
            return [self._tree(sample, [(ids, np.zeros(len(ids), np.float32))], (-1,))]
        if sample.kind == "pair":
            return [self._pair(sample)]
        plain = isinstance(sample.prompt, str)
        return [self._tree(sample, [self._join(chain, plain)], (-1,)) for chain in self._chains(sample, 0)]

    def _chains(self, sample: Sample, which: int) -> list[Chain]:
        """Return the chains that train answer number `which` of a sample."""
        answer = sample.answers[which] if sample.answers else ()
        if isinstance(sample.prompt, str):
            if not isinstance(answer, str):
                raise DataError(f"{sample.where}: a plain prompt needs a plain answer, found a list of turns")
            closed = not sample.extra.get("continues", False)
            piece = Piece(answer, self._anchor if sample.prompt else "", closed=closed)
            return [[(Piece(sample.prompt), False)] * bool(sample.prompt) + [(piece, True)]]
        more = (Message("assistant", answer),) if isinstance(answer, str) else answer
        return self._conversation((*sample.prompt, *more), len(sample.prompt) if more else 0, sample.where)

    def _pair(self, sample: Sample) -> Tree:
        both = [self._chains(sample, which) for which in (0, 1)]
        if any(len(chains) > 1 for chains in both):
            raise ModelError(
                f"{sample.where}: the chat template rewrites earlier turns, so that an answer of several assistant turns "
                "cannot be compared as one text. Keep one assistant turn per answer, or set another model.template"
            )
        chosen, rejected = (chains[0] for chains in both)
        shared = takewhile(lambda two: two[0] == two[1] and not two[0][1], zip(chosen, rejected, strict=False))
        cut = sum(1 for _ in shared)
        root = self._join(chosen[:cut], plain=isinstance(sample.prompt, str))
        answers = [self._join(chain[cut:], plain=False) for chain in (chosen, rejected)]
        if not len(root[0]):
            return self._tree(sample, answers, (-1, -1), {"chosen": (1.0, 0.0)})
        return self._tree(sample, [root, *answers], (-1, 0, 0), {"chosen": (float("nan"), 1.0, 0.0)})

    def _tree(
        self,
        sample: Sample,
        segments: list[tuple[np.ndarray, np.ndarray]],
        parents: tuple[int, ...],
        fields: dict[str, tuple[float, ...]] | None = None,
    ) -> Tree:
        for (_, weights), parent in zip(segments, parents, strict=True):
            if parent < 0:
                weights[:1] = 0  # nothing precedes it that it could be predicted from
        repeated = {name: (value,) * len(segments) for name, value in sample.fields.items()}
        tokens, weights = (tuple(column) for column in zip(*segments, strict=True))
        return Tree(tokens, weights, parents, {**repeated, **(fields or {})}, sample.where)

    def _join(self, chain: Chain, plain: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and weights of a chain; a plain one begins with what begins a text."""
        ids: list[int] = []
        weights: list[float] = []
        for piece, trained in chain:
            own = self._tokens(piece)
            ids += own
            weights += [float(trained)] * len(own)
        if plain:
            head = self.start if not chain or (len(chain) == 1 and chain[0][1]) else self.prefix
            head = [] if head and ids[: len(head)] == head else head  # a text may bring its own BOS
            ids, weights = head + ids, [0.0] * len(head) + weights
        return np.array(ids, np.int32), np.array(weights, np.float32)

    def _tokens(self, piece: Piece) -> list[int]:
        ids, before = [], self._ids(piece.after) if piece.after else []
        together = self._ids(piece.after + piece.text) if before else []
        ids = together[len(before) :] if before and together[: len(before)] == before else self._ids(piece.text)
        if piece.closed:
            if self.eos is None:
                raise ModelError(
                    "the tokenizer has no end-of-text token, so that a model would never learn where an answer ends. "
                    "Set eos_token in the model's tokenizer_config.json"
                )
            ids += [] if ids and ids[-1] == self.eos else [self.eos]
        return ids

    def _conversation(self, turns: Sequence[Message], first: int, where: str) -> list[Chain]:
        """Return the chains that train the assistant turns from number `first` on, each of them once."""
        chains: list[Chain] = []
        for index, context, answer in self._assistant_turns(turns, where):
            if index < first:
                continue
            if not chains or [piece for piece, _ in chains[-1]] != context[: len(chains[-1])]:
                chains.append([])
            chain = chains[-1]
            chain += [(piece, False) for piece in context[len(chain) :]]
            chain.append((answer, True))
        if not chains:
            raise DataError(f"{where}: expected an assistant turn to train on, found none")
        return chains

    def _prompt_pieces(self, turns: Sequence[Message], where: str) -> list[Piece]:
        """Return the generation prompt after some turns, in pieces; it depends on these turns alone."""
        done: list[Piece] = []
        for _, context, answer in self._assistant_turns(turns, where):
            done = [*context, replace(answer, closed=False)]
        return self._continued(done, self._generation_prompt(turns, where))

    def _assistant_turns(self, turns: Sequence[Message], where: str) -> Iterator[tuple[int, list[Piece], Piece]]:
        """Yield each assistant turn: its index, the pieces of its generation prompt, and its own piece."""
        done: list[Piece] = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._generation_prompt(turns[:index], where)
            context = self._continued(done, prompt)
            answer = self._answer(turns[: index + 1], prompt, where)
            yield index, context, answer
            done = [*context, replace(answer, closed=False)]

    def _continued(self, done: list[Piece], prompt: str) -> list[Piece]:
        """Cut a prompt where earlier turns were cut, or leave it whole when the template wrote those differently."""
        text = "".join(piece.text for piece in done)
        if done and prompt.startswith(text):
            return [*done, Piece(prompt[len(text) :], after=self._manner.end or self._anchor)]
        return [Piece(prompt)]

    def _generation_prompt(self, turns: Sequence[Message], where: str) -> str:
        prompt = self._written(turns, where, generate=True)
        return prompt[: len(prompt) - self._manner.surplus]

    def _answer(self, turns: Sequence[Message], prompt: str, where: str) -> Piece:
        """Return what the last turn, an assistant's, adds to its generation prompt, up to its end-of-turn token."""
        whole = self._written(turns, where)
        if not whole.startswith(prompt):
            raise _not_a_prefix(prompt, whole, where)
        text, manner = whole[len(prompt) :], self._manner
        if not manner.end:
            return Piece(text.removesuffix(manner.tail), self._anchor, closed=True)
        last = text.rfind(manner.end)
        if last < 0:
            raise ModelError(f"{where}: the chat template does not end this assistant turn with {manner.end!r}. {FIX}")
        return Piece(text[: last + len(manner.end)], self._anchor)

    def _written(self, turns: Sequence[Message], where: str, generate: bool = False) -> str:
        """Return what the chat template writes for some turns."""
        if self.template is None:
            raise ModelError(f"{where}: this is a conversation, but the tokenizer has no chat template. {FIX}")
        if not turns:
            raise DataError(f"{where}: the conversation begins with an assistant turn; expected a user's turn before it")
        try:
            return self._apply(self.template, turns, generate)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}. {FIX}") from error
        except jinja2.TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"{where}: the chat template refuses this conversation ({roles}): {error}. Change the row, or: {FIX}"
            ) from error

    def _apply(self, template: str, turns: Sequence[Message], generate: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        if "strftime_now" in template:
            template = FIXED_DATE + template
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=generate, tokenize=False
            )
        )

    @cached_property
    def _manner(self) -> _Manner:
        """How the template writes an assistant's turn, seen from a conversation of two turns."""
        asked, answered = PROBE
        try:
            prompt = self._written([asked], "a trial conversation", generate=True)
            bare = self._written([asked], "a trial conversation")
            whole = self._written(PROBE, "a trial conversation")
        except DataError as error:
            raise ModelError(str(error)) from error
        header, found, tail = whole.rpartition(answered.content)
        same = len(commonprefix([prompt, whole]))
        if not found or prompt[same:].strip():
            raise _not_a_prefix(prompt, whole, "a trial conversation")
        if prompt == bare and header[same:].strip():
            raise ModelError(
                f"the chat template begins an assistant's turn with {header[same:]!r}, but does not write that when "
                "add_generation_prompt is set, so that generation would have to invent it. Add "
                f"{{% if add_generation_prompt %}}{header[same:]}{{% endif %}} at its end, or: {FIX}"
            )
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        stop = next((token for token in self._ids(tail) if token in special), None)
        mark = "" if stop is None else str(self.tokenizer.convert_ids_to_tokens(stop))
        return _Manner(len(prompt) - same, tail[: tail.find(mark) + len(mark)] if mark else "", tail, stop)


def _not_a_prefix(prompt: str, whole: str, where: str) -> ModelError:
    same = len(commonprefix([prompt, whole]))
    return ModelError(
        f"{where}: the chat template's generation prompt is not how it begins an assistant's turn, so that a model would be "
        f"trained on one text and asked with another: it ends with {prompt[max(0, same - 20) :]!r}, the turn with "
        f"{whole[max(0, same - 20) : same + 40]!r} at that place. Make both the same in the template, or: {FIX}"
    )
