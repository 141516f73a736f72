"""Fitting the window, the counts, the token cache under kills, damage, full disks and rivals."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import signal
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.data import cache
from hone.data.cache import TokenCache, cache_key, cache_root
from hone.data.overlong import Counts, fit, fit_sample, longest_chain, trained_tokens
from hone.data.sample import Sample
from hone.errors import DataError, HoneError
from hone.text.pack import Tree, pack

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))


def tree_of(*segments: tuple[int, str], where: str = "", start: int = 0, **fields: tuple[float, ...]) -> Tree:
    """Make a tree of (parent, weights) segments such as (-1, "00") or (0, "111"); all tokens differ."""
    tokens, at = [], start
    for _, weights in segments:
        tokens.append(np.arange(at, at + len(weights), dtype=np.int32))
        at += len(weights)
    weights = tuple(np.array([float(w) for w in ws], np.float32) for _, ws in segments)
    return Tree(tuple(tokens), weights, tuple(p for p, _ in segments), dict(fields), where)


def plain(tree: Tree) -> tuple:
    fields = {name: tuple(map(str, values)) for name, values in tree.fields.items()}  # as text, NaN equals NaN
    return [t.tolist() for t in tree.tokens], [w.tolist() for w in tree.weights], tree.parents, fields, tree.where


# --- fitting the window


def test_what_fits_is_left_alone():
    tree = tree_of((-1, "00"), (0, "11"), (0, "111"))
    assert longest_chain(tree) == 5
    for how in ("truncate", "drop", "split"):
        assert fit(tree, 5, how)[0] is tree


def test_truncate_cuts_each_answer_and_keeps_the_prompt():
    tree = tree_of((-1, "000"), (0, "1111"), (0, "1"), reward=(float("nan"), 1.0, 0.0))
    (cut,) = fit(tree, 5, "truncate")
    assert [len(s) for s in cut.tokens] == [3, 2, 1]
    assert cut.fields == tree.fields
    assert trained_tokens(cut) == 3


def test_truncate_drops_later_turns_with_their_fields():
    tree = tree_of((-1, "000"), (0, "11"), (1, "00"), (2, "11"), value=(0.0, 1.0, 2.0, 3.0))
    (cut,) = fit(tree, 5, "truncate")
    assert plain(cut)[2:4] == ((-1, 0), {"value": ("0.0", "1.0")})


def test_a_step_that_was_cut_has_no_value():
    tree = tree_of((-1, "000"), (0, "11"), (1, "111"), value=(float("nan"), 0.5, 1.0), label=(1.0, 1.0, 1.0))
    (cut,) = fit(tree, 6, "truncate")
    assert [len(s) for s in cut.tokens] == [3, 2, 1]
    assert plain(cut)[3] == {"value": ("nan", "0.5", "nan"), "label": ("1.0", "1.0", "1.0")}


def test_drop_leaves_out_what_is_too_long():
    assert fit(tree_of((-1, "111")), 2, "drop") == []


def test_a_prompt_that_fills_the_window_leaves_nothing():
    tree = tree_of((-1, "0000"), (0, "11"), (0, "1"))
    for how in ("truncate", "split"):
        assert fit(tree, 4, how) == []
        assert fit(tree, 3, how) == []


def test_answers_that_cutting_makes_equal_leave_nothing():
    prompt, tail = np.zeros(2, np.int32), np.ones(2, np.float32)
    chosen, rejected = np.array([7, 8], np.int32), np.array([7, 9], np.int32)
    pair = Tree((prompt, chosen, rejected), (np.zeros(2, np.float32), tail, tail), (-1, 0, 0))
    assert fit(pair, 3, "truncate") == []
    assert fit(pair, 4, "truncate") == [pair]
    no_prompt = Tree((chosen, rejected), (tail, tail), (-1, -1))
    assert fit(no_prompt, 1, "truncate") == []


def test_split_gives_consecutive_windows():
    windows = fit(tree_of((-1, "11111")), 2, "split")
    assert [w.tokens[0].tolist() for w in windows] == [[0, 1], [2, 3]]  # nothing predicts the fifth token in its window
    assert [trained_tokens(w) for w in windows] == [1, 1]


@st.composite
def some_trees(draw) -> Tree:
    count = draw(st.integers(1, 6))
    weights = st.text("01", min_size=1, max_size=6)
    return tree_of(*((draw(st.integers(-1, i - 1)), draw(weights)) for i in range(count)))


@settings(max_examples=200, deadline=None)
@given(tree=some_trees(), window=st.integers(1, 12), how=st.sampled_from(["truncate", "drop", "split"]))
def test_pieces_fit_and_train_as_before(tree, window, how):
    pieces = fit(tree, window, how)
    weight_of = dict(zip(np.concatenate(tree.tokens).tolist(), np.concatenate(tree.weights).tolist(), strict=True))
    for piece in pieces:
        assert longest_chain(piece) <= window
        assert piece is tree or trained_tokens(piece) > 0
        for tokens, weights in zip(piece.tokens, piece.weights, strict=True):
            assert [weight_of[t] for t in tokens.tolist()] == weights.tolist()
    if how == "split" and len(tree.tokens) == 1 and longest_chain(tree) > window:
        trained = [t for t, w in weight_of.items() if w and t % window]
        found = [t for p in pieces for t, w in zip(p.tokens[0][1:], p.weights[0][1:], strict=True) if w]
        assert found == trained  # every token but the first of each window is trained once
    if how == "truncate" and longest_chain(tree) > window:
        inside = {t for p in pieces for s in p.tokens for t in s.tolist()}
        begins = pack([tree]).positions.tolist()
        expected = {t for t, position in zip(weight_of, begins, strict=True) if position < window}
        assert inside in (set(), expected)


def test_trained_tokens_are_those_that_pack_trains():
    tree = tree_of((-1, "101"), (0, "111"), (-1, "11"))
    assert trained_tokens(tree) == 5 == int((pack([tree]).weights != 0).sum())


@pytest.mark.parametrize(
    ("trees", "how", "trains", "expected"),
    [
        ([tree_of((-1, "01"))], "drop", True, {"kept": 1, "tokens": 2, "trained_tokens": 1}),
        ([tree_of((-1, "0111"))], "drop", True, {"dropped": 1}),
        ([tree_of((-1, "0111"))], "truncate", True, {"kept": 1, "truncated": 1, "tokens": 3, "trained_tokens": 2}),
        ([tree_of((-1, "1111"))], "split", True, {"kept": 1, "split": 1, "tokens": 3, "trained_tokens": 2}),
        ([tree_of((-1, "0001"))], "truncate", True, {"nothing_trained": 1}),
        ([tree_of((-1, "100"))], "truncate", True, {"nothing_trained": 1, "masked": 1}),
        ([], "truncate", True, {"nothing_trained": 1, "masked": 1}),
        ([tree_of((-1, "000"))], "truncate", False, {"kept": 1, "tokens": 3}),
        ([tree_of((-1, "0000"))], "truncate", False, {"dropped": 1}),
    ],
)
def test_the_fate_of_a_sample_is_counted(trees, how, trains, expected):
    fitted, counts = fit_sample(trees, 3, how, where="a:1", trains=trains)
    mishaps = {name: ["a:1"] for name in ("truncated", "split", "dropped", "nothing_trained") if name in expected}
    assert asdict(counts) == asdict(Counts(samples=1, examples=mishaps, **expected))
    assert bool(fitted) == bool(counts.kept)


def test_counts_add_up_and_survive_json():
    one = Counts(samples=3, kept=2, dropped=1, tokens=1200, trained_tokens=9, examples={"dropped": ["a:1"]})
    two = Counts(samples=4, dropped=4, examples={"dropped": ["a:2", "a:3", "a:4"]})
    total = one + two
    assert total.examples == {"dropped": ["a:1", "a:2", "a:3"]}
    assert Counts(**json.loads(json.dumps(asdict(total)))) == total
    assert total.describe() == (
        "7 samples, 2 kept: 1,200 tokens, 9 of them trained; 5 dropped for being longer than max_tokens "
        "(such as a:1, a:2, a:3)"
    )
    assert Counts(samples=2, kept=2, tokens=3, trained_tokens=1).describe() == (
        "2 samples, all kept: 3 tokens, 1 of them trained"
    )


@pytest.mark.parametrize(
    ("counts", "fix"),
    [
        (Counts(samples=5, nothing_trained=5, masked=5), "needs an assistant turn"),
        (Counts(samples=5, nothing_trained=5), "raise max_tokens"),
        (Counts(samples=5, dropped=5), "'truncate'"),
    ],
)
def test_nothing_to_train_on_is_an_error_with_its_fix(counts, fix):
    with pytest.raises(DataError, match=fix):
        counts.require_kept(512)
    (counts + Counts(samples=1, kept=1)).require_kept(512)


# --- the cache


class Feed:
    """Samples 0 to n - 1, each rendered to a tree that its number determines; counts what it rendered."""

    def __init__(self, size: int = 40, kill_at: int | None = None) -> None:
        self.size, self.kill_at, self.rendered = size, kill_at, 0

    def samples(self) -> Iterator[Sample]:
        for number in range(self.size):
            yield Sample("completion", str(number), (), where=f"däta:{number}")

    def render(self, sample: Sample) -> tuple[list[Tree], Counts]:
        number = int(str(sample.prompt))
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.rendered += 1
        return fit_sample([numbered_tree(number, sample.where)], 7, "truncate", where=sample.where)

    def open(self, key: str = "k", progress=None, shard_tokens: int = 50) -> TokenCache:
        return TokenCache.open(key, self.samples, self.render, progress=progress, shard_tokens=shard_tokens)


def numbered_tree(number: int, where: str) -> Tree:
    fields = {"reward": (float("nan"), number / 3)} if number % 3 == 0 else {}
    weights = "1" * (1 + number % 6)
    tree = tree_of((-1, "0" * (1 + number % 4)), (0, weights), where=where, start=number * 100, **fields)
    if number > 20:  # from some shard on, weights are no longer all 0 or 1
        tree = Tree(tree.tokens, tuple(w / 3 for w in tree.weights), tree.parents, tree.fields, where)
    return tree


def expected_trees(size: int = 40) -> list[tuple]:
    feed = Feed(size)
    return [plain(tree) for sample in feed.samples() for tree in feed.render(sample)[0]]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_a_cache_gives_the_trees_back_without_rendering_again():
    first = Feed()
    built = first.open()
    again = Feed()
    read = again.open()
    for trees in (built, read, TokenCache.in_memory(first.samples, first.render)):
        assert [plain(tree) for tree in trees] == expected_trees()
        assert trees.lengths.dtype == np.int32
        assert trees.lengths.tolist() == [len(tree) for tree in trees]
        assert trees.counts == built.counts
    assert again.rendered == 0
    assert built.counts.samples == 40
    assert plain(read[-1]) == plain(read[39]) == plain(read[np.int64(39)])
    assert [plain(t) for t in read[3:9:2]] == expected_trees()[3:9:2]
    for beyond in (40, -41):
        with pytest.raises(IndexError):
            read[beyond]


def test_weights_of_0_and_1_take_a_byte(tmp_path):
    Feed().open()
    files = sorted((tmp_path / "cache" / "k").glob("shard-*"))
    kinds = {cache._map(path)["weights"].dtype for path in files}
    assert kinds == {np.dtype(np.uint8), np.dtype(np.float32)}


def test_a_copy_for_a_worker_holds_no_data():
    trees = Feed().open()
    copied = pickle.dumps(trees)
    assert len(copied) < 5000
    assert [plain(tree) for tree in pickle.loads(copied)] == expected_trees()


def test_few_shards_are_open_at_a_time(monkeypatch):
    monkeypatch.setattr(cache, "_OPEN_SHARDS", 2)
    trees = Feed().open()
    assert [plain(tree) for tree in trees] == expected_trees()
    assert len(trees._opened) == 2


def test_progress_counts_samples_and_goes_on_after_a_resume(tmp_path):
    seen: list[int] = []
    in_child(lambda: Feed(kill_at=30).open())
    Feed().open(progress=seen.append)
    assert 0 < seen[0] <= 31
    assert seen == list(range(seen[0], 41))


def in_child(work) -> int:
    child = FORK.Process(target=work)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("kill_at", [0, 3, 17, 39])
def test_a_kill_loses_at_most_one_shard(tmp_path, kill_at):
    whole = Feed()
    whole.open("whole")
    assert in_child(lambda: Feed(kill_at=kill_at).open()) == -signal.SIGKILL
    rest = Feed()
    resumed = rest.open()
    assert [plain(tree) for tree in resumed] == expected_trees()
    assert content(tmp_path / "cache" / "k") == content(tmp_path / "cache" / "whole")
    longest_shard = max(len(cache._map(p)["lengths"]) for p in (tmp_path / "cache" / "k").glob("shard-*"))
    assert 40 - kill_at <= rest.rendered < 40 - kill_at + longest_shard


@pytest.mark.parametrize("instant", range(12))
def test_a_kill_at_any_write_leaves_a_cache_that_goes_on(tmp_path, instant, monkeypatch):
    Feed().open("whole")

    def work() -> None:
        calls, replace = iter(range(100)), Path.replace

        def dying(self: Path, target: Path) -> Path:
            if next(calls) == instant // 2:  # even: before the rename, odd: after it
                if instant % 2:
                    replace(self, target)
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", dying)
        Feed().open()

    assert in_child(work) == -signal.SIGKILL
    assert [plain(tree) for tree in Feed().open()] == expected_trees()
    assert content(tmp_path / "cache" / "k") == content(tmp_path / "cache" / "whole")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("shard-00002.safetensors", flip_a_bit),
        ("shard-00002.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("shard-00002.safetensors", lambda path: path.write_bytes(b"")),
        ("shard-00002.safetensors", Path.unlink),
        ("meta.json", flip_a_bit),
        ("meta.json", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("meta.json", lambda path: path.write_text("[]")),
        ("meta.json", lambda path: path.write_bytes(path.read_bytes().replace(b'"samples": 40', b'"samples": 41'))),
    ],
)
def test_a_damaged_cache_is_rendered_again_and_says_so(tmp_path, caplog, file, damage):
    Feed().open()
    before = content(tmp_path / "cache" / "k")
    damage(tmp_path / "cache" / "k" / file)
    repairing = Feed()
    with caplog.at_level(logging.WARNING):
        trees = repairing.open()
    assert [plain(tree) for tree in trees] == expected_trees()
    assert content(tmp_path / "cache" / "k") == before
    (line,) = caplog.messages
    assert file in line
    assert "rendering it again from there" in line
    assert (repairing.rendered < 40) == file.startswith("shard")  # the shards before the damaged one are kept


def test_a_full_disk_is_an_error_that_says_where_and_how_much(tmp_path, monkeypatch):
    written, sync = iter(range(100)), os.fsync

    def full(handle: int) -> None:
        if next(written) == 4:  # the second shard itself
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(HoneError, match=r"cache/k: the token cache .* the disk is full: .* MiB .*HONE_CACHE"):
            Feed().open()
    left = sorted(path.name for path in (tmp_path / "cache" / "k").iterdir())
    assert left == ["lock", "meta.json", "shard-00000.safetensors"]
    rest = Feed()
    assert [plain(tree) for tree in rest.open()] == expected_trees()
    assert rest.rendered < 40


def test_a_folder_that_cannot_be_made_is_an_error_with_its_fix(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "file"))
    with pytest.raises(HoneError, match=r"the disk refused.*cache: false"):
        Feed().open()


def test_two_processes_build_one_cache_once(tmp_path):
    barrier, rendered = FORK.Barrier(2), FORK.Queue()

    def work() -> None:
        feed = Feed()
        barrier.wait()
        trees = feed.open()
        rendered.put((feed.rendered, [plain(tree) for tree in trees] == expected_trees()))

    children = [FORK.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    found = sorted(rendered.get(timeout=30) for _ in children)
    for child in children:
        child.join()
    assert found == [(0, True), (40, True)]


def test_memory_does_not_grow_with_the_data():
    def peak(size: int) -> int:
        feed = Feed(size)
        tracemalloc.start()
        feed.open(f"of-{size}", shard_tokens=1000)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    Feed(400).open("warm", shard_tokens=1000)
    assert peak(2000) < 1.3 * peak(400)


def test_an_empty_cache_is_empty():
    trees = Feed(0).open()
    assert len(trees) == 0
    assert trees.counts == Counts()
    assert trees.lengths.shape == (0,)


def test_where_caches_lie(monkeypatch):
    monkeypatch.delenv("HONE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/hone/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("~/.cache/hone/tokens").expanduser()


def test_a_key_depends_on_every_part():
    base = {"source": "s", "renderer": "r", "split": "train", "max_tokens": 8, "overlong": None}
    keys = {cache_key(**base)} | {cache_key(**{**base, name: "other"}) for name in base}
    assert len(keys) == 6
