"""Low-rank error correction: what trains makes up for what quantising the base has lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.errors import HoneError
from hone.objectives.base import Objective, trained
from hone.objectives.language import next_token_loss
from hone.parts import part
from hone.text.vocabulary import CrossEntropy, vocabulary_sum

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed


def correction(
    logits: Tensor, targets: Tensor, teacher: Tensor, *, match: Literal["kl", "mse"], cross_entropy: float
) -> Tensor:
    """Return for each token how far logits are from a teacher's, and the weighted cross-entropy of the target.

    kl: sum_v q_v (log q_v - log p_v); mse: mean_v (z_v - y_v)^2;  both + cross_entropy (-log p_target); z and p are the
    student's logits and probabilities, y and q the teacher's

    Args:
        logits: (n, V).
        targets: (n,) token ids.
        teacher: (n, V) its logits.
        match: what is compared, "kl" or "mse".
        cross_entropy: weight of the cross-entropy.
    """
    log_p = torch.log_softmax(logits, -1)
    if match == "kl":
        log_q = torch.log_softmax(teacher.to(logits.dtype), -1)
        gap = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        gap = (logits - teacher).square().mean(-1)
    return gap - cross_entropy * log_p.gather(-1, targets[:, None]).squeeze(-1)


@part(
    "objective",
    "lrec",
    papers=[
        (
            "INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank "
            "Adaptation",
            "arXiv:2306.08162",
        )
    ],
    claim="LoRA trained to give the outputs of the model before its quantisation makes a 2-bit model usable at 1.05 "
    "times its size.",
    deviations="The teacher runs beside the student instead of having its outputs stored. Bases are rounded to the "
    "nearest level by `adapter.quantize`; the paper's come from GPTQ. Memory-efficient fine-tuning (EMEF), the paper's "
    "other part, is what every quantised base does: it is dequantised layer by layer, forward and backward. Matching "
    "logits by their mean squared difference is an addition.",
)
@dataclass(kw_only=True)
class LREC(Objective):
    """Match the outputs of the model that the run started from, before an adapter quantised its base.

    loss = sum_t w_t [KL(q_t || p_t) + cross_entropy (-log p_t(token_t))], q the starting model's and p the trained
    model's distribution of token t. Use it with `adapter: {name: lora, quantize: int2}` or another quantised base.

    Every token counts, prompts too: data is consumed as "tokens". The starting model is held in memory as well. Until
    training starts, while an adapter may look at data, the model is itself the starting model, whose divergence is 0.

    Args:
        match: "kl" compares distributions, "mse" the logits themselves, by their mean squared difference.
        cross_entropy: weight of the negative log-likelihood of the data; 0.1 is the paper's 200 to 1 on sums over
            2048 tokens.
    """

    consumes: ClassVar[str] = "tokens"
    match: Literal["kl", "mse"] = "kl"
    cross_entropy: Annotated[float, Field(ge=0)] = 0.1
    teacher: Any = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Load the starting model.

        Args:
            run: the run in progress.

        Raises:
            HoneError: the run starts from random weights, which say nothing worth matching.
        """
        start = run.recipe.build("model")
        if start.from_nothing:
            raise HoneError(
                "objective 'lrec' matches the model that the run starts from, but this one starts from random weights; "
                "name a pretrained model: model: {name: pretrained, path: ...}"
            )
        self.teacher = start.load(device=run.cluster.device, dtype=run.cluster.dtype, data=None)
        self.teacher.requires_grad_(False).eval()
        if run.cluster.precision == "bf16":  # as the frozen weights of the model that trains
            for parameter in self.teacher.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        if not run.model.packs:
            self.teacher.packs = False

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss over predicted tokens, and how many of them are likeliest as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        chosen = trained(batch)
        if self.teacher is None:
            loss, metrics = next_token_loss(model, batch, chosen, CrossEntropy())
            return self.cross_entropy * loss, metrics
        head = self.teacher.head
        with torch.no_grad():
            states = self.teacher.hidden(batch)[chosen.predictors].to(next(head.linear.parameters()).dtype)
        hidden = model.hidden(batch)[chosen.predictors]
        function = partial(correction, match=self.match, cross_entropy=self.cross_entropy)
        hits = torch.empty_like(chosen.weights)
        loss = vocabulary_sum(
            hidden, model.head, chosen.targets, chosen.weights, function,
            extras=[lambda rows: head(states[rows])], hits=hits,
        )  # fmt: skip
        return loss, {"token_accuracy": (chosen.weights * hits).sum()}
