"""Rendering of plain text and preference pairs: what is trained, what precedes it, and what identifies a renderer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families.chat_styles import (
    CHATML,
    GEMMA,
    LLAMA3,
    PLAIN,
    QWEN3,
    SPECIAL,
    TALK,
    TEXT,
    byte_level,
    sentencepiece,
    trained_text,
)  # fmt: skip
from hone.data.formats import CONTINUES
from hone.data.sample import Message, Sample
from hone.errors import DataError, ModelError
from hone.text.pack import pack
from hone.text.render import Renderer

# Plain text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [True, False])
def test_completion_is_prompt_and_trained_answer(adds_bos):
    tokenizer = byte_level(adds_bos=adds_bos)
    renderer = Renderer(tokenizer)
    sample = Sample("completion", "Question: 2 + 2?\nAnswer:", (" 4",), fields={"weight": 0.5}, where="x:1")
    (tree,) = renderer.render(sample)
    prompt = tokenizer("Question: 2 + 2?\nAnswer:")["input_ids"]
    answer = tokenizer(" 4", add_special_tokens=False)["input_ids"]
    assert tree.tokens[0].tolist() == [*prompt, *answer, tokenizer.eos_token_id]
    assert tree.weights[0].tolist() == [0.0] * len(prompt) + [1.0] * (len(answer) + 1)
    assert renderer.prompt_ids(sample).tolist() == prompt
    assert (
        tree.fields == {"weight": (0.5,)} and tree.tokens[0].dtype == np.int32 and tree.weights[0].dtype == np.float32
    )


def test_completion_reads_on_as_one_text_with_a_tokenizer_that_prefixes_spaces():
    tokenizer = sentencepiece()
    (tree,) = Renderer(tokenizer).render(Sample("completion", "Question: 2 + 2?\nAnswer:", (" 4",)))
    assert tree.tokens[0][:-1].tolist() == tokenizer("Question: 2 + 2?\nAnswer: 4")["input_ids"]


def test_text_that_brings_its_own_bos_and_end_gets_no_second_one():
    (tree,) = Renderer(PLAIN).render(Sample("completion", "<s>hello", (" you</s>",)))
    assert tree.tokens[0].tolist() == PLAIN("<s>hello you</s>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("adds_bos", "bos"), [(True, "<s>"), (False, "<s>"), (False, None)])
def test_without_a_prompt_something_still_precedes_the_first_trained_token(adds_bos, bos):
    tokenizer = byte_level(adds_bos=adds_bos, bos_token=bos)
    renderer = Renderer(tokenizer)
    start = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    for sample in (Sample("text", answers=("the user",)), Sample("completion", "", ("the user",))):
        (tree,) = renderer.render(sample)
        assert tree.tokens[0][0] == start and tree.tokens[0][-1] == tokenizer.eos_token_id
        assert tree.weights[0].tolist() == [0.0] + [1.0] * (len(tree) - 1)
        assert renderer.prompt_ids(sample).tolist() == [start]


def test_without_any_token_to_start_with_the_first_token_is_not_trained():
    renderer = Renderer(byte_level(adds_bos=False, bos_token=None, eos_token=None))
    (tree,) = renderer.render(Sample("text", answers=("the user asks",), extra={CONTINUES: True}))
    assert tree.weights[0][0] == 0 and tree.weights[0][1:].all()
    with pytest.raises(ModelError, match=r"x:1: the prompt is empty"):
        renderer.prompt_ids(Sample("prompt", "", where="x:1"))


def test_a_passage_of_a_longer_text_has_no_end():
    (tree,) = Renderer(PLAIN).render(Sample("text", answers=("the user",), extra={CONTINUES: True}))
    assert tree.tokens[0].tolist() == PLAIN("the user")["input_ids"]


def test_prompt_is_a_root_without_weight():
    (tree,) = Renderer(PLAIN).render(Sample("prompt", "the user asks"))
    assert tree.tokens[0].tolist() == PLAIN("the user asks")["input_ids"] and tree.trained == 0


def test_answer_without_a_token_to_end_it():
    renderer = Renderer(byte_level(eos_token=None))
    with pytest.raises(ModelError, match=r"no end-of-text token.*tokenizer_config.json"):
        renderer.render(Sample("completion", "a", ("b",)))
    assert (
        Renderer(byte_level(eos_token=None), eos_ids=7).render(Sample("completion", "a", ("b",)))[0].tokens[0][-1] == 7
    )


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_pair_is_a_prompt_with_two_children():
    renderer = Renderer(PLAIN)
    sample = Sample("pair", "Question: 2 + 2?\nAnswer:", (" 4", " 5, or 6"), fields={"margin": 2.0}, where="p:1")
    (tree,) = renderer.render(sample)
    assert tree.parents == (-1, 0, 0) and tree.fields["margin"] == (2.0, 2.0, 2.0)
    assert np.isnan(tree.fields["chosen"][0]) and tree.fields["chosen"][1:] == (1.0, 0.0)
    assert tree.tokens[0].tolist() == renderer.prompt_ids(sample).tolist() and not tree.weights[0].any()
    for child, answer in ((1, " 4"), (2, " 5, or 6")):
        (alone,) = renderer.render(Sample("completion", sample.prompt, (answer,)))
        assert np.concatenate([tree.tokens[0], tree.tokens[child]]).tolist() == alone.tokens[0].tolist()
        assert tree.weights[child].all()
    pack([tree])


def test_pair_of_conversations_shares_all_turns_before_the_answers():
    renderer = Renderer(byte_level(LLAMA3))
    answers = ((TALK[3],), (Message("assistant", "7"),))
    sample = Sample("pair", TALK[:3], answers, where="p:1")
    (tree,) = renderer.render(sample)
    assert tree.parents == (-1, 0, 0)
    assert tree.tokens[0].tolist() == renderer.prompt_ids(sample).tolist() and not tree.weights[0].any()
    assert trained_text(renderer, tree) == ["6, of course<|eot_id|>", "7<|eot_id|>"]


def test_pair_may_part_at_a_users_turn():
    renderer = Renderer(byte_level(CHATML))
    answers = (TALK[2:], (Message("user", "and 5?"), Message("assistant", "five")))
    (tree,) = renderer.render(Sample("pair", TALK[:2], answers, where="p:1"))
    assert renderer.decode(tree.tokens[0]).endswith("the answer is 4") and not tree.weights[0].any()
    assert trained_text(renderer, tree) == ["6, of course<|im_end|>", "five<|im_end|>"]


def test_pair_that_begins_its_answers_alike_trains_both_of_them_whole():
    renderer = Renderer(byte_level(CHATML))
    answers = (TALK[1:], (TALK[1], Message("user", "and 5?"), Message("assistant", "five")))
    (tree,) = renderer.render(Sample("pair", TALK[:1], answers, where="p:1"))
    first = "the answer is 4<|im_end|>"
    assert trained_text(renderer, tree) == [first, "6, of course<|im_end|>", first, "five<|im_end|>"]
    assert tree.tokens[0].tolist() == renderer.prompt_ids(Sample("prompt", TALK[:1])).tolist()


def test_pair_without_a_common_turn_has_two_roots():
    renderer = Renderer(byte_level(CHATML))
    answers = (TALK[:2], TALK[2:])
    (tree,) = renderer.render(Sample("pair", (), answers, where="p:1"))
    assert tree.parents == (-1, -1) and tree.fields["chosen"] == (1.0, 0.0)
    assert trained_text(renderer, tree) == ["the answer is 4<|im_end|>", "6, of course<|im_end|>"]


def test_pair_of_plain_texts_without_a_prompt_hangs_on_the_start():
    (tree,) = Renderer(PLAIN).render(Sample("pair", "", ("one", "two")))
    assert tree.tokens[0].tolist() == [PLAIN.bos_token_id] and tree.parents == (-1, 0, 0)
    assert tree.weights[1].all() and tree.weights[2].all()


def test_pair_whose_template_rewrites_turns_inside_an_answer():
    sample = Sample("pair", TALK[:1], (TALK[1:], (TALK[1],)), where="p:1")
    with pytest.raises(ModelError, match=r"p:1: the chat template rewrites earlier turns"):
        Renderer(byte_level(QWEN3)).render(sample)


def test_completion_of_a_conversation_trains_its_answer_only():
    renderer = Renderer(byte_level(CHATML))
    (tree,) = renderer.render(Sample("completion", TALK[:3], (TALK[3:],)))
    assert trained_text(renderer, tree) == ["6, of course<|im_end|>"]
    with pytest.raises(DataError, match=r"c:1: a plain prompt needs a plain answer"):
        renderer.render(Sample("completion", "hello", (TALK[3:],), where="c:1"))


# The rest of the contract --------------------------------------------------------------------------------------------


def test_stop_ids_are_the_ends_of_text_of_turns_and_of_the_model():
    tokenizer = byte_level(LLAMA3)
    eot, eos = tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id
    assert Renderer(tokenizer).stop_ids == sorted({eos, eot})
    assert Renderer(tokenizer, eos_ids=[300, eos]).stop_ids == sorted({eos, eot, 300})
    assert Renderer(byte_level()).stop_ids == [eos]


def test_decode_drops_the_end_of_the_answer_even_where_it_is_an_ordinary_token():
    tokenizer = byte_level()
    ids = tokenizer("the answer is 4!", add_special_tokens=False)["input_ids"]
    assert Renderer(tokenizer, eos_ids=ids[-1]).decode([*ids, tokenizer.eos_token_id]) == "the answer is 4"


def test_fingerprint_follows_what_changes_the_ids():
    tokenizer = byte_level(CHATML)
    first = Renderer(tokenizer).fingerprint
    tokenizer("a long text", truncation=True, max_length=2)
    assert Renderer(tokenizer).fingerprint == first
    assert Renderer(tokenizer, GEMMA).fingerprint != first
    assert Renderer(byte_level(CHATML, eos_token="<|eot_id|>")).fingerprint != first
    assert Renderer(byte_level(CHATML, adds_bos=False)).fingerprint != first
    assert Renderer(byte_level(CHATML, special=SPECIAL[:5])).fingerprint != first


@settings(max_examples=150, deadline=None)
@given(text=TEXT.filter(bool))
def test_a_rendered_text_decodes_to_itself(text):
    renderer = Renderer(PLAIN)
    (tree,) = renderer.render(Sample("text", answers=(text,)))
    assert renderer.decode(tree.tokens[0]) == text
    assert len(tree.tokens[0]) == len(tree.weights[0]) == tree.trained + 1


@settings(max_examples=150, deadline=None)
@given(prompt=TEXT, answer=TEXT.filter(bool), make=st.sampled_from([PLAIN, sentencepiece()]))
def test_weights_lie_on_the_answer_and_prompts_never_depend_on_it(prompt, answer, make):
    renderer = Renderer(make)
    sample = Sample("completion", prompt, (answer,))
    (tree,) = renderer.render(sample)
    (ids,), (weights,) = tree.tokens, tree.weights
    asked = renderer.prompt_ids(sample)
    assert ids[: len(asked)].tolist() == asked.tolist() and not weights[: len(asked)].any()
    assert weights[len(asked) :].all() and ids[-1] == make.eos_token_id
    if make is PLAIN:
        assert renderer.decode(asked) == prompt and renderer.decode(ids[len(asked) :]) == answer
