"""The cost of watching a language model: the same training each time, and the ratios of it."""

import json

import pytest
import torch

from benchmarks import language_model
from benchmarks.language_model import Problem, measure, train


@pytest.fixture
def problem():
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))

    def model():
        torch.manual_seed(0)
        return torch.nn.Linear(5, 3)

    def optimizer(parameters):
        adamw = torch.optim.AdamW(parameters, lr=0.01)
        return adamw, torch.optim.lr_scheduler.StepLR(adamw, 2)

    schedules = {"every=2": lambda: 2}
    target = torch.arange(24) % 3
    loss_fn = torch.nn.functional.cross_entropy
    return Problem("small", model, loss_fn, (x, target), 8, 7, optimizer, schedules)


def test_a_training_is_watched_on_its_minibatches(problem):
    run = train(problem, lambda: 3, steps=7)
    assert run.history["step"] == [0, 3, 6]
    # The first loss and its change are of the first minibatch, by AdamW's first step.
    x, y = problem.data
    rows = language_model.minibatch(24, 8, 0, 0)
    model = problem.model()
    optimizer, _ = problem.optimizer(model.parameters())
    before = problem.loss_fn(model(x[rows]), y[rows])
    before.backward()
    optimizer.step()
    change = problem.loss_fn(model(x[rows]), y[rows]) - before
    assert run.history["actual_change"][0] == pytest.approx(change.item(), rel=1e-3)
    assert run.history["critical_threshold"] == pytest.approx([200, 2000, 200_000])  # 2/η


def test_runs_begin_and_end_at_the_same_parameters(problem, monkeypatch):
    plain, watched = train(problem, None, 7), train(problem, lambda: 1, 7)
    assert plain.history is None
    assert all(map(torch.equal, plain.parameters, watched.parameters))
    found = measure(problem, rounds=3)
    assert found["identical"]
    assert [len(times) for times in found["seconds"].values()] == [3, 3]
    assert found["rows"] == {"every=2": [4, 4, 4]}
    expected = [
        a / b for a, b in zip(found["seconds"]["every=2"], found["seconds"]["without"], strict=True)
    ]
    assert found["ratios"] == {"every=2": expected}

    def disturbing(problem, every, steps):
        run = train(problem, every, steps)
        if every is not None:
            run.parameters[0][0, 0].nextafter_(torch.tensor(9.0))
        return run

    monkeypatch.setattr(language_model, "train", disturbing)
    assert not measure(problem, rounds=1)["identical"]


@pytest.mark.slow
def test_the_quick_run_writes_figures_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SUBSPACE_OPTIM_DATA", raising=False)
    nothing = language_model.windows

    def of_drawn_text(**options):
        return nothing(str(tmp_path / "no data"), **options)

    monkeypatch.setattr(language_model, "windows", of_drawn_text)
    output = tmp_path / "results.json"
    arguments = ["--quick", "--rounds", "1", "--picture-steps", "30", "--output", str(output)]
    assert language_model.main([*arguments, "--pictures", str(tmp_path / "new")]) == 0
    found = json.loads(output.read_text())
    assert list(found["models"]) == ["language model", "MLP", "CNN"]
    assert all(model["identical"] for model in found["models"].values())
    assert found["history"]["step"] == [0, 10, 20]
    assert "drawn" in found["text"]
    pictures = {path.name for path in (tmp_path / "new").iterdir()}
    assert pictures == {"language-model.png", "language-model-dark.png"}
    assert "every_share(0.05)" in capsys.readouterr().out


def test_a_monitor_that_changes_a_training_is_a_failure(monkeypatch, tmp_path):
    changed = {"language model": {"identical": True}, "MLP": {"identical": False}}
    figures = {"parameters": 1, "steps": 1, "rows": {}, "ratios": {}}
    monkeypatch.setattr(
        language_model,
        "measure",
        lambda each, _: changed.get(each.name, {"identical": True}) | figures,
    )
    arguments = ["--quick", "--picture-steps", "0", "--output", str(tmp_path / "results.json")]
    assert language_model.main(arguments) == 1


def test_no_rounds_are_refused(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        language_model.main(["--rounds", "0", "--output", str(tmp_path / "none.json")])
    assert stopped.value.code == 2
