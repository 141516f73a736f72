"""Losses over the vocabulary: a per-token function of the logits, computed without ever holding the (N, V) logits.

    vocabulary_sum(hidden, head, targets, weights, f)  =  sum_n weights_n f(head(hidden_n), targets_n)
    vocabulary_map(hidden, head, targets, f)_n         =  f(head(hidden_n), targets_n)

Both go over the hidden states in chunks whose logits take a constant number of bytes, whatever V is. The gradients of
a sum are finished during its forward pass, while a chunk's logits are at hand, so that no matrix product is done twice;
a map computes its chunks again in the backward pass, since only then is each token's weight known.

Within a chunk two sizes matter. Matrix products want many rows. Pointwise arithmetic wants few, so that its passes stay
in the processor's cache; so a chunk's logits are overwritten with their gradient block of rows by block of rows. Beside
the gradients themselves, peak memory is hence one chunk of logits, for any function of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PerToken = Callable[..., Tensor]  # (logits (n, V), targets (n,), *extras (n, ...)) -> (n,)

CPU_CHUNK, CPU_BLOCK = 32 * 2**20, 2**20  # a block fits the level-2 cache of a core
GPU_CHUNK, GPU_BLOCK = 256 * 2**20, 32 * 2**20  # large enough to hide the launches of kernels


@dataclass(frozen=True)
class Head:
    """The output layer of a language model, (n, D) -> (n, V).

    logits = soft_cap tanh(scale (h W^T + b) / soft_cap), the cap left out when it is None.

    Args:
        linear: the classifier h W^T + b; a plain `nn.Linear` takes the fast path, anything else the general one.
        scale: factor on the classifier's output.
        soft_cap: bound on the size of a logit, None for no bound.
    """

    linear: Callable[[Tensor], Tensor]
    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, V) of hidden states (n, D)."""
        logits = self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


@dataclass(frozen=True)
class FrozenLogits:
    """An extra of a per-token function: the logits of another model, computed chunk by chunk without gradient.

    Args:
        hidden: (N, D') that model's hidden states at the same tokens.
        head: that model's head.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of the target, with label smoothing, z-loss and temperature.

    With x = logits / temperature and log Z = logsumexp(x),
    f = log Z - (1 - label_smoothing) x_target - label_smoothing mean_v x_v + z_loss (log Z)^2.

    Args:
        label_smoothing: probability mass of the target that is spread evenly over the vocabulary, in [0, 1).
        z_loss: coefficient of (log Z)^2.
        temperature: what the logits are divided by first.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return f (n,) of logits (n, V) and targets (n,), for autograd to differentiate."""
        scaled = logits / self.temperature
        log_z = scaled.logsumexp(-1)
        picked = scaled.gather(-1, targets[:, None]).squeeze(-1)
        fit = log_z - (1 - self.label_smoothing) * picked - self.label_smoothing * scaled.mean(-1)
        return fit + self.z_loss * log_z.square()

    def overwrite(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Return f (n,) and overwrite the logits (n, V) with weights * df/dlogits, in closed form.

        With p = softmax(x), df/dx = (1 + 2 z_loss log Z) p - label_smoothing / V - (1 - label_smoothing) onehot(target).

        Args:
            logits: (n, V), destroyed.
            targets: (n,) token ids.
            weights: (n,) factors on the gradient; None when no gradient is wanted.
        """
        kept, index = 1 - self.label_smoothing, targets[:, None]
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        peak = logits.amax(-1, keepdim=True)
        logits.sub_(peak)
        values = -kept * logits.gather(1, index)
        if self.label_smoothing:
            values -= self.label_smoothing * logits.mean(-1, keepdim=True)
        sums = logits.exp_().sum(-1, keepdim=True)
        values += sums.log()
        log_z = sums.log() + peak
        if self.z_loss:
            values += self.z_loss * log_z.square()
        if weights is not None:
            factor = weights[:, None] / self.temperature
            logits.mul_(factor * (1 + 2 * self.z_loss * log_z) / sums)
            if self.label_smoothing:
                logits.sub_(factor * self.label_smoothing / logits.shape[1])
            logits.scatter_add_(1, index, -kept * factor)
        return values.squeeze(1)


def entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return -sum_v p_v log p_v (n,) with p = softmax(logits / temperature).

    Args:
        logits: (n, V).
        targets: (n,), not used: an entropy is the same for every target.
        temperature: what the logits are divided by.
    """
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def vocabulary_sum(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    weights: Tensor,
    function: PerToken = CrossEntropy(),  # noqa: B008 - frozen
    *,
    extras: Sequence[Tensor | FrozenLogits] = (),
    hits: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return sum_n weights_n function(head(hidden_n), targets_n, *extras_n) without holding the (N, V) logits.

    Gradients of the hidden states and of every tensor that trains in the head are ready when this returns, so its
    backward pass can run only once.

    Args:
        hidden: (N, D) hidden states that predict the targets.
        head: (n, D) -> (n, V) logits, row by row. A `Head` or `nn.Linear` takes the fast path. What the head derives
            from its parameters it must derive when called.
        targets: (N,) token ids.
        weights: (N,) factors; constants.
        function: (logits (n, V), targets (n,), *extras (n, ...)) -> (n,), each row on its own. Logits of less than 32
            bits reach it as float32.
        extras: more per-token arguments of the function, (N, ...) each; constants.
        hits: (N,) tensor to receive whether the target is a likeliest token, None to leave that out.
        chunk_bytes: size of one chunk of logits; by default a constant of the device.

    Raises:
        ValueError: shapes do not fit, or a constant requires a gradient.
        RuntimeError: the backward pass is run a second time.
    """
    if weights.requires_grad or weights.shape != targets.shape:
        raise ValueError(
            f"weights must be constants of shape {tuple(targets.shape)}, not a {tuple(weights.shape)} tensor that "
            f"{'requires' if weights.requires_grad else 'does not require'} a gradient; multiply `vocabulary_map` instead"
        )
    sweep = _Sweep.over(hidden, head, targets, function, extras, chunk_bytes)
    if sweep.trains:
        return _Sum.apply(sweep, weights, hits, hidden, *sweep.parameters)
    return _weighted(sweep.run(None, hits)[0], weights)


def vocabulary_map(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    function: PerToken = CrossEntropy(),  # noqa: B008 - frozen
    *,
    extras: Sequence[Tensor | FrozenLogits] = (),
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return function(head(hidden_n), targets_n, *extras_n) for each token (N,) without holding the (N, V) logits.

    For objectives whose loss is not a weighted sum with weights known beforehand. The backward pass computes each chunk
    again, with the same random numbers.

    Args:
        hidden: (N, D) hidden states that predict the targets.
        head: as for `vocabulary_sum`.
        targets: (N,) token ids.
        function: as for `vocabulary_sum`.
        extras: as for `vocabulary_sum`.
        chunk_bytes: size of one chunk of logits; by default a constant of the device.

    Returns:
        (N,) values, float32 when the logits have fewer bits.

    Raises:
        ValueError: shapes do not fit, or an extra requires a gradient.
    """
    sweep = _Sweep.over(hidden, head, targets, function, extras, chunk_bytes)
    if sweep.trains:
        return _Map.apply(sweep, hidden, *sweep.parameters)
    return sweep.run(None)[0]


def token_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return log softmax(head(hidden_n) / temperature) at targets_n for each token (N,).

    Args:
        hidden: (N, D) hidden states that predict the targets.
        head: (n, D) -> (n, V) logits.
        targets: (N,) token ids.
        temperature: what the logits are divided by.
    """
    return -vocabulary_map(hidden, head, targets, CrossEntropy(temperature=temperature))


def token_entropies(hidden: Tensor, head: Callable[[Tensor], Tensor], *, temperature: float = 1.0) -> Tensor:
    """Return the entropy of softmax(head(hidden_n) / temperature) in nats for each token (N,).

    Args:
        hidden: (N, D) hidden states.
        head: (n, D) -> (n, V) logits.
        temperature: what the logits are divided by.
    """
    targets = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)

    def function(logits: Tensor, targets: Tensor) -> Tensor:
        return entropy(logits, targets, temperature)

    return vocabulary_map(hidden, head, targets, function)


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights.to(values.dtype)).sum()


class _Sum(torch.autograd.Function):
    """The weighted sum; the forward pass leaves the finished gradients for the backward pass to scale."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, weights: Tensor, hits: Tensor | None, *inputs: Tensor) -> Tensor:
        values, ctx.gradients = sweep.run(weights, hits)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return _weighted(values, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and given away, so that .grad can be this very memory and nothing is held twice.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of vocabulary_sum are used up by one backward pass: compute the sum again")
        scaled = (g if g is None else g.mul_(upstream).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, *scaled


class _Map(torch.autograd.Function):
    """The per-token values; the backward pass is the sweep of a sum whose weights are the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, *inputs: Tensor) -> Tensor:
        ctx.sweep = sweep
        ctx.save_for_backward(*inputs)  # so that autograd notices if one is changed in place meanwhile
        return sweep.run(None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _, gradients = ctx.sweep.run(upstream)
        typed = (g if g is None else g.to(t.dtype) for g, t in zip(gradients, ctx.saved_tensors, strict=True))
        return None, *typed


@dataclass
class _Sweep:
    """One pass over the chunks of a batch, with or without gradients; it can be repeated.

    Args:
        hidden: (N, D), detached.
        layer: how logits are made and gradients are taken back through the head.
        targets: (N,) token ids.
        function: the per-token function.
        extras: its further arguments.
        chunk_bytes: size of one chunk of logits.
        block_bytes: size of the block of rows in which the function is evaluated.
        trains: whether there is anything to differentiate.
        to_hidden: whether the hidden states want a gradient.
    """

    hidden: Tensor
    layer: _Linear | _General
    targets: Tensor
    function: PerToken
    extras: Sequence[Tensor | FrozenLogits]
    chunk_bytes: int
    block_bytes: int
    trains: bool
    to_hidden: bool

    @classmethod
    def over(
        cls,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        function: PerToken,
        extras: Sequence[Tensor | FrozenLogits],
        chunk_bytes: int | None,
    ) -> _Sweep:
        """Check the arguments and choose how to go through the head."""
        tensors = [e.hidden if isinstance(e, FrozenLogits) else e for e in extras]
        if hidden.dim() != 2 or any(t.shape[0] != hidden.shape[0] for t in (targets, *tensors)) or targets.dim() != 1:
            shapes = [tuple(t.shape) for t in (hidden, targets, *tensors)]
            raise ValueError(f"expected hidden (N, D), targets (N,) and extras (N, ...), got shapes {shapes}")
        if any(e.requires_grad for e in extras if isinstance(e, Tensor)):
            raise ValueError("extras are constants, but one requires a gradient: detach it")
        on_cpu = hidden.device.type == "cpu"
        plain = head if isinstance(head, Head) else Head(head)
        layer = (_Linear if _is_plain(plain.linear) else _General)(plain, hidden)
        size = chunk_bytes or (CPU_CHUNK if on_cpu else GPU_CHUNK)
        return cls(
            hidden.detach(), layer, targets, function, extras, size, CPU_BLOCK if on_cpu else GPU_BLOCK,
            trains=torch.is_grad_enabled() and (hidden.requires_grad or bool(layer.parameters)),
            to_hidden=hidden.requires_grad,
        )  # fmt: skip

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that train in the head."""
        return self.layer.parameters

    def run(self, weights: Tensor | None, hits: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Return the values (N,), and the gradients of sum_n weights_n value_n by hidden states and parameters.

        Args:
            weights: (N,) weight of each token, None when no gradient is wanted (the list is then empty).
            hits: (N,) tensor to receive whether the target is a likeliest token.
        """
        layer, count = self.layer, self.hidden.shape[0]
        values = torch.empty(count, dtype=_at_least_single(layer.dtype), device=self.hidden.device)
        to_hidden = torch.empty_like(self.hidden) if weights is not None and self.to_hidden else None
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False), layer.sweeping(weights is not None):
            for chunk in self._chunks():
                logits = layer.logits(self.hidden[chunk])
                self._evaluate(chunk, logits, values, weights, hits)
                if weights is not None:
                    layer.take_back(logits, None if to_hidden is None else to_hidden[chunk])
            return values, [] if weights is None else [to_hidden, *layer.sums]

    def _chunks(self) -> Iterator[slice]:
        """Yield equal runs of rows whose logits fit a chunk."""
        count = self.hidden.shape[0]
        held = self.layer.copies + sum(isinstance(extra, FrozenLogits) for extra in self.extras)
        most = max(1, self.chunk_bytes // (self.layer.vocabulary * self.layer.dtype.itemsize * held))
        rows = -(-count // max(1, -(-count // most)))
        self.layer.rows = rows
        yield from (slice(begin, min(begin + rows, count)) for begin in range(0, count, max(1, rows)))

    def _evaluate(
        self, chunk: slice, logits: Tensor, values: Tensor, weights: Tensor | None, hits: Tensor | None
    ) -> None:
        """Store the values of a chunk, and overwrite its logits with their gradient if weights are given."""
        extras = [e.head(e.hidden[chunk]) if isinstance(e, FrozenLogits) else e[chunk] for e in self.extras]
        rows = max(1, self.block_bytes // (self.layer.vocabulary * values.dtype.itemsize))
        for begin in range(0, len(logits), rows):
            part = slice(begin, begin + rows)
            where = slice(chunk.start + begin, min(chunk.start + begin + rows, chunk.stop))
            block, targets = logits[part], self.targets[where]
            if hits is not None:
                hits[where] = block.gather(1, targets[:, None]).squeeze(1) >= block.amax(-1)
            weight = None if weights is None else weights[where].to(values.dtype)
            values[where] = _overwrite(self.function, block, targets, [e[part] for e in extras], weight)


def _overwrite(
    function: PerToken, logits: Tensor, targets: Tensor, extras: list[Tensor], weights: Tensor | None
) -> Tensor:
    """Return the function's values (n,), and overwrite the logits with weights * their gradient if weights are given."""
    wide = logits.to(_at_least_single(logits.dtype))
    if isinstance(function, CrossEntropy):
        values, gradient = function.overwrite(wide, targets, weights), wide
    else:
        leaf = wide.detach().requires_grad_(weights is not None)
        with torch.set_grad_enabled(weights is not None):
            values = function(leaf, targets, *extras)
        if values.shape != targets.shape:
            raise ValueError(f"the function gave shape {tuple(values.shape)}, expected {tuple(targets.shape)}")
        if weights is not None:
            (gradient,) = torch.autograd.grad(values, leaf, weights.to(values.dtype))
    if weights is not None and gradient is not logits:
        logits.copy_(gradient)
    return values.detach()


def _is_plain(linear: Callable[[Tensor], Tensor]) -> bool:
    """Whether calling it is exactly h W^T + b: an `nn.Linear` without hooks, replaced forward or exotic tensors."""
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(linear, name) for name in hooks) and type(linear.weight) in (Tensor, nn.Parameter)
