"""What is chosen where nothing is asked for: the criterion by what there is to look at, and what a budget takes last."""

import copy

import pytest
import torch
import torch.nn.functional as F
from scored import scores
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune import PruneError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"input_ids": torch.arange(16).reshape(2, 8)}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, use_cache=False, **SIZES)).eval()


def batches(labels: bool = True) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (2, 8), generator=generator) for _ in range(3)]
    return [{"input_ids": i, **({"labels": i} if labels else {})} for i in ids]


def widths(model: nn.Module) -> list[tuple[int, int]]:
    layers = [f"model.layers.{i}" for i in range(3)]
    get = model.get_parameter
    return [(get(f"{n}.mlp.down_proj.weight").shape[1], get(f"{n}.self_attn.o_proj.weight").shape[1]) for n in layers]


def terms_by_hooks(model: nn.Module, data) -> dict[str, torch.Tensor]:
    """For each layer that ends a branch the sum over tokens of squared first-order loss terms, by channel or by KV group."""
    model = copy.deepcopy(model)
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, group: int):
        def look(module, args):
            (x,) = args

            def add(g):
                rows = (x.detach() * g * len(x)).reshape(-1, x.shape[-1] // group, group).sum(-1)
                found[name] = found.get(name, 0) + rows.double().square().sum(0)

            x.register_hook(add)

        return look

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(watch(f"model.layers.{i}.mlp.gate_proj", 1))
        layer.self_attn.o_proj.register_forward_pre_hook(watch(f"model.layers.{i}.self_attn.q_proj", 16))
    for batch in data:
        model(**batch).loss.backward()
    return found


def test_token_taylor_is_the_squared_loss_term_of_each_token(llama):
    kept = {}
    for share in (0.25, 0.5):
        small = fxprune.prune(llama, share, IDS, criterion="token_taylor", data=batches(), only="model.layers.*", verify=False)
        for name, terms in terms_by_hooks(llama, batches()).items():
            count = len(terms) - int(share * len(terms))
            width = llama.get_submodule(name).out_features // len(terms)
            kept[name] = terms.topk(count).indices.sort().values
            rows = torch.cat([torch.arange(i * width, (i + 1) * width) for i in kept[name].tolist()])
            assert torch.equal(small.get_submodule(name).weight, llama.get_submodule(name).weight[rows]), name


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def test_the_places_of_an_image_are_one_sample():
    torch.manual_seed(0)
    model, x, y = Images().eval(), torch.randn(5, 3, 9, 9), torch.tensor([0, 1, 0, 1, 1])
    small = fxprune.prune(model, 0.5, x, criterion="token_taylor", data=[(x, y)], loss=F.cross_entropy)
    h = model.first(x).relu().detach().requires_grad_()
    F.cross_entropy(model.head(model.second(h).relu().mean((2, 3))), y).backward()
    terms = (h.detach() * h.grad).sum((2, 3)).square().sum(0)
    rows = terms.topk(4).indices.sort().values
    assert torch.equal(small.get_submodule("first").weight, model.first.weight[rows])


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_scores_are_the_terms_themselves_in_groups_too(groups):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.Flatten(), nn.Linear(200, 2)]
    model, x, y = nn.Sequential(*layers).double().eval(), torch.randn(5, 3, 9, 9).double(), torch.tensor([0, 1, 0, 1, 1])
    found = scores(model, x, "token_taylor", [(x, y)], F.cross_entropy)
    h = model[1](model[0](x)).detach().requires_grad_()
    F.cross_entropy(model[4](model[3](model[2](h))), y).backward()
    terms = (h.detach() * h.grad * 5).sum((2, 3)).square().sum(0)
    if groups == 8:  # a depthwise layer hands its units on: the last layer reads them
        z = model[2](h).detach().requires_grad_()
        F.cross_entropy(model[4](model[3](z)), y).backward()
        terms = (z.detach() * z.grad * 5).sum((2, 3)).square().sum(0)
    torch.testing.assert_close(found["0"], terms)


@pytest.mark.parametrize(
    ("data", "options", "criterion"),
    [
        (None, {}, "magnitude"),
        (batches(False), {}, "flap"),
        (batches(), {}, "token_taylor"),
        (batches(False), {"loss": lambda out, batch: out.logits.square().mean()}, "token_taylor"),
    ],
)
def test_the_criterion_looks_at_what_there_is(llama, data, options, criterion):
    small = fxprune.prune(llama, 0.5, IDS, data=data, verify=False, **options)
    asked = fxprune.prune(llama, 0.5, IDS, data=data, criterion=criterion, verify=False, **options)
    assert small.meta["plan"] == asked.meta["plan"]
    assert f"chosen: criterion='{criterion}', since" in str(fxprune.report(llama, small))
    assert "chosen" not in str(fxprune.report(llama, asked))


def test_an_iterator_of_batches_is_read_from_its_start(llama):
    once = fxprune.prune(llama, 0.5, IDS, data=iter(batches()), verify=False)
    assert once.meta["plan"] == fxprune.prune(llama, 0.5, IDS, data=batches(), verify=False).meta["plan"]


def test_no_batches_and_no_loss(llama):
    with pytest.raises(PruneError, match="holds no batches"):
        fxprune.prune(llama, 0.5, IDS, data=[])
    with pytest.raises(PruneError, match="the output of the model holds none"):
        fxprune.prune(llama, 0.5, IDS, data=batches(False), criterion="token_taylor")


def test_a_budget_takes_the_stream_through_the_whole_model_last(llama):
    small = fxprune.prune(llama, example_inputs=IDS, params=0.7)
    assert small.get_parameter("model.embed_tokens.weight").shape == (64, 32)
    assert "is a residual stream through the whole model, which goes last" in str(fxprune.report(llama, small))
    less = fxprune.prune(llama, example_inputs=IDS, params=0.2)  # more than all others can lose
    assert less.get_parameter("model.embed_tokens.weight").shape[1] < 32
    hidden, heads = zip(*widths(less), strict=True)
    assert heads == (16, 16, 16)  # one of two KV groups
    assert min(hidden) == 5  # a tenth, rounded up; what the last channel of the stream leaves of the budget is given back
    assert sum(hidden) <= 5 + 5 + 11


def test_a_ranking_that_is_asked_for_takes_of_every_family(llama):
    small = fxprune.prune(llama, example_inputs=IDS, params=0.7, ranking="local")
    assert small.get_parameter("model.embed_tokens.weight").shape[1] < 32


def test_the_last_step_of_a_local_budget_goes_by_score(llama):
    model = copy.deepcopy(llama)
    with torch.no_grad():  # the last layer's second KV group is worth least
        for name, rows in (("q_proj", slice(16, 32)), ("k_proj", slice(8, 16)), ("v_proj", slice(8, 16))):
            model.get_parameter(f"model.layers.2.self_attn.{name}.weight")[rows] *= 0.01
    group = 2 * 16 * 32 + 2 * 8 * 32  # parameters of a KV group: q and o, k and v
    total = sum(p.numel() for p in model.parameters())
    small = fxprune.prune(model, example_inputs=IDS, params=(total - group) / total, only="*self_attn")
    assert [heads for _, heads in widths(small)] == [32, 32, 16]


def grown(score):
    """The increase of t g / (t - g) by each unit that goes, the lowest first, where g of the sum t has gone before it."""
    total, gone, found = float(score.sum()), 0.0, []
    for value in score.sort().values.tolist()[: len(score) * 9 // 10]:
        after = gone + value
        found.append(total * after / (total - after) - total * gone / (total - gone))
        gone = after
    return found


def test_a_unit_is_taken_for_its_score_by_what_it_costs(llama):
    total = sum(p.numel() for p in llama.parameters())
    terms = terms_by_hooks(llama, batches())
    small = fxprune.prune(llama, example_inputs=IDS, params=0.85, data=batches(), only="model.layers.*")
    cost = {name: 3 * 32 if "mlp" in name else 2 * 16 * 32 + 2 * 8 * 32 for name in terms}
    units = sorted((value / cost[n], n) for n, each in terms.items() for value in grown(each))
    gone, left = dict.fromkeys(terms, 0), float(total)
    for _, name in units:
        if left <= 0.85 * total:
            break
        gone[name] += 1
        left -= cost[name]
    expected = [
        (48 - gone[f"model.layers.{i}.mlp.gate_proj"], 32 - 16 * gone[f"model.layers.{i}.self_attn.q_proj"]) for i in range(3)
    ]
    assert widths(small) == expected


@pytest.mark.parametrize("alone", [True, False])
def test_shares_of_a_family_grow_as_it_shrinks(alone):
    """Unless scores are of units that go one after the other: there the growth is in them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4)
    )
    with torch.no_grad():
        model[2].weight[::2] *= 0.05  # half of the units of one family are worth little beside the others
        model[4].weight[:, ::2] *= 0.05
    scores = [
        first.weight.square().sum(1) + first.bias.square() + then.weight.square().sum(0)
        for first, then in ((model[0], model[2]), (model[2], model[4]), (model[4], model[6]))
    ]
    shares = [(each / each.mean()).detach() for each in scores]
    units = [
        (value, i)
        for i, each in enumerate(shares)
        for value in (grown(each) if alone else each.sort().values.tolist()[: len(each) * 9 // 10])
    ]
    taken = [i for _, i in sorted(units)[: 7 * 70 // 10]]
    criterion = fxprune.criteria.Magnitude(normalise="mean" if alone else "share")
    small = fxprune.prune(model, example_inputs=torch.ones(2, 8), ratio=0.7, ranking="global", criterion=criterion)
    expected = [len(each) - taken.count(i) for i, each in enumerate(shares)]
    assert [small.get_submodule(n).out_features for n in ("0", "2", "4")] == expected
