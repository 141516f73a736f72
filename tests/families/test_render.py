"""Rendering: prompts are the same ids in training and generation, and exactly the answers are trained."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hone.data.sample import Message, Sample
from hone.errors import DataError, ModelError
from hone.text.pack import pack
from hone.text.render import Renderer

CORPUS = [
    "Question: what is 2 + 2?\nAnswer: 4",
    "the user asks, the assistant answers",
    "2026-07-01 système 日本 <think>",
] * 4
SPECIAL = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN3 = (  # thinking before the last user turn is dropped, and the last turn always has a thinking block
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% else %}"
    "{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% if '</think>' not in m['content'] %}{% set thought = '' %}{% endif %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STYLES = {
    "llama3": (LLAMA3, "<|eot_id|>", ""),
    "chatml": (CHATML, "<|im_end|>", ""),
    "gemma": (GEMMA, "<end_of_turn>", ""),
    "mistral": (MISTRAL, "</s>", " "),
}  # template, end of turn, what the template puts before an answer


def byte_level(
    template: str | None = None, *, adds_bos: bool = True, special: list | None = None, **named: str | None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL if special is None else special, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[bos]
        )
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **named}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def sentencepiece(template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE in the manner of SentencePiece, as of Llama 2 and Mistral: a space is put before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merge crosses a word
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = sorted(set("".join(CORPUS)))
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


PLAIN = byte_level()
TEXT = st.text().filter(lambda text: not any(token in text for token in SPECIAL))  # those stand for themselves
TALK = (
    Message("user", "what is 2 + 2?"),
    Message("assistant", "the answer is 4"),
    Message("user", "and 3 + 3?"),
    Message("assistant", "6, of course"),
)


BY_STYLE = {style: byte_level(template) for style, (template, _, _) in STYLES.items()}


def talk(*messages: Message, kind: str = "messages") -> Sample:
    return Sample(kind, prompt=messages or TALK, where="talk.jsonl:1")


def trained_text(renderer: Renderer, tree) -> list[str]:
    return [text for text, trained in renderer.show(tree) if trained]


# Conversations -------------------------------------------------------------------------------------------------------


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


def test_answer_without_a_token_to_end_it():
    renderer = Renderer(byte_level(eos_token=None))
    with pytest.raises(ModelError, match=r"no end-of-text token.*tokenizer_config.json"):
        renderer.render(Sample("completion", "a", ("b",)))
    assert (
        Renderer(byte_level(eos_token=None), eos_ids=7).render(Sample("completion", "a", ("b",)))[0].tokens[0][-1] == 7
    )


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
    (tree,) = renderer.render(Sample("text", answers=("the user asks",), extra={"continues": True}))
    assert tree.weights[0][0] == 0 and tree.weights[0][1:].all()
    with pytest.raises(ModelError, match=r"x:1: the prompt is empty"):
        renderer.prompt_ids(Sample("prompt", "", where="x:1"))


def test_a_passage_of_a_longer_text_has_no_end():
    (tree,) = Renderer(PLAIN).render(Sample("text", answers=("the user",), extra={"continues": True}))
    assert tree.tokens[0].tolist() == PLAIN("the user")["input_ids"]


def test_prompt_is_a_root_without_weight():
    (tree,) = Renderer(PLAIN).render(Sample("prompt", "the user asks"))
    assert tree.tokens[0].tolist() == PLAIN("the user asks")["input_ids"] and tree.trained == 0


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
