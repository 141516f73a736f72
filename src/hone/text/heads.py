"""Linear heads on the last hidden states, and how transformers' own classes carry them.

A head stands in `LanguageModel.extras` while it trains and is saved with the model. `as_classifier` puts it into the
class of transformers that computes the same: `AutoModelForSequenceClassification` reads the last token of a text,
`AutoModelForTokenClassification` every token.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from hone.errors import HoneError, ModelError
from hone.text.model import EXTRAS_FILE
from hone.text.pack import Tree, pack

if TYPE_CHECKING:
    from hone.text.model import LanguageModel

log = logging.getLogger("hone")
HEAD = "head"  # its name in `LanguageModel.extras`
_STATE = f"{HEAD}._extra_state"
_AUTO = {
    "text": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "token": (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}


class ClassHead(nn.Linear):
    """A linear layer that knows the names of its outputs, which are saved with it."""

    def __init__(self, width: int, names: list[str], bias: bool) -> None:
        """Make a layer with torch's random weights.

        Args:
            width: D of the hidden states.
            names: of its K outputs, in order.
            bias: whether it has one.
        """
        super().__init__(width, len(names), bias=bias)
        self.names = list(names)

    def get_extra_state(self) -> Tensor:
        """Return the names as bytes, since a safetensors file holds tensors alone."""
        return torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that saved weights are those of the same outputs.

        Args:
            state: the names as bytes.

        Raises:
            ModelError: they have other names, or the same ones in another order.
        """
        found = json.loads(bytes(state.tolist()))
        if found != self.names:
            raise ModelError(
                f"the saved head tells the classes {', '.join(found)}, but this run has {', '.join(self.names)}; set "
                "the objective's `classes` to those of the head, or start from a model without one"
            )


def new_head(model: LanguageModel, names: list[str], *, bias: bool) -> ClassHead:
    """Return a head for a model, drawn like transformers' own: normal weights of the config's size, no bias yet.

    Args:
        model: gives width, type and device.
        names: of the K outputs.
        bias: whether it has one.
    """
    config = model.hf.config.get_text_config()
    head = ClassHead(config.hidden_size, names, bias)
    nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
    if bias:
        nn.init.zeros_(head.bias)
    like = next(model.hf.parameters())
    return head.to(device=like.device, dtype=like.dtype)


def saved_names(folder: Path) -> list[str] | None:
    """Return the names of the classes that a saved model's head tells, None where it has no such head.

    Args:
        folder: of the model.
    """
    path = folder / EXTRAS_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if _STATE not in file.keys():  # noqa: SIM118 - no mapping
                return None
            return [str(name) for name in json.loads(bytes(file.get_tensor(_STATE).tolist()))]
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged, or no safetensors file: {error}") from error


@dataclass(frozen=True)
class Readout:
    """How a head is read.

    Args:
        head: the layer.
        of: "text" for the state of a text's last token, "token" for that of each token.
        obstacle: why transformers' classes compute something else, "" where they agree.
    """

    head: ClassHead
    of: Literal["text", "token"]
    obstacle: str = ""


def as_classifier(model: LanguageModel, readout: Readout) -> PreTrainedModel:
    """Return the model as transformers' class for classification, with its head and the names of its classes.

    Args:
        model: plain, any adapter merged.
        readout: how its head is read.

    Raises:
        HoneError: the class computes something else, or there is none for the architecture.
    """
    if readout.obstacle:
        raise HoneError(
            f"transformers' classifiers cannot hold this model: {readout.obstacle}. The run folder's model/ holds its "
            "weights, and the head lies beside them in extras.safetensors"
        )
    auto, mapping = _AUTO[readout.of]
    kind: Any = mapping.get(type(model.hf.config), None)
    if kind is None:
        raise HoneError(
            f"transformers has no {auto.__name__} for {type(model.hf).__name__}; the head lies in extras.safetensors"
        )
    made: PreTrainedModel = kind(_config(model, readout)).to(model.hf.dtype)
    getattr(made, made.base_model_prefix).load_state_dict(model.decoder.state_dict())
    place = next(m for name in ("score", "classifier") if isinstance(m := getattr(made, name, None), nn.Linear))
    with torch.no_grad():
        place.weight.copy_(readout.head.weight)
        if place.bias is not None:
            place.bias.zero_() if readout.head.bias is None else place.bias.copy_(readout.head.bias)
    return made.eval()


def classifier_error(model: LanguageModel, readout: Readout, folder: Path, ids: Tensor) -> float:
    """Return the largest difference of a logit between a model with its head and the classifier saved from it.

    Args:
        model: in single precision.
        readout: how its head is read.
        folder: the saved classifier.
        ids: (T,) token ids to look at.
    """
    auto, _ = _AUTO[readout.of]
    again: Any = auto.from_pretrained(folder, dtype=torch.float32).eval()
    tree = Tree((ids.numpy().astype(np.int32),), (np.zeros(len(ids), np.float32),), (-1,))
    with torch.no_grad():
        own, theirs = readout.head(model.hidden(pack([tree]))), again(input_ids=ids[None]).logits[0]
    return float(((own[-1] if readout.of == "text" else own) - theirs).abs().max())


def _config(model: LanguageModel, readout: Readout) -> Any:
    """Return the configuration of the classifier."""
    config: Any = copy.deepcopy(model.hf.config)
    config._attn_implementation = "sdpa" if model.hf._supports_sdpa else "eager"
    names = readout.head.names
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    padding = config.pad_token_id if config.pad_token_id is not None else model.tokenizer.pad_token_id
    if padding in model.renderer.stop_ids:  # transformers takes the last token that is not padding
        log.warning("the padding token ends texts too, so that the exported model scores one text at a time")
        padding = None
    config.pad_token_id = padding
    return config
