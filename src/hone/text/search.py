"""Search over the steps of answers: tree search with PUCT, and a beam that a value guides, for many questions at once.

A state is the beginning of an answer, cut at a step; what continues it, and what it is worth, a `Problem` says. Nothing
here knows of a model. All questions go on in step: each round hands a problem one state of each of them, so that a
language model continues them in one batch.

    PUCT(s, a) = Q(s, a) + c prior(a|s) sqrt(N(s)) / (1 + N(s, a))

N counts visits and Q is the mean of the values that were backed up through a node; the transitions are certain, so that
a node stands for the step that leads to it as well as for the state after it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Move(Generic[S]):
    """A state continued by one step.

    Args:
        state: the continued state.
        prior: how probable the policy finds the step.
        finished: whether the answer ends with it.
    """

    state: S
    prior: float = 1.0
    finished: bool = False


class Problem(Protocol[S]):
    """What is searched."""

    def expand(self, states: Sequence[S]) -> list[list[Move[S]]]:
        """Return the continuations of each state, none of which is finished; at least one each.

        Args:
            states: unfinished states; one may stand there several times and is then continued as often.
        """

    def value(self, states: Sequence[S]) -> list[float]:
        """Return what each state is worth: the outcome of a finished one where that is known, else an estimate.

        Args:
            states: any states.
        """


@dataclass(eq=False)
class Node(Generic[S]):
    """A state in a tree.

    Args:
        state: it.
        parent: the node that it continues, None for the root.
        prior: how probable the policy finds the step to it.
        finished: whether the answer ends here.
        children: its continuations, in the order they were found.
        visits: N, how many values were backed up through it.
        total: their sum.
        closed: whether everything below it is finished and has been looked at.
    """

    state: S
    parent: Node[S] | None = None
    prior: float = 1.0
    finished: bool = False
    children: list[Node[S]] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    closed: bool = False

    @property
    def q(self) -> float:
        """Q, the mean of the values that were backed up; 0 before the first."""
        return self.total / self.visits if self.visits else 0.0

    def puct(self, c_puct: float) -> float:
        """Return the upper bound by which the parent chooses among its children.

        Where the parent itself has not been visited, one visit is taken, so that priors decide.

        Args:
            c_puct: c, the weight of what is probable and has been tried little.
        """
        above = 1 if self.parent is None else max(1, self.parent.visits)
        return self.q + c_puct * self.prior * math.sqrt(above) / (1 + self.visits)

    def add(self, moves: Sequence[Move[S]]) -> None:
        """Add continuations; equal ones become one child.

        Args:
            moves: at least one.

        Raises:
            ValueError: there is none.
        """
        if not moves:
            raise ValueError(f"an unfinished state needs a continuation: {self.state}")
        known = {child.state for child in self.children}
        for move in moves:
            if move.state not in known:
                known.add(move.state)
                self.children.append(Node(move.state, self, move.prior, move.finished))

    def back_up(self, value: float) -> None:
        """Count a value here and in all nodes above.

        Args:
            value: what the state turned out to be worth.
        """
        node: Node[S] | None = self
        while node is not None:
            node.visits, node.total = node.visits + 1, node.total + value
            node = node.parent

    def close(self) -> None:
        """Say that nothing is left to look at here, and in those above of which the same is then true."""
        node: Node[S] | None = self
        while node is not None and all(child.closed for child in node.children):
            node.closed = True
            node = node.parent

    def walk(self) -> Iterator[Node[S]]:
        """Yield the nodes from here on, level by level, so that parents come before their children."""
        level = [self]
        while level:
            yield from level
            level = [child for node in level for child in node.children]

    def path(self) -> list[Node[S]]:
        """Return the nodes from the first step to this one, the root left out."""
        nodes, node = list[Node[S]](), self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def tree_search(
    problem: Problem[S], roots: Sequence[S], simulations: int, *, c_puct: float = 1.5, descend: bool = False
) -> list[Node[S]]:
    """Return the tree that PUCT grows from each root.

    A simulation goes down from the root, always to the child of the largest PUCT, the first of equals, to a node that
    has not been continued yet. What then happens:

    - a value is asked for: the node is continued and its own value backed up; its finished children are worth their
      outcome at once, count once, and are not gone to again. A tree of which nothing is left is left alone.
    - `descend`: it is continued, and so are those below it that PUCT goes on to, to the end of an answer, whose outcome
      is backed up. Finished nodes are visited again.

    Args:
        problem: continues states and knows what they are worth.
        roots: one state of each tree.
        simulations: of each tree.
        c_puct: the weight of what is probable and has been tried little.
        descend: whether a simulation goes on to the end of an answer instead of asking for a value.
    """
    trees = [Node(state) for state in roots]
    for _ in range(simulations):
        if descend:
            _play_out(problem, trees, c_puct)
        else:
            _look(problem, trees, c_puct)
    return trees


def _best(node: Node[S], c_puct: float) -> Node[S]:
    """Return the child of the largest PUCT among those with something left to look at."""
    return max((child for child in node.children if not child.closed), key=lambda child: child.puct(c_puct))


def _look(problem: Problem[S], trees: Sequence[Node[S]], c_puct: float) -> None:
    """Run one simulation of each tree that asks for a value."""
    leaves = []
    for node in trees:
        while node.children and not node.closed:
            node = _best(node, c_puct)
        if not node.closed:
            leaves.append(node)
    if not leaves:
        return
    for node, moves in zip(leaves, problem.expand([node.state for node in leaves]), strict=True):
        node.add(moves)
    ends = [child for node in leaves for child in node.children if child.finished]
    judged = [*ends, *leaves]
    for node, value in zip(judged, problem.value([node.state for node in judged]), strict=True):
        node.back_up(value)
    for node in ends:
        node.close()


def _play_out(problem: Problem[S], trees: Sequence[Node[S]], c_puct: float) -> None:
    """Run one simulation of each tree that goes to the end of an answer."""
    now = list(trees)
    while going := [at for at, node in enumerate(now) if not node.finished]:
        fresh = [at for at in going if not now[at].children]
        for at, moves in zip(fresh, problem.expand([now[at].state for at in fresh]) if fresh else [], strict=True):
            now[at].add(moves)
        for at in going:
            now[at] = _best(now[at], c_puct)
    for node, value in zip(now, problem.value([node.state for node in now]), strict=True):
        node.back_up(value)


@dataclass(frozen=True)
class Candidate(Generic[S]):
    """A state in a beam.

    Args:
        state: it.
        value: what it is worth.
        finished: whether the answer ends here.
    """

    state: S
    value: float
    finished: bool = False


def beam_search(problem: Problem[S], roots: Sequence[S], width: int) -> list[list[Candidate[S]]]:
    """Return the states that a beam over steps ends with for each root, the most valuable first.

    All states of a beam are continued, those that are finished stay as they are, and of all these, equal ones taken
    once, the `width` most valuable are kept, the first of equals. It begins with `width` copies of the root.

    Args:
        problem: continues states and knows what they are worth.
        roots: one state of each beam.
        width: B, the states that are kept.
    """
    beams = [[Candidate(state, 0.0)] * width for state in roots]
    while any(not one.finished for beam in beams for one in beam):
        going = [(at, one.state) for at, beam in enumerate(beams) for one in beam if not one.finished]
        moves = problem.expand([state for _, state in going])
        pools: list[dict[S, bool]] = [{one.state: True for one in beam if one.finished} for beam in beams]
        values = [{one.state: one.value for one in beam if one.finished} for beam in beams]
        for (at, _), found in zip(going, moves, strict=True):
            for move in found:
                pools[at].setdefault(move.state, move.finished)
        new = [(at, state) for at, pool in enumerate(pools) for state in pool if state not in values[at]]
        for (at, state), value in zip(new, problem.value([state for _, state in new]), strict=True):
            values[at][state] = value
        beams = [
            sorted((Candidate(s, values[at][s], end) for s, end in pool.items()), key=lambda one: -one.value)[:width]
            for at, pool in enumerate(pools)
        ]
    return beams
