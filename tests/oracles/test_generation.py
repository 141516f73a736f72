"""Generation against transformers' own `generate`, the packed scorer, and the distribution it should follow."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from scipy.stats import chisquare, kstest
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hone.errors import ModelError, NumericError
from hone.samplers.text import Sample, greedy
from hone.text import cache
from hone.text import generate as generation
from hone.text.cache import FIRST_CAPACITY
from hone.text.generate import Generation, generate
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack

VOCABULARY = 61
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.4, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
WINDOW = 6  # shorter than most prompts, and than most answers
GEMMA = dict(sliding_window=WINDOW, query_pre_attn_scalar=8)
SPARSE = dict(num_local_experts=4, num_experts_per_tok=2)
LATENT = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, num_key_value_heads=4,
    head_dim=4,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": dict(sliding_window=WINDOW),
    "gemma2": dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3_text": dict(GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": {},
    "mixtral": dict(sliding_window=WINDOW, **SPARSE),
    "gpt_oss": dict(sliding_window=WINDOW, **SPARSE),
    "deepseek_v3": dict(LATENT, first_k_dense_replace=2),
}
LENGTHS = (9, 3, 14, 1, 9)


def build(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    hf = AutoModelForCausalLM.from_config(config).double().eval()
    hf.set_experts_implementation("eager")  # the default for mixtures of experts has no float64
    for name, parameter in hf.named_parameters():
        if "sinks" in name or "bias" in name:
            torch.nn.init.normal_(parameter)  # they start at 0, where a mistake would not show
    return hf


def some_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, size=length).astype(np.int32) for length in lengths]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(build("llama"), None)


def reference(hf: PreTrainedModel, prompt: np.ndarray, count: int, stop: list[int]) -> list[int]:
    """What transformers' greedy search draws after one prompt, the stop token included."""
    hf.generation_config.eos_token_id = None
    tokens = torch.from_numpy(prompt.astype(np.int64))[None]
    made = hf.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False,
        eos_token_id=stop or None, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


def drawn(generation: Generation) -> list[int]:
    return generation.trajectory()[0].tolist()


def same(left: list[list[Generation]], right: list[list[Generation]]) -> None:
    assert [[drawn(g) for g in group] for group in left] == [[drawn(g) for g in group] for group in right]
    for a, b in zip(chain(*left), chain(*right), strict=True):
        np.testing.assert_allclose(a.trajectory()[1], b.trajectory()[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = build(family)
    theirs, model = copy.deepcopy(hf), LanguageModel(hf, None)
    assert model.packs
    monkeypatch.setattr(cache, "FIRST_CAPACITY", 8)  # the buffers have to grow
    prompts, count = some_prompts(), 12
    free = generate(model, prompts, max_new_tokens=count)
    assert [len(group) for group in free] == [1] * len(prompts)
    answers = [reference(theirs, prompt, count, []) for prompt in prompts]
    assert [drawn(group[0]) for group in free] == answers
    assert not any(group[0].stopped for group in free)

    stop = [drawn(free[0][0])[4], drawn(free[2][0])[8]]
    ends = [next((place + 1 for place, token in enumerate(full) if token in stop), count) for full in answers]
    expected = [full[:end] for full, end in zip(answers, ends, strict=True)]
    made = generate(model, prompts, max_new_tokens=count, stop=stop)
    assert [drawn(group[0]) for group in made] == expected
    for (found,), full in zip(made, expected, strict=True):
        assert found.stopped == (full[-1] in stop)
        assert found.tokens.tolist() == (full[:-1] if found.stopped else full)
        assert found.stop_token == (full[-1] if found.stopped else -1)
    assert any(group[0].stopped for group in made)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_scores_of_the_packed_tree(family: str) -> None:
    model, prompts = LanguageModel(build(family), None), some_prompts()
    sampler = Sample(temperature=1.5)
    made = generate(model, prompts, samples=3, max_new_tokens=12, sampler=sampler, stop=[5, 7, 11], seed=1)
    assert len({tuple(drawn(g)) for group in made for g in group}) > len(prompts)
    trees = []
    for prompt, group in zip(prompts, made, strict=True):
        segments = (prompt, *(g.trajectory()[0] for g in group))
        trees.append(Tree(segments, tuple(np.ones(len(s), np.float32) for s in segments), (-1, 0, 0, 0)))
    batch = pack(trees)
    with torch.no_grad():
        scores = model.logprobs(batch).numpy()
    segment = 0
    for group in made:
        for number, found in enumerate(group, 1):
            begin, end = batch.starts[segment + number], batch.starts[segment + number + 1]
            np.testing.assert_allclose(found.trajectory()[1], scores[begin:end], rtol=0, atol=1e-10)
        segment += 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_batch_size_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = LanguageModel(build(family), None), some_prompts()
    sampler, stop = Sample(temperature=0.8), [5, 7, 11]
    options: dict[str, Any] = dict(samples=4, max_new_tokens=40, sampler=sampler, stop=stop, seed=2)
    expected = generate(model, prompts, batch=1, **options)
    lengths = {len(drawn(g)) for group in expected for g in group}
    assert len(lengths) > 5 and max(lengths) > FIRST_CAPACITY  # samples end at many different steps
    same(generate(model, prompts, batch=64, **options), expected)
    same(generate(model, prompts, batch=9, **options), expected)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 10)  # several forward passes per wave
    same(generate(model, prompts, **options), expected)
    monkeypatch.setattr(generation, "COMPACT_BELOW", 0.0)  # finished samples are carried to the end
    same(generate(model, prompts, **options), expected)
    monkeypatch.setattr(generation, "COMPACT_BELOW", 1.0)  # dropped at once
    same(generate(model, prompts, **options), expected)


def test_a_sample_depends_on_seed_prompt_index_and_sample_index(model: LanguageModel) -> None:
    prompts = some_prompts((5, 5))
    prompts[1] = prompts[0]
    options: dict[str, Any] = dict(max_new_tokens=8, sampler=Sample())
    made = generate(model, prompts, samples=3, seed=1, **options)
    same(generate(model, prompts, samples=3, seed=1, **options), made)
    same([group[:2] for group in made], generate(model, prompts, samples=2, seed=1, **options))
    same(made[:1], generate(model, prompts[:1], samples=3, seed=1, **options))
    others = generate(model, prompts, samples=3, seed=2, **options)
    assert len({tuple(drawn(g)) for group in (*made, *others) for g in group}) == 12


class Counting(LanguageModel):
    """Notes how many tokens go through the decoder and through the head."""

    fed: ClassVar[list[int]] = []
    headed: ClassVar[list[int]] = []

    def states(self, tokens: Tensor, positions: Tensor, plan: Any) -> Tensor:
        self.fed.append(len(tokens))
        return super().states(tokens, positions, plan)

    @property
    def head(self) -> Any:
        apply = super().head

        def counted(hidden: Tensor) -> Tensor:
            self.headed.append(len(hidden))
            return apply(hidden)

        return counted


def test_samples_share_the_prefill_and_ended_samples_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(build("llama"), None)
    counting.fed.clear()
    counting.headed.clear()
    prompts = some_prompts()
    generate(counting, prompts, samples=6, max_new_tokens=3, sampler=Sample())
    assert counting.fed == [sum(LENGTHS), 30, 30]  # the last token is never fed
    assert counting.headed == [len(LENGTHS), 30, 30]  # and only last states go through the head

    monkeypatch.setattr(generation, "COMPACT_BELOW", 1.0)
    counting.fed.clear()
    made = generate(counting, prompts, samples=6, max_new_tokens=40, sampler=Sample(), stop=list(range(3, 12)))
    counts = [len(drawn(g)) for group in made for g in group]
    assert counting.fed[1:] == [sum(count > step for count in counts) for step in range(1, max(counts))]


def test_frequencies_follow_the_models_distribution() -> None:
    model = LanguageModel(build("llama", vocab_size=5, initializer_range=0.1, pad_token_id=None), None)
    prompt = np.array([1, 3, 4, 0], dtype=np.int32)
    count = 4000
    group = generate(model, [prompt], samples=count, max_new_tokens=2, sampler=Sample(), seed=4)[0]
    seen = np.zeros((5, 5))
    np.add.at(seen, tuple(np.stack([drawn(g) for g in group]).T), 1)
    rows = torch.tensor([[*prompt.tolist(), first] for first in range(5)])
    with torch.no_grad():
        probs = model.hf(rows).logits.softmax(-1)
    expected = count * (probs[0, 3][:, None] * probs[:, 4]).numpy()
    assert expected.min() > 5
    assert chisquare(seen.ravel(), expected.ravel()).pvalue > 1e-3
    chosen = np.array([g.logprobs for g in group])
    ids = np.stack([drawn(g) for g in group])
    np.testing.assert_allclose(chosen[:, 0], probs[0, 3].log().numpy()[ids[:, 0]], atol=1e-12)
    np.testing.assert_allclose(chosen[:, 1], probs[:, 4].log().numpy()[ids[:, 0], ids[:, 1]], atol=1e-12)


def test_uniforms_are_those_of_splitmix64() -> None:
    seed = np.full(5, 1234567, dtype=np.uint64)  # published test vector of the generator
    first, *_, fifth = generation._advance(seed, np.arange(5)).tolist()
    assert (first, fifth) == (6457827717110365317, 16408922859458223821)


def test_uniforms_are_uniform_across_samples_and_steps() -> None:
    keys = generation._keys(0, np.repeat(np.arange(40), 25), np.tile(np.arange(25), 40))
    assert len(set(keys.tolist())) == 1000
    drawn = np.stack([generation._uniforms(keys, step) for step in range(20)])
    assert drawn.min() >= 0 and drawn.max() < 1
    for sample in (drawn[0], drawn[7], drawn[:, :50].ravel(), drawn.ravel()):
        assert kstest(sample, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(drawn) - np.eye(20)).max() < 0.15
    assert generation._uniforms(keys, 3, 24).astype(np.float32).max() < 1


def test_an_adapted_model_in_training_is_restored(model: LanguageModel) -> None:
    hf = build("llama", attention_dropout=0.5)
    inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]), hf)
    hf.double()
    for name, parameter in hf.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    theirs, mine = copy.deepcopy(hf).eval(), LanguageModel(hf, None)
    mine.train()
    mine.hf.model.layers[0].eval()
    before = {name: module.training for name, module in mine.named_modules()}
    prompts = some_prompts()
    made = generate(mine, prompts, max_new_tokens=8)
    assert [drawn(group[0]) for group in made] == [reference(theirs, prompt, 8, []) for prompt in prompts]
    assert {name: module.training for name, module in mine.named_modules()} == before
    assert torch.is_grad_enabled() and mine.logprobs(pack([Tree((prompts[0],), (np.ones(9),), (-1,))])).requires_grad
    assert drawn(made[0][0]) != drawn(generate(model, prompts[:1], max_new_tokens=8)[0][0])


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_the_fallback_equals_transformers(family: str) -> None:
    sizes = dict(hidden_size=24, state_size=4, num_hidden_layers=2, pad_token_id=0) if family == "mamba" else {}
    hf = build(family, **sizes)
    theirs, model = copy.deepcopy(hf), LanguageModel(hf, None)
    model.packs = False
    hf.generation_config.eos_token_id, hf.generation_config.repetition_penalty = 3, 5.0  # must not reach our answers
    settings = hf.generation_config
    prompts = some_prompts()
    free = [reference(theirs, prompt, 10, []) for prompt in prompts]
    stop = [free[0][3], free[2][6]]
    made = generate(model, prompts, max_new_tokens=10, stop=stop)
    assert [drawn(group[0]) for group in made] == [reference(theirs, prompt, 10, stop) for prompt in prompts]
    assert hf.generation_config is settings

    options: dict[str, Any] = dict(samples=3, max_new_tokens=10, sampler=Sample(), stop=stop, seed=6)
    made = generate(model, prompts, **options)
    assert [[drawn(g) for g in group] for group in generate(model, prompts, batch=1, **options)] == [
        [drawn(g) for g in group] for group in made
    ]
    for prompt, group in zip(prompts, made, strict=True):
        for found in group:
            ids, logprobs = found.trajectory()
            with torch.no_grad():
                logits = theirs(torch.tensor([[*prompt.tolist(), *ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(ids.astype(np.int64))[:, None])[:, 0]
            np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-4)  # transformers rounds to float32


def test_packed_and_fallback_draw_the_same_samples() -> None:
    model, prompts = LanguageModel(build("llama"), None), some_prompts()
    options: dict[str, Any] = dict(samples=2, max_new_tokens=10, sampler=Sample(top_k=10), stop=[5, 7], seed=8)
    packed = generate(model, prompts, **options)
    model.packs = False
    padded = generate(model, prompts, **options)
    assert [[drawn(g) for g in group] for group in packed] == [[drawn(g) for g in group] for group in padded]


def test_answers_end_where_the_context_does() -> None:
    model = LanguageModel(build("gpt2", max_position_embeddings=20), None)
    prompts = some_prompts((12, 19, 3))
    for compact in (0.0, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "COMPACT_BELOW", compact)
            made = generate(model, prompts, max_new_tokens=30, samples=2)
        assert [len(g.tokens) for group in made for g in group] == [8, 8, 1, 1, 17, 17]
        assert not any(g.stopped for group in made for g in group)
    with pytest.raises(ModelError, match=r"prompt 1 has 20 tokens and leaves no room .* context of 20 tokens"):
        generate(model, some_prompts((3, 20)), max_new_tokens=1)


def test_progress_counts_finished_samples(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        model, some_prompts(), samples=2, max_new_tokens=20, sampler=Sample(), stop=list(range(3, 9)), batch=4,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert {total for _, total in seen} == {10}
    done = [count for count, _ in seen]
    assert done == sorted(set(done)) and done[-1] == 10 and len(done) > 3


def test_nothing_to_do_gives_nothing(model: LanguageModel) -> None:
    assert generate(model, []) == []


def test_bad_requests_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        generate(model, [np.array([4]), np.array([], dtype=np.int32)])
    for option in ("samples", "max_new_tokens", "batch"):
        with pytest.raises(ValueError, match="must be at least 1"):
            generate(model, some_prompts(), **{option: 0})


def test_logits_that_are_not_finite_are_reported() -> None:
    model = LanguageModel(build("llama"), None)
    with torch.no_grad():
        model.hf.lm_head.weight[7] = torch.nan
    for sampler in (greedy, Sample(), Sample(top_p=0.9)):
        with pytest.raises(NumericError, match="generated token 0 after prompt 0 are not finite"):
            generate(model, some_prompts((4, 6)), sampler=sampler)
