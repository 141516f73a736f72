"""Conversations: trained exactly on the assistant's turns, behind the very prompts that generation is given."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from families.chat_styles import (
    BY_STYLE,
    CHATML,
    GEMMA,
    PLAIN,
    QWEN3,
    SPECIAL,
    STYLES,
    TALK,
    TEXT,
    byte_level,
    sentencepiece,
    talk,
    trained_text,
)  # fmt: skip
from hone.data.sample import Message
from hone.errors import DataError, ModelError
from hone.text.render import Renderer


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_conversation_is_one_tree_that_trains_exactly_the_answers(style, make):
    template, end, before = STYLES[style]
    renderer = Renderer(make(template))
    (tree,) = renderer.render(talk())
    expected = [f"{before}{answer}{end}" for answer in ("the answer is 4", "6, of course")]
    found = trained_text(renderer, tree)
    if make is sentencepiece:  # its decoder drops a space at the start
        expected, found = [text.lstrip() for text in expected], [text.lstrip() for text in found]
    assert found == expected
    assert tree.where == "talk.jsonl:1" and tree.parents == (-1,)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_training_generation_and_transformers_see_the_same_ids(style, make):
    template, end, _ = STYLES[style]
    tokenizer = make(template)
    renderer = Renderer(tokenizer)
    (tree,) = renderer.render(talk())
    ids = tree.tokens[0].tolist()
    for turn in (1, 3):
        prompt = renderer.prompt_ids(talk(*TALK[: turn + 1])).tolist()
        plain = [{"role": m.role, "content": m.content} for m in TALK[:turn]]
        served = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        assert ids[: len(prompt)] == prompt == served
        assert tree.weights[0][len(prompt) - 1] == 0 and tree.weights[0][len(prompt)] == 1
        assert renderer.prompt_ids(talk(*TALK[:turn], kind="prompt")).tolist() == prompt
    whole = [{"role": m.role, "content": m.content} for m in TALK]
    assert ids == tokenizer.apply_chat_template(whole, return_dict=False)[: len(ids)]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("style", STYLES)
def test_bos_stands_once_at_the_start_where_the_template_writes_it(style):
    template = STYLES[style][0]
    renderer = Renderer(byte_level(template))
    for ids in (renderer.render(talk())[0].tokens[0], renderer.prompt_ids(talk())):
        assert ids.tolist().count(PLAIN.bos_token_id) == ("bos_token" in template)
        assert (ids[0] == PLAIN.bos_token_id) == ("bos_token" in template)


def test_a_template_that_drops_earlier_thinking_gives_a_tree_per_turn():
    tokenizer = byte_level(QWEN3)
    renderer = Renderer(tokenizer)
    messages = (
        TALK[0],
        Message("assistant", "<think>\nadd them\n</think>\n\nthe answer is 4"),
        TALK[2],
        Message("assistant", "<think>\nagain\n</think>\n\n6, of course"),
    )
    trees = renderer.render(talk(*messages))
    assert [trained_text(renderer, tree) for tree in trees] == [
        ["<think>\nadd them\n</think>\n\nthe answer is 4<|im_end|>"],
        ["<think>\nagain\n</think>\n\n6, of course<|im_end|>"],
    ]
    for tree, turn in zip(trees, (1, 3), strict=True):
        plain = [{"role": m.role, "content": m.content} for m in messages[:turn]]
        served = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        assert renderer.prompt_ids(talk(*messages[: turn + 1])).tolist() == served
        assert tree.tokens[0][: len(served)].tolist() == served and not tree.weights[0][: len(served)].any()
    assert "add them" not in renderer.decode(trees[1].tokens[0])


def test_a_turn_after_the_last_assistant_turn_is_left_out():
    renderer = Renderer(byte_level(CHATML))
    longer, shorter = renderer.render(talk(*TALK, Message("user", "thanks"))), renderer.render(talk())
    assert longer[0].tokens[0].tolist() == shorter[0].tokens[0].tolist()


def test_tokens_that_swallow_white_space_are_served_alike():
    special = [AddedToken(t, rstrip=t == "<|im_end|>", special=True) for t in SPECIAL]  # as <|end|> of Phi-3
    tokenizer = byte_level(CHATML, special=special)
    renderer = Renderer(tokenizer)
    plain = [{"role": m.role, "content": m.content} for m in TALK[:3]]
    served = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert renderer.prompt_ids(talk()).tolist() == served


def test_without_an_end_of_turn_token_each_turn_ends_with_the_end_of_text():
    template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    renderer = Renderer(byte_level(template))
    trees = renderer.render(talk())
    assert [trained_text(renderer, tree) for tree in trees] == [["the answer is 4</s>"], ["6, of course</s>"]]
    prompt = renderer.prompt_ids(talk())
    assert trees[1].tokens[0][: len(prompt)].tolist() == prompt.tolist()
    assert PLAIN.eos_token_id not in prompt
    assert renderer.stop_ids == [PLAIN.eos_token_id]


@pytest.mark.parametrize("known", [True, False])
def test_built_in_chatml_always_ends_a_turn_with_one_token(known):
    tokenizer = byte_level(special=SPECIAL if known else SPECIAL[:3])
    renderer = Renderer(tokenizer, "chatml")
    (tree,) = renderer.render(talk())
    end = "<|im_end|>" if known else "</s>"
    assert trained_text(renderer, tree) == [f"the answer is 4{end}", f"6, of course{end}"]
    assert tree.tokens[0].tolist().count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids(end) in renderer.stop_ids
    assert "BOS" not in renderer.template and "END" not in renderer.template


def test_template_from_a_file_wins_over_the_tokenizers_own(tmp_path):
    (tmp_path / "mine.jinja").write_text(GEMMA)
    renderer = Renderer(byte_level(CHATML), str(tmp_path / "mine.jinja"))
    assert trained_text(renderer, renderer.render(talk())[0])[0].endswith("<end_of_turn>")


def test_todays_date_does_not_reach_the_ids():
    template = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML
    renderer = Renderer(byte_level(template))
    assert renderer.decode(renderer.prompt_ids(talk())).startswith("26 Jul 2024\nuser\n")


def test_white_space_that_only_the_generation_prompt_has_is_left_out(caplog):
    template = CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n ' }}{% endif")
    renderer = Renderer(byte_level(template))
    (tree,) = renderer.render(talk())
    prompt = renderer.prompt_ids(talk())
    assert tree.tokens[0][: len(prompt)].tolist() == prompt.tolist()
    assert renderer.decode(prompt).endswith("assistant\n")
    assert "ends with ' ', which no assistant's turn has" in caplog.text


PUBLISHED = (
    sorted((Path(find_spec("trl").origin).parent / "chat_templates").glob("*.jinja")) if find_spec("trl") else []
)
PUBLISHED = [
    p for p in PUBLISHED if p.stem in ("llama3", "llama3_1", "gemma", "gemma3", "qwen2_5", "qwen3", "phi3", "cohere")
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_are_served_as_they_are_trained(path):
    marks = set(re.findall(r"<[|a-zA-Z_]+>", path.read_text()))
    tokenizer = byte_level(special=sorted({*SPECIAL, *marks} - {"<think>", "</think>"}))
    renderer = Renderer(tokenizer, str(path))
    trees = renderer.render(talk())
    trained = [text for tree in trees for text in trained_text(renderer, tree)]
    assert [re.sub(r"<.*?>|\n", "", text) for text in trained] == ["the answer is 4", "6, of course"]
    assert all(tokenizer(text, add_special_tokens=False)["input_ids"][-1] in renderer.stop_ids for text in trained)
    for turn in (1, 3):
        prompt = renderer.prompt_ids(talk(*TALK[: turn + 1])).tolist()
        plain = [{"role": m.role, "content": m.content} for m in TALK[:turn]]
        written = {"add_generation_prompt": True, "return_dict": False, "chat_template": renderer.template}
        assert prompt == tokenizer.apply_chat_template(plain, **written)
        assert any(tree.tokens[0][: len(prompt)].tolist() == prompt for tree in trees)


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6),
    style=st.sampled_from(list(STYLES)),
)
def test_any_conversation_trains_each_answer_once_behind_its_own_prompt(contents, style):
    template, end, before = STYLES[style]
    renderer = Renderer(BY_STYLE[style])
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents))
    (tree,) = renderer.render(talk(*messages))
    (ids,), (weights,) = tree.tokens, tree.weights
    trained = 0
    for turn in range(1, len(messages), 2):
        prompt = renderer.prompt_ids(talk(*messages[: turn + 1]))
        said = messages[turn].content.strip() if "trim" in template else messages[turn].content
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        length = int(np.argmin(np.append(weights[len(prompt) :], 0)))
        answer = ids[len(prompt) : len(prompt) + length]
        assert PLAIN.decode(answer, skip_special_tokens=False) == f"{before}{said}{end}"
        trained += length
    assert trained == tree.trained


# What templates can get wrong ----------------------------------------------------------------------------------------


def test_conversation_without_a_template_says_how_to_set_one():
    with pytest.raises(ModelError, match=r"talk.jsonl:1: .* no chat template. Set model.template to 'chatml'"):
        Renderer(byte_level()).render(talk())


def test_generation_prompt_that_turns_do_not_begin_with():
    template = CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif")
    with pytest.raises(ModelError, match=r"goes on with '<think>\\n' where the turn has 'hone answers"):
        Renderer(byte_level(template)).render(talk())


def test_template_that_ignores_the_generation_prompt():
    template = CHATML.partition("{% if add_generation_prompt")[0]
    with pytest.raises(ModelError, match=r"does not write that when add_generation_prompt is set"):
        Renderer(byte_level(template)).render(talk())


def test_template_that_leaves_the_answer_out():
    template = CHATML.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    with pytest.raises(ModelError, match=r"leaves out what an assistant says; it wrote"):
        Renderer(byte_level(template)).render(talk())


def test_template_that_is_not_jinja():
    with pytest.raises(ModelError, match=r"not valid Jinja: line 1: .*model.template"):
        Renderer(byte_level(), "{% for m in messages %}").render(talk())


def test_template_that_refuses_any_conversation():
    renderer = Renderer(byte_level("{{ raise_exception('tools are missing') }}"))
    with pytest.raises(ModelError, match=r"refuses this conversation .user.: tools are missing"):
        renderer.render(talk())
    assert renderer.stop_ids == [PLAIN.eos_token_id]  # plain text needs no template


def test_template_that_does_not_end_some_turn():
    template = CHATML.replace("+ '<|im_end|>'", "+ ('<|im_end|>' if '6' not in m['content'] else '')")
    with pytest.raises(ModelError, match=r"talk.jsonl:1: .*does not end this assistant turn with '<\|im_end\|>'"):
        Renderer(byte_level(template)).render(talk())


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((Message("system", "be brief"), *TALK), "System role not supported"),
        ((TALK[0], TALK[2], TALK[1]), "roles must alternate"),
        ((TALK[1], TALK[0]), "begins with an assistant turn"),
    ],
)
def test_conversation_that_the_template_refuses(messages, reason):
    with pytest.raises(DataError, match=f"talk.jsonl:1: .*{reason}"):
        Renderer(byte_level(GEMMA)).render(talk(*messages))


def test_missing_template_file_names_the_nearest(tmp_path):
    (tmp_path / "mine.jinja").write_text(GEMMA)
    with pytest.raises(ModelError, match=r"there is no template file .*did you mean 'mine.jinja'"):
        Renderer(byte_level(), str(tmp_path / "mien.jinja"))


def test_several_templates_without_a_default():
    tokenizer = byte_level()
    tokenizer.chat_template = {"tool": CHATML, "rag": CHATML}
    with pytest.raises(ModelError, match=r"several chat templates .rag, tool."):
        Renderer(tokenizer)
    tokenizer.chat_template = {"tool": GEMMA, "default": CHATML}
    assert Renderer(tokenizer).template == CHATML
