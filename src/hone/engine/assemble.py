"""From a recipe to parts that are ready to train, built in the order the data meets them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hone.adapters.base import CONFIG_FILE
from hone.adapters.calibration import Calibration
from hone.adapters.layers import layout_of
from hone.data.open import Opened, open_data
from hone.data.source import RowSource, Source, Split
from hone.engine import evaluate, sharding
from hone.engine.checkpoint import staged
from hone.engine.devices import Cluster, seed_all
from hone.engine.loop import Player, Run
from hone.engine.manifest import folder_hash
from hone.engine.progress import Display
from hone.recipe import Recipe
from hone.text.loading import stored_dtype
from hone.text.model import LanguageModel, shipped_base
from hone.text.starts import Pretrained


@dataclass
class Bench:
    """The assembled parts of a run, ready to train.

    Args:
        run: what trains.
        adapter: how weights are parameterised.
        data: the training data.
        eval_data: the evaluation data.
        general_data: text whose loss shows what is forgotten, None when nobody asked.
        metrics: judges of generated answers.
        sampler: picks tokens in evaluation.
        solvers: draw arrays in evaluation.
        distances: judges of drawn arrays.
        base: path of the starting model, for saved adapters.
        setup_seconds: seconds that the adapter took to attach, which data-driven ones spend on looking at data.
    """

    run: Run
    adapter: Any
    data: Opened
    eval_data: Opened
    general_data: Opened | None
    metrics: list[Any]
    sampler: Any
    solvers: list[Any]
    distances: list[Any]
    base: str
    setup_seconds: float

    def evaluate(self, display: Display) -> evaluate.Evaluation:
        """Return the loss on held-out data and the scores of generated answers."""
        run = self.run
        display.update(run.step, "evaluating on held-out data")
        with sharding.gathered(run.model):
            found = judging(self)(run.model, run.objective, run.recipe, run.cluster)
        found.scores = run.cluster.from_main(found.scores)  # every process must find the same step the best
        return found

    def save(self, folder: Path) -> None:
        """Save the trained model: a language model where transformers or PEFT can load it, a denoiser whole."""
        if self.run.model.medium == "arrays":
            with staged(folder) as staging:
                self.run.model.save_merged(staging, self.adapter)
            return
        nested = (Path(self.base) / CONFIG_FILE).is_file()  # it started from an adapter, which PEFT takes for no base
        base = str((folder / "base").resolve()) if nested else self.base
        with staged(folder) as staging:
            self.adapter.save(self.run.model.hf, staging, base=base)
            if nested and (staging / CONFIG_FILE).is_file():
                LanguageModel.load(self.base, dtype=self.run.cluster.dtype).save(staging / "base")
            self.run.model.save_tokenizer(staging)
            self.run.model.save_extras(staging)


def judging(bench: Bench) -> Callable[..., evaluate.Evaluation]:
    """Return what evaluates a model of the bench's medium: called with (model, objective, recipe, cluster)."""
    if bench.run.model.medium == "arrays":
        from hone.diffusion import judge

        arrays: Any = bench.eval_data
        return partial(judge.judge, judges=judge.ArrayJudges(arrays, bench.solvers, bench.distances))
    return partial(
        evaluate.judge, judges=evaluate.Judges(bench.eval_data, bench.metrics, bench.sampler, bench.general_data)
    )


def open_split(source: Any, model: Any, objective: Any, split: Split, **options: Any) -> Any:
    """Return a split of a source, ready for a model of its medium.

    Args:
        source: gives the samples.
        model: what they are for.
        objective: what they are for.
        split: "train" or "eval".
        options: more arguments of `open_data`, where the samples are text.
    """
    if model.medium == "arrays":
        from hone.diffusion.opened import open_arrays

        return open_arrays(source, split)
    options = {"consumes": objective.consumes, "classes": objective.class_names(), **options}
    return open_data(source, model.renderer, split=split, **options)


def assemble(recipe: Recipe, cluster: Cluster, display: Display, *, rehearsal: bool = False) -> Bench:
    """Build every part of a single-stage recipe, in the order the data meets them.

    Args:
        recipe: a checked recipe without stages.
        cluster: device and processes.
        display: says what was found.
        rehearsal: whether only a few steps will be run, to measure them.
    """
    seed_all(recipe.seed, 0)
    source = recipe.build("data")
    eval_source, eval_split = evaluation_data(recipe, source)
    for one in (source, eval_source):
        if isinstance(one, RowSource):  # a wrong column is found before a model is loaded
            one.layout()
    start, objective = recipe.build("model"), recipe.build("objective")
    adapter = recipe.build("adapter")
    model = _load(start, adapter, recipe, cluster, source)
    _introduce(model, start, objective, source, eval_source)
    context = adapter.room(model.context)

    def opened(label: str, which: Source, split: Split, consumes: str = objective.consumes) -> Opened:
        display.start(label, None)
        made: Opened = open_split(
            which, model, objective, split, consumes=consumes, context=context, progress=display.update
        )
        display.stop()
        return made

    data = opened("reading data", source, "train")
    eval_data = opened("reading held-out data", eval_source, eval_split)
    general_data = None
    if recipe.general_data is not None:
        general = recipe.build("general_data")
        general_data = opened("reading general data", general, general.evaluation_split(), "tokens")
    _tell(display, data, eval_data)
    began = time.perf_counter()
    with cluster.autocast():
        text = None if general_data is None else look(general_data, recipe, model, evaluate.Text())
        adapter.attach(model.hf, look(data, recipe, model, objective, text))
    setup_seconds = time.perf_counter() - began
    model.to(device=cluster.device)
    if cluster.precision == "bf16" and not adapter.saves_base and model.medium == "text":
        narrow(model)
    cluster.align(model)
    if cluster.sharded:
        sharding.shard(model, cluster)
    run = _prepare(recipe, cluster, model, objective, adapter, data)
    run.held_out, run.display, run.rehearsal = eval_data.trees, display, rehearsal
    _start(run)
    base = getattr(start, "path", "")
    local = shipped_base() if base == "base" else Path(base).expanduser()
    base = str(local.resolve()) if base and local.is_dir() else base  # a saved adapter is loaded from any folder
    metrics, sampler, solvers, distances = (recipe.build(n) for n in ("metrics", "sampler", "solvers", "distances"))
    return Bench(run, adapter, data, eval_data, general_data, metrics, sampler, solvers, distances, base, setup_seconds)


def _load(start: Any, adapter: Any, recipe: Recipe, cluster: Cluster, source: Source) -> LanguageModel:
    """Return the model that a run starts from, before anything is attached to it."""
    # A base in few bits need not fit the device as it was: it is quantised where it was read, and moved then.
    home = cluster.device if getattr(adapter, "quantize", "none") == "none" else torch.device("cpu")
    # A base that stays frozen in bf16 is read in it: in float32 one of 7 billion parameters takes 28 GB, not 14.
    frozen = cluster.precision == "bf16" and not adapter.saves_base and isinstance(start, Pretrained)
    dtype = stored_dtype(start.path, cluster.dtype) if frozen else cluster.dtype
    model: LanguageModel = start.load(device=home, dtype=dtype, data=source)
    model.checkpoint_layers(recipe.recompute)
    if not recipe.packing:
        model.packs = False
    return model


def narrow(model: LanguageModel, frozen: torch.dtype | None = torch.bfloat16) -> None:
    """Hold a language model's frozen weights in bf16, in which it may have been read, and what trains in float32.

    Autocast would cast frozen weights anew in every forward pass; steps of 1e-5 of a weight are lost in bf16.

    Not beside a tensor that trains in the same module, unless it is a layer of products, whose tensors autocast brings
    to one precision: a norm takes its weight and bias as they are, and on the CPU refuses two precisions.

    Not a denoiser's, into which the adapter is merged in the end: in bf16, 77% of the weights would not take a change
    of 1e-3 of their deviation.

    Args:
        model: the language model, its adapter attached.
        frozen: what frozen weights are held in; None leaves them as they are.
    """
    own = [list(module.parameters(recurse=False)) for module in model.modules() if layout_of(module) is None]
    whole = {id(p) for params in own if any(p.requires_grad for p in params) for p in params}
    for parameter in model.parameters():
        held = torch.float32 if parameter.requires_grad or id(parameter) in whole else frozen
        if held is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(held)


def _introduce(model: LanguageModel, start: Any, objective: Any, *sources: Source) -> None:
    """Let sources and the objective meet the model that a run starts from, before any data is read."""
    acquaint(sources, lambda: model, start, objective)
    objective.look(sources[0])
    objective.equip(model)
    if path := getattr(start, "path", ""):
        model.load_extras(Path(path))


def _tell(display: Display, data: Any, held_out: Any) -> None:
    """Say what a run trains on and how much it is evaluated on."""
    display.say(data.describe())
    if held_out.trees is not None:
        count = len(held_out.trees)
        display.say(
            f"{count:,} samples to evaluate on" if count else "nothing to evaluate on: set holdout or eval_data"
        )


def acquaint(sources: Sequence[Source], load: Callable[[], LanguageModel], start: Any, objective: Any) -> None:
    """Tell sources what their samples may depend on, before any is read.

    Args:
        sources: the data.
        load: returns the model that the run starts from.
        start: the part that made it.
        objective: what the samples are for.
    """
    for source in sources:
        source.meet(load, _identity(start))
        source.suit(objective.consumes)


def _prepare(recipe: Recipe, cluster: Cluster, model: LanguageModel, objective: Any, adapter: Any, data: Opened) -> Run:
    """Return the run of a model whose adapter is attached: what acts beside the steps, and nobody who trains yet."""
    loader = data.loader(recipe.batch_tokens, recipe.seed, recipe.epochs)
    total = recipe.steps if recipe.steps is not None else loader.total_steps(recipe.epochs or 1.0)
    callbacks, penalties = recipe.build("callbacks") + adapter.callbacks(), recipe.build("penalties")
    return Run(
        recipe, cluster, model, objective, loader, total, callbacks=callbacks,
        penalties=penalties + adapter.penalties(), adapter=adapter,
    )  # fmt: skip


def _start(run: Run) -> None:
    """Add who trains and what moves them, and let the objective and the penalties prepare."""
    model, recipe = run.model, run.recipe
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors = {f"hf.{name}": factor for name, factor in run.adapter.rates(model.hf).items()}
    optimizer = recipe.build("optimizer").build(params, factors)
    run.players["model"] = Player(params, optimizer, recipe.build("schedule").factor)
    for part in (run.objective, *run.penalties):
        part.setup(run)
    run.loader.join(run)


def _identity(start: Any) -> str:
    """Return what tells the content of the model that a run starts from, and how it is asked."""
    path = getattr(start, "path", "")
    local = shipped_base() if path == "base" else Path(path).expanduser()
    content = (folder_hash(local) if path else None) or json.dumps(str(start))
    template = getattr(start, "template", None)
    if template is None:
        return content
    written = Path(template).expanduser()
    return f"{content}:{written.read_text(encoding='utf-8') if written.is_file() else template}"


def evaluation_data(recipe: Recipe, source: Source | None = None) -> tuple[Source, Split]:
    """Return what a recipe evaluates on: the held-out split of its data, or all of `eval_data`.

    Args:
        recipe: a checked recipe.
        source: its training data, when it is built already.
    """
    if recipe.eval_data is None:
        return recipe.build("data") if source is None else source, "eval"
    other = recipe.build("eval_data")
    return other, other.evaluation_split()


def look(
    opened: Opened, recipe: Recipe, model: LanguageModel, objective: Any, general: Calibration | None = None
) -> Calibration:
    """Return data as adapters see it that look at data before they train.

    Args:
        opened: the data.
        recipe: a checked recipe.
        model: the model, without an adapter.
        objective: gives the loss whose gradients may be asked for.
        general: text apart from the task.
    """
    return Calibration(
        batches=opened.calibration(recipe.batch_tokens, recipe.seed, next(model.parameters()).device),
        forward=model.hidden, loss=lambda batch: objective.loss(model, batch)[0], count=objective.count,
        general=general, head=getattr(model, "head", None),
    )  # fmt: skip


def describe_model(bench: Bench) -> dict[str, Any]:
    """Return the path, content hash and sizes of the model that a run starts from."""
    model = bench.run.model
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for _, p in bench.run.trainable if p.requires_grad)
    return {"base": bench.base, "sha256": folder_hash(Path(bench.base)) if bench.base else None,
            "parameters": everything, "trained": trained, "packed": bool(model.packs)}  # fmt: skip
