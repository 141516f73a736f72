"""Conversations that call tools: read from every form, written by the template or refused, trained, and graded."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from families.chat_styles import CHATML, SPECIAL, byte_level, trained_text
from hone.data.answers import calls, same_answer
from hone.data.formats import sniff
from hone.data.sample import Message, opened
from hone.data.sampled import own_answer
from hone.data.source import reference
from hone.engine.evaluate import expected, show_prompt
from hone.errors import DataError, ModelError
from hone.text.render import Renderer

HERMES = (  # the way of Qwen 2.5 and of Hermes
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>\n' }}{% endif %}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson + "}" }}'
    "{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
TOOLS = [{"type": "function", "function": ADD}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
ASK, TOLD = {"role": "user", "content": "2 + 3?"}, {"role": "tool", "tool_call_id": "c1", "content": "5"}
CALLS, SAYS = {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "assistant", "content": "It is 5."}
ROW = {"messages": [ASK, CALLS, TOLD, SAYS], "tools": TOOLS}


def convert(row):
    return sniff(row, "d.jsonl:1").convert(row, "d.jsonl:1")


def renderer(template=HERMES):
    return Renderer(byte_level(template, adds_bos=False))


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "tools": json.dumps(TOOLS)},
        {**ROW, "tools": [ADD]},  # bare schemas, as in many sets
        {**ROW, "messages": [ASK, {**CALLS, "content": "", "tool_calls": [{**CALL, "function": {
            "name": "add", "arguments": '{"a": 2, "b": 3}'}}]}, TOLD, SAYS]},
    ],
)  # fmt: skip
def test_calls_are_read_from_every_form(row):
    sample = convert(row)
    assert sample == convert(ROW) and json.loads(sample.tools) == TOOLS and sample.extra == {}
    assert [turn.role for turn in sample.prompt] == ["user", "assistant", "tool", "assistant"]
    assert sample.prompt[1].plain() == {**CALLS, "content": ""} and sample.prompt[2].plain() == TOLD


def test_older_forms_of_calls():
    older = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    share = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'}
    for turn, ask in ((older, ASK), (share, {"from": "human", "value": "2 + 3?"})):
        sample = convert({"messages": [ask, turn]})
        assert sample.prompt[1].calls == [CALL["function"]] and sample.prompt[1].content == ""


def test_what_the_template_writes_is_trained_turn_by_turn():
    made, sample = renderer(), convert(ROW)
    (tree,) = made.render(sample)
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    assert trained_text(made, tree) == [call, "It is 5.<|im_end|>"]
    text = "".join(part for part, _ in made.show(tree))
    assert text.startswith('<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "add"')
    prompt = made.prompt_ids(sample).tolist()  # generation is given the tools, the call and the result
    assert tree.tokens[0][: len(prompt)].tolist() == prompt
    assert made.tokenizer.decode(prompt).endswith("5<|im_end|>\n<|im_start|>assistant\n")


def test_turns_of_weight_0_are_read_and_not_trained():
    made = renderer()
    for mark in ({"weight": 0}, {"train": False}):
        sample = convert({**ROW, "messages": [ASK, {**CALLS, **mark}, TOLD, SAYS]})
        (tree,) = made.render(sample)
        assert trained_text(made, tree) == ["It is 5.<|im_end|>"]
        assert tree.tokens[0].tolist() == made.render(convert(ROW))[0].tokens[0].tolist()
    with pytest.raises(DataError, match="only weights of 0"):
        convert({"messages": [ASK, {**SAYS, "weight": 0}]})


def test_reasoning_is_written_and_trained():
    made = renderer()
    (tree,) = made.render(convert({"messages": [ASK, {**SAYS, "reasoning_content": "2 and 3"}]}))
    assert trained_text(made, tree) == ["<think>2 and 3</think>\nIt is 5.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW, "the chat template leaves out the tool 'add'"),
        ({"messages": ROW["messages"]}, "the chat template leaves out the call of 'add'"),
        ({"messages": [ASK, {**SAYS, "reasoning_content": "2 and 3"}]}, "leaves out 'reasoning_content'"),
        ({"messages": [ASK, {**SAYS, "thinking": "2 and 3"}]}, "leaves out 'thinking'"),
    ],
)
def test_a_template_that_would_lose_something_is_refused(row, said):
    with pytest.raises(ModelError, match=said) as caught:
        renderer(CHATML).render(convert(row))
    assert str(caught.value).startswith("d.jsonl:1: ") and "model.template" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK, {**CALLS, "tool_calls": [{"id": 1}]}]}, "turn 2 to call tools by name"),
        ({"messages": [ASK, {**CALLS, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": "2, 3"}}]}]},
         "an object of arguments, in 'tool_calls'"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, SAYS]}, "turn 1 to be an assistant's, since it calls tools"),
        ({"messages": [ASK, {**SAYS, "weight": -1}]}, "the weight of turn 2 to be a number that is not negative"),
        ({"messages": [{**ASK, "reasoning": "hm"}, SAYS]}, "'reasoning' to be an assistant's text in turn 1"),
        ({**ROW, "tools": "add"}, "field 'tools': expected a list of tools, found the string ('add')"),
        ({**ROW, "tools": [{"type": "function"}]}, "field 'tools': expected tools with a name"),
    ],
)  # fmt: skip
def test_bad_calls(row, said):
    with pytest.raises(DataError, match=r"d\.jsonl:1: ") as caught:
        convert(row)
    assert said in str(caught.value)


def test_calls_are_graded_as_data():
    sample = convert({**ROW, "messages": [ASK, CALLS]})
    right = '<tool_call>\n{"arguments": {"b": 3, "a": 2}, "name": "add"}\n</tool_call>'
    assert reference(sample) == '{"name": "add", "arguments": {"a": 2, "b": 3}}' == sample.prompt[1].text
    assert same_answer(right, reference(sample))
    for wrong in (right.replace("3", "4"), right.replace("add", "sub"), "5", right + right, '{"name": "add"'):
        assert not same_answer(wrong, reference(sample))
    assert calls('{"name": "a", "parameters": {}} and {"function": {"name": "b", "arguments": {"x": {}}}}') == [
        ("a", {}), ("b", {"x": {}}),
    ]  # fmt: skip
    assert same_answer("#### 5", "5") and calls("{{{ {1: 2} {") == []


def test_the_reference_is_what_the_template_writes():
    made = renderer()
    sample = convert({**ROW, "messages": [ASK, CALLS]})
    worded = made.worded(sample)
    assert worded.answers == ('\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>',)
    assert made.prompt_ids(worded).tolist() == made.prompt_ids(sample).tolist()
    assert same_answer(worded.answers[0], reference(worded)) and expected(worded) == worded.answers[0]
    assert made.worded(convert(ROW)) == convert(ROW)  # its last answer calls nothing
    assert 'assistant: {"name": "add"' in show_prompt(convert(ROW))
    assert opened(sample).answers[0] == (sample.prompt[1],) and isinstance(sample.prompt[1], Message)


def test_answers_that_call_tools_do_not_stand_beside_texts():
    sample = opened(convert({**ROW, "messages": [ASK, CALLS]}))
    with pytest.raises(DataError, match="an answer that calls tools cannot stand beside texts"):
        own_answer(sample)
    assert own_answer(opened(convert(ROW))) == "It is 5."


PUBLISHED = (
    sorted((Path(find_spec("trl").origin).parent / "chat_templates").glob("*.jinja")) if find_spec("trl") else []
)
PUBLISHED = [path for path in PUBLISHED if path.stem in ("llama3_1", "qwen2_5", "qwen3", "qwen3_instruct_2507")]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_write_calls(path):
    marks = set(re.findall(r"<[|a-zA-Z_]+>", path.read_text())) - {"<think>", "</think>", "<tool_call>"}
    made = Renderer(byte_level(special=sorted({*SPECIAL, *marks})), str(path))
    sample = convert(ROW)
    trees = made.render(sample)
    trained = [text for tree in trees for text in trained_text(made, tree)]
    assert len(trained) == 2 and calls(trained[0]) == [("add", {"a": 2, "b": 3})] and "It is 5." in trained[1]
    prompt = made.prompt_ids(sample).tolist()
    assert any(tree.tokens[0][: len(prompt)].tolist() == prompt for tree in trees)
