"""Models that FSDP2 and tensor parallelism spread over processes: what is left of them is what one process leaves."""

import gc
import io
import weakref

import pytest
import torch
from processes import in_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import fxprune
from fxprune.distributed import sharded

TOKENS = torch.arange(10).view(2, 5)
EVEN = {"width": 16, "heads": 8, "hidden": 24}  # of which two processes have equally much after each step


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head_dim = width // heads

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


class Decoder(nn.Module):
    """Blocks between an embedding and a head that share one matrix."""

    def __init__(self, blocks=2, width=12, heads=4, hidden=21):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(blocks))
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(1, 2, width))

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def features(self, tokens):
        return self(tokens).mean(1)


def decoder(**sizes):
    torch.manual_seed(0)
    return Decoder(**sizes).eval()


def in_fsdp(mesh, **sizes):
    model = decoder(**sizes)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


PLAN = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()}
PLAN |= {"up": ColwiseParallel(), "down": RowwiseParallel()}


def in_parallel(mesh, **sizes):
    model = decoder(**sizes)
    for block in model.blocks:
        parallelize_module(block, mesh, PLAN)
    return model


def mesh_of(*shape, names=None):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def described(small):
    """Plan, values, outputs and the values after a step, as JSON."""
    values = {name: whole(t).tolist() for name, t in small.state_dict().items()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    loss = cross_entropy(small(TOKENS).flatten(0, 1), TOKENS.flatten())
    loss.backward()
    optimizer.step()
    trained = {name: whole(t).tolist() for name, t in small.state_dict().items()}
    return {"plan": fxprune.plan_of(small).to_json(), "values": values, "loss": loss.item(), "trained": trained}


def by_ratio(model):
    return fxprune.prune(model, 0.5, TOKENS, same_class=True, verify=False)


def by_budget(model):
    return fxprune.prune(model, params=0.6, example_inputs=TOKENS, ranking="global", same_class=True, verify=False)


# -- tasks of each process ------------------------------------------------------------------------------------------------


def fsdp(rank):
    return described(by_ratio(in_fsdp(None)))


def fsdp_after_forward(rank):
    model = in_fsdp(None)
    model(TOKENS)
    return described(by_budget(model))


def fsdp_again(rank):
    return described(by_ratio(by_budget(in_fsdp(None))))


def fsdp_in_place(rank):
    """How many gathered parameters are there at once, how large the original is then, and the result."""
    alive, most, gather = [0], [0], sharded.whole

    def counted(tensor):
        found = gather(tensor)
        if found is not tensor:
            alive[0] += 1
            weakref.finalize(found, lambda: alive.__setitem__(0, alive[0] - 1))
            most[0] = max(most[0], alive[0])
        return found

    model = in_fsdp(None)
    sharded.whole = counted
    try:
        small = fxprune.prune(model, 0.5, TOKENS, inplace=True)
    finally:
        sharded.whole = gather
    gc.collect()
    return most[0], sum(p.numel() for p in model.parameters()), described(small)


def fsdp_settings(rank):
    model = decoder()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy, reshard_after_forward=False)
    fully_shard([model.embed, model.head])
    fully_shard(model)
    register_fsdp_forward_method(model, "features")
    model.set_requires_gradient_sync(False)
    small = by_ratio(model)
    states = [small.blocks[0]._get_fsdp_state(), small.head._get_fsdp_state()]
    group = states[0]._fsdp_param_groups[0]
    return {
        "class": type(small).__name__,
        "policy": states[0]._mp_policy == policy,
        "reshard": group.post_forward_mesh_info is None,
        "sync": group.reduce_grads,
        "together": states[1] is small.embed._get_fsdp_state(),
        "features": list(small.features(TOKENS).shape),
    }


def tensor_parallel(rank):
    return described(fxprune.prune(in_parallel(mesh_of(2), hidden=24), 0.5, TOKENS))


def tensor_parallel_uneven(rank):
    return described(fxprune.prune(in_parallel(mesh_of(2), hidden=24), {"blocks.0.up": 0.21}, TOKENS))


def in_both(**sizes):
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    model = in_parallel(mesh["tensor"], **sizes)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def both(rank):
    return described(by_ratio(in_both(hidden=24)))


def hybrid(rank):
    return described(by_ratio(in_fsdp(mesh_of(2, 2, names=("copies", "shards")))))


def one_cannot(rank):
    return by_ratio(in_fsdp(None)) if rank else fxprune.prune(in_fsdp(None), 1.5, TOKENS)


def one_fails_in_between(rank):
    def score(weight):
        if rank == 1:
            raise ValueError("out of luck")
        return weight.square()

    return fxprune.prune(in_fsdp(None), 0.5, TOKENS, criterion=score)


def one_asks_otherwise(rank):
    return fxprune.prune(in_fsdp(None), 0.5 if rank else 0.25, TOKENS)


def by_data(rank):
    return fxprune.prune(in_fsdp(None), 0.5, TOKENS, criterion="taylor", data=[(TOKENS, TOKENS)], loss=cross_entropy)


def verified(rank):
    return fxprune.prune(in_fsdp(None), 0.5, TOKENS, verify=True)


def of_plan(rank):
    return described(fxprune.prune(decoder(), 0.5, TOKENS, verify=False).plan.apply(in_fsdp(None)))


def of_plan_without_values(rank):
    """Shards on the meta device, which get the values of a pruned model afterwards."""
    pruned = by_ratio(decoder())
    with torch.device("meta"):
        model = Decoder().eval()
    for block in model.blocks:
        fully_shard(block)
    small = fxprune.plan_of(pruned).apply(fully_shard(model)).to_empty(device="cpu")
    set_model_state_dict(small, pruned.state_dict(), options=StateDictOptions(full_state_dict=True))
    return {name: whole(t).tolist() for name, t in small.state_dict().items()}


def of_another_plan(rank):
    return fxprune.prune(decoder(), 0.25 if rank else 0.5, TOKENS).plan.apply(in_fsdp(None))


def coupled(rank):
    """Both models are made by all; one process alone asks."""
    models = in_fsdp(None), in_parallel(mesh_of(2), hidden=24)
    if rank:
        return None
    found = [fxprune.couple(model, TOKENS) for model in models]
    with pytest.raises(fxprune.PruneError, match="a group has none of its values"):
        found[0].group("blocks.0.up", [0]).apply()
    return [coupling.to_dict()["families"] for coupling in found]


def stepped(model, **asked):
    """Two steps of pruning, each with a step of training by an optimizer that is remapped."""
    asked = {"ratio": 0.5, "steps": 2} | asked
    pruner = fxprune.Pruner(model, example_inputs=TOKENS, same_class=True, verify=False, **asked)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    while not pruner.done:
        small = pruner.step()
        pruner.remap_optimizer(optimizer)
        small.train()
        cross_entropy(small(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    momentum = [whole(optimizer.state[p]["momentum_buffer"]).tolist() for p in small.parameters()]
    values = {name: whole(t).tolist() for name, t in small.state_dict().items()}
    shrunk = {name: whole(t).tolist() for name, t in pruner.shrink().state_dict().items()}
    modes = [small.training, pruner.shrink().training]
    kept = [[*step.units, step.fresh, *step.params] for step in pruner.history]
    found = {"values": values, "shrunk": shrunk, "momentum": momentum, "modes": modes, "kept": kept}
    return found | {"plan": pruner.plan.to_json(), "class": type(small).__name__.removeprefix("FSDP")}


def by_steps(model):
    return stepped(model)


def by_steps_to_a_budget(model):
    return stepped(model, ratio=None, params=0.6, ranking="global")


def in_steps(rank):
    return by_steps(in_fsdp(None))


def in_steps_to_a_budget(rank):
    return by_steps_to_a_budget(in_fsdp(None))


def in_steps_in_parallel(rank):
    return by_steps(in_parallel(mesh_of(2), **EVEN))


def in_steps_of_another_model(rank):
    pruner = fxprune.Pruner(in_fsdp(None), 0.5, TOKENS, steps=2)
    pruner.step(in_fsdp(None, hidden=24))


def by_hand(model):
    """The first of two steps, of which only half of the candidates are taken."""
    pruner = fxprune.Pruner(model, 0.5, TOKENS, steps=2, same_class=True, verify=False)
    proposal = pruner.step(interactive=True)
    for candidate in list(proposal)[::2]:
        candidate.apply()
    made = proposal.finish()
    return {"plan": pruner.plan.to_json(), "values": {name: whole(t).tolist() for name, t in made.state_dict().items()}}


def in_steps_by_hand(rank):
    return by_hand(in_fsdp(None))


def in_steps_with_masks(rank):
    fxprune.Pruner(in_fsdp(None), 0.5, TOKENS, mask="hold")


def trained(model, optimizer, pruner=None):
    """A step of training, with a penalty where there is a pruner."""
    model.train()
    cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    if pruner is not None:
        pruner.regularize(model)
    optimizer.step()
    optimizer.zero_grad()


def with_a_penalty(model, regularizer):
    pruner = fxprune.Pruner(model, 0.5, TOKENS, steps=2, same_class=True, verify=False, regularizer=regularizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained(model, optimizer, pruner)
    trained(model, optimizer, pruner)
    small = pruner.step()
    pruner.remap_optimizer(optimizer)
    trained(small, optimizer, pruner)
    values = {name: whole(t).tolist() for name, t in small.state_dict().items()}
    return {"values": values, "plan": pruner.plan.to_json()}


def by_group_lasso(model):
    return with_a_penalty(model, fxprune.regularizers.GroupLasso(strength=0.1))


def by_growing(model):
    return with_a_penalty(model, fxprune.regularizers.Growing(strength=0.1))


def in_steps_by_group_lasso(rank):
    return by_group_lasso(in_fsdp(None))


def in_steps_by_growing(rank):
    return by_growing(in_fsdp(None))


def in_steps_by_group_lasso_in_parallel(rank):
    return by_group_lasso(in_parallel(mesh_of(2), **EVEN))


def in_steps_by_group_lasso_in_both(rank):
    return by_group_lasso(in_both(**EVEN))


def in_steps_with_no_gradient(rank):
    model = in_fsdp(None)
    pruner = fxprune.Pruner(model, 0.5, TOKENS)
    model(TOKENS).sum().backward()
    if rank:
        model.zero_grad()
    pruner.regularize(model)


def resumed(make):
    """Two steps and the training between them; once in one go, once by the states after the first step, read from bytes."""

    def pruner_of(model):
        return fxprune.Pruner(model, 0.5, TOKENS, steps=2, same_class=True, verify=False)

    def last_step(pruner, small, optimizer):
        trained(small, optimizer)
        last = pruner.step(small)
        return {"values": {name: whole(t).tolist() for name, t in last.state_dict().items()}, "plan": pruner.plan.to_json()}

    model = make()
    pruner, optimizer = pruner_of(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    trained(model, optimizer)
    small = pruner.step()
    pruner.remap_optimizer(optimizer)
    file = io.BytesIO()
    torch.save({"pruner": pruner.state_dict(), "optimizer": optimizer.state_dict()}, file)
    wanted = last_step(pruner, small, optimizer)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = pruner_of(make())
    again.load_state_dict(state["pruner"])
    optimizer = torch.optim.SGD(again.model.parameters(), lr=0.1, momentum=0.5)
    optimizer.load_state_dict(state["optimizer"])
    return {"wanted": wanted, "found": last_step(again, again.model, optimizer), "history": len(again.history)}


def in_steps_resumed(rank):
    return resumed(lambda: in_fsdp(None))


def in_steps_resumed_in_parallel(rank):
    return resumed(lambda: in_parallel(mesh_of(2), **EVEN))


def in_steps_resumed_in_both(rank):
    return resumed(lambda: in_both(**EVEN))


def in_steps_resumed_with_the_state_of_another(rank):
    state = fxprune.Pruner(in_fsdp(None), 0.5, TOKENS).state_dict()
    state["asked"]["process"] = "1 of 2"
    fxprune.Pruner(in_fsdp(None), 0.5, TOKENS).load_state_dict(state)


def in_steps_resumed_too_late(rank):
    pruner = fxprune.Pruner(in_fsdp(None), 0.5, TOKENS, steps=2)
    pruner.step()
    pruner.load_state_dict(pruner.state_dict())


TASKS = [fsdp, fsdp_after_forward, fsdp_again, fsdp_in_place, fsdp_settings, tensor_parallel, tensor_parallel_uneven]
TASKS += [one_cannot, one_fails_in_between, one_asks_otherwise, by_data, verified]
TASKS += [of_plan, of_plan_without_values, of_another_plan, coupled]
IN_STEPS = [in_steps, in_steps_to_a_budget, in_steps_in_parallel, in_steps_by_hand]
IN_STEPS += [in_steps_of_another_model, in_steps_with_masks, in_steps_by_group_lasso, in_steps_by_growing]
IN_STEPS += [in_steps_by_group_lasso_in_parallel, in_steps_with_no_gradient, in_steps_resumed, in_steps_resumed_in_parallel]
IN_STEPS += [in_steps_resumed_with_the_state_of_another, in_steps_resumed_too_late]
IN_BOTH = [in_steps_by_group_lasso_in_both, in_steps_resumed_in_both]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes gets; they start once, since importing torch takes most of the time."""
    return in_processes(2, TASKS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_in_steps(tmp_path_factory):
    return in_processes(2, IN_STEPS, tmp_path_factory.mktemp("two_in_steps"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return in_processes(4, [fsdp, both, hybrid], tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def four_in_steps(tmp_path_factory):
    return in_processes(4, [in_steps, *IN_BOTH], tmp_path_factory.mktemp("four_in_steps"))


def assert_like(found, wanted, step=1e-6):
    """Plan and values to the last bit; what a step makes of them to rounding, since gradients are added in another order."""
    assert found["plan"] == wanted["plan"] and found["values"] == wanted["values"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    for name, values in wanted["trained"].items():
        torch.testing.assert_close(torch.tensor(found["trained"][name]), torch.tensor(values), rtol=step, atol=step)


@pytest.mark.parametrize(
    ("task", "prune"),
    [
        (fsdp, by_ratio),
        (of_plan, by_ratio),
        (fsdp_after_forward, by_budget),
        (fsdp_again, lambda model: by_ratio(by_budget(model))),
    ],
)
def test_two_processes_leave_what_one_leaves(task, prune, two):
    wanted = described(prune(decoder()))
    for found in two:
        assert_like(found[task.__name__], wanted)


def test_a_plan_cuts_shards_on_the_meta_device(two):
    wanted = {name: t.tolist() for name, t in by_ratio(decoder()).state_dict().items()}
    assert [found["of_plan_without_values"] for found in two] == [wanted] * 2


def test_one_process_couples_what_all_hold(two):
    wanted = [fxprune.couple(decoder(**sizes), TOKENS).to_dict()["families"] for sizes in ({}, {"hidden": 24})]
    assert two[0]["coupled"] == wanted


def test_four_processes_leave_what_one_leaves(four):
    for found in four:
        assert_like(found["fsdp"], described(by_ratio(decoder())))
        assert_like(found["hybrid"], described(by_ratio(decoder())))
        assert_like(found["both"], described(by_ratio(decoder(hidden=24))), 1e-5)


@pytest.mark.parametrize(
    ("task", "steps", "sizes"),
    [
        ("in_steps", by_steps, {}),
        ("in_steps_to_a_budget", by_steps_to_a_budget, {}),
        ("in_steps_in_parallel", by_steps, EVEN),
        ("in_steps_by_hand", by_hand, {}),
        ("in_steps_by_group_lasso", by_group_lasso, {}),
        ("in_steps_by_growing", by_growing, {}),
        ("in_steps_by_group_lasso_in_parallel", by_group_lasso, EVEN),
    ],
)
def test_steps_of_two_processes_are_those_of_one(task, steps, sizes, two_in_steps):
    wanted = steps(decoder(**sizes))
    for found in two_in_steps:
        assert_same_steps(found[task], wanted)


def test_steps_of_four_processes_are_those_of_one(four_in_steps):
    wanted = by_steps(decoder())
    assert wanted["kept"][0] != wanted["kept"][1]  # both steps remove something
    for found in four_in_steps:
        assert_same_steps(found["in_steps"], wanted)


def test_penalties_of_four_processes_are_those_of_one(four_in_steps):
    wanted = by_group_lasso(decoder(**EVEN))
    for found in four_in_steps:
        assert_same_steps(found["in_steps_by_group_lasso_in_both"], wanted)


def test_sharded_steps_go_on_from_a_state(two_in_steps, four_in_steps):
    tasks = "in_steps_resumed", "in_steps_resumed_in_parallel", "in_steps_resumed_in_both"
    results = [found[task] for found in [*two_in_steps, *four_in_steps] for task in tasks if task in found]
    assert len(results) == 8
    for found in results:
        assert found["found"] == found["wanted"] and found["history"] == 2


def test_a_state_is_for_the_process_that_it_was_saved_in(two_in_steps):
    said = "the state is of a Pruner with process 1 of 2, and this one has 0 of 2"
    assert all(said in found["in_steps_resumed_with_the_state_of_another"] for found in two_in_steps)


def assert_same_steps(found, wanted):
    """The same is removed; values to rounding, since gradients are added in another order."""
    numbers = {"values", "shrunk", "momentum"}
    assert {k: v for k, v in found.items() if k not in numbers} == {k: v for k, v in wanted.items() if k not in numbers}
    for name in numbers & wanted.keys():
        mine, theirs = found[name], wanted[name]
        assert isinstance(mine, list) or mine.keys() == theirs.keys()
        for a, b in zip(*(list(v.values()) if isinstance(v, dict) else v for v in (mine, theirs)), strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)


def test_tensor_parallelism(two):
    for found in two:
        assert_like(found["tensor_parallel"], described(by_ratio(decoder(hidden=24))), 1e-5)


def test_layers_in_tensor_parallel_share_evenly(two):
    said = "19 of 24 would be left of blocks.0.up.weight in dimension 0, which 2 processes share"
    assert all(said in found["tensor_parallel_uneven"] and "round_to=2" in found["tensor_parallel_uneven"] for found in two)


def test_in_place_one_parameter_is_whole_at_a_time(two):
    for found in two:
        most, left, small = found["fsdp_in_place"]
        assert most == 1 and left == 0
        assert_like(small, described(by_ratio(decoder())))


def test_what_fully_shard_was_told_stays(two):
    wanted = {"class": "FSDPDecoder", "policy": True, "reshard": True, "sync": False, "together": True, "features": [2, 10]}
    assert [found["fsdp_settings"] for found in two] == [wanted] * 2


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("one_cannot", "must be a number in [0, 1)"),
        ("one_fails_in_between", "out of luck"),
        ("one_asks_otherwise", "another plan than rank 0"),
        ("of_another_plan", "another plan than rank 0"),
        ("by_data", "the criterion taylor looks at data, which takes the model in one process"),
        ("verified", "the result is compared with the original, which takes the model in one process"),
    ],
)
def test_all_fail_together(task, said, two):
    assert all(isinstance(found[task], str) and said in found[task] for found in two)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("in_steps_of_another_model", "this is another model: blocks.0.up.weight has shape (24, 12), not (21, 12)"),
        ("in_steps_with_masks", "mask='hold' takes the model in one process, and it is sharded: with masks it computes"),
        ("in_steps_with_no_gradient", "no parameter has a gradient"),
        ("in_steps_resumed_too_late", "is loaded into a Pruner that has taken no step"),
    ],
)
def test_all_steps_fail_together(task, said, two_in_steps):
    assert all(isinstance(found[task], str) and said in found[task] for found in two_in_steps)
