"""Several processes that hold one model make one plan, and fail together."""

import pytest
import torch
from processes import in_processes
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fxprune


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


X = torch.linspace(-1, 1, 6).view(1, 6)


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(8, 6, generator=generator)
    return [(x, torch.randint(4, (8,), generator=generator))]


def magnitude(rank, model):
    return fxprune.prune(model, 0.5, X)


def by_data(rank, model):
    return fxprune.prune(model, params=0.5, example_inputs=X, criterion="taylor", data=batches(rank), loss=cross_entropy)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6)) for _ in range(8))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def residual():
    torch.manual_seed(0)
    return Residual().eval()


def by_depth(rank, model):
    return fxprune.prune(model, 0.125, X, depth="only", data=batches(rank))


def one_fails(rank, model):
    data = batches(rank) if rank != 1 else [(torch.full((8, 6), float("nan")), torch.zeros(8, dtype=torch.long))]
    return fxprune.prune(model, 0.5, X, criterion="taylor", data=data, loss=cross_entropy)


def one_asks_otherwise(rank, model):
    return fxprune.prune(model, 0.5 if rank else 0.25, X)


def one_cannot(rank, model):
    return fxprune.prune(model, 0.5 if rank else 1.5, X)


def other_weights(rank, model):
    """One plan all the same: the mean of the scores of all."""
    for parameter in model.parameters():
        parameter.data += rank * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(rank))
    return fxprune.prune(model, 0.5, X)


TASKS = (magnitude, by_data, by_depth, other_weights, one_fails, one_asks_otherwise, one_cannot)


def model_for(task):
    return residual() if task == "by_depth" else net()


class Pruned:
    """A task of a process: the plan and the tensors of what a function makes of the model in DistributedDataParallel."""

    def __init__(self, prune):
        self.prune, self.__name__ = prune, prune.__name__

    def __call__(self, rank):
        small = self.prune(rank, DistributedDataParallel(model_for(self.__name__)))
        return fxprune.plan_of(small).to_json(), {n: t.tolist() for n, t in small.state_dict().items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes gets; they start once, since importing torch takes most of the time."""
    return in_processes(2, [Pruned(f) for f in TASKS], tmp_path_factory.mktemp("two"))


def alone():
    small = fxprune.prune(net(), 0.5, X)
    return [small.plan.to_json(), {n: t.tolist() for n, t in small.state_dict().items()}]


def test_the_result_of_two_is_that_of_one(two):
    assert [found["magnitude"] for found in two] == [alone()] * 2


def test_the_result_of_four_is_that_of_one(tmp_path):
    assert [found["magnitude"] for found in in_processes(4, [Pruned(magnitude)], tmp_path)] == [alone()] * 4


@pytest.mark.parametrize("task", [by_data, by_depth, other_weights])
def test_one_plan_from_the_data_of_all(task, two):
    plans = {found[task.__name__][0] for found in two}
    apart = {fxprune.plan_of(task(rank, model_for(task.__name__))).to_json() for rank in range(2)}
    assert len(plans) == 1 and len(apart) == 2


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("one_fails", "gives NaN"),
        ("one_asks_otherwise", "another plan than rank 0"),
        ("one_cannot", "must be a number in [0, 1)"),
    ],
)
def test_all_fail_together(task, said, two):
    assert all(isinstance(found[task], str) and said in found[task] for found in two)
