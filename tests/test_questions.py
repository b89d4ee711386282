"""What Python answers itself about sizes and tensors while a model is captured: `len`, `type`, `isinstance`, and texts."""

import builtins
import logging
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.overrides import has_torch_function, has_torch_function_unary, has_torch_function_variadic

import fxprune
from fxprune.passes.errors import GuardError

LOG = logging.getLogger(__name__)


class Asks(nn.Module):
    """Two layers, and something that is asked between them."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.a, self.b, self.ask = nn.Linear(6, 12), nn.Linear(12, 3), ask
        self.k5, self.k7 = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        return self.ask(self, x, self.a(x))


def pruned(ask):
    torch.manual_seed(0)
    model = Asks(ask).eval()
    small = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 5, 6), criterion="random")
    assert small.meta["capture"] == "symbolic" and small.a.out_features == 6
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
    return model, small


def is_plain(tensor):
    return type(tensor) is torch.Tensor and type(tensor) in {torch.Tensor}


QUESTIONS = {
    "len": lambda m, x, y: m.b(y.view(len(x), -1, 12)).sum(0) / len(x),
    "size by keyword": lambda m, x, y: m.b(y.reshape(x.size()[0], x.size(dim=1), 12)),
    "type": lambda m, x, y: m.b(y if is_plain(y) else y * 0),
    "type of a size": lambda m, x, y: m.b(y if type(x.shape[0]) is int and type(x.shape) is torch.Size else y * 0),
    "name of a type": lambda m, x, y: m.b(y if type(y).__name__ == "Tensor" and type(y).__module__ == "torch" else y * 0),
    "dtype": lambda m, x, y: m.b(y if y.dtype is torch.float32 and y.dtype == torch.float32 else y * 0),
    "by type": lambda m, x, y: m.b({torch.Tensor: torch.relu}[type(y)](y)),
    "three arguments": lambda m, x, y: m.b(y * type("Two", (), {"number": 2}).number),
    "class": lambda m, x, y: m.b(y if y.__class__ is torch.Tensor and y.__class__.__name__ == "Tensor" else y * 0),
    "class of a shape": lambda m, x, y: m.b(
        y if isinstance(x.shape, torch.Size) and x.shape.__class__ is torch.Size else y * 0
    ),
    "parameter": lambda m, x, y: m.b(y if isinstance(m.a.weight, nn.Parameter) and not isinstance(y, nn.Parameter) else y * 0),
    "callable": lambda m, x, y: m.b(y * 0 if callable(y) else y),
    "has numpy": lambda m, x, y: m.b(y if hasattr(y, "numpy") and hasattr(y, "data_ptr") else y * 0),
    "overridden": lambda m, x, y: m.b(y * 0 if torch.overrides.has_torch_function((x, y)) else y),
    "overridden, by name": lambda m, x, y: m.b(y * 0 if has_torch_function_unary(y) or has_torch_function((y, "a")) else y),
    "overridden parameter": lambda m, x, y: m.b(y * 0 if has_torch_function_variadic(m.a.weight, m.a.bias) else y),
    "overridden, as C++ says": lambda m, x, y: m.b(y * 0 if torch._C._has_torch_function_unary(y) else y),
    "function modes": lambda m, x, y: m.b(y * 0 if torch._C._len_torch_function_stack() else y),
    "legacy": lambda m, x, y: m.b(y if isinstance(y, torch.FloatTensor) and not isinstance(y, torch.LongTensor) else y * 0),
    "assertion": lambda m, x, y: (torch._assert(x.shape[1] > 0, f"no tokens: {x.shape[1]}"), m.b(y))[1],
    "print": lambda m, x, y: (print(x.shape, f"{x.shape[0]}"), m.b(y))[1],
    "log": lambda m, x, y: (LOG.debug(f"{x.shape[1]} tokens"), m.b(y))[1],
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_that_leave_sizes_free(name):
    model, small = pruned(QUESTIONS[name])
    for x in (torch.randn(2, 5, 6), torch.randn(3, 5, 6), torch.randn(1, 7, 6)):
        torch.testing.assert_close(small(x), model(x))


def test_a_warning_is_said_to_be_of_the_models_line():
    with pytest.warns(UserWarning, match="5 tokens") as said:
        _, small = pruned(lambda m, x, y: (warnings.warn(f"{x.shape[1]} tokens", stacklevel=1), m.b(y))[1])
    assert {w.filename for w in said} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(small(torch.randn(2, 7, 6)).shape, torch.Size([2, 7, 3]))


TEXTS = {
    "a part of a name": lambda m, x, y: getattr(m, f"k{x.shape[1]}")(y),
    "a key": lambda m, x, y: m.b(y * {"5": 2.0, "7": 3.0}[str(x.shape[1])]),
    "a key of two": lambda m, x, y: m.b(y * {"5 6": 2.0, "7 6": 3.0}["{} {}".format(*x.shape[1:])]),
    "a shape": lambda m, x, y: m.b(y * {"torch.Size([2, 5, 6])": 2.0, "torch.Size([2, 7, 6])": 3.0}[str(x.shape)]),
    "a list": lambda m, x, y: m.b(y * {"[5, 6]": 2.0, "[7, 6]": 3.0}[str(list(x.shape[1:]))]),
    "a number again": lambda m, x, y: m.b(y * int(str(x.shape[1]))),
    "strides": lambda m, x, y: m.b(y * (y.stride(0) // y.stride(1))),
    "after a message": lambda m, x, y: (print(f"{x.shape[0]}"), m.b(y * len("x" * int(f"{x.shape[1]}"))))[1],
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_looked_up_by_the_text_of_a_size_or_made_of_strides_is_decided_by_the_example(name):
    model, small = pruned(TEXTS[name])
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(small(x), model(x))
    with pytest.raises(GuardError, match="is 5, and here it is 7"):
        small(torch.randn(2, 7, 6))


def test_functions_of_pythons_own_are_as_they_were():
    kept, seen = (print, len, type, warnings.warn, logging.Logger.debug, torch._assert), []

    def ask(m, x, y):
        other = threading.Thread(target=lambda: seen.append((type(torch.ones(1)), len(torch.ones(2)))))
        other.start()
        other.join()
        return m.b(y)

    pruned(ask)
    assert (print, len, type, warnings.warn, logging.Logger.debug, torch._assert) == kept
    assert builtins.print is kept[0] and not {"len", "type"} & globals().keys()
    assert {(kind == torch.Tensor, size) for kind, size in seen} == {(True, 2)}


POSITIONS = {
    "made": lambda m, x, y: m.b(y * torch.arange(y.shape[1] * y.shape[2]).view(y.shape[1:]) / 60),
    "rolled": lambda m, x, y: m.b(y.flatten(1).roll(12, 1).view(y.shape)),
    "rolled and summed": lambda m, x, y: y.flatten(1).roll(12, 1)[:, 1:].square().sum(1),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_that_are_written_down_are_those_of_one_size(name):
    """The kept entries of a dimension in which channels and tokens are merged; for more tokens there are more of them."""
    model, small = pruned(POSITIONS[name])
    for x in (torch.randn(2, 5, 6), torch.randn(3, 5, 6)):
        torch.testing.assert_close(small(x), model(x))
    with pytest.raises(GuardError, match=r"dimension . of .* is .*0, and here it is 84"):
        small(torch.randn(2, 14, 6) if name != "made" else torch.randn(2, 7, 6))
