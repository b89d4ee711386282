"""How a pruned model prints: as its module tree, with what changed."""

import copy
import pickle

import torch
import torchvision
from refusals import IMAGES, net
from torch import nn

import fxprune


def pruned(model, x, **options):
    torch.manual_seed(0)
    return fxprune.prune(model, 0.5, x, verify=False, **options)


def test_a_pruned_model_prints_with_what_changed():
    small = pruned(net(), IMAGES)
    expected = """Net(
  (stem): Conv2d(3, 8→4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
  (norm): BatchNorm2d(8→4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
  (drop): Dropout(p=0.1, inplace=False)
  (body): Conv2d(8→4, 6→3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
  (head): Linear(in_features=6→3, out_features=4, bias=True)
)"""
    bn = str(nn.BatchNorm2d(8)).replace("(8,", "(8→4,")  # whose attributes depend on the release of torch
    expected = "\n".join(f"  (norm): {bn}" if "(norm)" in line else line for line in expected.splitlines())
    assert str(small) == repr(small) == expected


def test_copies_print_the_same():
    small = pruned(net(), IMAGES)
    small.body._forward_hooks.clear()  # a function of a function, which does not pickle
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert str(other) == str(small)


def test_what_is_alike_shares_an_entry():
    text = str(pruned(torchvision.models.resnet18(weights=None).eval(), torch.randn(1, 3, 32, 32)))
    assert text.splitlines()[5].strip() == "(layer1): Sequential("
    assert text.splitlines()[6].strip() == "(0-1): 2 x BasicBlock("
    assert text.count("Conv2d(64→32, 64→32") == 2


def test_what_was_replaced_since_prints_as_it_is():
    small = pruned(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    assert "(2): Linear(in_features=8→4, out_features=2, bias=True)" in str(small)
    small.add_module("2", nn.Conv1d(4, 7, 1))
    assert "(2): Conv1d(4, 7, kernel_size=(1,), stride=(1,))" in str(small)
