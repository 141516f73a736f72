"""LoRA with terms of its own beside the loss: on the outputs (BA-LoRA) or on the activations (DEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from hone.adapters.lora import LoRA
from hone.adapters.starts import PiSSA
from hone.parts import part
from hone.penalties.activations import ActivationDensity
from hone.penalties.base import Strength
from hone.penalties.outputs import SVD, Consistency, Course, Diversity, Form, Rows, Temperature


@part(
    "adapter",
    "ba-lora",
    papers=[
        (
            "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language "
            "Models",
            "arXiv:2408.04556",
        )
    ],
    claim="Three terms on the outputs, beside PiSSA's start, make fine-tuning more accurate and keep it from passing "
    "on the biases and the noise of the pretraining data.",
    deviations="The strengths are the paper's for Llama 2 7B. The term of the logit matrix looks at 256 trained tokens "
    "of a micro-batch at most. With dropout, A0 too sees the thinned input, as pissa says; the official scripts train "
    "with weight_decay 0. See the penalties consistency, diversity and svd, which work with other adapters too.",
)
@dataclass(kw_only=True)
class BALoRA(PiSSA):
    """Train the largest singular values of each weight, with three terms on the outputs beside the loss.

    loss + consistency * (distance to the outputs of the pretrained model) + diversity * (-entropy of the outputs)
    + svd * (-share of the k largest singular values of the logit matrix), from PiSSA's start

    Args:
        consistency: strength of the distance to the pretrained model.
        diversity: strength of the entropy, or in the classification form of the covariance.
        svd: strength of the share of the largest singular values.
        form: the paper's terms for generated text, or those for classes.
        temperature: of the distance, in the generation form.
        top: tokens over which the entropy is taken, the likeliest; None takes all.
        singular_values: k, how many singular values shall stand out.
        staged: as in the paper, the first strength fades to a tenth over the run, and the others are 0 for its first
            fifth; without it all are constant.
    """

    consistency: Strength = 0.025
    diversity: Strength = 0.005
    svd: Strength = 0.005
    form: Form = "generation"
    temperature: Temperature = 2.0
    top: Rows | None = 20
    singular_values: Annotated[int, Field(ge=1)] = 10
    staged: bool = True

    def penalties(self) -> list[Any]:
        """Return the three terms."""
        early: Course = "fade" if self.staged else "constant"
        late: Course = "late" if self.staged else "constant"
        return [
            Consistency(strength=self.consistency, course=early, form=self.form, temperature=self.temperature),
            Diversity(strength=self.diversity, course=late, form=self.form, top=self.top),
            SVD(strength=self.svd, course=late, k=self.singular_values),
        ]


@part(
    "adapter",
    "deft",
    papers=[
        (
            "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers",
            "arXiv:2402.01911",
        )
    ],
    claim="Fine-tuning with a penalty on the density of the MLP activations makes far fewer units active at a like "
    "accuracy.",
    deviations="With LoRA, the paper's choice beside bottleneck adapters, prefixes and prompts; the penalty "
    "activation-density does the same for any other adapter. ADA-DEFT is not included.",
)
@dataclass(kw_only=True)
class DEFT(LoRA):
    """LoRA whose training makes few units of the MLP blocks active.

    loss + density * mean over blocks, tokens and units of a^2 / (a^2 + eps), a the output of the activation function

    Args:
        density: strength of the penalty.
        eps: square of the activation that counts half.
    """

    density: Strength = 1.0
    eps: Annotated[float, Field(gt=0)] = 1e-7

    def penalties(self) -> list[Any]:
        """Return the penalty on the density, which also reports it."""
        return [ActivationDensity(strength=self.density, eps=self.eps)]
