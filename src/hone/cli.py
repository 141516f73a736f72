"""The command line: `hone run`, `resume`, `check`, `compare`, `verify`, `report`, `list`, `show`, `find`, and so on.

Heavy imports live inside the commands, so that `hone --help` answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hone.errors import HoneError

app = typer.Typer(
    help="Every published training technique is a switch: name it in a recipe, run it, compare it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. adapter.rank=16.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object for programs.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, help="Cells at a time; default what the machine allows. OMP_NUM_THREADS bounds the threads of each."
    ),
]


def main() -> None:
    """Run the command line; an error meant for the user is printed without a traceback, with exit status 2."""
    try:
        app()
    except HoneError as error:
        print(f"hone: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _finish(result: dict[str, Any], as_json: bool) -> None:
    from hone.engine.summary import summary

    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks
        print(json.dumps(result) if as_json else "\n".join(summary(result)))
    raise SystemExit(0 if result["status"] == "finished" else 130)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe by name, or a YAML file.")],
    overrides: Set = [],  # noqa: B006 - typer reads the default, nothing writes it
    as_json: Json = False,
) -> None:
    """Train; everything lands in one run folder, which is never overwritten."""
    from hone.recipe import Recipe

    checked = Recipe.load(recipe, overrides)
    from hone.engine.progress import Display
    from hone.engine.run import run as run_recipe

    _finish(run_recipe(checked, Display()), as_json)


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False) -> None:
    """Go on from the last good checkpoint, to the same bytes as if the run had never stopped."""
    from hone.engine.progress import Display
    from hone.engine.run import resume as resume_run

    _finish(resume_run(run, Display()), as_json)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe by name, or a YAML file.")],
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Rehearse a run: show what is trained, run the longest batch, save, reload; print memory and time."""
    from hone.recipe import Recipe

    checked = Recipe.load(recipe, overrides)
    from hone.engine.preflight import preflight
    from hone.engine.progress import Display

    found = preflight(checked, Display())
    settings = [word for override in overrides for word in ("--set", override)]
    print(json.dumps(found.record()) if as_json else found.text(shlex.join(["hone", "run", recipe, *settings])))


@app.command(name="list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="adapter, objective, optimizer, data, ...")] = None,
    as_json: Json = False,
) -> None:
    """List every part and recipe, with what became of its paper's claims: "-" where none has been tested."""
    from hone import catalogue

    entries = catalogue.entries(kind)
    if as_json:
        print(json.dumps([entry.plain() for entry in entries], indent=1))
        return
    names = max((len(entry.name) for entry in entries), default=0)
    marks = max((len(entry.mark) for entry in entries), default=0)
    for before, entry in zip([None, *entries], entries, strict=False):
        gap = "\n" if before is not None and before.kind != entry.kind else ""
        print(f"{gap}{entry.kind:<10} {entry.name:<{names}}  {entry.mark:<{marks}}  {entry.summary}")
    if not entries:
        print(f"there is no {kind} yet")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A part or a recipe.")],
    kind: Annotated[str | None, typer.Option(help="Where kinds share a name, e.g. objective.")] = None,
    as_json: Json = False,
) -> None:
    """Show one part, or print a recipe: `hone show quickstart > mine.yaml` starts your own."""
    from hone import catalogue

    entries = catalogue.named(name, kind)
    if as_json:
        print(json.dumps([entry.plain() for entry in entries], indent=1))
        return
    recipes = [entry for entry in entries if entry.kind == "recipe"]
    for entry in entries if recipes else []:  # a recipe is printed alone, so that it can start one's own
        if entry.kind != "recipe":
            print(f"note: there is also: hone show {name} --kind {entry.kind}", file=sys.stderr)
    print("\n\n".join(entry.text(name) for entry in recipes or entries))


@app.command()
def find(
    need: Annotated[str, typer.Argument(help='Words, e.g. "use less memory in the optimizer".')],
    limit: Annotated[int, typer.Option(min=1, help="Most lines.")] = 10,
    as_json: Json = False,
) -> None:
    """Find the parts and recipes for a need, the best first."""
    from hone import search

    matches = search.find(need, limit)
    if as_json:
        print(json.dumps([match.plain() for match in matches], indent=1))
        return
    for match in matches:
        entry = match.entry
        print(f"{match.score:4.1f}  {entry.kind} {entry.name} [{entry.verdict or '-'}]  {entry.summary}")
        if match.sentence != entry.summary:
            print(f"      > {match.sentence}")
    if not matches:
        near = ", ".join(search.suggestions(need))
        print(f"nothing in the catalogue matches '{need}' ({f'nearest names: {near}' if near else 'see: hone list'})")


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe by name, or a YAML file.")],
    vary: Annotated[
        list[str], typer.Option(metavar="FIELD=A,B", help="Values of a field to compare; several multiply.")
    ] = [],  # noqa: B006
    with_: Annotated[list[str], typer.Option("--with", metavar="RECIPE", help="Another whole recipe to compare.")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds: same data order, same evaluation set.")] = 3,
    budget: Annotated[str, typer.Option(metavar="KIND=N", help="steps, tokens, seconds or flops of every run.")] = "",
    tune: Annotated[list[str], typer.Option(metavar="FIELD=X,Y", help="Values that every variant tries first.")] = [],  # noqa: B006
    metric: Annotated[str, typer.Option(help="What ranks; default accuracy where there is one, else loss.")] = "",
    baseline: Annotated[str, typer.Option(help="Label of the variant to compare with; default the first.")] = "",
    general: Annotated[str, typer.Option(help="Text that shows forgetting; default pydocs; 'none' for none.")] = "",
    on: Annotated[str, typer.Option(help="Where cells run: local, ray, or ray:ADDRESS.")] = "local",
    jobs: Jobs = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run cells again that failed before.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where; default runs/compare-RECIPE-KEY.")] = None,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Measure variants of a recipe against each other: equal budget, paired seeds, intervals, cost, forgetting."""
    from hone.evidence.command import Request, run_comparison

    request = Request(
        recipes=[recipe, *with_], vary=vary, seeds=seeds, budget=budget, tune=tune, metric=metric, baseline=baseline,
        general=general, on=on, jobs=jobs, retry=retry, out=out, overrides=overrides, command=_typed(),
    )  # fmt: skip
    result, lines = run_comparison(request)
    print(json.dumps(result) if as_json else "\n".join(lines))
    failed = all(row["status"] == "failed" for row in result["variants"])
    raise SystemExit(130 if result["status"] != "finished" else int(failed))


@app.command()
def verify(
    names: Annotated[list[str], typer.Argument(help="Parts, kinds, KIND.NAME.CLAIM, or all.")],
    stale: Annotated[bool, typer.Option("--stale", help="Only claims that never ran or whose source changed.")] = False,
    recheck: Annotated[
        bool, typer.Option("--recheck", help="Only look, with one seed, whether stale results are as they were.")
    ] = False,
    show_only: Annotated[bool, typer.Option("--list", help="Name the claims, run nothing.")] = False,
    on: Annotated[str, typer.Option(help="Where cells run: local, ray, or ray:ADDRESS.")] = "local",
    jobs: Jobs = None,
    out: Annotated[
        Path | None, typer.Option(help="Where results go; default the project's docs/evidence/claims.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the experiments behind what methods claim, and store what came out."""
    from hone.evidence.recheck import recheck_command
    from hone.evidence.verify import verify_command

    if recheck and not show_only:
        records, lines = recheck_command(names, on=on, jobs=jobs, out=out)
    else:
        records, lines = verify_command(names, stale=stale or recheck, show_only=show_only, on=on, jobs=jobs, out=out)
    print(json.dumps(records) if as_json else "\n".join(lines))
    raise SystemExit(1 if any(record["verdict"] == "failed" for record in records) else 0)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Put runs side by side in one page: figures, curves, settings that differ, answers to the same prompts."""
    from hone.evidence.runs_page import write_runs

    print(f"report: {write_runs(runs, out)}")


def _typed() -> str:
    """Return the command line as the user could type it again."""
    import shlex

    return shlex.join(["hone", *sys.argv[1:]])


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder or a model folder.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text to answer; may be repeated.")] = [],  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 picks the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the sampler.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template, as a user's turn.")] = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with a trained model; without --prompt, some held-out ones."""
    from hone.engine.use import sample_run

    rows = sample_run(
        run, prompt, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat
    )
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        for answer in row["answers"]:
            print(f"--- {row['prompt'].rstrip()}\n{answer.rstrip()}")


@app.command(name="eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Evaluate a finished run's model on held-out data: loss, and the accuracy of generated answers."""
    from hone.engine.progress import Display
    from hone.engine.use import eval_run

    row = eval_run(run, overrides, Display())
    print(json.dumps(row) if as_json else "\n".join(f"{name}: {value:.4f}" for name, value in row.items()))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[str, typer.Option(help="hf: a whole model; peft: the adapter alone.")] = "hf",
    out: Annotated[Path | None, typer.Option(help="Where; default RUN/export-TO.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default as trained.")] = "",
    as_json: Json = False,
) -> None:
    """Write the trained model for other libraries, and prove that it gives the same logits."""
    from hone.engine.use import export_run

    made = export_run(run, to, out, dtype)
    shown = [made["path"], f"largest difference of a logit after reloading: {made['error']:.1e}"]
    shown += [f"by rounding to {dtype}: {made['rounding']:.1e}"] if made["rounding"] is not None else []
    shown += [f"load it on: {made['base']}"] if made["base"] else []
    print(json.dumps(made) if as_json else "\n".join(shown))


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="Model folders, adapters or Hub names, trained from one start.")],
    out: Annotated[Path, typer.Option(help="The new model's folder.")],
    method: Annotated[str, typer.Option(help="A merger; see: hone list merger.")] = "linear",
    base: Annotated[str | None, typer.Option(help="What they were trained from, where changes are added.")] = None,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Merge models into one, through their files; --set gives the method's options, e.g. density=0.2."""
    from hone.engine.merging import merge_command

    made = merge_command(models, base, method, overrides, out)
    print(json.dumps(made) if as_json else f"{made['path']}: {made['parameters']:,} parameters")


if __name__ == "__main__":
    main()
