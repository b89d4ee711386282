"""Outputs that are released by name: their channels may go."""

from collections import namedtuple
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fxprune
from fxprune import Plan, PruneError
from fxprune.inspect import main

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Found = namedtuple("Found", ["logits", "hidden"])


class Body(nn.Module):
    """Returns what it was told to, of its logits and its two hidden states."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x).relu()
        b = self.second(a).tanh()
        forms = {
            "tensor": lambda: b,
            "dict": lambda: {"logits": self.head(b), "states": (a, b)},
            "tuple": lambda: (self.head(b), [a, b]),
            "fields": lambda: Found(self.head(b), b),
            "twice": lambda: {"states": b, "again": b * 2},
        }
        return forms[self.form]()


def body(form: str) -> Body:
    torch.manual_seed(1)
    return Body(form).double()


def kept_of(plan: Plan, name: str) -> list[int]:
    return plan.slices[f"{name}.weight"][0].keep.tolist()


def test_by_default_every_output_keeps_its_shape():
    reasons = {f.name: f.frozen for f in fxprune.couple(body("dict"), X).families}
    assert reasons["first"] == "is an output of the model, states.0"
    assert reasons["second"] == "is an output of the model, states.1"
    assert reasons["head"] == "is an output of the model, logits"
    small = fxprune.prune(body("tensor"), example_inputs=X)
    assert small(X).shape == (2, 10)


@pytest.mark.parametrize(
    ("form", "release", "get"),
    [
        ("tensor", "output", lambda out: out),
        ("dict", "states.1", lambda out: out["states"][1]),
        ("tuple", "1.1", lambda out: out[1][1]),
        ("fields", "hidden", lambda out: out.hidden),
    ],
)
def test_what_is_left_of_a_released_output_is_what_the_original_has_there(form, release, get):
    """With nothing else removed (`ratio`), the kept channels are the original's own, number for number."""
    model = body(form)
    small = fxprune.prune(model, {"second": 0.5}, example_inputs=X, release=release)
    kept = kept_of(small.meta["plan"], "second")
    assert len(kept) == 5
    torch.testing.assert_close(get(small(X)), get(model(X))[:, kept], rtol=1e-12, atol=1e-12)
    assert small.meta["verification"].error < 1e-12


def test_a_released_container_releases_all_that_is_in_it():
    small = fxprune.prune(body("dict"), example_inputs=X, release="states")
    out = small(X)
    assert [t.shape[1] for t in out["states"]] == [4, 5]
    assert out["logits"].shape == (2, 3)
    assert small.meta["verification"].ok


def test_an_output_that_is_not_released_holds_what_it_shares():
    small = fxprune.prune(body("twice"), example_inputs=X, release="states")
    assert {name: t.shape[1] for name, t in small(X).items()} == {"states": 10, "again": 10}
    both = fxprune.prune(body("twice"), example_inputs=X, release=["states", "ag*"])
    assert {name: t.shape[1] for name, t in both(X).items()} == {"states": 5, "again": 5}


def test_verification_sees_a_released_output_in_another_order():
    model = body("tensor")
    small = fxprune.prune(model, example_inputs=X, release="output")
    second = small.get_submodule("second")
    with torch.no_grad():
        second.weight.copy_(second.weight.flip(0))
        second.bias.copy_(second.bias.flip(0))
    assert not fxprune.verify(model, small, X).ok


def test_the_plan_remembers():
    model = body("dict")
    small = fxprune.prune(model, example_inputs=X, release="states")
    plan = Plan.from_json(small.meta["plan"].to_json())
    assert plan == small.meta["plan"] and plan.release == ("states",)
    again = plan.apply(model, X)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), small.state_dict().values(), strict=True))
    assert fxprune.verify(model, again, X).ok


def test_a_plan_of_before_outputs_could_be_released():
    data = fxprune.prune(body("dict"), {"first": 0.5}, example_inputs=X, release="states.0").meta["plan"].to_dict()
    del data["release"]
    assert Plan.from_dict(data).release == ()


def test_pruner_and_the_other_ways_in():
    model = body("tensor")
    steps = fxprune.Pruner(model, 0.5, example_inputs=X, release="output", steps=2)
    steps.step()
    assert steps.step()(X).shape == (2, 5)
    assert fxprune.masks.prune_zeros(fxprune.masks.masked(model, steps.plan), X, release="output")(X).shape == (2, 5)
    assert any(f.frozen is None for f in fxprune.couple(model, X, release="output").families if f.name == "second")


def test_encoder_states_of_an_encoder_with_a_decoder():
    """A model that also returns what it computed on the way: released by name, all of it can be pruned."""
    torch.manual_seed(0)
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    config = transformers.BartConfig(
        **sizes, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, max_position_embeddings=40, use_cache=False
    )
    model = transformers.BartForConditionalGeneration(config).eval().double()
    ids = torch.randint(3, 60, (2, 12))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    whole = fxprune.prune(model, example_inputs=inputs)
    small = fxprune.prune(model, example_inputs=inputs, release="encoder_last_hidden_state")
    count = [sum(p.numel() for p in m.parameters()) for m in (model, whole, small)]
    assert count[2] < 0.35 * count[0] < count[1]
    assert small(**inputs)["encoder_last_hidden_state"].shape == (2, 12, 16)
    assert small(**inputs)["logits"].shape == (2, 7, 60)
    assert small.meta["verification"].error < 1e-10


class Auxiliary(Body):
    """In training it returns more, under other names."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x).relu()
        b = self.second(a)
        return {"answer": b, "aside": a} if self.training else b


def test_an_output_of_training_alone():
    torch.manual_seed(1)
    model = Auxiliary("").double()
    small = fxprune.prune(model.eval(), example_inputs=X, release=["output", "answer", "aside"])
    assert small(X).shape == (2, 5)
    assert {k: v.shape[1] for k, v in small.train()(X).items()} == {"answer": 5, "aside": 4}
    answer = fxprune.prune(model, example_inputs=X, release=["output", "answer"])
    assert {k: v.shape[1] for k, v in answer.train()(X).items()} == {"answer": 5, "aside": 8}


def test_a_glob_that_matches_no_output():
    with pytest.raises(PruneError) as caught:
        fxprune.prune(body("dict"), example_inputs=X, release="hidden_states")
    assert caught.value.what == "the glob 'hidden_states' in release matches no output of the model"
    assert caught.value.fix == "one of its outputs: 'logits', 'states.0', 'states.1'"


def test_something_else_than_globs():
    with pytest.raises(PruneError) as caught:
        fxprune.prune(body("dict"), example_inputs=X, release=3)
    assert caught.value.what == "release must be globs over names of outputs, not 3"
    assert caught.value.fix == "release='hidden_states'"


def test_inspect(tmp_path, capsys):
    (tmp_path / "model.py").write_text("import torch\nmodel = torch.nn.Linear(4, 6)\nexample_inputs = torch.randn(1, 4)\n")
    assert main([str(tmp_path / "model.py"), "--release", "output"]) == 0
    assert "1 prunable family of 6 units" in capsys.readouterr().out
