"""`examples/benchmarks/thirdparty.py`: two references that tell right from wrong, and models, without their packages."""

import subprocess

import pytest
import torch
from torch import nn

import fxprune

NEEDED = {"pytorchcv": 150, "segmentation-models-pytorch": 12, "vit-pytorch": 70, "x-transformers": 20, "open_clip_torch": 15}


class Normed(nn.Module):
    """Norms of several kinds over channels that are pruned."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.scale, self.head = norm, nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5), nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(torch.relu(self.norm(x)))
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.scale
        return self.head((x.softmax(1) * x.amax(1, keepdim=True) + x).mean((2, 3)))


class Last(nn.Module):
    """A norm over channels that come last."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


@pytest.fixture
def references(benchmarks):
    import thirdparty_references

    return thirdparty_references


@pytest.fixture
def models(benchmarks):
    import thirdparty_models

    return thirdparty_models


def zeroed(references, model, x):
    """A pruned model and its original with the removed elements zeroed."""
    small = fxprune.prune(model, 0.5, example_inputs=x)
    references.zero_removed(model, fxprune.plan_of(small).masks(model))
    return small


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16), Last(nn.LayerNorm(16)), Last(nn.RMSNorm(16)), nn.BatchNorm2d(16)])
def test_statistics_over_what_is_not_zero_make_the_zeroed_original_a_reference(references, norm):
    torch.manual_seed(0)
    model, x = Normed(norm).eval(), torch.randn(2, 3, 8, 8)
    small = zeroed(references, model, x)
    assert not references.agreement(model, small, x)[1]
    over_kept, why = references.agreement_over_kept(model, small, x)
    assert over_kept and "of which 8 are kept" in why
    with torch.no_grad():
        small.head.bias.add_(1.0)
    assert not references.agreement_over_kept(model, small, x)[0]


def test_without_statistics_the_zeroed_original_is_a_reference_and_a_wrong_model_has_no_excuse(references):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(5, 8)
    small = zeroed(references, model, x)
    assert references.agreement(model, small, x)[1]
    with torch.no_grad():
        next(small.parameters())[0].add_(1.0)
    assert not references.agreement(model, small, x)[1]
    assert references.agreement_over_kept(model, small, x) == (False, "")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([("mean", 8), ("_softmax", 4)], [("mean", 8), ("_softmax", 4)], ""),
        ([("mean", 8), ("_softmax", 4)], [("mean", 8), ("_softmax", 2)], "_softmax over 4 elements, of which 2 are kept"),
        ([("mean", 8), ("mean", 6)], [("mean", 3)], "mean over 8 elements, of which 3 are kept"),
        ([("mean", 8)], [], ""),
    ],
)
def test_a_statistic_over_fewer_elements_is_named(references, before, after, words):
    assert references.shrunk(before, after) == words


def test_outputs_of_other_shapes_numbers_or_nan_differ(references):
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert references.difference([one], [one]) == 0
    assert references.difference([one], [one * 1.5]) == 0.5
    for other in ([], [one, one], [torch.ones(2)], [nan]):
        assert references.difference([one], other) == float("inf")


def test_models_are_listed_once_with_inputs(models):
    counts = {package: len(its.cases) for package, its in models.PACKAGES.items()}
    assert len(models.names()) == len(set(models.names())) == sum(counts.values())
    assert all(counts[package] >= number for package, number in NEEDED.items())
    assert len(counts) >= len(NEEDED) + 5
    for its in models.PACKAGES.values():
        for case in its.cases.values():
            assert (case.inputs or its.inputs)() is not None


def test_a_constructor_gets_the_shared_options_that_it_takes_and_those_that_are_made(benchmarks):
    from thirdparty_build import Package, case, floats, made

    its = Package("torch.nn", floats(2, 8), {"Sequential": case()}, shared={"in_features": 8, "out_features": 3, "dim": 1})
    assert repr(its.build("Linear", {"bias": False})) == "Linear(in_features=8, out_features=3, bias=False)"
    encoder = made("TransformerEncoderLayer", d_model=8, nhead=2, batch_first=True)
    layer = its.build("TransformerEncoder", {"encoder_layer": encoder, "num_layers": 1})
    assert layer.layers[0].linear1.in_features == 8


def test_the_table_counts_each_package_and_lists_what_is_not_exact(benchmarks):
    import thirdparty

    rows = [
        {"model": "monai:A", "status": "exact", "references": "both", "reason": ""},
        {"model": "monai:B", "status": "exact", "references": "masked", "reason": "mean over 8 elements, of which 4 are kept"},
        {"model": "monai:C", "status": "failed", "reason": "killed by SIGSEGV"},
        {"model": "tsai:D", "status": "unbuildable", "reason": "no such module"},
    ]
    text = thirdparty.table(rows)
    assert "3 models of 2 packages" in text and "2 exact (66.7%), 0 refused, 1 failed" in text and "mean (1)" in text
    assert "| monai:C | failed | killed by SIGSEGV |" in text and "| monai:B |" not in text
    assert "| monai | 3 | 1 | 0 | 1 | 0 | 1 | 0 |" in text


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_model_that_fails_in_the_child_is_unbuildable_and_leaves_nothing_here(benchmarks):
    import thirdparty

    class Broken(nn.Module):
        def forward(self, x):
            self.ran = True
            raise ValueError("no")

    model = Broken()
    with pytest.raises(RuntimeError, match="ValueError: no"):
        thirdparty.in_child(lambda: thirdparty.drawn(model, torch.ones(1)))
    assert not hasattr(model, "ran")


def test_rows_of_older_code_are_told_from_those_of_a_commit(benchmarks, monkeypatch, tmp_path):
    import thirdparty

    def git(*said):
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *said], cwd=tmp_path, check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    git("init", "-q")
    commits = []
    for message in ("one", "two", "three"):
        git("commit", "-q", "--allow-empty", "-m", message)
        commits.append(git("rev-parse", "--short", "HEAD"))
    monkeypatch.setattr(thirdparty, "HERE", tmp_path)
    assert [thirdparty.is_before({"commit": c}, commits[1]) for c in commits] == [True, False, False]
    assert thirdparty.is_before({"model": "no:commit"}, commits[1]) and not thirdparty.is_before({}, commits[1])
