"""One comparison of the whole family of adapters: one task, equal budget, equal trained parameters where it can be.

    python bench/family.py [--jobs N] [--out docs/evidence/compare-adapters.json] [--count]

The shipped model learns to sort in 40 steps (the claims' task SORT). Every
adapter tries the same four learning rates (ten times those where few numbers train) on a seed of its own and then runs
on five paired seeds at its best. Sizes are chosen so that each trains about as many numbers as LoRA of rank 8 does,
175,104; those that cannot show it by their count. `--count` prints the counts alone.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LORA = {"rank": 8}
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "full": "full", "hft": "hft", "lisa": {"name": "lisa", "layers": 1, "interval": 5}, "cofitune": "cofitune",
    "lora": {"name": "lora", **LORA}, "rslora": {"name": "lora", **LORA, "rank_stabilized": True},
    "dora": {"name": "lora", **LORA, "weight_decomposed": True},
    **{name: {"name": name, **LORA} for name in ("pissa", "olora", "eva", "corda", "allora", "lora-plus", "qlora")},
    "corda-preserved": {"name": "corda", **LORA, "mode": "knowledge-preserved"},
    **{name: {"name": name, **LORA} for name in ("loftq", "lq-lora", "ba-lora", "deft", "adalora", "triadaptlora")},
    "diffora": {"name": "diffora", "rank": 11}, "lora-sb": {"name": "lora-sb", "rank": 64},
    "lamda": {"name": "lamda", "rank": 64}, "lamda-plus": {"name": "lamda-plus", "rank": 64}, "vera": "vera",
    "s2-lora": {"name": "s2-lora", "rank": 96}, "mos": {"name": "mos", "rank": 16, "budget": 8, "private": 2},
    "llava-mole": {"name": "llava-mole", "rank": 4}, "mor": {"name": "mor", "experts": 4, "rank": 2, "targets": MLP},
    "smore": {"name": "smore", "experts": [2, 2], "active": [1, 1], "ranks": [2, 2], "narrow": 8, "width": 8},
    "s2ft": {"name": "s2ft", "o": 0.16, "down": 0.235}, "spiel": {"name": "spiel", "entries": 175_104},
    "sara": {"name": "sara", "share": 0.066}, "ia3": "ia3", "bitfit": "bitfit",
    "bottleneck": {"name": "bottleneck", "width": 37}, "qst": {"name": "qst", "rank": 8},
    "prompt-tuning": "prompt-tuning", "prefix-tuning": {"name": "prefix-tuning", "tokens": 76},
}  # fmt: skip
# Few numbers far from the weights want steps ten times as long.
LONGER = {"vera", "ia3", "bitfit", "prompt-tuning", "prefix-tuning"}


def _look(network: Any) -> Any:
    """Return data to look at: a row of ids, as task and as general text."""
    import torch

    from hone.adapters.calibration import Calibration

    ids = torch.arange(256)[None]

    def loss(batch: Any) -> Any:
        return network(input_ids=batch, labels=batch).loss * 255

    def data(general: Calibration | None) -> Calibration:
        return Calibration([ids, ids], lambda b: network(input_ids=b), loss, lambda b: 255.0, general)

    return data(data(None))


def count() -> None:
    """Print how many numbers each adapter trains in the shipped model."""
    from hone import options
    from hone.text.model import LanguageModel

    for label, spec in ADAPTERS.items():
        model = LanguageModel.load("base")
        options.build_part("adapter", spec).attach(model.hf, _look(model.hf))
        print(f"{label:16} {sum(p.numel() for p in model.parameters() if p.requires_grad):>9,}", flush=True)


def main() -> None:
    """Run the comparison, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--count", action="store_true")
    parser.add_argument(
        "--again", nargs="*", help="look for the learning rates of these alone; others keep those of OUT"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/compare-adapters"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/compare-adapters.json"))
    args = parser.parse_args()
    if args.count:
        count()
        return
    from hone.engine.progress import Display
    from hone.evidence.claims.tasks import RATES, SORT
    from hone.evidence.compare import compare, table
    from hone.evidence.contest import Comparison
    from hone.evidence.pool import LocalPool
    from hone.evidence.variants import Variant, changed

    def settings(label: str) -> dict[str, Any]:
        longer = {"optimizer.rates": {"hf": 10.0}} if label in LONGER else {}
        return {"adapter": ADAPTERS[label], **longer}

    def contest(name: str, chosen: dict[str, dict[str, Any]], tune: dict[str, Any], seeds: int) -> dict[str, Any]:
        variants = [Variant(label, changed(SORT, given), given) for label, given in chosen.items()]
        comparison = Comparison(
            name=name, variants=tuple(variants), seeds=seeds, tune=tune, metric="loss", baseline=next(iter(chosen)),
            command="python bench/family.py",
        )  # fmt: skip
        result = compare(comparison, args.runs / name, pool=LocalPool(args.jobs), display=Display(), retry=True)
        if result["status"] != "finished":
            raise SystemExit("stopped; finished runs are kept: call it again to go on")
        return result

    # Tuning and running are two contests, so that an adapter whose code has changed is tuned anew without the others.
    known = json.loads(args.out.read_text(encoding="utf-8"))["variants"] if args.again else []
    looked = {row["label"]: row for row in known if row["label"] not in args.again}
    if missing := [label for label in ADAPTERS if label not in looked]:
        found = contest("tuned", {label: settings(label) for label in missing}, {"optimizer.lr": RATES}, 1)
        looked.update({row["label"]: row for row in found["variants"]})
    first = ["lora", *(label for label in ADAPTERS if label != "lora")]
    result = contest("adapters", {label: {**settings(label), **looked[label]["tuned"]} for label in first}, {}, 5)
    for row in result["variants"]:
        row.update(
            {key: looked[row["label"]][key] for key in ("tuned", "trials", "note")}, settings=settings(row["label"])
        )
        row.pop("cells", None)
    result["tune"] = {"optimizer.lr": RATES}
    print("\n".join(table(result)))
    kept = {key: value for key, value in result.items() if key not in ("folder", "report")}
    args.out.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
