"""Vocabulary losses equal plain PyTorch's in value and gradient, and never hold more than one chunk of logits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hone.text.vocabulary import (
    CrossEntropy,
    Head,
    entropy,
    token_entropies,
    token_logprobs,
    vocabulary_map,
    vocabulary_sum,
)

N, D, V = 23, 6, 19
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank update, as an adapter makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, V).double().requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, D, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(V, 2, dtype=torch.float64))
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.dropout(hidden) @ self.down.T @ self.up.T


class Model(nn.Module):
    """A model whose head is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(D, D).double(), nn.Linear(D, V, bias=False).double()

    def head(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.out(hidden))


def hooked() -> nn.Linear:
    linear = nn.Linear(D, V).double()
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    return linear


def closure() -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    return lambda hidden: hidden @ weight.T * scale, [weight, scale]


def make_head(kind: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """Return a head and the tensors that train in it."""
    if kind == "closure":
        return closure()
    if kind == "method":
        model = Model()
        return model.head, list(model.out.parameters())
    made: Any = {
        "linear": lambda: nn.Linear(D, V, bias=False).double(),
        "bias": lambda: nn.Linear(D, V).double(),
        "frozen bias": lambda: nn.Linear(D, V).double(),
        "scaled": lambda: Head(nn.Linear(D, V).double(), scale=0.6),
        "capped": lambda: Head(nn.Linear(D, V).double(), scale=1.5, soft_cap=2.0),
        "lora": LowRank,
        "capped lora": lambda: Head(LowRank(), soft_cap=2.0),
        "sequential": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, V)).double(),
        "hooked": hooked,
    }[kind]()
    module = made.linear if isinstance(made, Head) else made
    if kind == "frozen bias":
        module.bias.requires_grad_(False)
    return made, [p for p in module.parameters() if p.requires_grad]


HEADS = ["linear", "bias", "frozen bias", "scaled", "capped", "lora", "capped lora", "sequential", "hooked", "closure",
         "method"]  # fmt: skip
FUNCTIONS = {
    "cross-entropy": CrossEntropy(),
    "all options": CrossEntropy(label_smoothing=0.1, z_loss=1e-2, temperature=0.7),
    "entropy": entropy,
}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that train, targets, and weights of both signs with zeros among them."""
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(N, dtype=torch.float64) * (torch.rand(N) > 0.2)
    return hidden, torch.randint(V, (N,)), weights


def rows(count: int, itemsize: int = 8, vocabulary: int = V) -> int:
    """Return the chunk size in bytes that holds `count` rows of logits."""
    return count * vocabulary * itemsize


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("primitive", ["sum", "map"])
def test_equals_plain_pytorch(batch, primitive, kind, function):
    hidden, targets, weights = batch
    head, trained = make_head(kind)
    size = rows(4)
    if primitive == "sum":
        total = vocabulary_sum(hidden, head, targets, weights, function, chunk_bytes=size)
    else:
        total = (vocabulary_map(hidden, head, targets, function, chunk_bytes=size) * weights).sum()
    expected = (function(head(hidden), targets) * weights).sum()
    torch.testing.assert_close(total, expected, **EXACT)
    got = torch.autograd.grad(0.3 * total, [hidden, *trained])
    wanted = torch.autograd.grad(0.3 * expected, [hidden, *trained], materialize_grads=True)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(batch, smoothing):
    hidden, targets, _ = batch
    head, _ = make_head("bias")
    ours = vocabulary_map(hidden, head, targets, CrossEntropy(label_smoothing=smoothing))
    theirs = F.cross_entropy(head(hidden), targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_z_loss_is_squared_logsumexp(batch):
    hidden, targets, _ = batch
    head, _ = make_head("bias")
    with_z = vocabulary_map(hidden, head, targets, CrossEntropy(z_loss=0.5))
    plain = F.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(with_z - plain, 0.5 * head(hidden).logsumexp(-1).square(), **EXACT)


def test_tied_head_adds_to_the_embeddings_gradient(batch):
    _, targets, weights = batch
    embedding = nn.Embedding(V, D).double()
    head = nn.Linear(D, V, bias=False).double()
    head.weight = embedding.weight
    tokens = torch.randint(V, (N,))
    vocabulary_sum(embedding(tokens).tanh(), head, targets, weights, chunk_bytes=rows(5)).backward()
    ours = embedding.weight.grad
    embedding.weight.grad = None
    (F.cross_entropy(head(embedding(tokens).tanh()), targets, reduction="none") * weights).sum().backward()
    torch.testing.assert_close(ours, embedding.weight.grad, **EXACT)


def test_frozen_head_gets_no_gradient(batch):
    hidden, targets, weights = batch
    head, _ = make_head("bias")
    head.requires_grad_(False)
    with Peak(hidden, head.weight, head.bias) as peak:
        vocabulary_sum(hidden, head, targets, weights, chunk_bytes=rows(1)).backward()
    assert head.weight.grad is None and head.bias.grad is None
    reference = torch.autograd.grad((CrossEntropy()(head(hidden), targets) * weights).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, reference, **EXACT)
    assert peak.bytes < hidden.nbytes + head.weight.nbytes + rows(1)  # no room was made for a gradient of the head


def test_frozen_hidden_states_get_no_gradient(batch):
    hidden, targets, weights = batch
    for kind in ("bias", "lora"):
        head, trained = make_head(kind)
        total = vocabulary_sum(hidden.detach(), head, targets, weights)
        expected = (CrossEntropy()(head(hidden.detach()), targets) * weights).sum()
        wanted = torch.autograd.grad(expected, trained)
        for ours, theirs in zip(torch.autograd.grad(total, trained), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("cuts", [[N], [1, N - 1], [10, 3, 10], [1] * N])
@pytest.mark.parametrize("kind", ["bias", "capped", "lora"])
def test_any_split_into_micro_batches_gives_the_same_gradients(batch, kind, cuts):
    hidden, targets, weights = batch
    head, trained = make_head(kind)
    whole = torch.autograd.grad(vocabulary_sum(hidden, head, targets, weights) / N, [hidden, *trained])
    parts = [vocabulary_sum(h, head, t, w, chunk_bytes=rows(2)) / N
             for h, t, w in zip(hidden.split(cuts), targets.split(cuts), weights.split(cuts), strict=True)]  # fmt: skip
    split = torch.autograd.grad(torch.stack(parts).sum(), [hidden, *trained])
    for ours, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("kind", ["bias", "capped", "lora"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_of_the_map(kind, name):
    torch.manual_seed(1)
    hidden = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (5,))
    head, trained = make_head(kind)

    def run(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return vocabulary_map(hidden, head, targets, FUNCTIONS[name], chunk_bytes=rows(2))

    assert torch.autograd.gradcheck(run, (hidden, *trained))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_and_entropies(batch, temperature):
    hidden, targets, _ = batch
    head, _ = make_head("capped")
    log_p = (head(hidden) / temperature).log_softmax(-1)
    ours = token_logprobs(hidden, head, targets, temperature=temperature)
    torch.testing.assert_close(ours, log_p.gather(1, targets[:, None]).squeeze(1), **EXACT)
    ours = token_entropies(hidden, head, temperature=temperature)
    torch.testing.assert_close(ours, torch.distributions.Categorical(logits=log_p).entropy(), **EXACT)


def test_a_map_can_go_back_twice(batch):
    hidden, targets, _ = batch
    head, _ = make_head("bias")
    values = vocabulary_map(hidden, head, targets)
    first = torch.autograd.grad(values.square().sum(), hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(values.square().sum(), hidden)[0], first, rtol=0, atol=0)


def test_a_sum_goes_back_once(batch):
    hidden, targets, weights = batch
    total = vocabulary_sum(hidden, make_head("bias")[0], targets, weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_a_map_notices_a_weight_changed_meanwhile(batch):
    hidden, targets, _ = batch
    head, _ = make_head("bias")
    values = vocabulary_map(hidden, head, targets)
    with torch.no_grad():
        head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


def test_dropout_in_the_head_is_the_same_in_both_passes(batch):
    hidden, targets, _ = batch
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, V, bias=False).double())

    def picked(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.gather(1, targets[:, None]).squeeze(1)

    values = vocabulary_map(hidden, head, targets, picked, chunk_bytes=rows(8))
    after = torch.get_rng_state()
    values.sum().backward()
    # What is linear in the hidden states equals their gradient times them, if the mask was the same.
    torch.testing.assert_close((hidden.grad * hidden).sum(1), values, **EXACT)
    assert torch.equal(torch.get_rng_state(), after)


def test_extras_are_cut_with_the_tokens(batch):
    hidden, targets, weights = batch
    head, _ = make_head("bias")
    teacher, states, factor = nn.Linear(4, V).double(), torch.randn(N, 4).double(), torch.rand(N).double()

    def divergence(logits: Tensor, targets: Tensor, taught: Tensor, factor: Tensor) -> Tensor:
        log_p, log_q = logits.log_softmax(-1), taught.log_softmax(-1)
        return factor * (log_q.exp() * (log_q - log_p)).sum(-1)

    extras = (lambda part: teacher(states[part]), factor)
    total = vocabulary_sum(hidden, head, targets, weights, divergence, extras=extras, chunk_bytes=rows(6))
    expected = (divergence(head(hidden), targets, teacher(states).detach(), factor) * weights).sum()
    torch.testing.assert_close(total, expected, **EXACT)
    wanted = torch.autograd.grad(expected, head.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(total, head.weight)[0], wanted, **EXACT)


def test_hits_are_the_targets_that_are_likeliest(batch):
    hidden, targets, weights = batch
    for kind in ("bias", "capped", "lora"):
        head, _ = make_head(kind)
        best = head(hidden).argmax(-1)
        targets = torch.where(torch.arange(N) % 3 == 0, best, targets)
        hits = torch.empty(N)
        vocabulary_sum(hidden, head, targets, weights, hits=hits, chunk_bytes=rows(4))
        assert torch.equal(hits.bool(), best == targets) and hits.sum() >= N // 3


def test_no_tokens_give_zero_and_no_gradient(batch):
    hidden, targets, weights = batch
    for kind in ("bias", "lora"):
        head, trained = make_head(kind)
        total = vocabulary_sum(hidden[:0], head, targets[:0], weights[:0])
        assert total == 0
        assert all(not g.any() for g in torch.autograd.grad(total, [hidden, *trained]))


def test_what_would_silently_lose_a_gradient_is_an_error(batch):
    hidden, targets, weights = batch
    head, _ = make_head("bias")
    with pytest.raises(ValueError, match="weights"):
        vocabulary_sum(hidden, head, targets, weights.requires_grad_())
    with pytest.raises(ValueError, match="extras"):
        vocabulary_map(hidden, head, targets, extras=(weights,))
    slope = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="beside the logits"):
        vocabulary_sum(hidden, head, targets, weights.detach(), lambda logits, targets: (logits * slope).sum(-1))


def test_wrong_shapes_are_named(batch):
    hidden, targets, weights = batch
    with pytest.raises(ValueError, match=r"\(22,\)"):
        vocabulary_map(hidden, make_head("bias")[0], targets[1:])
    with pytest.raises(ValueError, match=r"gave shape \(23, 19\)"):
        vocabulary_sum(hidden, make_head("bias")[0], targets, weights, lambda logits, targets: logits)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("wrap", [lambda head: head, nn.Sequential], ids=["linear", "general"])
def test_bfloat16_is_summed_in_float32(wrap):
    torch.manual_seed(2)
    head, targets, weights = nn.Linear(16, 64).to(torch.bfloat16), torch.zeros(512, dtype=torch.int64), torch.ones(512)
    hidden = (torch.randn(512, 16) + 1).to(torch.bfloat16).requires_grad_()
    total = vocabulary_sum(hidden, wrap(head), targets, weights, chunk_bytes=1)  # one row a chunk: 512 additions
    ours = torch.autograd.grad(total / 512, [hidden, head.weight, head.bias])
    assert total.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in ours)

    wide = [t.detach().double().requires_grad_() for t in (hidden, head.weight, head.bias)]
    expected = F.cross_entropy(F.linear(*wide), targets)
    exact = torch.autograd.grad(expected, wide)
    assert relative(total.detach() / 512, expected.detach()) < 2e-3
    assert all(relative(a, b) < 5e-3 for a, b in zip(ours, exact, strict=True))

    slopes = (F.linear(*wide).softmax(-1) - F.one_hot(targets, 64)).detach() / 512
    naive = torch.zeros(64, 16, dtype=torch.bfloat16)
    for slope, row in zip(slopes.bfloat16(), hidden.detach(), strict=True):
        naive += slope[:, None] * row
    assert relative(naive, exact[1]) > 1e-2  # what summing in bfloat16 would have given


@pytest.mark.parametrize("wrap", [lambda head: head, nn.Sequential], ids=["linear", "general"])
@pytest.mark.parametrize("primitive", ["sum", "map"])
def test_autocast_runs_the_products_in_bfloat16(primitive, wrap):
    torch.manual_seed(2)
    head, hidden, targets = nn.Linear(16, 64), torch.randn(40, 16, requires_grad=True), torch.randint(64, (40,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if primitive == "sum":
            total = vocabulary_sum(hidden, wrap(head), targets, torch.ones(40), chunk_bytes=rows(7, 2, 64))
        else:
            total = vocabulary_map(hidden, wrap(head), targets, chunk_bytes=rows(7, 2, 64)).sum()
        expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(expected, [hidden, head.weight, head.bias])
    for ours, theirs in zip(torch.autograd.grad(total, [hidden, head.weight, head.bias]), wanted, strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) < 1e-2


class Peak(TorchDispatchMode):
    """Counts the bytes of live tensor storages that operations make within; `bytes` is the most at one time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.track, func(*args, **(kwargs or {})))

    def track(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.bytes = max(self.bytes, self.now)
            weakref.finalize(storage, self.release, storage._cdata)
        return tensor

    def release(self, key: int) -> None:
        self.now -= self.live.pop(key)


def large(vocabulary: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    hidden = torch.randn(512, 32, requires_grad=True)
    return nn.Linear(32, vocabulary, bias=False), hidden, torch.randint(vocabulary, (512,)), torch.rand(512)


def peak_bytes(linear: nn.Linear, hidden: Tensor, run: Callable[[], Tensor]) -> int:
    """Return the most bytes that a loss and its backward pass hold beside the hidden states and the classifier."""
    with Peak(hidden, linear.weight) as peak:
        run().backward()
    return peak.bytes


def test_the_counter_sees_what_plain_pytorch_holds():
    linear, hidden, targets, _ = large(4096)
    used = peak_bytes(linear, hidden, lambda: F.cross_entropy(linear(hidden), targets))
    assert used >= 2 * 512 * 4096 * 4
    with Peak() as peak:
        kept = [torch.empty(1000) for _ in range(3)]
        torch.empty(500)
        del kept
        torch.empty(1000)
    assert peak.bytes == 3 * 4000 + 2000 and peak.now == 0


CASES = {
    "cross-entropy": (lambda linear: linear, CrossEntropy()),
    "all options": (lambda linear: linear, CrossEntropy(0.1, 1e-3, 0.8)),
    "capped": (lambda linear: Head(linear, soft_cap=3.0), CrossEntropy()),
}


@pytest.mark.parametrize("vocabulary", [4096, 16384])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("primitive", ["sum", "map"])
def test_peak_memory_is_the_gradients_and_one_chunk(primitive, case, vocabulary):
    linear, hidden, targets, weights = large(vocabulary)
    wrap, function = CASES[case]
    chunk = 2**20

    def run() -> Tensor:
        if primitive == "sum":
            return vocabulary_sum(hidden, wrap(linear), targets, weights, function, chunk_bytes=chunk) / 512
        return (vocabulary_map(hidden, wrap(linear), targets, function, chunk_bytes=chunk) * weights).sum() / 512

    assert peak_bytes(linear, hidden, run) <= 1.1 * (hidden.nbytes + linear.weight.nbytes + chunk)


def test_a_chunk_is_as_large_for_a_vocabulary_16_times_larger():
    extra = []
    for vocabulary in (2048, 32768):
        linear, hidden, targets, weights = large(vocabulary)
        run = partial(vocabulary_sum, hidden, linear, targets, weights, chunk_bytes=2**19)
        extra.append(peak_bytes(linear, hidden, run) - hidden.nbytes - linear.weight.nbytes)
    assert extra[1] <= 1.02 * extra[0] and extra[0] >= 2**19


def test_without_gradients_nothing_but_a_chunk_is_held():
    linear, hidden, targets, weights = large(4096)
    with torch.no_grad(), Peak(hidden, linear.weight, targets) as peak:
        total = vocabulary_sum(hidden, linear, targets, weights, chunk_bytes=2**20)
    assert not total.requires_grad
    assert peak.bytes <= 1.1 * 2**20 and peak.now == total.nbytes
