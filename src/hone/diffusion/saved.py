"""Where a saved denoiser lies; this imports no torch, since commands and recipes ask."""

from __future__ import annotations

from pathlib import Path

FILE, WEIGHTS = "denoiser.json", "model.safetensors"


def denoiser_folder(path: Path | str) -> Path | None:
    """Return the folder of the denoiser that a run, or a model folder, holds; None where there is none.

    Args:
        path: the run's or the model's folder.
    """
    folder = Path(path).expanduser()
    return next((place for place in (folder / "model", folder) if (place / FILE).is_file()), None)
