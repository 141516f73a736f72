"""Walks through the states of a text that can be taken back: episodes of actions, and the packed trees of their states.

A state is a text: the prompt and what is left of the actions so far. A token leads to a longer text, a deletion back to
the text before. So the states of an episode are the nodes of a tree of tokens, which is what a packed tree is: each
state is computed once, and its last hidden state gives the values of all actions in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hone.text.pack import Packed, Tree, pack


@dataclass(frozen=True)
class Episode:
    """What was done after a prompt, and what came of it.

    Args:
        prompt: token ids, at least one.
        actions: (n,) what was chosen at each step: a token, or the one that deletes.
        effects: (n,) what happened: the same, or what got into the text instead.
        weights: (n,) weight of each step.
        ended: whether the last step ends the text; otherwise it was cut off.
    """

    prompt: np.ndarray
    actions: np.ndarray
    effects: np.ndarray
    weights: np.ndarray
    ended: bool


def episodes_of(batch: Packed, stop: Collection[int]) -> list[Episode]:
    """Return the episodes of a batch: each run of trained tokens in a segment, after all that precedes it.

    Args:
        batch: packed forest of T tokens.
        stop: ids that end a text.
    """
    tokens, weights, starts = batch.tokens.cpu().numpy(), batch.weights.cpu().numpy(), batch.starts.tolist()
    found = []
    for segment in range(batch.segments):
        begin, end = starts[segment], starts[segment + 1]
        marked = np.flatnonzero(weights[begin:end])
        before = [tokens[starts[s] : starts[s + 1]] for s in batch.chain(segment)[:-1]]
        for run in np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1) if len(marked) else ():
            own = slice(begin + int(run[0]), begin + int(run[-1]) + 1)
            prompt = np.concatenate([*before, tokens[begin : own.start]])
            found.append(Episode(prompt, tokens[own], tokens[own], weights[own], int(tokens[own][-1]) in stop))
    return found


def noised(episode: Episode, backspace: int, noise: float, wrong: np.ndarray, rng: np.random.Generator) -> Episode:
    """Return an episode in which wrong tokens get into the text and are deleted at once.

    At a noised step the right token is chosen, another one appears, is deleted, and the right one is chosen again.

    Args:
        episode: without noise.
        backspace: id that deletes.
        noise: probability of a wrong token at a step.
        wrong: ids to draw from.
        rng: draws.
    """
    actions, effects, weights = list[int](), list[int](), list[float]()
    hit, drawn = rng.random(len(episode.actions)) < noise, rng.integers(max(1, len(wrong)), size=len(episode.actions))
    for place, (action, weight) in enumerate(zip(episode.actions.tolist(), episode.weights.tolist(), strict=True)):
        if hit[place] and len(wrong) and (token := int(wrong[drawn[place]])) != action:
            actions += [action, backspace]
            effects += [token, backspace]
            weights += [weight, weight]
        actions.append(action)
        effects.append(action)
        weights.append(weight)
    return replace(episode, actions=np.array(actions), effects=np.array(effects), weights=np.array(weights, np.float32))


@dataclass(frozen=True)
class Walks:
    """The steps of some episodes through the states of a packed forest; a state is the index of its last token.

    Args:
        batch: the forest, one tree an episode.
        states: (n,) the state of each step.
        actions: (n,) what was chosen.
        following: (n,) the state that came of it.
        weights: (n,) weight of the step, discounted.
        final: (n,) the weight, discounted once more, of a step that ends a text; 0 elsewhere.
        episodes: (n,) number of the episode.
    """

    batch: Packed
    states: Tensor
    actions: Tensor
    following: Tensor
    weights: Tensor
    final: Tensor
    episodes: Tensor

    def to(self, device: torch.device | str) -> Walks:
        """Return the walks on a device."""
        moved = {name: getattr(self, name).to(device) for name in self.__dataclass_fields__}
        return Walks(**moved)


def pack_walks(episodes: Sequence[Episode], backspace: int | None, gamma: float) -> Walks:
    """Return the walks of episodes.

    Args:
        episodes: at least one.
        backspace: id that deletes; None where none does.
        gamma: discount of a step.
    """
    trees, columns, offset = list[Tree](), list[tuple[np.ndarray, ...]](), 0
    for number, episode in enumerate(episodes):
        tree, places = state_tree(episode, backspace)
        trees.append(tree)
        weights = episode.weights * gamma ** np.arange(len(episode.actions))
        final = np.zeros_like(weights)
        if episode.ended:
            final[-1] = gamma * weights[-1]
        columns.append((places[:-1] + offset, episode.actions, places[1:] + offset, weights, final,
                        np.full(len(weights), number)))  # fmt: skip
        offset += len(tree)
    parts = [np.concatenate(column) for column in zip(*columns, strict=True)]
    states, actions, following, numbers = (torch.from_numpy(parts[n].astype(np.int64)) for n in (0, 1, 2, 5))
    discounted, final = (torch.from_numpy(parts[n].astype(np.float32)) for n in (3, 4))
    return Walks(pack(trees), states, actions, following, discounted, final, numbers)


def state_tree(episode: Episode, backspace: int | None) -> tuple[Tree, np.ndarray]:
    """Return the tree of an episode's states, and where in it each state stands, (n + 1,), the first one included.

    Args:
        episode: its effects say what gets into the text and what is taken back.
        backspace: id that deletes; on nothing it has no effect.
    """
    tokens, parents = [int(token) for token in episode.prompt], list(range(-1, len(episode.prompt) - 1))
    first = at = len(tokens) - 1
    nodes, known = [at], dict[tuple[int, int], int]()
    for effect in episode.effects.tolist():
        if effect == backspace:
            at = parents[at] if at != first else first
        else:
            if (at, effect) not in known:
                known[at, effect] = len(tokens)
                tokens.append(effect)
                parents.append(at)
            at = known[at, effect]
        nodes.append(at)
    return _segments(tokens, parents, nodes)


def _segments(tokens: list[int], parents: list[int], nodes: list[int]) -> tuple[Tree, np.ndarray]:
    """Return a tree of tokens cut into segments where it branches, and where some of its nodes stand in it."""
    children = np.zeros(len(tokens), np.int64)
    for parent in parents[1:]:
        children[parent] += 1
    owner, held, above = list[int](), list[list[int]](), list[int]()
    for node, parent in enumerate(parents):
        if parent >= 0 and children[parent] == 1:
            owner.append(owner[parent])
            held[owner[parent]].append(node)
        else:
            above.append(owner[parent] if parent >= 0 else -1)
            owner.append(len(held))
            held.append([node])
    place = np.empty(len(tokens), np.int64)
    place[np.concatenate([np.array(segment) for segment in held])] = np.arange(len(tokens))
    ids = tuple(np.array([tokens[node] for node in segment], np.int32) for segment in held)
    return Tree(ids, tuple(np.zeros(len(segment), np.float32) for segment in ids), tuple(above)), place[nodes]
