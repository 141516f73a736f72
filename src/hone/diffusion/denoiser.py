"""The denoiser D(x, sigma): any network behind a parameterisation, with its data's shape, scale and classes."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hone.diffusion.items import Batch, Item, collate
from hone.diffusion.levels import Parameterisation, spread
from hone.diffusion.saved import FILE, WEIGHTS, denoiser_folder
from hone.diffusion.views import check_guidance
from hone.errors import HoneError, ModelError
from hone.files import write_whole
from hone.precision import wide_dtype

log = logging.getLogger("hone")
EXTRAS_FILE = "extras.safetensors"  # beside the weights: what an objective has put beside the network


class Denoiser(nn.Module):
    """Guesses the clean array y in x = y + sigma n.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise, labels), the coefficients being those of `parameterisation`.
    """

    medium = "arrays"
    context = None  # arrays have no length that could be too long
    packs = True

    def __init__(
        self,
        network: nn.Module,
        parameterisation: Parameterisation,
        shape: tuple[int, ...],
        *,
        classes: int = 0,
        sigma_max: float = 80.0,
        built: dict[str, Any] | None = None,
    ) -> None:
        """Hold the network.

        Args:
            network: F, called with (x, noise (B,), labels (B,) or None, extras (B, k) or None).
            parameterisation: what F's output means.
            shape: of one array.
            classes: of the data, 0 for none.
            sigma_max: noise level from which samples start.
            built: specification of the network, which builds it again.
        """
        super().__init__()
        self.hf = network  # what adapters are attached to, as in `LanguageModel`
        self.parameterisation, self.shape, self.classes = parameterisation, tuple(shape), classes
        self.sigma_max, self.built = sigma_max, built or {}
        self.extras = nn.ModuleDict()
        self.widened = 0

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data."""
        return self.parameterisation.sigma_data

    @property
    def wide(self) -> torch.dtype:
        """The precision of arrays: that of the weights, and at least float32."""
        return wide_dtype(next(self.parameters()))

    @property
    def sigma_min(self) -> float:
        """The smallest noise level."""
        return self.parameterisation.sigma_min

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return D (B, *shape).

        Args:
            x: (B, *shape) noisy arrays.
            sigma: (B,) noise levels, or one number for all.
            labels: (B,) int64 classes, -1 for none; None for none at all.
            extras: (B, k) further numbers that `widen` has made room for.
        """
        x = x.to(torch.promote_types(x.dtype, self.wide))  # adapters that look at data show it in float32
        sigma = sigma.expand(len(x)) if sigma.dim() == 0 else sigma
        found = self.parameterisation.coefficients(sigma)
        raw = self.hf(spread(found.inside, x) * x, found.noise.to(x.dtype), labels, extras)
        return spread(found.skip, x) * x + spread(found.out, x) * raw

    def guided(self, x: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Return D under classifier-free guidance: D(none) + guidance (D(label) - D(none)), in one pass of 2 B arrays.

        Args:
            x: (B, *shape) noisy arrays.
            sigma: (B,) noise levels, or one number.
            labels: (B,) classes; None where guidance is 1.
            guidance: 1 leaves D as it is.
        """
        check_guidance(guidance, labels is not None)
        if labels is None or guidance == 1.0:
            return self(x, sigma, labels)
        sigma = sigma.expand(len(x)) if sigma.dim() == 0 else sigma
        both = self(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([labels, torch.full_like(labels, -1)]))
        told, untold = both.chunk(2)
        return untold + guidance * (told - untold)

    def widen(self, count: int) -> None:
        """Make room for `count` further numbers beside the noise level, without effect at first.

        Args:
            count: how many.

        Raises:
            ModelError: the network takes none.
        """
        if not hasattr(self.hf, "widen"):
            raise ModelError(
                f"the objective shows its network {count} more numbers, which {type(self.hf).__name__} does not take; "
                "use one of hone's own networks: mlp, unet or dit"
            )
        network: Any = self.hf
        network.widen(count)
        self.widened = max(self.widened, count)

    def collate(self, items: Sequence[Item]) -> Batch:
        """Return items as a batch, in the model's precision."""
        found = collate(items)
        return replace(found, arrays=found.arrays.to(self.wide))

    def checkpoint_layers(self, enabled: bool) -> None:
        """Refuse recomputation, which small networks do not need.

        Raises:
            ModelError: it is asked for.
        """
        if enabled:
            raise ModelError("recompute: a denoiser's layers are not recomputed; switch it off")

    def hidden(self, batch: Batch) -> Tensor:
        """Run the network once at middling noise, for methods that look at the inputs of its layers.

        Numbers that `widen` has made room for are 0.

        Args:
            batch: on the model's device.
        """
        sigma = torch.full((len(batch),), self.sigma_data, device=batch.arrays.device)
        extras = torch.zeros(len(batch), self.widened).to(batch.arrays) if self.widened else None
        return self(batch.arrays + self.sigma_data * torch.randn_like(batch.arrays), sigma, batch.labels, extras)

    def save(self, folder: Path) -> None:
        """Write the denoiser, its network's specification beside the weights.

        Args:
            folder: where; it exists.
        """
        kept = self.parameterisation
        record = {
            "network": self.built, "shape": list(self.shape), "classes": self.classes, "sigma_max": self.sigma_max,
            "parameterisation": kept.kind, "sigma_data": kept.sigma_data, "sigma_min": kept.sigma_min,
            "extras": self.widened,
        }  # fmt: skip
        write_whole(folder / FILE, (json.dumps(record, indent=1) + "\n").encode())
        save_file({name: t.contiguous() for name, t in self.hf.state_dict().items()}, folder / WEIGHTS)

    def save_merged(self, folder: Path, adapter: Any) -> None:
        """Write the denoiser with what an adapter has learned, as whole weights.

        Args:
            folder: where; it exists.
            adapter: attached to the network.
        """
        whole = copy.deepcopy(self)
        adapter.strip(whole.hf)
        whole.save(folder)
        whole.save_extras(folder)

    def save_extras(self, folder: Path) -> None:
        """Write what an objective has put beside the network.

        Args:
            folder: where; it exists.
        """
        if len(self.extras):
            save_file({k: v.contiguous() for k, v in self.extras.state_dict().items()}, folder / EXTRAS_FILE)

    def load_extras(self, folder: Path) -> None:
        """Read what `save_extras` wrote: whatever has the name of a module that the objective puts beside the network.

        What only other objectives know is left out; what was not saved begins anew, and a note says so.

        Args:
            folder: of a run, or its `model` folder.

        Raises:
            ModelError: a module of that name has other shapes.
        """
        place = denoiser_folder(folder)
        if place is None or not len(self.extras) or not (place / EXTRAS_FILE).is_file():
            return
        path, saved = place / EXTRAS_FILE, dict[str, dict[str, Tensor]]()
        try:
            for name, tensor in load_file(path).items():
                module, _, rest = name.partition(".")
                saved.setdefault(module, {})[rest] = tensor
            for name in self.extras.keys() & saved.keys():
                self.extras[name].load_state_dict(saved[name])
        except (RuntimeError, SafetensorError) as error:
            raise ModelError(f"{path} does not fit what the objective puts beside the model: {error}") from error
        if fresh := ", ".join(sorted(self.extras.keys() - saved.keys())):
            log.warning("%s holds no %s, which begins anew; it holds %s", path, fresh, ", ".join(sorted(saved)))

    @staticmethod
    def load(folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Denoiser:
        """Read a saved denoiser.

        Args:
            folder: of a run, or its `model` folder.
            device: where it computes.
            dtype: of its weights.

        Raises:
            HoneError: there is none.
        """
        from hone import options

        place = denoiser_folder(folder)
        if place is None:
            raise HoneError(f"there is no denoiser in '{folder}': expected a finished run or a folder with {FILE}")
        record = json.loads((place / FILE).read_text(encoding="utf-8"))
        shape = tuple(record["shape"])
        network = options.build_part("network", record["network"]).build(shape, record["classes"])
        kept = Parameterisation(record["parameterisation"], record["sigma_data"], record["sigma_min"])
        made = Denoiser(
            network, kept, shape, classes=record["classes"], sigma_max=record["sigma_max"], built=record["network"]
        )
        if record["extras"]:
            made.widen(record["extras"])
        made.to(device=device, dtype=dtype)  # before the weights, which may be wider than a fresh network's
        network.load_state_dict(load_file(place / WEIGHTS))
        return made
