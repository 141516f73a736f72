"""LoRA for long contexts: in training, attention within groups of tokens that half of the heads shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.calibration import Calibration
from hone.adapters.host import adapted_layers
from hone.adapters.lora import LoRA
from hone.adapters.tree import decoder_of, inside
from hone.parts import part
from hone.text.attention import Scoring
from hone.text.pack import Packed
from hone.text.steering import Arranged, ChainPlan, Steering, Wrap, refuse_windows, release, steer


def grouped(batch: Packed, size: int | None, sinks: int, shifted: bool) -> ChainPlan:
    """Return causal attention within groups of tokens, and to the first tokens of each text.

    With G the size of a group, the token at position i sees position j <= i of its chain where
    (i + G - s) // G = (j + G - s) // G, s being 0 or, shifted, G // 2; and where j < sinks.

    Args:
        batch: the packed forest.
        size: G; None for a quarter of each tree's longest chain, rounded up.
        sinks: number of first tokens that all see.
        shifted: whether the groups begin half a group later.
    """
    begins = batch.positions[batch.starts[:-1].to(batch.positions.device)].tolist()
    lengths = batch.starts.diff().tolist()
    sizes = [size] * batch.segments if size is not None else _quarters(batch, begins, lengths)
    starts: list[int] = []
    chains: list[list[int]] = []
    group_of: list[int] = []  # of each piece, -1 for sinks
    above: list[list[int]] = []  # per segment the pieces of its chain
    for segment, parent in enumerate(batch.parents.tolist()):
        first, width = begins[segment], sizes[segment]
        shift = width // 2 if shifted else 0
        seen = list(above[parent]) if parent >= 0 else []
        for place in range(first, first + lengths[segment]):
            if place != first and place != sinks and (place - shift) % width:
                continue
            group = -1 if place < sinks else (place + width - shift) // width
            if place < sinks and seen and group_of[seen[-1]] == -1 and place != first:
                continue  # sinks are seen by all, whatever group they are in
            piece = len(chains)
            chains.append([*(p for p in seen if group_of[p] in (-1, group)), piece])
            starts.append(int(batch.starts[segment]) + place - first)
            group_of.append(group)
            seen.append(piece)
        above.append(seen)
    return ChainPlan([*starts, len(batch)], chains)


def _quarters(batch: Packed, begins: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return per segment a quarter of its tree's longest chain."""
    roots: list[int] = []
    longest: dict[int, int] = {}
    for segment, parent in enumerate(batch.parents.tolist()):
        roots.append(roots[parent] if parent >= 0 else segment)
        longest[roots[-1]] = max(longest.get(roots[-1], 0), begins[segment] + lengths[segment])
    return [-(-longest[root] // 4) for root in roots]


class GroupPlan:
    """Attention in groups: the last heads in shifted ones, the others in plain ones."""

    def __init__(self, batch: Packed, size: int | None, sinks: int, returned: float) -> None:
        """Lay out both kinds of groups.

        Args:
            batch: the packed forest.
            size: tokens of a group; None for a quarter of each tree's longest chain.
            sinks: number of first tokens that all see.
            returned: share of the shifted half of the heads that goes back to plain groups.
        """
        self.plain = grouped(batch, size, sinks, shifted=False)
        self.shifted = grouped(batch, size, sinks, shifted=True)
        self.returned = returned

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention of all heads.

        Args:
            module: the attention layer.
            query: (1, H, T, d).
            key: (1, H', T, d).
            value: (1, H', T, d).
            scoring: how the layer makes weights of scores.

        Returns:
            (1, T, H, d).
        """
        heads, shared = query.shape[1], query.shape[1] // key.shape[1]
        still = heads - round(heads // 2 * (1 - self.returned))
        if shared > 1:  # the border between the heads may fall between two that share their keys
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        outputs = []
        for plan, part_of in ((self.plain, slice(0, still)), (self.shifted, slice(still, heads))):
            if part_of.start < part_of.stop:
                own = scoring if scoring.sinks is None else replace(scoring, sinks=scoring.sinks[part_of])
                outputs.append(plan.attend(module, query[:, part_of], key[:, part_of], value[:, part_of], own))
        return torch.cat(outputs, dim=2)


class GroupSteering(Steering):
    """Attention in groups while the network trains, full attention otherwise.

    Args:
        layer: an adapted layer.
        size: tokens of a group; None for a quarter of each tree's longest chain.
        sinks: number of first tokens that all see.
        returned: share of the shifted heads that goes back to plain groups.
    """

    own_plan: ClassVar[bool] = True

    def __init__(self, layer: nn.Module, size: int | None, sinks: int, returned: float) -> None:
        """Hold the options."""
        super().__init__(layer)
        self.size, self.sinks, self.returned = size, sinks, returned

    def arrange(self, batch: Packed, training: bool, wrap: Wrap) -> Arranged:
        """Return the batch as it is, with attention in groups in training.

        Args:
            batch: the packed forest.
            training: whether the network is in training mode.
            wrap: goes around the innermost plan.
        """
        if not training:
            return super().arrange(batch, training, wrap)
        plan = GroupPlan(batch, self.size, self.sinks, self.returned)
        return Arranged(batch.tokens, batch.positions, wrap(plan))

    def obstacle_in_rows(self, training: bool) -> str:
        """Return that groups are made in packed training only.

        Args:
            training: whether the network is in training mode.
        """
        return "adapter 'sinklora' makes its groups of tokens in packed training only" if training else ""


@part(
    "adapter",
    "sinklora",
    papers=[
        (
            "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
            "arXiv:2406.05678",
        ),
        ("LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", "arXiv:2309.12307"),
    ],
    claim="Giving back half of LongLoRA's shifted heads and letting every token see the first four reaches 92% of full "
    "attention's gain in perplexity, where LongLoRA reaches 39%.",
    deviations="The authors' repository does not hold this attention; it is built from the paper's words: of the "
    "shifted half of the heads a share returns, in whole heads. Groups do not wrap around, as in LongLoRA's flash "
    "attention, so that nothing sees its future. Sink tokens are the text's own first ones and do not look ahead. LoRA "
    "goes on all linear layers, where LongLoRA adapts those of attention; an embedding that is tied to the output head "
    "stays frozen. H2O's eviction of the cache at inference is left out, as is the interpolation of positions, which "
    "belongs to the model.",
)
@dataclass(kw_only=True)
class SinkLoRA(LoRA):
    """LoRA whose training attends within groups of G tokens; half of the heads shift by G / 2, and part of them return.

    Token i sees token j <= i of its text in the same group, (i + G - s) // G = (j + G - s) // G, or j < sinks, with
    s = G // 2 in the last round(H / 2 (1 - returned)) heads and 0 in the others. Evaluation and generation use full
    attention. LongLoRA's S2-Attn is `returned: 0, sinks: 0`. Embeddings and norms train as a whole (LongLoRA+).

    Args:
        rank: rank of the product.
        group: G in tokens; None for a quarter of each text, rounded up.
        returned: share of the shifted half of the heads that goes back to plain groups.
        sinks: number of first tokens that every token sees.
        plus: train all norms and the input embedding too; not an embedding that is tied to the output head.
    """

    group: Annotated[int, Field(ge=2)] | None = None
    returned: Annotated[float, Field(ge=0, le=1)] = 0.5
    sinks: Annotated[int, Field(ge=0)] = 4
    plus: bool = True

    def whole(self, model: nn.Module) -> list[str]:
        """Return the modules that train as a whole: those that were named, the embedding and the norms.

        Args:
            model: a plain network.
        """
        named = super().whole(model)
        if not self.plus:
            return named
        find = getattr(model, "get_input_embeddings", None)
        embedding = find() if find is not None else None
        heads = [m for _, m in model.named_modules() if m is not embedding and isinstance(m, nn.Linear)]
        if embedding is not None and any(m.weight is embedding.weight for m in heads):
            embedding = None
        more = [
            name
            for name, module in model.named_modules()
            if (module is embedding or type(module).__name__.endswith("Norm")) and not inside(name, named)
        ]
        return [name for name, _ in model.named_modules() if name in {*named, *more}]

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Refuse a model whose attention is local already.

        Args:
            model: a plain network.
            names: dotted names of the layers that will be adapted.
            calibration: not looked at.
        """
        refuse_windows(model, self.name)
        super().prepare(model, names, calibration)

    def install(self, model: nn.Module, names: list[str]) -> None:
        """Adapt the layers and let training attend in groups.

        Args:
            model: a plain network.
            names: dotted names of layers.
        """
        super().install(model, names)
        layer = next(iter(adapted_layers(model).values()))
        steer(model, decoder_of(model), GroupSteering(layer, self.group, self.sinks, self.returned))

    def strip(self, model: nn.Module) -> None:
        """Merge for good; the plain network attends in full.

        Args:
            model: the network this adapter is attached to.
        """
        super().strip(model)
        release(model)
