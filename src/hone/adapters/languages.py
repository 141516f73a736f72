"""One small residual adapter per language, picked by what the data says of each sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hone.adapters.bottleneck import Activation
from hone.adapters.host import Host, adapted_layers
from hone.adapters.layers import Layout, Wrapped
from hone.adapters.tree import decoder_of
from hone.callbacks.base import Callback
from hone.data.mix import SOURCE
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide_dtype
from hone.text.pack import Packed
from hone.text.steering import Arranged, Steering, Wrap, steer

if TYPE_CHECKING:
    from hone.engine.loop import Run

_LANGUAGES = "languages"  # attribute of a plan: (T,) the language of every token


class Speaking(Steering):
    """Which language each token of the forward pass in progress is in.

    Args:
        layer: module whose `enabled` says whether the adapter is in effect.
        default: language of what says nothing, such as a prompt in generation.
        count: number of languages.
    """

    def __init__(self, layer: nn.Module, default: int, count: int) -> None:
        """Begin with nothing known."""
        super().__init__(layer)
        self.default, self.count = default, count
        self.tokens: Tensor | None = None

    def arrange(self, batch: Packed, training: bool, wrap: Wrap) -> Arranged:
        """Return the batch as it is, with the language of every token beside its plan.

        Args:
            batch: the packed forest.
            training: whether the network is in training mode.
            wrap: goes around the innermost plan.

        Raises:
            HoneError: a batch that is trained on does not say its languages, or has more than there are adapters.
        """
        found = super().arrange(batch, training, wrap)
        if SOURCE in batch.fields:
            numbers = batch.fields[SOURCE].long().cpu()
            if (most := int(numbers.max())) >= self.count:
                raise HoneError(f"adapter.languages: {self.count}, numbered from 0, but a sample is in language {most}")
            languages = numbers.repeat_interleave(batch.starts.diff()).to(batch.tokens.device)
            setattr(found.plan, _LANGUAGES, languages)
        elif training:
            raise HoneError(
                f"adapter 'language-adapters' needs to know the language of every sample: give each a number "
                f"'{SOURCE}', or mix one source per language with data: {{name: mix, mark: true, sources: [...]}}"
            )
        return found

    def obstacle_in_rows(self, training: bool) -> str:
        """Return why rows cannot be trained on.

        Args:
            training: whether the network is in training mode.
        """
        return "rows do not say their language" if training else ""

    def listen(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the languages from the plan of a packed batch; a hook that runs before the decoder.

        A pass of the base alone leaves them: layers of the pass before may run again in its backward pass.

        Args:
            decoder: the model without its head.
            args: positional arguments of its forward.
            kwargs: keyword arguments of its forward.
        """
        if self.active:
            self.tokens = getattr(kwargs.get("plan"), _LANGUAGES, None)


class LanguageBottleneck(Wrapped):
    """h + U_g f(D_g norm(h)) for the output h of a layer and the language g of the token.

    Args:
        base: the layer whose output passes through.
        layout: how it stores its weight.
        count: number of languages.
        width: rows of every D.
        activation: name of f.
    """

    def __init__(self, base: nn.Module, layout: Layout, *, count: int, width: int, activation: Activation) -> None:
        """Make the adapters; every U is zero, so that nothing changes at the start."""
        super().__init__(base, layout)
        weight = cast(Tensor, base.weight)
        make: Any = {"dtype": wide_dtype(weight), "device": weight.device}
        outputs = self.matrix().shape[0]
        down = [nn.init.kaiming_uniform_(torch.empty(width, outputs), a=5**0.5) for _ in range(count)]
        self.down = nn.Parameter(torch.stack(down).to(**make))
        self.up = nn.Parameter(torch.zeros(count, outputs, width, **make))
        self.activation = ACT2FN[activation]
        self.speaking: Speaking | None = None  # the adapter hands it out; all layers share it

    def adapted(self, x: Tensor) -> Tensor:
        """Return the layer's output, each token passed through the adapter of its language."""
        hidden = self.base_layer(x)
        speaking = cast(Speaking, self.speaking)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if speaking.tokens is None:
            return hidden + self.change(rows, speaking.default).view(hidden.shape).to(hidden.dtype)
        change = torch.zeros_like(rows)
        for language in speaking.tokens.unique().tolist():
            mine = (speaking.tokens == language).nonzero().squeeze(1)
            change = change.index_add(0, mine, self.change(rows[mine], language).to(rows.dtype))
        return hidden + change.view(hidden.shape)

    def change(self, rows: Tensor, language: int) -> Tensor:
        """Return U_g f(D_g norm(h)).

        Args:
            rows: h, (N, out).
            language: g.
        """
        wide = rows.to(self.down.dtype)
        normed = nn.functional.layer_norm(wide, wide.shape[-1:])
        return self.activation(normed @ self.down[language].mT) @ self.up[language].mT


@dataclass(kw_only=True)
class BestOfEach(Callback):
    """Keeps each language's adapter of the evaluation at which its own loss was lowest, and ends with those.

    Args:
        adapter: the part that it belongs to.
    """

    chooses: ClassVar[bool] = True
    adapter: Any
    best: dict[str, float] = field(init=False, default_factory=dict)
    kept: dict[str, dict[str, Tensor]] = field(init=False, default_factory=dict, repr=False)

    def on_eval(self, run: Run, row: dict[str, Any]) -> None:
        """Keep the adapters of the languages that have never been better."""
        for language in range(self.adapter.languages):
            loss = row.get(f"loss/{language}")
            key = str(language)
            if loss is not None and loss < self.best.get(key, float("inf")):
                self.best[key] = loss
                self.kept[key] = {n: p[language].detach().clone() for n, p in self._tensors(run)}

    @torch.no_grad()
    def on_end(self, run: Run) -> None:
        """Put every language's best adapter in place."""
        for key, tensors in self.kept.items():
            for name, parameter in self._tensors(run):
                parameter[int(key)].copy_(tensors[name])

    def _tensors(self, run: Run) -> Iterator[tuple[str, Tensor]]:
        for name, layer in adapted_layers(run.model.hf).items():
            yield f"{name}.down", layer.down
            yield f"{name}.up", layer.up

    def state_dict(self) -> dict[str, Any]:
        """Return the best losses and adapters."""
        return {"best": dict(self.best), "kept": {key: dict(tensors) for key, tensors in self.kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        self.best, self.kept = dict(state["best"]), {key: dict(tensors) for key, tensors in state["kept"].items()}


@part(
    "adapter",
    "language-adapters",
    papers=[("Efficient Adapter Finetuning for Tail Languages in Streaming Multilingual ASR", "arXiv:2401.08992")],
    claim="Assembling each language's adapter from the checkpoint at which that language was best beats any single "
    "checkpoint of all languages, and comes near training everything.",
    deviations="Language models instead of a cascaded Conformer transducer; no teacher's pseudo-labels: name labelled "
    "text of each language in the data. The abstract and secondary accounts were read, not the paper's equations: the "
    "adapter is the usual residual one, norm, down, nonlinearity, up. In generation all prompts are in one language.",
)
@dataclass(kw_only=True)
class LanguageAdapters(Host):
    """Freeze the model and train one residual adapter per language behind each sublayer.

    h' = h + U_g f(D_g norm(h)), with g the language that the data says: the field "source" of a sample

    With `eval_every`, each language ends with its adapter of the evaluation at which its own held-out loss was lowest.

    Args:
        targets: layers whose output passes through; "sublayers" is after attention and after feed-forward.
        languages: how many there are; samples are numbered from 0 (data: mix with mark: true).
        width: rows of every D.
        activation: f.
        speaks: language of generation, where prompts do not say theirs.
        assemble: end with each language's best adapter.
    """

    unmergeable: ClassVar[str] = "its layers are not linear, and each language has its own"
    targets: list[str] | Literal["all-linear", "all", "sublayers"] = "sublayers"
    languages: Annotated[int, Field(ge=1)] = 2
    width: Annotated[int, Field(ge=1)] = 16
    activation: Activation = "relu"
    speaks: Annotated[int, Field(ge=0)] = 0
    assemble: bool = True

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options together."""
        if self.speaks >= self.languages:
            yield "speaks", f"expected one of {self.languages} languages, numbered from 0, got {self.speaks}"

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Wrapped:
        """Return the layer with the adapters of all languages behind it.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.
        """
        return LanguageBottleneck(base, layout, count=self.languages, width=self.width, activation=self.activation)

    def install(self, model: nn.Module, names: list[str]) -> None:
        """Put the adapters behind the layers, and let them know the language of every token.

        Args:
            model: a plain language model.
            names: dotted names of layers.
        """
        super().install(model, names)
        layers = list(adapted_layers(model).values())
        speaking, decoder = Speaking(layers[0], self.speaks, self.languages), decoder_of(model)
        for layer in layers:
            layer.speaking = speaking
        steer(model, decoder, speaking)
        decoder.register_forward_pre_hook(speaking.listen, with_kwargs=True)

    def callbacks(self) -> list[Any]:
        """Return what keeps each language's best adapter."""
        return [BestOfEach(adapter=self)] if self.assemble else []
