"""A pruned model is compiled and exported with sizes that are free, wherever the original is; a guard never falls silent."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim

import fxprune
from fxprune.passes.errors import GuardError
from fxprune.passes.rewrite.guards import holds, noting


class Attends(nn.Module):
    """Attention by hand; asks for sizes as models do: truth of one, an order of two, a remainder, a maximum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.head = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 5)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        pad = (4 - n % 4) % 4
        y = F.pad(x, (0, 0, 0, pad)) if pad else x
        if n:
            y = y * 2
        attended = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = y[:, :n] + self.out(attended.permute(2, 0, 1, 3).reshape(n * b, d)).view(n, b, d).permute(1, 0, 2)
        return self.head(y + self.down(self.up(y).relu())) * max(n, 2) + min(b, n)


class Branches(nn.Module):
    """Takes two paths: which one is decided by a size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return y * 2 if x.shape[0] % 3 == 0 else y


class Pyramid(nn.Module):
    """Two scales, resized to one another's and to the input's sizes, and boxes as detectors lay them out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.lateral, self.top, self.boxes = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x):
        fine = self.fine(x).relu()
        lateral = self.lateral(fine)
        p = F.interpolate(self.top(self.coarse(fine).relu()), size=lateral.shape[-2:], mode="nearest") + lateral
        n, _, h, w = p.shape
        boxes = self.boxes(p).view(n, -1, 6, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 6)
        return boxes, F.interpolate(p[:, :1], size=x.shape[-2:], mode="bilinear", align_corners=False)


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))


def mistral():
    """Its eager code leaves out the mask of an input without padding that is shorter than the window; a program has it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8, use_cache=False)
    return transformers.MistralModel(config)


def words(*shape):
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(0))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TOKENS, IMAGES = {0: "b", 1: "n"}, {0: "b", 2: "h", 3: "w"}
CASES = {  # the model, inputs of which the first is the example, the dimensions that are free
    "attends": (Attends, [noise(b, n, 24) for b, n in ((2, 12), (3, 8), (5, 16), (6, 20), (4, 4))], TOKENS),
    "attends_padded": (Attends, [noise(b, n, 24) for b, n in ((2, 10), (3, 7), (5, 9), (6, 22), (4, 5))], TOKENS),
    "pyramid": (
        Pyramid,
        [noise(b, 3, h, w) for b, h, w in ((2, 32, 32), (3, 48, 32), (5, 39, 42), (4, 17, 40))],
        IMAGES,
    ),
    "mistral": (mistral, [words(b, n) for b, n in ((2, 6), (3, 5), (2, 9), (4, 20))], TOKENS),
    "bert": (bert, [words(b, n) for b, n in ((2, 12), (3, 9), (5, 15), (4, 30), (6, 7))], TOKENS),
}


@pytest.fixture(scope="module")
def pruned():
    made = {}

    def get(name):
        if name not in made:
            build, inputs, free = CASES[name]
            made[name] = fxprune.prune(build().eval(), 0.5, example_inputs=inputs[0]), inputs, free
        return made[name]

    return get


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def tensors(output):
    return list(output.values()) if isinstance(output, dict) else list(output) if isinstance(output, tuple) else [output]


def same(first, second, *inputs):
    with torch.no_grad():
        for x in inputs:
            for one, two in zip(tensors(first(x)), tensors(second(x)), strict=True):
                torch.testing.assert_close(one, two)


def exported(model, x, free, kind=Dim.DYNAMIC, strict=False):
    shapes = {d: Dim(f"{name}_", min=2, max=64) if kind is Dim else kind for d, name in free.items()}
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=(shapes,), strict=strict)


@pytest.mark.parametrize(("name", "dynamic"), [("attends", None), ("pyramid", True), ("bert", True), ("mistral", True)])
def test_compiled_code_takes_other_sizes(pruned, name, dynamic):
    """It is not compiled anew for each of them, but where torch takes sizes for fixed, or for equal, that then are not."""
    small, inputs, _ = pruned(name)
    same(small, torch.compile(small, backend="eager", dynamic=dynamic, fullgraph=True), *inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 < len(inputs)


@pytest.mark.parametrize(("name", "kind"), [*((name, Dim.DYNAMIC) for name in CASES), ("bert", Dim.AUTO)])
def test_exported_programs_take_other_sizes(pruned, name, kind):
    small, inputs, free = pruned(name)
    same(small, exported(small, inputs[0], free, kind).module(), *inputs)


def test_a_mask_that_eager_code_may_leave_out_is_in_the_program(pruned):
    """Padding, and what is longer than the window, are no other programs, though the example has neither."""
    model, inputs = mistral().eval(), {"input_ids": words(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert fxprune.verify(model, pruned("mistral")[0], words(2, 20)).ok
    small = fxprune.prune(model, 0.5, example_inputs=inputs)
    for n in (6, 20):
        padded = torch.ones(2, n, dtype=torch.long)
        padded[1, :3] = 0
        assert fxprune.verify(model, small, {"input_ids": words(2, n), "attention_mask": padded}).ok


def test_named_dimensions_are_shared(pruned):
    """BERT asks for more than one token, which the range of the name grants."""
    small, inputs, free = pruned("bert")
    same(small, exported(small, inputs[0], free, Dim).module(), *inputs)


def test_exported_programs_are_stored_and_decomposed(pruned):
    small, inputs, free = pruned("attends")
    program, stored = exported(small, inputs[0], free), io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    same(small, torch.export.load(stored).module(), *inputs)
    same(small, program.run_decompositions().module(), *inputs)


def test_compiled_by_aot_autograd_it_trains(pruned):
    small, inputs, _ = pruned("attends")
    compiled = torch.compile(small, backend="aot_eager", dynamic=True)
    for x in inputs:
        found = []
        for model in (small, compiled):
            model.zero_grad()
            model(x).square().sum().backward()
            found.append([p.grad.clone() for p in small.parameters()])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two)


# -- guards stay ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def branches():
    return fxprune.prune(Branches().eval(), 0.5, example_inputs=noise(6, 8))


def test_a_guard_of_compiled_code_is_asked_of_each_input(branches):
    compiled = torch.compile(branches, backend="eager", dynamic=True)
    same(branches, compiled, noise(6, 8), noise(9, 8))
    with pytest.raises(GuardError, match="captured where %eq is True"):
        compiled(noise(7, 8))
    same(branches, compiled, noise(12, 8))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_guard_becomes_a_constraint_of_the_exported_program(branches, strict, deferred):
    shapes = ({0: Dim.DYNAMIC},)
    more = {"strict": strict, "prefer_deferred_runtime_asserts_over_guards": deferred}
    program = torch.export.export(branches, (noise(6, 8),), dynamic_shapes=shapes, **more)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    for module in (program.module(), torch.export.load(stored).module(), program.run_decompositions().module()):
        same(branches, module, noise(9, 8))
        with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|assertion failed"):
            module(noise(7, 8))


def test_an_input_that_disagrees_is_not_exported(branches):
    with pytest.raises(RuntimeError, match="captured where %eq is True"):
        exported(branches, noise(7, 8), {0: "b"})


def test_a_size_that_is_one_number_alone_is_no_free_dimension():
    class Counts(Branches):
        def forward(self, x):
            return self.b(self.a(x).relu()) * sum(range(x.shape[0]))

    small = fxprune.prune(Counts().eval(), 0.5, example_inputs=noise(6, 8))
    with pytest.raises(torch._dynamo.exc.UserError, match=r"specialized it to be a constant \(6\)"):
        exported(small, noise(6, 8), {0: "b"})


def test_a_traced_program_keeps_its_guards(branches):
    """FX's own tracer goes over it, and dead code is removed: a call that returns nothing looks dead."""
    traced = fx.symbolic_trace(branches)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    same(branches, traced, noise(9, 8))
    with pytest.raises(GuardError, match="captured where %eq is True"):
        traced(noise(7, 8))


def test_a_waived_guard_is_a_constraint_at_other_sizes():
    class Program(nn.Module):
        def forward(self, x):
            n = x.shape[0]
            holds(n // 3, 2, "two threes", n, 2)
            holds(n == 2, False, "not two", n, 2)
            return x + 1

    program = Program()
    for n in (2, 6, 8):
        assert program(noise(n)).shape == (n,)
    with pytest.raises(GuardError, match="two threes, and here it is 3"):
        program(noise(9))
    compiled, module = torch.compile(program, backend="eager", dynamic=True), exported(program, noise(6), {0: "b"}).module()
    for call in (compiled, module):
        same(program, call, noise(8), noise(2))
        with pytest.raises((GuardError, AssertionError), match=r"two threes|Guard failed"):
            call(noise(9))


@pytest.mark.parametrize("value", [0, 3])
def test_the_truth_of_a_size_is_no_size(value):
    """`if n % 4:` holds of 5, 6 and 7; the guard does not ask for more."""

    class Pads(Branches):
        def forward(self, x):
            y = self.b(self.a(x).relu())
            return F.pad(y, (0, 0, 0, 4 - x.shape[0] % 4)) if x.shape[0] % 4 else y

    model = Pads().eval()
    small = fxprune.prune(model, 0.5, example_inputs=noise(4 + value, 8))
    taken, refused = ((8, 12), (5, 7)) if not value else ((5, 6, 9), (4, 8))
    for n in taken:
        assert small(noise(n, 8)).shape == model(noise(n, 8)).shape
        assert fxprune.verify(model, small, noise(n, 8)).ok
    for n in refused:
        with pytest.raises(GuardError, match="is not 0" if value else "is 0"):
            small(noise(n, 8))


def test_a_size_that_is_used_as_a_number_too_is_that_number():
    class Both(Branches):
        def forward(self, x):
            y, n = self.b(self.a(x).relu()), x.shape[0]
            n = n + 1
            return y * (len(range(n)) if n else 1)

    small = fxprune.prune(Both().eval(), 0.5, example_inputs=noise(6, 8))
    with pytest.raises(GuardError, match="is 7, and here it is 8"):
        small(noise(7, 8))


def test_noted_guards_leave_nothing_behind(branches):
    with noting() as failing:
        branches(noise(7, 8))
    assert len(failing) == 1 and "captured where %eq is True" in failing[0]
    with pytest.raises(GuardError):
        branches(noise(7, 8))
    pickle.dumps(branches)
    copy.deepcopy(branches)
