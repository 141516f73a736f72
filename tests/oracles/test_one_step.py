"""What generators are made of: several students, free arrays, simulated steps, pools of heads, watches over critics."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hone.adapters.lora import LoRA
from hone.data.arrays import Points
from hone.data.loader import Loader
from hone.diffusion.critics import Critic, features_of
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.items import Item, collate
from hone.diffusion.levels import Parameterisation
from hone.diffusion.networks import MLP, DiT
from hone.diffusion.routed import Particles, StudentsNetwork
from hone.engine.devices import Cluster
from hone.engine.loop import Player, Run, Trainer
from hone.errors import HoneError, ModelError, NumericError
from hone.objectives.adversarial import NitroFusion, Pool
from hone.objectives.continuous import SanaSprint
from hone.objectives.generators import Drawn, take_weights
from hone.objectives.lightning import Lightning
from hone.objectives.matching import DMD2, fake_network
from hone.objectives.simple_distillation import SimpleDistillation
from hone.objectives.stochastic_consistency import StochasticDistillation
from hone.objectives.students import TeacherScoreMatching
from hone.objectives.teachers import Truth
from hone.objectives.trajectory import ConsistencyTrajectory
from hone.objectives.watch import PATIENCE, TIMES, Watch
from hone.recipe import Recipe
from hone.solvers.few import Multistep


def denoiser(plan: Any, classes: int = 8, shape: tuple[int, ...] = (2,), kind: str = "edm", seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    made = Denoiser(
        plan.build(shape, classes), Parameterisation(kind, 0.7, 0.01), shape, classes=classes, sigma_max=10.0,
        built=plan.record(),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def batch(count: int = 12, shape: tuple[int, ...] = (2,)) -> Any:
    items = [Item(torch.randn(shape, dtype=torch.float64), i % 8, place=i) for i in range(count)]
    return collate(items)


def test_each_student_answers_for_its_classes_and_they_are_saved_and_read(tmp_path):
    plan = StudentsNetwork(groups=4, of=MLP(width=8, depth=2))
    made = denoiser(plan)
    x, sigma, labels = torch.randn(9, 2).double(), torch.linspace(0.1, 5, 9).double(), torch.arange(9) - 1
    found = made(x, sigma, labels)
    for row, label in enumerate(labels.tolist()):
        own = Denoiser(made.hf.students[max(label, 0) // 2], made.parameterisation, (2,), classes=8)
        expected = own(x[row : row + 1], sigma[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected)
    made.save(tmp_path)
    again = Denoiser.load(tmp_path, dtype=torch.float64)
    assert torch.equal(again(x, sigma, labels), found)
    assert torch.equal(again(x, sigma), again(x, sigma, torch.full((9,), -1)))
    moved = torch.autograd.grad(found[labels >= 6].sum(), list(made.parameters()), materialize_grads=True)
    names = {name.split(".")[2] for (name, _), g in zip(made.named_parameters(), moved, strict=True) if g.any()}
    assert names == {"3"}  # of hf.students.N
    made.widen(1)
    assert made(x, sigma, labels, torch.zeros(9, 1).double()).shape == x.shape
    with pytest.raises(HoneError, match="2 classes, which cannot form 4 groups"):
        plan.build((2,), 2)


@pytest.mark.parametrize("of", [MLP(width=8, depth=2), DiT(width=8, depth=2, heads=2)])
def test_discriminators_read_the_features_of_several_students(of):
    shape = (2,) if isinstance(of, MLP) else (1, 4, 4)
    made = denoiser(StudentsNetwork(groups=2, of=of), shape=shape)
    x, sigma, labels = torch.randn(6, *shape).double(), torch.ones(6).double(), torch.tensor([7, 0, 1, 6, 5, 2])
    critic = Critic(made)
    logits = critic(x, sigma, labels)
    assert logits.shape == (6, 2 if isinstance(of, MLP) else 8)
    for half, rows in ((0, labels < 4), (1, labels >= 4)):
        critic.body.hf = made.hf.students[half]
        torch.testing.assert_close(critic(x[rows], sigma[rows], labels[rows]), logits[rows])


def test_a_discriminator_says_what_features_it_cannot_have():
    made = denoiser(MLP(width=8, depth=2))
    truth = Points(density="ring", conditional=True).truth()
    with pytest.raises(ModelError, match=r"objective\.teacher: a discriminator needs the features of a network"):
        Critic(Truth(truth, made))


def test_a_discriminator_shows_zeros_where_its_network_was_widened():
    made = denoiser(MLP(width=8, depth=2))
    x, sigma = torch.randn(5, 2).double(), torch.ones(5).double()
    before = Critic(made).features(x, sigma, None)
    made.widen(2)
    critic = Critic(made)
    torch.testing.assert_close(critic.features(x, sigma, None), before)  # fresh numbers are without effect
    with torch.no_grad():
        for layer in critic.body.hf.embed_extras:
            layer.weight.normal_()
    shown = features_of(critic.body, x, sigma, None, torch.zeros(5, 2).double())
    torch.testing.assert_close(critic.features(x, sigma, None), shown)
    with pytest.raises(ModelError, match="trained with 2 more numbers beside the noise level"):
        features_of(critic.body, x, sigma, None)


def test_students_begin_with_their_teachers_weights():
    teacher, students = (
        denoiser(MLP(width=8, depth=2), seed=1),
        denoiser(StudentsNetwork(groups=2, of=MLP(width=8, depth=2))),
    )
    take_weights(students, teacher)
    x, sigma, labels = torch.randn(8, 2).double(), torch.ones(8).double(), torch.arange(8)
    torch.testing.assert_close(students(x, sigma, labels), teacher(x, sigma, labels))
    with pytest.raises(ModelError, match="different shapes"):
        take_weights(denoiser(MLP(width=9, depth=2)), teacher)
    with pytest.raises(ModelError, match=r"is edm, sigma_data 0\.7, sigma_min 0\.01; the student's is flow"):
        take_weights(denoiser(MLP(width=8, depth=2), kind="flow"), teacher)
    other = denoiser(MLP(width=8, depth=2))
    other.parameterisation = Parameterisation("edm", 1.4, 0.01)  # the same weights would denoise to other arrays
    with pytest.raises(ModelError, match=r"the student's is edm, sigma_data 1\.4"):
        take_weights(other, teacher)


def test_a_student_with_an_adapter_does_not_begin_with_its_teachers_weights(tmp_path):
    denoiser(MLP(width=8, depth=2), seed=1).save(tmp_path)
    with pytest.raises(ModelError, match="the adapter 'lora' is attached to the student"):
        ready(denoiser(MLP(width=8, depth=2)), DMD2(teacher=str(tmp_path), begin="teacher"), LoRA(rank=2))


def test_free_arrays_are_all_drawn_as_often_and_are_saved_and_read(tmp_path):
    made = denoiser(Particles(count=5), classes=3, kind="x0")
    noise = torch.randn(6000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(6000) % 3
    drawn, calls = Multistep().sample(made, noise, labels)
    assert calls == 1
    for label in range(3):
        rows, counts = drawn[labels == label].detach().unique(dim=0, return_counts=True)
        expected = made.hf.arrays[label].detach()
        torch.testing.assert_close(rows, expected[expected[:, 0].argsort()])
        assert counts.min() > 340 and counts.max() < 460  # 400 +- 3 sigma or so
    made.save(tmp_path)
    again, _ = Multistep().sample(Denoiser.load(tmp_path, dtype=torch.float64), noise, labels)
    assert torch.equal(again, drawn)
    with pytest.raises(ModelError, match=r"objective\.critic: the fake score needs a network"):
        fake_network(None, None, made)
    assert fake_network(MLP(width=8), None, made)(noise, torch.ones(6000).double(), labels).shape == noise.shape


def test_training_arrays_of_several_steps_are_those_of_the_solver():
    model, objective, given = denoiser(MLP(width=8, depth=2)), DMD2(teacher="", student_steps=3), batch()
    drawn: dict[str, Tensor] = {}

    def normal(batch: Any, stream: str = "noise") -> Tensor:
        return drawn.setdefault(stream, torch.randn(12, 2, dtype=torch.float64))

    objective.normal = normal
    for last in range(3):
        drawn.clear()
        objective.once = lambda batch, stream, last=last: (last + 0.5) / 3
        found = objective.made(model, given, "g")
        sigmas = Multistep(steps=3).sigmas(model)
        clean = model(sigmas[0] * drawn["zg"], sigmas[0], given.labels)
        for step in range(1, last + 1):
            x = clean + math.sqrt(float(sigmas[step]) ** 2 - 0.01**2) * drawn[f"{step}+g"]
            clean = model(x, sigmas[step], given.labels)
        torch.testing.assert_close(found, clean)
        assert found.requires_grad


def test_heads_of_a_pool_judge_their_own_part_of_the_noise():
    made = denoiser(DiT(width=8, depth=2, heads=2), shape=(1, 4, 4))
    pool = Pool(made, parts=2, copies=4)
    assert len(pool.heads) == 2 * 2 * 4 and not any(p.requires_grad for p in pool.body.parameters())
    x, place = torch.randn(6, 1, 4, 4).double(), torch.tensor([0.1, 0.9, 0.3, 0.6, 0.2, 0.99]).double()
    labels = torch.arange(6)
    drawn = Drawn(x, x, x, 0.1 + place, place, labels, place)
    seen = list(pool.logits(drawn, [[1, 6], [8]], 2 * x))
    assert [(mine.tolist(), len(found), count) for mine, found, count in seen] == [
        ([0, 2, 4], 2, 2), ([0, 2, 4], 2, 2), ([1, 3, 5], 2, 1),
    ]  # fmt: skip
    assert [found[0].shape for _, found, _ in seen] == [(3, 1), (3, 4), (3, 4)]  # head 1 sees the mean over places
    states = pool.features(x, 0.1 + place, labels)
    torch.testing.assert_close(seen[0][1][0], pool.heads[1](states[0][[0, 2, 4]].flatten(2).mean(2)))
    blind = pool.features(x, 0.1 + place, None)  # head 6 is of the second layer and not told the class
    torch.testing.assert_close(seen[1][1][0], pool.heads[6](blind[1][[0, 2, 4]]))
    other = pool.features(2 * x, 0.1 + place, labels)
    torch.testing.assert_close(seen[2][1][1], pool.heads[8](other[0][[1, 3, 5]]))


def test_a_critic_that_diverges_stops_the_run_with_its_curve():
    watch = Watch("fake/denoising")
    for step, loss in enumerate([1.0, 0.5, 2.0, *[60.0] * (PATIENCE - 1), 1.0]):  # a pause: it begins again
        watch.look(loss, step)
    for step in range(PATIENCE - 1):
        watch.look(51.0 + step, 100 + step)
    again = Watch("fake/denoising")
    again.load_state_dict(watch.state_dict())  # as after a resume
    with pytest.raises(
        NumericError, match=r"step 119: the critic 'fake/denoising' diverges: .* 0.5, for 20 steps: 51, "
    ):
        again.look(70.0, 119)
    calm = Watch("heads/loss", 2.0)
    for step, loss in enumerate([1e-6, *[1.9 * TIMES] * 50]):  # a task that was easy once is no divergence
        calm.look(loss, step)


def test_objectives_watch_their_critics():
    objective = DMD2(teacher="")
    objective.watch("fake/denoising")
    row = {"fake/denoising": 0.3}
    objective.after_step(SimpleNamespace(step=1), row)
    kept = objective.state_dict()
    with pytest.raises(NumericError, match="the critic 'fake/denoising' diverges"):
        for step in range(PATIENCE):
            objective.after_step(SimpleNamespace(step=2 + step), {"fake/denoising": 31.0})
    objective.load_state_dict(kept)
    objective.after_step(SimpleNamespace(step=2), {"fake/denoising": 31.0})
    assert list(DMD2(teacher="", least=0.9, most=0.5).check()) == [("least", "expected less than most (0.5), got 0.9")]


def ready(model: Denoiser, objective: Any, adapter: Any = None) -> Run:
    """Return a run at its beginning."""
    source = Points(density="ring", count=200, holdout=40, conditional=True)
    recipe = Recipe.of(
        model="denoiser", data={"name": "points", "conditional": True}, objective="denoise", steps=2, batch_tokens=12,
        optimizer={"name": "adamw", "lr": 1e-3}, schedule="constant",
    )  # fmt: skip
    trees: Any = source.collection("train")
    run = Run(recipe, Cluster("cpu", "fp32"), model, objective, Loader(trees, batch_tokens=12, seed=0), 2)
    run.adapter = adapter
    params = list(model.named_parameters())
    run.players["model"] = Player(params, recipe.build("optimizer").build(params, {}), lambda step, total: 1.0)
    objective.setup(run)
    return run


@pytest.mark.parametrize(("kind", "options"), [
    (Lightning, {"plan": [2, 1]}), (ConsistencyTrajectory, {"adversarial": 0.1}), (SanaSprint, {}),
    (StochasticDistillation, {"adversarial": 0.5}), (DMD2, {}),
])  # fmt: skip
def test_every_critic_is_watched_and_the_watch_goes_on_after_a_resume(kind, options, tmp_path):
    denoiser(MLP(width=8, depth=2), seed=1).save(tmp_path)
    model, key = denoiser(MLP(width=8, depth=2)), "fake/denoising" if kind is DMD2 else "critic/loss"
    first, then = (kind(teacher=str(tmp_path), **options) for _ in range(2))
    run = ready(model, first)
    rows = [{"loss": 1.0}, {"loss": 1.0, key: 2.0}, *[{"loss": 1.0, key: 900.0}] * (PATIENCE - 1)]
    for row in rows:  # a step in which the critic has no turn says nothing
        first.after_step(run, dict(row))
    ready(model, then)
    then.load_state_dict(first.state_dict())
    with pytest.raises(NumericError, match=f"the critic '{key}' diverges"):
        then.after_step(run, dict(rows[-1]))


@pytest.mark.parametrize("objective", [TeacherScoreMatching(teacher="truth"), DMD2(teacher="truth", critic_updates=2)])
def test_several_students_train_in_the_real_loop(objective):
    model = denoiser(StudentsNetwork(groups=4, of=MLP(width=8, depth=2))).float()
    run = ready(model, objective)
    trainer, before = Trainer(run), [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        assert math.isfinite(trainer.train_step(next(run.loader))["loss"])
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [NitroFusion, SimpleDistillation])
def test_teachers_that_draw_do_not_guide_without_classes(kind, tmp_path):
    denoiser(MLP(width=8, depth=2), classes=0, seed=1).save(tmp_path)
    with pytest.raises(ModelError, match="guidance: 2 leads to a class"):
        ready(denoiser(MLP(width=8, depth=2), classes=0), kind(teacher=str(tmp_path), guidance=2.0))
