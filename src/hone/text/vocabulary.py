"""Losses over the vocabulary: a per-token function of the logits, computed without ever holding the (N, V) logits.

    vocabulary_sum(hidden, head, targets, weights, f)  =  sum_n weights_n f(head(hidden_n), targets_n)
    vocabulary_map(hidden, head, targets, f)_n         =  f(head(hidden_n), targets_n)

Both go over the hidden states in chunks whose logits take a constant number of bytes, whatever V is. The gradients of
a sum are finished during its forward pass, while a chunk's logits are at hand, so that no matrix product is done twice;
a map computes its chunks again in the backward pass, since only then is each token's weight known.

Matrix products want many rows, pointwise arithmetic few, so that its passes stay in the processor's cache; so a chunk's
logits are overwritten with their gradient by blocks of rows. Beside the gradients, peak memory is one chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PerToken = Callable[..., Tensor]  # (logits (n, V), targets (n,), *extras (n, ...)) -> (n,)
Extra = Tensor | Callable[[slice], Tensor]  # (N, ...), or what makes the rows of a slice, e.g. a teacher's logits

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

        df/dx = (1 + 2 z_loss log Z) softmax(x) - label_smoothing / V - (1 - label_smoothing) onehot(target).

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
    function: PerToken = CrossEntropy(),
    *,
    extras: Sequence[Extra] = (),
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
        extras: more arguments of the function, constants: tensors (N, ...), or functions of a slice of the N rows that
            make them without gradient, for what is too large to hold, e.g. `lambda rows: teacher(states[rows])`.
        hits: (N,) tensor to receive whether the target is a likeliest token, None to leave that out.
        chunk_bytes: size of one chunk of logits; by default a constant of the device.

    Raises:
        ValueError: shapes do not fit, or a constant requires a gradient.
        RuntimeError: the backward pass is run a second time.
    """
    if weights.requires_grad or weights.shape != targets.shape:
        raise ValueError("weights must be (N,) constants; where weights train, multiply the values of vocabulary_map")
    sweep = _Sweep(hidden, head, targets, function, extras, chunk_bytes)
    if sweep.trains:
        return _Sum.apply(sweep, weights, hits, hidden, *sweep.parameters)
    values, _ = sweep.run(None, hits)
    return (values * weights.to(values.dtype)).sum()


def vocabulary_map(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    function: PerToken = CrossEntropy(),
    *,
    extras: Sequence[Extra] = (),
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return function(head(hidden_n), targets_n, *extras_n) for each token (N,) without holding the (N, V) logits.

    For objectives whose loss is not a weighted sum with weights known beforehand. The backward pass computes each chunk
    again, with the same random numbers. Arguments are those of `vocabulary_sum`.

    Args:
        hidden: (N, D) hidden states that predict the targets.
        head: (n, D) -> (n, V) logits.
        targets: (N,) token ids.
        function: (logits (n, V), targets (n,), *extras (n, ...)) -> (n,).
        extras: more arguments of the function, constants: tensors (N, ...), or functions of a slice of the N rows.
        chunk_bytes: size of one chunk of logits; by default a constant of the device.

    Returns:
        (N,) values, float32 when the logits have fewer bits.

    Raises:
        ValueError: shapes do not fit, or an extra requires a gradient.
    """
    sweep = _Sweep(hidden, head, targets, function, extras, chunk_bytes)
    if sweep.trains:
        return _Map.apply(sweep, hidden, *sweep.parameters)
    values, _ = sweep.run(None)
    return values


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
    unused = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return vocabulary_map(hidden, head, unused, partial(entropy, temperature=temperature))


class _Sum(torch.autograd.Function):
    """The weighted sum; the forward pass leaves the finished gradients for the backward pass to scale."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, weights: Tensor, hits: Tensor | None, *inputs: Tensor) -> Tensor:
        values, ctx.gradients = sweep.run(weights, hits)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return (values * weights.to(values.dtype)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and given away, so that .grad can be this very memory and nothing is held twice.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("vocabulary_sum allows one backward pass, which uses up its gradients: compute it again")
        scaled = (g if g is None else g.mul_(upstream).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, *scaled


class _Map(torch.autograd.Function):
    """The per-token values; the backward pass is the sweep of a sum whose weights are the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, *inputs: Tensor) -> Tensor:
        ctx.sweep, ctx.random = sweep, _random_state(sweep.hidden.device)
        ctx.save_for_backward(*inputs)  # so that autograd notices if one is changed in place meanwhile
        values, _ = sweep.run(None)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        with _replaying(upstream.device, ctx.random):  # a head may drop out
            _, gradients = ctx.sweep.run(upstream)
        return None, *(g if g is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True))


class _Sweep:
    """One pass over the chunks of a batch, with or without gradients; it can be repeated."""

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        function: PerToken,
        extras: Sequence[Extra],
        chunk_bytes: int | None,
    ) -> None:
        """Check the arguments, which are those of `vocabulary_map`, and find out what trains in the head."""
        tensors = [extra for extra in extras if isinstance(extra, Tensor)]
        if hidden.dim() != 2 or targets.dim() != 1 or any(len(t) != len(hidden) for t in (targets, *tensors)):
            shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, targets, *tensors))
            raise ValueError(f"expected hidden (N, D), targets (N,) and extras (N, ...), got {shapes}")
        if any(extra.requires_grad for extra in tensors):
            raise ValueError("extras are constants, but one requires a gradient: detach it")
        self.hidden, self.targets, self.function, self.extras = hidden.detach(), targets, function, extras
        device = hidden.device.type
        self.chunk_bytes = chunk_bytes or (CPU_CHUNK if device == "cpu" else GPU_CHUNK)
        self.block_bytes = CPU_BLOCK if device == "cpu" else GPU_BLOCK
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.head = head if isinstance(head, Head) else Head(head)
        self.plain = _is_plain(self.head.linear)
        self.parameters, self.vocabulary, self.dtype = self._look_at_head()
        self.to_hidden = hidden.requires_grad
        self.trains = torch.is_grad_enabled() and (self.to_hidden or bool(self.parameters))

    def _look_at_head(self) -> tuple[list[Tensor], int, torch.dtype]:
        """Return the tensors that train in the head, the size of the vocabulary and the type of the logits."""
        if self.plain:
            weight, bias = self.head.linear.weight, self.head.linear.bias  # type: ignore[attr-defined]
            trained = [p for p in (weight, bias) if p is not None and p.requires_grad]
            return trained, weight.shape[0], self.autocast or self.hidden.dtype
        device = self.hidden.device
        with torch.enable_grad(), _replaying(device, _random_state(device)):
            row = self.head(self.hidden[:1])
        return _leaves(row), row.shape[-1], row.dtype

    def run(self, weights: Tensor | None, hits: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Return the values (N,), and the gradients of sum_n weights_n value_n by hidden states and parameters.

        Args:
            weights: (N,) weight of each token, None when no gradient is wanted (the list is then empty).
            hits: (N,) tensor to receive whether the target is a likeliest token.
        """
        count, train, rows = len(self.hidden), weights is not None, self._rows()
        values = self.hidden.new_empty(count, dtype=_at_least_single(self.dtype))
        to_hidden = torch.empty_like(self.hidden) if train and self.to_hidden else None
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            sums = [torch.zeros_like(p, dtype=_at_least_single(p.dtype)) for p in self.parameters if train]
            layer = _LinearPass(self, rows, sums) if self.plain else _GeneralPass(self, rows, sums, train)
            for begin in range(0, count, rows):
                chunk = slice(begin, min(begin + rows, count))
                logits = layer.logits(self.hidden[chunk])
                self._evaluate(chunk, logits, values, weights, hits)
                if train:
                    layer.take_back(logits, None if to_hidden is None else to_hidden[chunk])
        return values, [to_hidden, *sums] if train else []

    def _rows(self) -> int:
        """Return how many rows a chunk has; chunks are evened out, since a short last one would be slow."""
        held = 1 if self.plain and self.head.soft_cap is None else 2
        held += sum(callable(extra) for extra in self.extras)
        most = max(1, self.chunk_bytes // (self.vocabulary * self.dtype.itemsize * held))
        chunks = -(-len(self.hidden) // most)
        return -(-len(self.hidden) // chunks) if chunks else 1

    def _evaluate(
        self, chunk: slice, logits: Tensor, values: Tensor, weights: Tensor | None, hits: Tensor | None
    ) -> None:
        """Store the values of a chunk, and overwrite its logits with their gradient if weights are given."""
        extras = [extra[chunk] if isinstance(extra, Tensor) else extra(chunk) for extra in self.extras]
        rows = max(1, self.block_bytes // (self.vocabulary * values.dtype.itemsize))
        for begin in range(0, len(logits), rows):
            part = slice(begin, min(begin + rows, len(logits)))
            here = slice(chunk.start + part.start, chunk.start + part.stop)
            block, targets = logits[part], self.targets[here]
            if hits is not None:
                hits[here] = block.gather(1, targets[:, None]).squeeze(1) >= block.amax(-1)
            weight = None if weights is None else weights[here].to(values.dtype)
            values[here] = _overwrite(self.function, block, targets, [extra[part] for extra in extras], weight)


class _LinearPass:
    """A pass through a plain linear head: products by hand, one buffer of logits, weight gradients summed in place."""

    def __init__(self, sweep: _Sweep, rows: int, sums: list[Tensor]) -> None:
        """Make room for chunks of at most `rows` rows; parameters' gradients will be added to `sums`."""
        self.head, self.dtype, self.sums = sweep.head, sweep.dtype, sums
        linear: Any = sweep.head.linear
        self.weight = linear.weight.detach().to(self.dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)
        self.buffer = self.weight.new_empty(1 if self.head.soft_cap is None else 2, rows, sweep.vocabulary)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, V) of hidden states (n, D), in memory that the next call uses again."""
        self.hidden = hidden.to(self.dtype)
        logits = self.buffer[0, : len(hidden)]
        if self.bias is None:
            torch.mm(self.hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, self.hidden, self.weight.t(), out=logits)
        if self.head.scale != 1.0:
            logits.mul_(self.head.scale)
        if self.head.soft_cap is None:
            return logits
        self.squashed = logits.div_(self.head.soft_cap).tanh_()
        return torch.mul(self.squashed, self.head.soft_cap, out=self.buffer[1, : len(hidden)])

    def take_back(self, gradient: Tensor, into: Tensor | None) -> None:
        """Take d/dlogits (n, V), which is destroyed, back to the hidden states and add it to the parameters' sums."""
        if self.head.soft_cap is not None:
            gradient.mul_(self.squashed.square_().neg_().add_(1))
        if self.head.scale != 1.0:
            gradient.mul_(self.head.scale)
        if into is not None and into.dtype == self.dtype:
            torch.mm(gradient, self.weight, out=into)
        elif into is not None:
            into.copy_(gradient @ self.weight)
        for total in self.sums:
            if total.dim() == 1:  # the bias
                total.add_(gradient.sum(0, dtype=total.dtype))
            elif total.dtype == self.dtype:
                total.addmm_(gradient.t(), self.hidden)
            else:  # a product of low precision reaches the float32 sum by bands: no second (V, D) is held
                band = max(1, self.buffer.numel() // total.shape[1])
                for part, columns in zip(total.split(band), gradient.split(band, dim=1), strict=True):
                    part.add_(columns.t() @ self.hidden)


class _GeneralPass:
    """A pass through any other head: autograd goes back through each chunk, to whatever trains in its graph."""

    def __init__(self, sweep: _Sweep, rows: int, sums: list[Tensor], train: bool) -> None:
        """Make room for chunks of at most `rows` rows; parameters' gradients will be added to `sums` if `train`."""
        self.head, self.parameters, self.autocast = sweep.head, sweep.parameters, sweep.autocast
        self.sums, self.train = sums, train
        self.graph: Any = None  # the logits and what they derive from, until they are taken back
        self.buffer = sweep.hidden.new_empty(rows, sweep.vocabulary, dtype=sweep.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return a copy of the logits (n, V) of hidden states (n, D), since the head's graph may need the original."""
        leaf = hidden.detach().requires_grad_(self.train)
        cast = torch.autocast(hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.train), cast:
            output = self.head(leaf)
        self.graph = (output, (leaf, *self.parameters)) if self.train else None
        return self.buffer[: len(hidden)].copy_(output.detach())

    def take_back(self, gradient: Tensor, into: Tensor | None) -> None:
        """Take d/dlogits (n, V) back to the hidden states and add it to the parameters' sums."""
        (output, inputs), self.graph = self.graph, None
        first, *rest = torch.autograd.grad(output, inputs, gradient, materialize_grads=True)
        if into is not None:
            into.copy_(first)
        for total, part in zip(self.sums, rest, strict=True):
            total.add_(part)


def _overwrite(
    function: PerToken, logits: Tensor, targets: Tensor, extras: list[Tensor], weights: Tensor | None
) -> Tensor:
    """Return the function's values (n,); if weights are given, overwrite the logits with weights * their gradient."""
    wide = logits.to(_at_least_single(logits.dtype))
    gradient = wide
    if isinstance(function, CrossEntropy):
        values = function.overwrite(wide, targets, weights)
    else:
        leaf = wide.detach().requires_grad_(weights is not None)
        with torch.set_grad_enabled(weights is not None):
            values = function(leaf, targets, *extras)
        if values.shape != targets.shape:
            raise ValueError(f"the function gave shape {tuple(values.shape)}, expected {tuple(targets.shape)}")
        if weights is not None:
            if any(other is not leaf for other in _leaves(values)):
                raise ValueError("the function depends on tensors that train beside the logits: put them into the head")
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


def _leaves(output: Tensor) -> list[Tensor]:
    """Return the tensors that train in the graph of `output`: no closure or tied weight of a head goes unnoticed."""
    found, seen, waiting = [], set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of the generators that work on `device` may draw from: the CPU's, and the device's own."""
    own = () if device.type == "cpu" else (torch.get_device_module(device).get_rng_state(device),)
    return torch.get_rng_state(), *own


def _set_random_state(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    for own in states[1:]:
        torch.get_device_module(device).set_rng_state(own, device)


@contextmanager
def _replaying(device: torch.device, states: tuple[Tensor, ...]) -> Iterator[None]:
    """Draw within from saved states of the generators, and go on outside as if nothing had been drawn."""
    outside = _random_state(device)
    _set_random_state(device, states)
    try:
        yield
    finally:
        _set_random_state(device, outside)


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
