"""The one training loop: micro-batches, turns, the reducer, the guard, checkpoints. It never names a method."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from hone.callbacks.base import Callback
from hone.engine import guard, sharding
from hone.engine.devices import Cluster, persistent_buffers, seed_all
from hone.errors import HoneError, NumericError
from hone.text.pack import Packed, Tree, divide, pack

if TYPE_CHECKING:
    from hone.engine.folder import RunFolder
    from hone.recipe import Recipe

INTERRUPTED = "interrupted"  # what the reason for a stop begins with when the run is to go on another time


@dataclass
class Player:
    """Tensors that train together, and what moves them.

    Args:
        params: named parameters that train, all of them that ever do.
        optimizer: moves them.
        schedule: factor on the learning rate as a function of (step, total).
    """

    params: list[tuple[str, nn.Parameter]]
    optimizer: Optimizer
    schedule: Callable[[int, int], float]
    rates: list[float] = field(init=False)
    groups: list[set[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Remember the unscaled learning rate of each group, and which tensors are in it."""
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.groups = [{id(p) for p in group["params"]} for group in self.optimizer.param_groups]

    @property
    def active(self) -> list[str]:
        """Names of the tensors that train at present."""
        return [name for name, p in self.params if p.requires_grad]

    def activate(self, names: Collection[str]) -> None:
        """Let only some of the tensors train from now on; the others keep their values and hold no other memory.

        Args:
            names: which of `params`; those that trained before keep their optimizer state.
        """
        chosen = set(names)
        for name, p in self.params:
            p.requires_grad_(name in chosen)
            if name not in chosen:
                p.grad = None
                self.optimizer.state.pop(p, None)
        for group, members in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"] = [p for name, p in self.params if name in chosen and id(p) in members]

    def set_rate(self, step: int, total: int) -> float:
        """Set the learning rates of a step; return that of the first group."""
        factor = self.schedule(step, total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return self.rates[0] * factor


@dataclass
class Run:
    """A run in progress: what objectives, adapters and callbacks may see and use.

    Args:
        recipe: the checked recipe.
        cluster: device and processes.
        model: the model that trains.
        objective: what is minimised.
        loader: yields the trees of one step.
        total: optimizer steps of the whole run.
        players: who trains; objectives may add some in `setup`.
        callbacks: hooks beside the steps, the adapter's own among them.
        penalties: terms added to the loss of the player "model", the adapter's own among them.
        adapter: how the model's weights are parameterised.
        step: finished steps.
        tokens: tokens of all finished steps.
        stop: set to a reason to end the run after the step.
        best: (rank, step) of the best evaluation so far; the smallest rank is the best.
        folder: the run folder, None in a rehearsal.
        held_out: the trees that evaluations use, None when there are none.
        display: shows the progress of long preparations; None says nothing.
        rehearsal: whether only a few steps will be run, to measure them.
    """

    recipe: Recipe
    cluster: Cluster
    model: Any
    objective: Any
    loader: Any
    total: int
    players: dict[str, Player] = field(default_factory=dict)
    callbacks: list[Any] = field(default_factory=list)
    penalties: list[Any] = field(default_factory=list)
    adapter: Any = None
    step: int = 0
    tokens: int = 0
    stop: str = ""
    best: tuple[list[float], int] | None = None
    folder: RunFolder | None = None
    held_out: Sequence[Tree] | None = None
    display: Any = None
    rehearsal: bool = False

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters of the player "model"."""
        return self.players["model"].params

    @property
    def unit(self) -> str:
        """What is counted: "tokens", or "arrays"."""
        return "arrays" if self.model.medium == "arrays" else "tokens"

    @property
    def interrupted(self) -> bool:
        """Whether the run stops before its end, to go on another time."""
        return self.stop.startswith(INTERRUPTED)

    def state(self, keep: bool = True) -> dict[str, Any]:
        """Return everything that the rest of the run depends on. Random numbers are a function of the step.

        Args:
            keep: False leaves out the tensors that processes share, on one that does not write the state; all processes
                must call it together.
        """
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "stop": "" if self.interrupted else self.stop,
            "best": None if self.best is None else list(self.best),
            "players": {
                name: {
                    "weights": dict(player.params),
                    "active": player.active,
                    "optimizer": player.optimizer.state_dict(),
                }
                for name, player in self.players.items()
            },
            "buffers": dict(persistent_buffers(self.model)),
            "loader": self.loader.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "objective": self.objective.state_dict(),
        }
        return sharding.whole(state, keep) if self.cluster.sharded else state

    def restore(self, state: dict[str, Any]) -> None:
        """Invert `state`.

        Raises:
            HoneError: the checkpoint belongs to a run with other trained tensors.
        """
        self.step, self.tokens, self.stop = state["step"], state["tokens"], state["stop"]
        rank, step = state["best"] or (None, 0)  # a number alone in checkpoints of before ranks had two
        self.best = None if rank is None else (rank if isinstance(rank, list) else [rank], step)
        for name, player in self.players.items():
            load_tensors(dict(player.params), state["players"][name]["weights"], f"player '{name}'")
            if (active := state["players"][name]["active"]) != player.active:
                player.activate(active)
            saved = state["players"][name]["optimizer"]
            if self.cluster.sharded:
                saved = sharding.share_like(saved, [p for g in player.optimizer.param_groups for p in g["params"]])
            player.optimizer.load_state_dict(saved)
        load_tensors(dict(persistent_buffers(self.model)), state["buffers"], "buffers")
        self.loader.load_state_dict(state["loader"])
        for callback, own in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(own)
        self.objective.load_state_dict(state.get("objective", {}))

    def take_weights(self, state: dict[str, Any]) -> None:
        """Go back to the weights of a state and to the buffers that give them their meaning, and to nothing else of it.

        Args:
            state: what `state` returned.

        Raises:
            HoneError: the checkpoint belongs to a run with other trained tensors.
        """
        for name, player in self.players.items():
            load_tensors(dict(player.params), state["players"][name]["weights"], f"player '{name}'")
        load_tensors(dict(persistent_buffers(self.model)), state["buffers"], "buffers")


def load_tensors(into: dict[str, Any], saved: dict[str, Any], what: str) -> None:
    """Copy saved tensors into live ones of the same names and shapes.

    Args:
        into: live tensors by name.
        saved: whole tensors by name.
        what: what they are, for the message.

    Raises:
        HoneError: names or shapes differ; some of the differences are listed.
    """
    wrong = sorted(set(into) ^ set(saved)) or sorted(n for n in into if into[n].shape != saved[n].shape)
    if wrong:
        raise HoneError(f"the checkpoint does not fit this run's {what}: {', '.join(wrong[:5])}")
    for name, tensor in into.items():
        sharding.copy_into(tensor.data, saved[name])


@dataclass(frozen=True)
class Share:
    """A micro-batch of one process.

    Args:
        batch: the packed trees, or arrays.
        counts: False when it only keeps the process in step with the others, which have trees left; it trains nothing.
    """

    batch: Any
    counts: bool


def divide_among(trees: Sequence[Any], limit: int, cluster: Cluster, collate: Callable[..., Any] = pack) -> list[Share]:
    """Return this process's micro-batches of a step: as many as every other process has.

    Args:
        trees: the trees, or arrays, of the whole step, the same on every process.
        limit: most tokens in one forward pass.
        cluster: the processes and the device.
        collate: makes a batch of some of them.
    """
    mine = divide(trees, limit, cluster.world)[cluster.rank :: cluster.world]
    spare = [min(trees, key=len)]
    return [Share(collate(share or spare).to(cluster.device), bool(share)) for share in mine]


class Trainer:
    """Runs optimizer steps of a `Run`."""

    def __init__(self, run: Run) -> None:
        """Prepare to train.

        Args:
            run: the run in progress.
        """
        self.run = run
        self.limit = run.recipe.micro_tokens or run.recipe.batch_tokens
        self.moved = False  # whether a player has taken the latest step, which another one may still break off

    def train_step(self, trees: Sequence[Tree]) -> dict[str, Any]:
        """Train on the trees of one step and return its row of metrics.

        Every process sees the whole step's trees in the same order and takes its share of the micro-batches. Losses are
        sums; they are divided by the count of the whole step, so no division into micro-batches changes a gradient.

        Raises:
            HoneError: nothing in the step is trained on.
            NumericError: a loss or gradient is not finite; `moved` says whether a player of an earlier turn has moved.
        """
        run, cluster = self.run, self.run.cluster
        began = time.perf_counter()
        self.moved = False
        run.model.train()
        seed_all(run.recipe.seed, run.step + 1, cluster.rank)
        run.objective.before_step(run, trees)
        shares = divide_among(trees, self.limit, cluster, run.model.collate)
        units = cluster.sum(sum(float(run.objective.count(share.batch)) for share in shares if share.counts))
        if units <= 0:
            raise HoneError(f"step {run.step + 1}: nothing in this step is trained on: every token is masked")
        tokens = sum(len(tree) for tree in trees)
        row = self._turns(shares, units, tuple(tree.where for tree in trees))
        run.step += 1
        run.tokens += tokens
        run.objective.after_step(run, row)
        seconds = time.perf_counter() - began
        return {"step": run.step, **row, "tokens": tokens, "units": units, "seconds": round(seconds, 4),
                "memory": cluster.peak_memory()}  # fmt: skip

    def _turns(self, shares: list[Share], units: float, where: tuple[str, ...]) -> dict[str, Any]:
        """Let every micro-batch take its turns side by side: a player moves once all have given its loss."""
        run, cluster = self.run, self.run.cluster
        totals = [cluster.sum(sum(p.count(s.batch) for s in shares if s.counts)) for p in run.penalties]
        games = [run.objective.turns(run.model, share.batch) for share in shares]
        row: dict[str, Any] = {}
        while True:
            player_name, sums, trouble = "", dict[str, float](), ""
            for game, share in zip(games, shares, strict=True):
                with cluster.autocast():
                    turn = next(game, None)
                    own = turn is not None and turn.player == "model"
                    extra, figures = _penalise(run, share.batch, totals) if own else (0.0, {})
                if turn is None:
                    continue
                player_name = turn.player
                try:
                    guard.check_loss(turn.loss.detach(), run.step + 1, share.batch.where)
                except NumericError as error:
                    trouble = trouble or str(error)  # raised below: the other processes expect the backward pass
                (turn.loss * share.counts / units + extra * share.counts).backward()
                scaled = {name: value * units for name, value in figures.items()}  # divided by units below
                for name, value in {"loss": turn.loss.detach(), **turn.metrics, **scaled}.items():
                    sums[name] = sums.get(name, 0.0) + share.counts * float(value)
            if not player_name:
                return row
            if trouble := cluster.agree(trouble):
                raise NumericError(trouble)
            player = run.players[player_name]
            prefix = "" if player_name == "model" else f"{player_name}/"
            row.update({prefix + name: cluster.sum(value) / units for name, value in sums.items()})
            if player_name == "model":
                row.update(self._penalise_weights())
            parameters = [p for _, p in player.params if p.requires_grad]
            cluster.reduce_gradients(parameters)
            if player_name == "model":
                self._show_gradients(parameters, where)
            norm = guard.clip(parameters, run.recipe.clip, run.step + 1, where)
            rate = player.set_rate(run.step, run.total)
            player.optimizer.step()
            self.moved = True
            player.optimizer.zero_grad(set_to_none=True)
            row.update({prefix + "lr": rate, prefix + "grad_norm": norm})

    def _penalise_weights(self) -> dict[str, float]:
        """Add the gradients of what the weights are penalised for, each process its share of them.

        Of shared weights the term is that of the whole ones, and its gradient is nowhere summed over the processes.
        """
        found: dict[str, float] = {}
        shares = 1 if self.run.cluster.sharded else self.run.cluster.world
        for penalty in self.run.penalties:
            term = penalty.of_weights(self.run.model)
            if term is not None:
                (term / shares).backward()
                name = f"penalty/{penalty.name}"
                found[name] = found.get(name, 0.0) + float(sharding.whole(term.detach()))
        return found

    def _show_gradients(self, parameters: list[nn.Parameter], where: tuple[str, ...]) -> None:
        """Let the callbacks that look at gradients see them, when they are finite."""
        watchers = [c for c in self.run.callbacks if type(c).on_gradients is not Callback.on_gradients]
        if watchers:
            guard.clip(parameters, None, self.run.step + 1, where)
        for callback in watchers:
            callback.on_gradients(self.run)


def _penalise(run: Run, batch: Packed, totals: list[float]) -> tuple[Any, dict[str, float]]:
    """Return what penalties add to the loss of a batch that the model has just run, and what they report.

    Args:
        run: the run in progress.
        batch: a micro-batch.
        totals: per penalty, its units in the whole step, by which its sums are divided.
    """
    extra: Any = 0.0
    reported: dict[str, float] = {}
    for penalty, total in zip(run.penalties, totals, strict=True):
        term, found = penalty.of_batch(run.model, batch), penalty.figures(batch)
        if term is not None:
            extra = extra + term / max(total, 1.0)
            found = {f"penalty/{penalty.name}": float(term.detach()), **found}
        for name, value in found.items():  # two penalties of one name add up
            reported[name] = reported.get(name, 0.0) + value / max(total, 1.0)
    return extra, reported
