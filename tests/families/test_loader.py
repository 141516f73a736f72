"""The resumable loaders against a plain reference, with and without workers, resumed anywhere; opening data."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.data.loader import Loader, Steps, StreamingLoader
from hone.data.open import open_data
from hone.data.overlong import Counts, fit_sample
from hone.data.sample import Message, Sample
from hone.data.source import Source
from hone.errors import DataError, ModelError
from hone.parts import find
from hone.text.pack import Tree, divide

# a machine with one core has a suggestion to make about two workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

LENGTHS = [3, 9, 1, 4, 12, 2, 2, 7, 5, 1, 8, 3, 3, 6, 2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))


def a_tree(length: int, name: int) -> Tree:
    tokens = np.full(length, name, np.int32)
    return Tree((tokens,), (np.ones(length, np.float32),), (-1,), where=str(name))


def the_trees(lengths: list[int]) -> list[Tree]:
    return [a_tree(length, name) for name, length in enumerate(lengths)]


def names(steps: list[list[Tree]]) -> list[list[str]]:
    """Name every tree by its place and its length, so that windows of one sample differ."""
    return [[f"{tree.where}:{len(tree)}" for tree in step] for step in steps]


def reference_steps(lengths: list[int], batch_tokens: int, seed: int, shuffle: bool, epochs: float) -> list[list[str]]:
    """The definition, token by token: concatenate the epochs' orders and cut greedily."""
    order: list[int] = []
    for epoch in range(int(np.ceil(epochs))):
        whole = np.random.default_rng([seed, epoch]).permutation(len(lengths)) if shuffle else np.arange(len(lengths))
        order.extend(whole)
    order = order[: int(np.ceil(epochs * len(lengths)))]
    steps: list[list[str]] = []
    room = 0
    for name in order:
        if not steps or lengths[name] > room:
            steps.append([])
            room = batch_tokens
        steps[-1].append(f"{name}:{lengths[name]}")
        room -= lengths[name]
    return steps


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    batch_tokens=st.integers(1, 40),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    epochs=st.floats(0.1, 4.5),
    data=st.data(),
)
def test_loader_is_the_definition_and_resumes_anywhere(lengths, batch_tokens, seed, shuffle, epochs, data):
    def made() -> Loader:
        options = {"batch_tokens": batch_tokens, "seed": seed, "shuffle": shuffle, "epochs": epochs}
        return Loader(the_trees(lengths), **options)

    expected = reference_steps(lengths, batch_tokens, seed, shuffle, epochs)
    loader = made()
    assert names(list(loader)) == expected
    assert loader.total_steps(epochs) == len(expected)
    assert loader.steps_per_epoch == len(reference_steps(lengths, batch_tokens, seed, shuffle, 1))

    stop = data.draw(st.integers(0, len(expected)))
    stopped = made()
    before = names(list(itertools.islice(stopped, stop)))
    resumed = made()
    resumed.load_state_dict(stopped.state_dict())
    assert before + names(list(resumed)) == expected


def test_endless_steps_cross_the_border_between_epochs():
    loader = Loader(the_trees([2, 2, 2]), batch_tokens=4, seed=0, shuffle=False)
    assert names(list(itertools.islice(loader, 3))) == [["0:2", "1:2"], ["2:2", "0:2"], ["1:2", "2:2"]]
    assert loader.state_dict() == {"epoch": 2, "index": 0, "samples": 6}


def test_each_epoch_has_an_order_of_its_own():
    loader = Loader(the_trees([1] * 50), batch_tokens=50, seed=3)
    first, second = names(list(itertools.islice(loader, 2)))
    assert first != second
    assert sorted(first) == sorted(second)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    batch_tokens=st.integers(4, 20),
    stop=st.integers(0, 6),
)
def test_workers_give_the_same_steps_and_the_same_position(lengths, batch_tokens, stop):
    def made(workers: int) -> Loader:
        return Loader(the_trees(lengths), batch_tokens=batch_tokens, seed=1, workers=workers, epochs=2)

    expected = names(list(made(0)))
    ahead = made(2)  # its workers have read further than what was handed out
    before = names(list(itertools.islice(ahead, stop)))
    state = ahead.state_dict()
    plain = made(0)
    list(itertools.islice(plain, stop))
    assert state == plain.state_dict()
    ahead.load_state_dict(state)
    plain.load_state_dict(state)
    assert before + names(list(ahead)) == expected
    assert before + names(list(plain)) == expected
    ahead.close()


def test_workers_leave_the_global_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(Loader(the_trees(LENGTHS), batch_tokens=10, seed=0, workers=2, epochs=1))
    list(StreamingLoader(Stream(20), batch_tokens=10, seed=0, workers=2, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_trees_is_an_error():
    with pytest.raises(DataError, match="nothing to train on"):
        Loader([], batch_tokens=8, seed=0)


@pytest.mark.parametrize("state", [{"epoch": 1, "index": 3, "samples": 18}, {"epoch": 0, "index": 20, "samples": 20}])
def test_a_position_in_other_data_is_an_error(state):
    loader = Loader(the_trees([4] * 10), batch_tokens=8, seed=0)  # in 15 trees, (1, 3) is place 18
    with pytest.raises(DataError, match="not what it was"):
        loader.load_state_dict(state)


def test_state_is_a_copy():
    loader = Loader(the_trees(LENGTHS), batch_tokens=10, seed=0)
    state = loader.state_dict()
    next(loader)
    assert state["samples"] == 0


def length_of(number: int) -> int:
    return number * 5 % 11 + 2


class Stream:
    """A feed of samples of 2 to 12 tokens; some are split into windows, some are dropped, one may be bad."""

    def __init__(self, size: int, window: int = 8, bad: int | None = None, render_fails: bool = False) -> None:
        self.size, self.window, self.bad, self.render_fails = size, window, bad, render_fails
        self.rendered: list[str] = []

    def samples(self) -> Iterator[Sample]:
        for number in range(self.size):
            if number == self.bad and not self.render_fails:
                raise DataError(f"data.jsonl:{number}: not JSON")
            yield Sample(kind="text", answers=("x" * length_of(number),), where=str(number))

    def render(self, sample: Sample) -> tuple[list[Tree], Counts]:
        self.rendered.append(sample.where)
        if self.render_fails and sample.where == str(self.bad):
            raise ModelError(f"the template cannot render sample {sample.where}")
        how = "drop" if int(sample.where) % 4 == 3 else "split"
        return fit_sample([a_tree(len(sample.answers[0]), int(sample.where))], self.window, how, where=sample.where)


def stream_loader(feed: Stream, workers: int = 0, **options) -> StreamingLoader:
    defaults = {"batch_tokens": 12, "seed": 2, "buffer": 5, "epochs": 2}
    return StreamingLoader(feed, workers=workers, **{**defaults, **options})


def assert_resumes(made, stop: int) -> None:
    """Stopping after some steps and going on, in this process or in two workers, gives the steps of one pass."""
    expected = names(list(made(0)))
    for first, second in ((0, 0), (2, 0), (0, 2)):
        stopped: Steps = made(first)
        before = names(list(itertools.islice(stopped, stop)))
        state = stopped.state_dict()
        stopped.close()
        resumed = made(second)
        resumed.load_state_dict(state)
        assert before + names(list(resumed)) == expected


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(1, 30), buffer=st.integers(1, 40), batch_tokens=st.integers(1, 30), shuffle=st.booleans(),
    stop=st.integers(0, 12),
)  # fmt: skip
def test_a_stream_resumes_anywhere_with_any_number_of_workers(size, buffer, batch_tokens, shuffle, stop):
    options = {"buffer": buffer, "batch_tokens": batch_tokens, "shuffle": shuffle}
    assert_resumes(lambda workers: stream_loader(Stream(size), workers, **options), stop)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), batch_tokens=st.integers(1, 30), stop=st.integers(0, 30))
def test_a_stream_resumes_anywhere(size, batch_tokens, stop):
    expected = names(list(stream_loader(Stream(size), batch_tokens=batch_tokens)))
    stopped, resumed = (stream_loader(Stream(size), batch_tokens=batch_tokens) for _ in range(2))
    before = names(list(itertools.islice(stopped, stop)))
    resumed.load_state_dict(stopped.state_dict())
    assert before + names(list(resumed)) == expected


def test_a_stream_uses_every_sample_once_an_epoch():
    loader = stream_loader(Stream(20), epochs=3)
    used = Counter(f"{tree.where}:{len(tree)}" for step in loader for tree in step)
    expected: Counter[str] = Counter()
    for n in range(20):
        short, dropped = length_of(n) <= 8, n % 4 == 3
        # of two windows the second is useless when it has one token, which nothing in it predicts
        windows = [length_of(n)] if short else [] if dropped else [8, length_of(n) - 8]
        expected.update({f"{n}:{length}": 3 for length in windows if length > 1})
    assert used == expected
    assert loader.counts.samples == 60
    assert loader.counts.dropped + loader.counts.kept == 60
    assert loader.counts.dropped == 3 * sum(1 for n in range(20) if n % 4 == 3 and length_of(n) > 8) > 0


def test_a_stream_without_shuffling_keeps_its_order():
    loader = stream_loader(Stream(12, window=12), epochs=1, shuffle=False, batch_tokens=1)
    assert [step[0].where for step in loader] == [str(n) for n in range(12)]


def test_a_stream_is_shuffled_anew_each_epoch():
    used = [step[0].where for step in stream_loader(Stream(12, window=12), batch_tokens=1, buffer=6)]
    assert used[:12] != [str(n) for n in range(12)]
    assert used[:12] != used[12:]
    assert sorted(used[:12]) == sorted(used[12:])


def test_resuming_a_stream_renders_nothing_twice():
    stopped = stream_loader(Stream(30), epochs=1)
    list(itertools.islice(stopped, 5))
    feed = Stream(30)
    resumed = stream_loader(feed, epochs=1)
    resumed.load_state_dict(stopped.state_dict())
    list(resumed)
    assert len(feed.rendered) == 30 - stopped.state_dict()["index"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_stream_comes_at_the_same_step(workers):
    loader = stream_loader(Stream(20, bad=9), workers, shuffle=False, batch_tokens=1)
    read = []
    with pytest.raises(DataError, match=r"^data\.jsonl:9: not JSON$"):
        for step in loader:
            read.extend(tree.where for tree in step)
    # 8 is in the buffer; 7 waits to see whether another tree fits into its step
    assert list(dict.fromkeys(read)) == [str(n) for n in range(7)]


def test_an_error_in_a_worker_is_a_clean_message():
    with pytest.raises(DataError, match=r"^the template cannot render sample 9$"):
        list(stream_loader(Stream(20, bad=9, render_fails=True), 2))
    with pytest.raises(ModelError, match=r"^the template cannot render sample 9$"):
        list(stream_loader(Stream(20, bad=9, render_fails=True), 0))


class Nothing(Stream):
    """A feed in which no token is trained."""

    def render(self, sample: Sample) -> tuple[list[Tree], Counts]:
        tree = a_tree(4, 0)
        masked = Tree(tree.tokens, (np.zeros(4, np.float32),), (-1,))
        return fit_sample([masked], 8, "split", where=sample.where)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epochs", [None, 1])
def test_a_stream_of_nothing_ends(workers, epochs):
    with pytest.raises(DataError, match="not one sample of 6 can be trained on"):
        next(stream_loader(Nothing(6), workers, epochs=epochs))
    with pytest.raises(DataError, match="the stream has no samples"):
        next(stream_loader(Stream(0), workers, epochs=epochs))


def test_a_stream_that_became_shorter_is_an_error():
    stopped = stream_loader(Stream(30), epochs=1)
    list(itertools.islice(stopped, 8))
    resumed = stream_loader(Stream(4), epochs=1)
    resumed.load_state_dict(stopped.state_dict())
    with pytest.raises(DataError, match="ended after 4 samples"):
        next(resumed)


def test_a_stream_has_no_length():
    loader = stream_loader(Stream(3))
    assert loader.steps_per_epoch is None
    with pytest.raises(DataError, match="give steps"):
        loader.total_steps(2)
    with pytest.raises(DataError, match=r"read 1\.5 times"):
        stream_loader(Stream(3), epochs=1.5)
    with pytest.raises(DataError, match="streamed"):
        loader.load_state_dict(Loader(the_trees(LENGTHS), batch_tokens=9, seed=0).state_dict())


# --- opening data


@dataclass(kw_only=True)
class Listed(Source):
    """A source that is a list; the last sample is held out."""

    listed: list[Sample]

    def samples(self, split):
        yield from self.listed[:-1] if split == "train" else self.listed[-1:]

    def fingerprint(self):
        return str(self.listed)


class Renderer:
    """Renders a character to a token; prompts are read, answers trained."""

    fingerprint = "characters"

    def render(self, sample: Sample) -> list[Tree]:
        prompt = sample.prompt if isinstance(sample.prompt, str) else "".join(m.content for m in sample.prompt)
        answers = [str(answer) for answer in sample.answers]
        texts = [*([(prompt, 0, -1)] if prompt else []), *((text, 1, 0 if prompt else -1) for text in answers)]
        tokens = tuple(np.array([ord(c) for c in text], np.int32) for text, _, _ in texts)
        weights = tuple(np.full(len(text), weight, np.float32) for text, weight, _ in texts)
        return [Tree(tokens, weights, tuple(parent for _, _, parent in texts), where=sample.where)]


def of_kind(kind: str, count: int = 6) -> list[Sample]:
    made = {
        "text": Sample("text", "", ("abcdefgh",)),
        "completion": Sample("completion", "abc", ("def",)),
        "messages": Sample("messages", (Message("user", "abc"),), ("def",)),
        "pair": Sample("pair", "abc", ("def", "gh")),
        "prompt": Sample("prompt", "abc"),
    }[kind]
    return [Sample(made.kind, made.prompt, made.answers, where=f"data.jsonl:{n + 1}") for n in range(count)]


@pytest.mark.parametrize(
    ("consumes", "kinds"),
    [
        ("sequences", ("text", "completion", "messages")),
        ("pairs", ("pair",)),
        ("any", ("text", "completion", "messages", "pair", "prompt")),
    ],
)
def test_what_an_objective_consumes(consumes, kinds):
    for kind in ("text", "completion", "messages", "pair", "prompt"):
        for streaming in (False, True):
            source = Listed(listed=of_kind(kind), streaming=streaming)
            if kind in kinds:
                assert next(open_data(source, Renderer(), consumes=consumes).loader(100, 0))
            else:
                with pytest.raises(DataError, match=rf"^data\.jsonl:1: .*\({kind}\)"):
                    open_data(source, Renderer(), consumes=consumes)


def test_preference_data_for_an_objective_on_sequences_names_the_right_one():
    with pytest.raises(DataError, match=r"this is preference data .* Use an objective that consumes pairs") as caught:
        open_data(Listed(listed=of_kind("pair")), Renderer(), consumes="sequences")
    assert ("such as dpo" in str(caught.value)) == (find("objective", "dpo") is not None)


def test_a_sample_of_another_kind_further_on_is_an_error():
    with pytest.raises(DataError, match=r"^data\.jsonl:4: "):
        open_data(Listed(listed=of_kind("text", 3) + of_kind("pair")[3:]), Renderer(), consumes="sequences")


def test_unknown_consumption_is_refused():
    with pytest.raises(ValueError, match="images"):
        open_data(Listed(listed=of_kind("text")), Renderer(), consumes="images")


@pytest.mark.parametrize("streaming", [False, True])
def test_no_samples_is_an_error_in_training_only(streaming):
    source = Listed(listed=[], streaming=streaming)
    with pytest.raises(DataError, match="nothing to train on"):
        open_data(source, Renderer(), consumes="sequences")
    opened = open_data(source, Renderer(), consumes="sequences", split="eval")
    assert (len(opened.trees), opened.first(9)) == (0, [])


def test_samples_without_a_trained_token_are_an_error():
    listed = [Sample("completion", "abc", (), where="a:1")] * 3
    with pytest.raises(DataError, match="not one sample of 2 can be trained on: 2 without any trained token"):
        open_data(Listed(listed=listed), Renderer(), consumes="sequences")


def test_what_consumes_tokens_trains_on_prompts_too():
    listed = of_kind("completion")
    masked = open_data(Listed(listed=listed), Renderer(), consumes="sequences").trees[0]
    whole = open_data(Listed(listed=listed), Renderer(), consumes="tokens").trees[0]
    assert masked.trained < whole.trained == len(whole) == len(masked)


def test_opened_data_says_what_it_is(tmp_path):
    opened = open_data(Listed(listed=of_kind("text"), max_tokens=3), Renderer(), consumes="sequences")
    assert opened.describe().startswith("Listed: 5 samples, all kept: 40 tokens, 25 of them trained; 5 split into")
    record = json.loads(json.dumps(opened.record()))
    assert record["counts"]["split"] == 5
    assert record["cache"].startswith(str(tmp_path / "cache"))
    held = open_data(Listed(listed=of_kind("text")), Renderer(), consumes="sequences", split="eval")
    assert [sample.where for sample in held.first(9)] == ["data.jsonl:6"]


def test_overlong_follows_the_kind_unless_it_is_given():
    def lengths(kind: str, overlong: str | None) -> list[int]:
        source = Listed(listed=of_kind(kind, 2), max_tokens=5, overlong=overlong, cache=False)
        opened = open_data(source, Renderer(), consumes="any")
        return opened.trees.lengths.tolist()

    assert lengths("text", None) == [5, 3]
    assert lengths("text", "truncate") == [5]
    assert lengths("completion", None) == [5]
    assert lengths("completion", "split") == [5]


def test_cache_false_writes_nothing_and_a_stream_reads_on_the_fly(tmp_path):
    plain_data = open_data(Listed(listed=of_kind("text"), cache=False), Renderer(), consumes="sequences")
    stream = open_data(Listed(listed=of_kind("text"), streaming=True), Renderer(), consumes="sequences")
    assert not (tmp_path / "cache").exists()
    assert isinstance(plain_data.loader(16, 0), Loader)
    assert isinstance(stream.loader(16, 0), StreamingLoader)
    assert stream.trees is None
    assert "stream" in stream.describe()
    assert stream.record()["counts"] is None
    for opened in (plain_data, stream):
        used = [tree.where for step in opened.loader(16, 0, 1) for tree in step]
        assert sorted(used) == [f"data.jsonl:{n}" for n in range(1, 6)]


def test_loaders_follow_the_options_of_the_source():
    source = Listed(listed=of_kind("text"), shuffle=False, workers=3)
    opened = open_data(source, Renderer(), consumes="sequences")
    loader = opened.loader(8, 0)
    assert (loader.workers, opened.loader(8, 0, workers=0).workers) == (3, 0)
    assert [opened.trees[i].where for i in range(5)] == [step[0].where for step in opened.loader(8, 0, 1, workers=0)]


def test_calibration_gives_the_same_batches_each_time():
    calibration = open_data(Listed(listed=of_kind("text")), Renderer(), consumes="sequences").calibration(16, 0)
    first, second = ([batch.where for batch in calibration] for _ in range(2))
    assert first == second
    assert [len(where) for where in first] == [2, 2, 1]


def test_prompts_are_read_whole_or_not_at_all():
    listed = [Sample("prompt", "ab", where="a:1"), Sample("prompt", "abcdef", where="a:2")]
    opened = open_data(Listed(listed=[*listed, *listed], max_tokens=4), Renderer(), consumes="any")
    assert [tree.where for tree in opened.trees] == ["a:1", "a:1"]
    assert opened.trees.counts.dropped == 1


def test_another_objective_has_a_cache_of_its_own():
    source = Listed(listed=of_kind("completion"))
    sequences, prompts = (open_data(source, Renderer(), consumes=c) for c in ("sequences", "any"))
    assert sequences.trees.folder != prompts.trees.folder


def test_trees_longer_than_the_limit_leave_no_micro_batch_empty():
    trees = the_trees([9, 2, 8])
    assert [[len(tree) for tree in part] for part in divide(trees, 3)] == [[9], [8], [2]]
    assert [len(part) for part in divide(trees, 3, parts=2)] == [1, 1, 1, 0]  # as many for each of two processes


@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_that_is_taken_back_comes_again(streaming):
    opened = open_data(Listed(listed=of_kind("text"), streaming=streaming), Renderer(), consumes="sequences")
    loader, straight = (opened.loader(8, 0, 2) for _ in range(2))
    wanted = [[tree.where for tree in step] for step in straight]
    found = []
    for _ in wanted:
        next(loader)
        loader.rewind()
        found.append([tree.where for tree in next(loader)])
    assert found == wanted
