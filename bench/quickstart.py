"""What `make demo` shows, over several seeds: accuracy before and after, time and memory, each run in its own process.

python bench/quickstart.py [--seeds 3] [--out docs/evidence/quickstart.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import machine


def run(seed: int, out: str) -> dict[str, Any]:
    """Run the recipe once and return its result."""
    settings = ["--set", f"seed={seed}", "--set", f"out={out}"]
    command = [sys.executable, "-m", "hone.cli", "run", "quickstart", "--json", *settings]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run all seeds and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            result = run(seed, f"{scratch}/{seed}")
            rows.append({
                "seed": seed, "before": result["before"], "after": result["after"], "seconds": result["seconds"],
                "peak_mib": round(result["peak_memory"] / 2**20),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    gains = [row["after"]["accuracy"] - row["before"]["accuracy"] for row in rows]
    report = {"machine": machine(), "recipe": "quickstart", "runs": rows, "smallest_gain": min(gains)}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
