"""What a run says at its end: the gain, some answers, where everything lies, and what to try next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.diffusion.saved import denoiser_folder
from hone.engine.folder import RunFolder, stage_folders
from hone.engine.progress import clock
from hone.figures import is_share

SHOWN = 3  # answers that are printed
STILL_SHARE = 0.1  # share of steps without a gradient from which on they are told


def summary(result: dict[str, Any]) -> list[str]:
    """Return what a run made, where, and the next commands to try, as lines of text.

    Args:
        result: what `run` or `resume` returned.
    """
    path = result["run"]
    lines = [
        f"{result['steps']} steps, {result['tokens']:,} {unit(result)}, {clock(result['training_seconds'])} of "
        f"training, peak memory {result['peak_memory'] / 2**20:,.0f} MiB"
    ]
    still = result.get("still_steps", 0)  # runs of before do not say
    if still and still >= STILL_SHARE * result["steps"]:
        lines.append(f"the gradient was exactly 0 in {still} of these steps: nothing was learned from them")
    if result["status"] == "interrupted":
        return [*lines, f"{result['reason']}; everything is saved. Go on with:  hone resume {path}"]
    lines += _answers(Path(path))
    for name, after in result["after"].items():
        before = result["before"].get(name)
        if before is not None:
            shown = [f"{value:.1%}" if is_share(name) else f"{value:.3f}" for value in (before, after)]
            lines.append(f"held-out {name}: {shown[0]} before, {shown[1]} after")
    text = unit(result) == "tokens"
    further = [f"  hone sample {path} --prompt '...'", f"  hone eval {path}", f"  hone export {path} --to hf"]
    return [
        *lines, f"model:  {result['model']}", f"report: {result['report']}", "next:",
        *(further if text else [f"  hone sample {path} --samples 64", f"  hone eval {path}"]),
    ]  # fmt: skip


def unit(result: dict[str, Any]) -> str:
    """Return what a run counts: tokens, or arrays."""
    model = result.get("model")
    return "arrays" if model and denoiser_folder(model) else "tokens"


def _answers(path: Path) -> list[str]:
    """Return a few prompts with the answers before and after, as lines of text."""
    folders = [path, *stage_folders(path)]
    rows = [row for folder in folders for row in RunFolder(folder).rows("samples.jsonl")]
    if not rows:
        return []
    first = {(row["where"], row["prompt"]): row for row in reversed(rows)}  # sources of a mixture share places
    lines = []
    for row in [row for row in rows if row["step"] == rows[-1]["step"]][-SHOWN:]:
        lines.append(f"--- {row['prompt'].strip()}")
        for label, one in (("before", first[row["where"], row["prompt"]]), ("after", row)):
            mark = {None: "", 0.0: " (wrong)", 1.0: " (right)"}.get(one.get("accuracy"), "")
            text = one["answer"].strip().replace("\n", "\n    ")
            lines.append(f"  {label}{mark}:\n    {text[:400] or '(nothing)'}")
    return [*lines, ""]
