"""The language model: an unmodified Hugging Face causal model that runs packed trees."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hone.errors import ModelError
from hone.networks import body_of
from hone.text.attention import NAME, Plan
from hone.text.fallback import Rows, padded_hidden
from hone.text.loading import build_fresh, read_pretrained
from hone.text.loading import shipped_base as shipped_base  # part of this module's interface
from hone.text.pack import Packed, Tree, pack
from hone.text.probe import find_obstacle
from hone.text.steering import Arranged, Steering, Wrap, steering_of, unsteered
from hone.text.vocabulary import Head, token_logprobs

if TYPE_CHECKING:
    from hone.adapters.base import Adapter
    from hone.text.render import Renderer

log = logging.getLogger("hone")
EXTRAS_FILE = "extras.safetensors"  # beside a saved model: what an objective has added to it


class LanguageModel(nn.Module):
    """A causal language model with its tokenizer.

    The model of transformers inside, `hf`, works as ever: `hf(input_ids)`, `hf.generate`, `hf.save_pretrained`.
    """

    medium = "text"

    def __init__(self, hf: PreTrainedModel, tokenizer: Any, template: str | None = None) -> None:
        """Wrap a model and prove on it that packing is exact; where it is not, fall back to padding and say so.

        Args:
            hf: a causal model of transformers.
            tokenizer: its tokenizer.
            template: chat template: "chatml", the path of a .jinja file, or None for the tokenizer's own.

        Raises:
            ModelError: the model's logits cannot be computed from its hidden states, or it is not causal.
        """
        super().__init__()
        self.hf = hf
        self.tokenizer = tokenizer
        self.template = template
        if self.packs:  # wrapped before: go back to what transformers would choose, for the proof
            hf.set_attn_implementation("sdpa" if hf._supports_sdpa else "eager")
        self._stock = hf.config._attn_implementation
        self._arranged: tuple[Packed, Steering | None, bool, Arranged] | None = None
        self.watchers: list[Callable[[Packed, Tensor], None]] = []  # shown each batch with its last hidden states
        self.adapter: Adapter | None = None  # what was loaded and stays on its base
        self.extras = nn.ModuleDict()  # what an objective puts beside the network, e.g. a classification head
        with unsteered(hf):
            obstacle = find_obstacle(self)
        if obstacle:
            log.warning("sequences are padded instead of packed, which is slower: %s", obstacle)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        template: str | None = None,
        merge: bool = True,
    ) -> LanguageModel:
        """Load a model with its tokenizer.

        Args:
            path: "base" (the shipped model), a folder in Hugging Face format, a folder with an adapter in PEFT format
                (merged into its base), or a Hub name "owner/name". Only safetensors are read, and no code.
            dtype: of the weights.
            device: where it computes.
            template: chat template: "chatml", the path of a .jinja file, or None for the tokenizer's own.
            merge: False leaves an adapter on its base, which is read in bf16 where it is stored in two bytes a weight.

        Raises:
            ModelError: the model or its tokenizer is missing, or is not a causal language model.
        """
        hf, tokenizer, adapter = read_pretrained(path, dtype, merge=merge)
        hf.to(device)
        made = cls(hf, tokenizer, template)
        made.adapter = adapter
        return made

    @classmethod
    def fresh(cls, config: Mapping[str, Any], tokenizer: Any, *, template: str | None = None) -> LanguageModel:
        """Build a model with random weights, drawn from torch's generator.

        Args:
            config: configuration in the words of transformers, e.g. {"model_type": "llama", "hidden_size": 192};
                vocabulary size and special tokens follow from the tokenizer.
            tokenizer: the model's tokenizer.
            template: chat template, as for `load`.

        Raises:
            ModelError: the model type or a key is unknown, or a value does not fit.
        """
        return cls(build_fresh(config, tokenizer), tokenizer, template)

    def collate(self, trees: Sequence[Tree]) -> Packed:
        """Return trees as one packed forest.

        Args:
            trees: at least one.
        """
        return pack(trees)

    @property
    def packs(self) -> bool:
        """Whether batches run as packed trees; False falls back to padded rows, which every causal model can do."""
        return self.hf.config._attn_implementation == NAME

    @packs.setter
    def packs(self, value: bool) -> None:
        """Switch to padding, or back to packing after the proof has held."""
        self.hf.set_attn_implementation(NAME if value else self._stock)

    @cached_property
    def renderer(self) -> Renderer:
        """What turns samples into trees and prompts with this model's tokenizer and template."""
        from hone.text.render import Renderer

        eos_ids = getattr(self.hf.generation_config, "eos_token_id", None)
        return Renderer(self.tokenizer, self.template, eos_ids)

    @property
    def context(self) -> int | None:
        """The most tokens that a chain may have, None where the architecture sets no limit.

        Virtual tokens that an adapter puts in front are taken off. Longrope, as in Phi-3, turns all positions of a row
        by other angles once one of them lies beyond the context it was pretrained with: a longer sample would change
        the others in its row, and a growing answer its own beginning. So that context is the limit there.
        """
        config = self.hf.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None), *_switching(config)]
        limit = min((limit for limit in limits if limit is not None), default=None)
        return None if limit is None else limit - self.front

    @property
    def front(self) -> int:
        """The virtual tokens that an adapter puts in front of every chain."""
        steering = steering_of(self.hf)
        return 0 if steering is None else steering.front

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return body_of(self.hf) or self.hf

    @property
    def head(self) -> Head:
        """The output layer, (n, D) -> (n, V): classifier with bias, then scale and soft cap where there are any."""
        config = self.hf.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return Head(self.hf.get_output_embeddings(), _logit_scale(config), cap)

    def hidden(self, batch: Packed) -> Tensor:
        """Return the last hidden states (T, D) in packed order: what the head is applied to.

        Args:
            batch: on the model's device.
        """
        steering, training = steering_of(self.hf), self.hf.training
        if batch.two_way is not None:
            self._require_two_way(steering)
        if not self.packs:
            if steering is not None and (obstacle := steering.obstacle_in_rows(training)):
                raise ModelError(f"the sequences of this model are padded instead of packed, and {obstacle}")
            found = padded_hidden(self.decoder, Rows.unroll(batch))
        else:
            made = self.arranged(batch)
            found = made.own(self.states(made.tokens, made.positions, made.plan))
        for watch in self.watchers:
            watch(batch, found)
        return found

    def _require_two_way(self, steering: Steering | None) -> None:
        """Refuse to run without the causal mask where that cannot be done."""
        if not self.packs:
            raise ModelError(
                f"{type(self.hf).__name__} runs padded instead of packed, so that its attention cannot be opened to "
                "both sides; use a model that packs, and packing: true"
            )
        if steering is not None and steering.own_plan:
            raise ModelError(
                "this adapter decides itself which tokens see each other, so that attention cannot be opened to both "
                "sides beside it; use another adapter"
            )

    def arranged(self, batch: Packed) -> Arranged:
        """Return a batch as the decoder runs it, made once for as long as the same batch is asked for.

        Args:
            batch: on the model's device.
        """
        steering, training, made = steering_of(self.hf), self.hf.training, self._arranged
        # Policy and reference often see the same batch.
        if made is None or made[0] is not batch or made[1] is not steering or made[2] != training:
            self._arranged = made = batch, steering, training, self.arrange(batch)
        return made[3]

    def arrange(self, batch: Packed, wrap: Wrap = lambda plan: plan) -> Arranged:
        """Return a batch as the decoder runs it: as it is, or as an adapter changes it.

        Args:
            batch: on the model's device.
            wrap: goes around the innermost plan, and sees virtual tokens too.
        """
        steering = steering_of(self.hf) or Steering(self.hf)
        return steering.arrange(batch, self.hf.training, wrap)

    def states(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Return the last hidden states (T, D) of a flat row of tokens.

        Args:
            tokens: (T,) token ids.
            positions: (T,) position of each token on its chain.
            plan: the attention between them.
        """
        output = self.decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, plan=plan)
        return output.last_hidden_state[0]

    def logprobs(self, batch: Packed, temperature: float = 1.0) -> Tensor:
        """Return log p(token t | the tokens before it on its chain) (T,), 0 at the first token of a root.

        Args:
            batch: on the model's device.
            temperature: what the logits are divided by.
        """
        hidden = self.hidden(batch)
        predicted = (batch.previous >= 0).nonzero().squeeze(1)
        states = hidden[batch.previous[predicted]]
        values = token_logprobs(states, self.head, batch.tokens[predicted], temperature=temperature)
        return values.new_zeros(len(batch)).index_put((predicted,), values)

    def checkpoint_layers(self, enabled: bool) -> None:
        """Switch recomputation on or off: layers keep their inputs only and run again in the backward pass.

        Args:
            enabled: True trades about a third more computation for memory.

        Raises:
            ModelError: the architecture does not support it.
        """
        supported = self.hf.supports_gradient_checkpointing
        if enabled and not supported:
            raise ModelError(f"recompute: {type(self.hf).__name__} does not support it; switch it off")
        if enabled:
            _either(self.hf, "activation_checkpointing_enable", "gradient_checkpointing_enable")(
                {"use_reentrant": False}
            )
        elif supported:
            _either(self.hf, "activation_checkpointing_disable", "gradient_checkpointing_disable")()

    def save(self, folder: Path) -> None:
        """Write the model with its tokenizer and generation settings in Hugging Face format.

        Args:
            folder: where; made when it is missing.
        """
        self.hf.save_pretrained(folder)
        self.save_tokenizer(folder)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, with the chat template that was trained on.

        Args:
            folder: where; made when it is missing.
        """
        if self.template is not None:
            self.tokenizer.chat_template = self.renderer.template
        self.tokenizer.save_pretrained(folder)

    def save_extras(self, folder: Path) -> None:
        """Write what stands beside the network, if anything does.

        Args:
            folder: the model's folder.
        """
        if tensors := {name: value.detach().contiguous() for name, value in self.extras.state_dict().items()}:
            save_file(tensors, folder / EXTRAS_FILE)

    def load_extras(self, folder: Path) -> None:
        """Read what stands beside the network, which must be there in the same shape; nothing where none was saved.

        Args:
            folder: a model's folder.

        Raises:
            ModelError: what was saved is something else, e.g. a head for other classes.
        """
        path = folder / EXTRAS_FILE
        if not path.is_file() or not len(self.extras):
            return
        try:
            self.extras.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ModelError(f"{path} does not fit what the objective puts beside the model: {error}") from error


def _switching(config: Any) -> list[int]:
    """Return the lengths of a row from which its rotary embeddings are others, of all layers that have such."""
    found = getattr(config, "rope_parameters", None) or {}
    layers = [found] if "rope_type" in found else [own for own in found.values() if isinstance(own, dict)]
    return [own["original_max_position_embeddings"] for own in layers if own.get("rope_type") == "longrope"]


def _logit_scale(config: Any) -> float:
    """Return the factor between the classifier's output and the logits; architectures disagree on its name."""
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides by it, HyperCLOVA X multiplies
        return config.logits_scaling if config.model_type.startswith("hyperclovax") else 1 / config.logits_scaling
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon H1
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return 1.0


def _either(owner: object, new: str, old: str) -> Any:
    """Return a method by its name in transformers 5.20 and later, or by the older one, which those deprecate."""
    return getattr(owner, new, None) or getattr(owner, old)
