"""Run several programs of one job in turn, each in a process of its own, and print medians and ratios.

Alternating (A B A B ...) keeps the comparison fair when the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def whole_peak() -> int:
    """Return the peak resident memory of this process since it began, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_side(script: Path, side: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run one side in a fresh process; its last line of output is a JSON object."""
    command = [sys.executable, str(script), "--side", side, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternate(script: Path, sides: Sequence[str], rounds: int, arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run the sides in turn, `rounds` times, and return the median of each figure by side."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            found[side].append(run_side(script, side, arguments))
            print(f"round {number + 1}: {side}: {found[side][-1]}", file=sys.stderr, flush=True)
    return {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()}


def compare(
    script: Path,
    doc: str | None,
    sides: Mapping[str, Callable[[int], dict[str, float]]],
    steps: int,
    ratios: Callable[[dict[str, dict[str, float]]], dict[str, float]],
) -> None:
    """Run one side as the command line asks, or all of them alternating, and print and keep the comparison.

    Args:
        script: the benchmark's file, which every side runs again.
        doc: what it says of itself.
        sides: by name what runs some steps and returns figures.
        steps: how many by default.
        ratios: returns what the figures of all sides come to.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=list(sides))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(sides[args.side](args.steps)))
        return
    found = alternate(script, list(sides), args.rounds, ["--steps", str(args.steps)])
    report = {"machine": machine(), **found, **ratios(found)}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> str:
    """Return the machine in words: processor, cores, GPUs, threads, torch."""
    import torch

    from hone.engine import manifest

    return f"{manifest.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
