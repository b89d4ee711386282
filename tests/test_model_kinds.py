"""Wrappers are looked into, and kinds of models that cannot be pruned are refused with what to pass instead."""

import threading

import pytest
import torch
from refusals import refuses
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxprune
from fxprune.entry_points import unwrapped

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
SHARDED = "prune the plain model, before fully_shard(), parallelize_module() or quantize_()"


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def eager(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled": eager,
    "averaged": AveragedModel,
    "compiled, of a distributed one": lambda model: eager(nn.parallel.DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapper_is_looked_into(wrap, group):
    """Every entry point gives what it gives for the module inside."""
    model = plain()
    wrapper, small = wrap(model), fxprune.prune(model, 0.5, example_inputs=X)
    inside = unwrapped(wrapper)
    found = fxprune.prune(wrapper, 0.5, example_inputs=X)
    assert found.plan == small.plan and "0.weight" in found.plan.shapes and torch.equal(found(X), small(X))
    assert found.plan.apply(wrapper).get_submodule("0").out_features == 4
    assert fxprune.couple(wrapper, X).to_dict() == fxprune.couple(inside, X).to_dict()
    assert fxprune.feasible(wrapper, X) == fxprune.feasible(inside, X)
    assert fxprune.verify(wrapper, found, X).ok and fxprune.report(wrapper, found, X).share < 1
    assert fxprune.repair(wrapper, found, [X]).get_submodule("0").out_features == 4
    assert len(fxprune.sensitivity(wrapper, X, lambda m: m(X).sum(), ratios=(0.5,)).curves) == 1
    pruner = fxprune.Pruner(wrapper, 0.5, example_inputs=X, steps=2)
    first = pruner.step()
    assert pruner.step(wrap(first.train())).get_submodule("0").out_features == 4


def test_compiled_code_is_followed_as_python():
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), eager(nn.Linear(8, 8)), nn.Linear(8, 2)
            self.f = eager(lambda x: x.relu() * 2)
            self.b.compile(backend="eager")

        @torch.compile(backend="eager")
        def forward(self, x):
            return self.c(self.b(self.f(self.a(x))))

    model = Compiled().eval()
    small = fxprune.prune(model, 0.5, example_inputs=X)
    assert small.verification.ok and small.a.out_features == 4
    assert small.get_parameter("b._orig_mod.weight").shape == (4, 4)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_model_that_is_compiled_in_place():
    model = plain()
    model.compile(backend="eager")
    model[0].compile(backend="eager")
    assert fxprune.prune(model, 0.5, example_inputs=X).verification.ok


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = plain(), plain(), nn.Linear(2, 4)
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(self.a, x, use_reentrant=self.reentrant)
        return checkpoint_sequential(self.b, 2, self.c(x).relu(), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, training):
    model = Checkpointed(reentrant).train(training)
    small = fxprune.prune(model, 0.5, example_inputs=X)
    assert small.verification.ok and small.plan.kept_shape("b.0.weight")[0] == 4


class Lightning(nn.Module):
    """What makes such modules special: a trainer that may not be there, handles of hooks, and a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self._trainer, self.lock = plain(), None, threading.Lock()
        self.handles = [self.net[0].register_forward_hook(lambda module, args, out: None)]
        self.state = {"locks": [threading.Lock()]}

    @property
    def trainer(self):
        if self._trainer is None:
            raise RuntimeError("not attached to a trainer")
        return self._trainer

    def training_step(self, batch, index):
        return self(batch).sum()

    def forward(self, x):
        with self.lock:
            return self.net(x)


def test_a_module_as_of_lightning():
    model = Lightning().eval()
    small = fxprune.prune(model, 0.5, example_inputs=X)
    assert small.verification.ok and small.get_submodule("net.0").out_features == 4
    whole = fxprune.prune(model, 0.5, example_inputs=X, same_class=True)
    with torch.no_grad():
        assert isinstance(whole, Lightning) and torch.allclose(whole(X), small(X), atol=1e-6)
    whole.handles[0].remove()
    assert model.net[0]._forward_hooks, "the copy's handle must not remove the original's hook"


def test_what_an_exported_program_calls():
    for shapes in (None, ({0: torch.export.Dim("batch")},)):
        exported = torch.export.export(plain(), (X,), dynamic_shapes=shapes)
        small = fxprune.prune(exported.module(), 0.5, example_inputs=X)
        assert small.verification.ok and sum(p.numel() for p in small.parameters()) == 30


def test_what_stands_for_a_model():
    refuses(
        lambda: fxprune.prune(torch.export.export(plain(), (X,)), 0.5, example_inputs=X),
        what="model is an ExportedProgram, not a torch.nn.Module",
        fix="pass exported.module()",
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["scripted", "traced"])
def test_a_model_that_is_no_longer_python(make):
    model = make(plain())
    for call in (fxprune.prune, fxprune.couple, fxprune.feasible, fxprune.Pruner):
        with pytest.raises(fxprune.PruneError, match="what it computes is no longer Python") as caught:
            call(model, example_inputs=X)
        assert caught.value.fix == "pass the module that was scripted or traced, and trace the pruned one (torch.jit.trace)"


def test_a_lazy_layer_that_has_not_run():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)).eval()
    refuses(
        lambda: fxprune.prune(model, 0.5, example_inputs=X),
        what="0.weight is not initialized: its layer is lazy",
        where="0 (LazyLinear)",
        fix="run the model once: model(*example_inputs)",
    )
    model(X)
    assert fxprune.prune(model, 0.5, example_inputs=X).get_submodule("0").out_features == 4


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
def test_sharded_parameters(group):
    mesh = init_device_mesh("cpu", (1,))
    tensor_parallel = parallelize_module(plain(), mesh, {"0": ColwiseParallel()})
    for model in (fully_shard(plain()), tensor_parallel):
        what = "0.weight is a DTensor that is sharded or packed, not a plain tensor"
        fix = f"prune(), couple(), Plan.apply() and Pruner take it as it is; else {SHARDED}"
        refuses(lambda m=model: fxprune.feasible(m, X), what=what, where=type(model).__name__, fix=fix)
    flat = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))
    what = "the model's parameters are flattened and sharded"
    refuses(lambda: fxprune.couple(flat, X), what=what, where="FSDP", fix=SHARDED)


def quantizable(training: bool) -> nn.Module:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), *plain(), torch.ao.quantization.DeQuantStub()).train(training)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantized_models():
    dynamic = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})
    refuses(
        lambda: fxprune.prune(dynamic, 0.5, example_inputs=X),
        what="nothing in the model can be pruned: it is quantized, and its weights are packed",
        where="0._packed_params (LinearPackedParams)",
        fix="prune the float model, then quantize it",
    )
    prepared = torch.ao.quantization.prepare_qat(quantizable(True))
    prepared(X)
    refuses(
        lambda: fxprune.prune(prepared.eval(), 0.5, example_inputs=X),
        what="nothing in the model can be pruned: it is prepared for quantization, and observers follow its weights",
        where="0.activation_post_process (FusedMovingAvgObsFakeQuantize)",
        fix="prune the float model, then prepare it for quantization",
    )


def test_what_nobody_foresaw_is_one_error(monkeypatch):
    monkeypatch.delenv("FXPRUNE_STRICT")

    def fails(*args, **kwargs):
        raise LookupError("nobody foresaw this")

    monkeypatch.setattr("fxprune.inputs.ExampleInputs.check", fails)
    for call in (fxprune.prune, fxprune.couple, fxprune.feasible, fxprune.Pruner):
        with pytest.raises(fxprune.PruneError, match="LookupError: nobody foresaw this") as caught:
            call(plain().eval(), example_inputs=X)
        assert caught.value.fix


class NoCopy:
    def __deepcopy__(self, memo):
        raise LookupError("there is one of me")


def test_what_cannot_be_copied_is_shared():
    model = plain().eval()
    model.one = NoCopy()
    assert fxprune.prune(model, 0.5, example_inputs=X).verification.ok


def test_compiling_goes_on_as_before():
    """The stance of the compiler and its configuration are those of before."""
    seen: list[int] = []

    def backend(graph, inputs):
        seen.append(len(inputs))
        return graph.forward

    model = torch.compile(plain(), backend=backend)
    fxprune.prune(model, 0.5, example_inputs=X)
    assert not seen
    model(X)
    assert seen and torch._dynamo.config.error_on_nested_fx_trace
