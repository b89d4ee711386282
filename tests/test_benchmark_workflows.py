"""`examples/benchmarks/workflows.py`: a few cheap workflows, and a table that says what the rows say."""

from pathlib import Path

import pytest
import torch
from torch import nn

FORMS = ("original", "graph", "same class", "torch-pruning")
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def workflows(benchmarks, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    import workflows

    return workflows


@FORKS
@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize(("name", "model"), [("copy.deepcopy, independent", "ResNet-18"), ("pickle", "BERT")])
def test_workflows_pass(workflows, name, model, form):
    row = workflows.measure(name, model, form)
    assert (row["status"], row["reason"]) == ("pass", "")


@FORKS
def test_generate_is_of_the_models_class_alone(workflows):
    found = workflows.WORKFLOWS["generate, greedy with a cache", "Llama"]
    assert "graph" not in found.forms and "same class" in found.forms and "modelopt" not in found.forms
    assert workflows.measure(found.name, found.model, "same class")["status"] == "pass"


@FORKS
def test_a_workflow_that_goes_wrong_is_a_row_with_the_reason(workflows, monkeypatch):
    import workflow_cases as cases

    def tiny():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)

    def lossy(case):
        wanted = case.run()
        with torch.no_grad():
            case.model[0].weight.add_(1)
        cases.same(case.run(), wanted, 1e-6)

    def broken(case):
        raise FileNotFoundError(f"no file {Path('/opt/venv/some/where/model.pt')}\nmore")

    monkeypatch.setitem(cases.MODELS, "tiny", tiny)
    monkeypatch.setattr(cases, "WORKFLOWS", workflows.WORKFLOWS)
    for name, run in (("lossy", lossy), ("broken", broken)):
        monkeypatch.setitem(workflows.WORKFLOWS, (name, "tiny"), cases.Workflow("group", name, "tiny", run, FORMS))
    row = workflows.measure("lossy", "tiny", "original")
    assert row["status"] == "failed" and row["reason"].startswith("Wrong: outputs differ by ")
    row = workflows.measure("broken", "tiny", "original")
    assert row["reason"] == "FileNotFoundError: no file model.pt"
    monkeypatch.setitem(cases.MODELS, "tiny", lambda: (nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4)))
    assert workflows.measure("lossy", "tiny", "graph")["status"] == "pruning failed"


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_outputs_that_differ_are_wrong(workflows, size):
    import workflow_cases as cases

    one = torch.tensor([1.0, -2.0])
    cases.same([one + size], [one], size / 2)  # of the largest absolute value
    with pytest.raises(cases.Wrong, match="shape"):
        cases.same([one[:1]], [one])
    with pytest.raises(cases.Wrong, match="0 outputs instead of 1"):
        cases.same([], [one])
    with pytest.raises(cases.Wrong, match="nothing was quantized"):
        cases.rounded([one], [one])
    with pytest.raises(cases.Wrong, match="differ"):
        cases.same([one * float("nan")], [one], 0.5)


def test_training_that_leaves_parameters_alone_is_wrong(workflows):
    import workflow_cases as cases

    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4)
    assert len(cases.train(model, x)) == 3
    with pytest.raises(cases.Wrong, match="2 parameters with a gradient stay as they are"):
        cases.train(model, x, torch.optim.SGD(model[0].parameters(), lr=0.1))
    model[0].requires_grad_(False)
    cases.train(model, x)


def test_the_table_is_what_the_rows_say(workflows):
    def rows(name, model, statuses):
        return [
            {"workflow": name, "model": model, "form": form, "status": status, "reason": "" if status == "pass" else f"{form}!"}
            for form, status in zip(FORMS, statuses, strict=True)
        ]

    text = workflows.table(
        [
            *rows("pickle", "BERT", ["pass", "pass", "failed", "pruning failed"]),
            *rows("torch.jit.trace, saved and loaded", "ResNet-18", ["failed", "pass", "pass", "pass"]),
            *rows("forward hooks on containers and blocks", "ResNet-18", ["pass", "pass", "pass", "failed"]),
        ]
    )
    assert "3 workflows, with 3 pairs of workflow and model; the original passes 2 of these" in text
    assert "- fxprune: 2 of 2 pass\n- fxprune, same class: 1 of 2 pass\n" in text
    assert "- Torch-Pruning: 0 of 2 pass, 1 fail as pruning does\n" in text
    assert "| pickle | BERT | pass | **fails**: same class! | **pruning fails**: torch-pruning! |" in text
    assert "| torch.jit.trace, saved and loaded | ResNet-18 | the original fails: original! |  |  |" in text
    assert text.index("## save and load") < text.index("## modules") < text.index("## compile and export")


def test_every_workflow_is_listed_with_a_model_that_is_there(workflows):
    import workflow_cases as cases

    found = workflows.listed()
    assert len({each.name for each in found}) >= 60
    assert all(each.model in cases.MODELS and each.forms[0] == "original" for each in found)
    assert {each.model for each in found} == set(cases.MODELS)
