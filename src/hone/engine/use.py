"""What one does with a finished run: sample, evaluate, export."""

from __future__ import annotations

import itertools
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hone.adapters.base import CONFIG_FILE, read_config, reader
from hone.data.open import open_data
from hone.data.sample import Message, Sample
from hone.data.source import Source
from hone.diffusion.saved import denoiser_folder
from hone.diffusion.use import evaluate_arrays, sample_arrays
from hone.engine import evaluate
from hone.engine.assemble import acquaint, evaluation_data, narrow
from hone.engine.checkpoint import SUMS, staged
from hone.engine.devices import Cluster
from hone.engine.folder import RunFolder
from hone.engine.loop import Run
from hone.engine.progress import Display, listen
from hone.engine.run import last_stage, require_finished, stages_of
from hone.errors import HoneError
from hone.objectives.base import Objective
from hone.recipe import Recipe
from hone.samplers.text import Greedy
from hone.samplers.text import Sample as Sampling
from hone.text.generate import generate
from hone.text.heads import as_classifier, classifier_error
from hone.text.model import EXTRAS_FILE, LanguageModel

EVALUATED = (
    "data", "eval_data", "eval_samples", "max_new_tokens", "sampler", "metrics", "solvers", "distances",
    "batch_tokens", "micro_tokens", "device", "precision", "seed",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _model_folder(path: Path) -> tuple[Path | str, Recipe | None]:
    """Return the model of a run folder with its recipe, or a plain model folder."""
    listen()
    if (path / "recipe.yaml").is_file():
        return path / "model", last_stage(path)
    return (str(path) if str(path) == "base" else path), None


def sample_run(
    path: Path, prompts: list[str], *, samples: int, max_new_tokens: int, temperature: float, seed: int, chat: bool
) -> list[dict[str, Any]]:
    """Answer prompts with a trained model, or draw arrays with a trained denoiser.

    Args:
        path: a run folder or a model folder.
        prompts: texts to answer; empty takes three held-out samples of the run.
        samples: answers to each prompt; of a denoiser, how many arrays, 64 where it is 1.
        max_new_tokens: longest answer in tokens.
        temperature: 0 picks the most probable token.
        seed: seeds the sampler.
        chat: put the prompts into the chat template, each as a user's turn.

    Raises:
        HoneError: there is no prompt and no run to take some from.
    """
    folder, recipe = _model_folder(path)
    if denoiser_folder(folder):
        if prompts:
            raise HoneError("this run's model draws arrays and takes no --prompt; say how many with --samples")
        return sample_arrays(path, Path(folder), recipe, 64 if samples == 1 else samples, seed)
    # On any device, which need not have the precision that the run asked for: only the lean one is looked for.
    lean = recipe is None or recipe.precision in ("auto", "bf16")
    cluster = Cluster(precision="auto" if lean else "float32")
    model = _loaded(folder, cluster)
    objective = None if recipe is None else ready_objective(recipe, model, Path(folder))
    if objective is not None and not objective.generates:
        if not prompts:
            raise HoneError(
                f"this run's model does not answer but judges; give it texts with --prompt 'some text', or judge the "
                f"held-out data: hone eval {path}"
            )
        with cluster.autocast():
            said = objective.verdicts(model, prompts)
        return [{"prompt": text, "answers": [verdict]} for text, verdict in zip(prompts, said, strict=True)]
    if prompts:
        turns = [(Message("user", text),) if chat else text for text in prompts]
        asked = [Sample(kind="prompt", prompt=turn, where="--prompt") for turn in turns]
    elif recipe is not None:
        source, split = evaluation_data(recipe)
        _introduce(source, recipe, model, objective)
        held_out = itertools.islice(source.questions(split), 100)
        asked = list(itertools.islice((s for s in held_out if s.kind != "text"), 3))
        if not asked:
            raise HoneError("the held-out data is running text without prompts; give one with --prompt 'some text'")
    else:
        raise HoneError("give a prompt: hone sample FOLDER --prompt 'some text'")
    sampler = Sampling(temperature=temperature) if temperature > 0 else Greedy()
    answering = generate if objective is None else objective.generate
    with cluster.autocast():
        made = answering(
            model, [model.renderer.prompt_ids(s) for s in asked], samples=samples, max_new_tokens=max_new_tokens,
            sampler=sampler, stop=model.renderer.stop_ids, seed=seed,
        )  # fmt: skip
    return [
        {"prompt": evaluate.show_prompt(s), "answers": [model.renderer.decode(g.tokens) for g in group]}
        for s, group in zip(asked, made, strict=True)
    ]


def _loaded(folder: Path | str, cluster: Cluster) -> LanguageModel:
    """Return a model as it was when it trained: in bf16 an adapter stays on its base, which is read as it is stored."""
    beside = cluster.precision == "bf16" and (Path(folder) / CONFIG_FILE).is_file()
    model = LanguageModel.load(str(folder), device=cluster.device, dtype=cluster.dtype, merge=not beside)
    rounded = beside and any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    if rounded and model.adapter is not None:  # norms or biases of the base trained, in float32
        narrow(model, frozen=None)
        model.adapter.load(model.hf, Path(folder))
    return model


def ready_objective(recipe: Recipe, model: LanguageModel, folder: Path) -> Any:
    """Return a run's objective, with what it has put beside the model read from the run.

    Args:
        recipe: of the run's last stage.
        model: the run's model.
        folder: where it was saved.
    """
    objective = recipe.build("objective")
    # The start of a run is hashed for data that may be made by it, which takes a while: only for those who look.
    if not objective.recall(folder) and type(objective).look is not Objective.look:
        source = recipe.build("data")
        _introduce(source, recipe, model, objective)
        objective.look(source)
    objective.equip(model)
    model.load_extras(folder)
    return objective


def _introduce(source: Source, recipe: Recipe, model: LanguageModel, objective: Any) -> None:
    """Let a source meet the model that a run started from, which is loaded once where it is asked."""
    start, like = recipe.build("model"), next(model.parameters())
    load = cache(lambda: start.load(device=like.device, dtype=like.dtype, data=source))
    acquaint([source], load, start, objective)


def eval_run(path: Path, overrides: list[str], display: Display) -> dict[str, float]:
    """Evaluate a finished run's model on its held-out data, or on other data given by overrides.

    Args:
        path: a run folder.
        overrides: settings such as "eval_data=FILE" or "eval_samples=500".
        display: shows progress.

    Raises:
        HoneError: an override that evaluation does not look at, or a run that is not finished.
    """
    listen()
    if wrong := [text for text in overrides if text.partition("=")[0].partition(".")[0] not in EVALUATED]:
        raise HoneError(f"--set {wrong[0]}: an evaluation looks at {', '.join(EVALUATED)} only")
    folder = RunFolder.open(path)
    require_finished(folder)
    # In the last stage's recipe, whose own settings would cover those of the whole run.
    trained = stages_of(Recipe.load(folder.path / "recipe.yaml"), folder)[-1]
    recipe = trained.overridden(overrides)
    if denoiser_folder(folder.path / "model"):
        return evaluate_arrays(folder.path / "model", recipe)
    cluster = Cluster(recipe.device, recipe.precision)
    model = _loaded(folder.path / "model", cluster)
    objective = ready_objective(trained, model, folder.path / "model")  # it looks at what it was trained on
    source, split = evaluation_data(recipe)
    _introduce(source, recipe, model, objective)
    display.start("reading held-out data", None)
    opened = open_data(
        source, model.renderer, consumes=objective.consumes, classes=objective.class_names(), split=split,
        context=model.context, progress=display.update,
    )  # fmt: skip
    display.stop()
    objective.setup(Run(recipe, cluster, model, objective, loader=None, total=0))  # it may need a reference model
    judges = evaluate.Judges(opened, recipe.build("metrics"), recipe.build("sampler"))  # of the task alone
    return evaluate.judge(model, objective, recipe, cluster, judges).row()


def _check_exportable(made: Path, to: str, dtype: str) -> None:
    """Refuse what there is not: formats, the adapter of a run without one, the merged model of one that cannot be."""
    if denoiser_folder(made):
        raise HoneError(f"{made} holds a denoiser, whole and in safetensors already: there is nothing to export")
    if to not in ("hf", "peft"):
        raise HoneError(f"--to: expected hf or peft, got '{to}'")
    if dtype not in ("", *DTYPES) or (dtype and to == "peft"):
        raise HoneError(f"--dtype: expected one of {', '.join(DTYPES)} with --to hf, got '{dtype}'")
    adapted = (made / CONFIG_FILE).is_file()
    if to == "peft" and not adapted:
        raise HoneError(f"{made} holds whole weights: there is no adapter to export; use --to hf")
    if to == "hf" and adapted and (reason := reader(made).unmergeable):
        raise HoneError(f"{made}: its adapter cannot be merged into its base: {reason}; use --to peft")


@torch.no_grad()
def export_run(path: Path, to: str, out: Path | None, dtype: str = "") -> dict[str, Any]:
    """Write a run's model for other libraries and prove that it is the same model.

    Args:
        path: a run folder.
        to: "hf" writes the whole model, an adapter merged into its base, and a head as transformers' own classes for
            classification have it; "peft" the adapter alone.
        out: where; None writes RUN/export-TO.
        dtype: "float32", "bfloat16" or "float16" for a whole model; "" keeps what was trained.

    Returns:
        The path, the base of an adapter, the largest difference of a logit between what was written and what is read
        back ("error"), and for another `dtype` that between the trained and the rounded weights ("rounding").

    Raises:
        HoneError: an unknown format, a run without an adapter, an existing folder, or logits that differ.
    """
    listen()
    path = path.expanduser()
    recipe, made = last_stage(path), path / "model"
    _check_exportable(made, to, dtype)
    target = out or path / f"export-{to}"
    if target.exists():
        raise HoneError(f"'{target}' exists already, and nothing is ever overwritten; give another one with --out")
    trained = LanguageModel.load(str(made), dtype=torch.float64 if recipe.precision == "float64" else torch.float32)
    ids = torch.arange(1, 33)[None] % trained.hf.config.vocab_size
    headed = to == "hf" and (made / EXTRAS_FILE).is_file()
    readout = ready_objective(recipe, trained, made).readout(trained) if headed else None
    exact = trained.hf(input_ids=ids).logits if dtype else None
    for parameter in trained.parameters() if dtype else ():  # not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(DTYPES[dtype])
    base = ""
    with staged(target) as staging:
        if readout is not None:
            as_classifier(trained, readout).save_pretrained(staging)
            trained.save_tokenizer(staging)
        elif to == "hf":
            trained.save(staging)
        else:
            shutil.copytree(made, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SUMS))
            base = _name_base(staging, target)
    trained.float()
    rounding = None if exact is None else float((trained.hf(input_ids=ids).logits - exact).abs().max())
    if readout is not None:
        error = classifier_error(trained, readout, target, ids[0])
    else:
        again = LanguageModel.load(str(target))
        error = float((trained.hf(input_ids=ids).logits - again.hf(input_ids=ids).logits).abs().max())
    if not error <= 1e-4:
        raise HoneError(f"{target}: the exported model's logits differ from the trained model's by {error:.1e}")
    return {"path": str(target), "format": to, "error": error, "rounding": rounding, "base": base}


def _name_base(staging: Path, target: Path) -> str:
    """Let an adapter that is being exported name the base beside it, where it has one of its own; return the base."""
    config = read_config(staging)
    if (staging / "base").is_dir():
        config["base_model_name_or_path"] = str((target / "base").absolute())
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return str(config["base_model_name_or_path"])
