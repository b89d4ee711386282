"""Plans from strangers: each of many texts is refused by one PruneError, in little memory, before anything is made of it."""

import copy
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Plan, PruneError

HUGE = 10**15
NAN, INF = float("nan"), float("inf")
DEEP = "[" * 100_000 + "]" * 100_000
NOT_A_LIST = (None, 3, -1, 0.5, NAN, True, "0", {"0": 1})
NOT_A_MAPPING = (None, 3, NAN, "shapes", [], [["0.weight", [8, 4]]])
NOT_A_SIZE = (-1, 0.5, NAN, INF, "4", None, True, [4], 1 << 63, -HUGE)
NOT_AN_INDEX = (-1, 8, HUGE, 1 << 63, -(1 << 70), NAN, INF, 0.0, "0", None, True, [0], {})
BAD_TEXT = ("", " ", "{", "nan", "null", "true", "3", '"a"', "[]", "[{}]", "{'a': 1}", "\x00", "\ud800", "[" * 5000, DEEP)

Steps = tuple[str | int, ...]
SLICE: Steps = ("keep", "0.weight", 0)
INPUT: Steps = ("inputs", "tensor")

# what stands where in a plan, and what must not
TABLE: list[tuple[Steps, tuple[Any, ...]]] = [
    (("format",), (None, 1, "fxprune.plan/0", "fxprune.plan/3", [], {})),
    (("shapes",), NOT_A_MAPPING),
    (("shapes", "0.weight"), (*NOT_A_LIST, [1] * 65)),
    (("shapes", "0.weight", 0), NOT_A_SIZE),
    (("keep",), NOT_A_MAPPING),
    (("keep", "0.weight"), (None, 3, "dims", {"dims": [0]}, [3], [None], [[]])),
    ((*SLICE, "dims"), (*NOT_A_LIST, [], [0, 0], [2], [-1], [HUGE], [NAN], ["0"], [0, 1, 2])),
    ((*SLICE, "sizes"), (*NOT_A_LIST, [], [3], [HUGE], [-4], [2, 2], [NAN])),
    ((*SLICE, "keep"), (*NOT_A_LIST, [], [0], [3, 2, 1, 0], [1, 1, 2, 3])),
    ((*SLICE, "keep", 0), NOT_AN_INDEX),
    (("attention",), (None, 1, "", "Heads", "both", [], {}, ["heads"])),
    (("freeze",), (3, "0.weight", [3], [None], ["nothing"], {"0": 1})),
    (("release",), (3, "output", [3], [None], [["output"]], {"0": 1}, ["no such output"])),
    (
        ("waiver",),
        (3, [], "x", {}, {"input": 3, "size": 1}, {"input": "x", "size": "1"}, {"input": "x", "size": 1, "guards": [3]}),
    ),
    (
        ("inputs",),
        (3, [], "x", {}, {"tensor": 3}, {"tensor": {}}, {"file": "x"}, {"a": 1, "b": 2}, {"tuple": 3}, {"dict": [3]}),
    ),
    (("inputs",), ({"fields": 3}, {"fields": [3]}, {"fields": [["x", 3]]})),
    (("inputs",), tuple({"fields": [[name, {"value": 1}]]} for name in (None, 3, "", "_x", "class", "a b", "__class__"))),
    ((*INPUT, "shape"), (*NOT_A_LIST, [HUGE], [1 << 20, 1 << 20, 1 << 20], [-1, 4], [NAN, 4])),
    ((*INPUT, "dtype"), (None, 3, "float", "nn", "os.system", "Tensor", "qint8", [])),
]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def good() -> dict[str, Any]:
    return fxprune.prune(small_model(), 0.5, example_inputs=torch.randn(2, 4)).plan.to_dict()


def changed(plan: dict[str, Any], path: Steps, value: Any) -> dict[str, Any]:
    made: Any = copy.deepcopy(plan)
    owner = made
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = value
    return made


def without(plan: dict[str, Any], path: Steps) -> dict[str, Any]:
    made: Any = copy.deepcopy(plan)
    owner = made
    for step in path[:-1]:
        owner = owner[step]
    del owner[path[-1]]
    return made


def nested(kind: str, depth: int) -> Any:
    made: Any = {"value": 1}
    for _ in range(depth):
        made = {kind: [made]} if kind != "dict" else {"dict": [["x", made]]}
    return made


def hostile() -> Iterator[tuple[str, str]]:
    """Texts, each with what is wrong with it."""
    plan = good()
    for text in BAD_TEXT:
        yield f"text {text[:8]!r}", text
    for path, values in TABLE:
        for value in values:
            yield f"{'.'.join(map(str, path))} = {str(value)[:20]}", json.dumps(changed(plan, path, value))
    for path in [(k,) for k in ("format", "shapes", "keep", "attention", "freeze", "inputs")]:
        yield f"no {path[0]}", json.dumps(without(plan, path))
    for field in ("dims", "keep", "sizes"):
        yield f"a slice without {field}", json.dumps(without(plan, (*SLICE, field)))
    twice = changed(plan, ("keep", "0.weight"), plan["keep"]["0.weight"] * 2)
    yield "a dimension cut twice", json.dumps(twice)
    yield "a tensor of another model", json.dumps(changed(plan, ("keep", "9.weight"), plan["keep"]["0.weight"]))
    yield "another shape", json.dumps(changed(plan, ("shapes", "0.weight"), [8, 5]))
    yield "channels that are kept on one side alone", json.dumps(without(plan, ("keep", "2.weight")))
    for kind in ("tuple", "list", "dict"):
        yield f"{kind}s in one another", json.dumps(changed(plan, ("inputs",), nested(kind, 200)))
    yield "an integer of ten thousand digits", json.dumps(plan).replace("[8, 4]", f"[{'9' * 10_000}, 4]")
    many = {"tuple": [{"tensor": {"shape": [1 << 20, 1 << 10], "dtype": "float32"}}] * 2048}
    yield "many large inputs", json.dumps(changed(plan, ("inputs",), many))


def outcomes() -> Iterator[tuple[str, str]]:
    """What came of each text: `refused`, or what else was raised."""
    model = small_model()
    for name, text in hostile():
        try:
            Plan.from_json(text).apply(model)
        except PruneError as error:
            yield name, "refused" if error.fix else "refused without a fix"
        except BaseException as error:
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, "applied"


def test_there_are_enough_of_them():
    names = [name for name, _ in hostile()]
    assert len(names) >= 150


def test_texts_of_strangers_are_refused():
    assert not [(name, said) for name, said in outcomes() if said != "refused"]


def test_the_table_starts_from_a_plan_that_applies():
    assert Plan.from_json(json.dumps(good())).apply(small_model()).get_submodule("0").out_features == 4


def test_they_take_little_memory():
    """In a process of its own: the most memory that it ever held, over what it held before the first text."""
    code = "import test_hostile_plans; test_hostile_plans.report_memory()"
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert float(done.stdout.split()[-1]) < 200, done.stdout


def report_memory() -> None:
    texts = list(hostile())
    fxprune.Plan.from_json(json.dumps(good())).apply(small_model())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del texts
    list(outcomes())
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.parametrize("text", [None, 3, ["{}"], {"format": "fxprune.plan/1"}])
def test_what_is_no_text(text):
    with pytest.raises(PruneError, match="this is no plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("data", [None, 3, "{}", [], {1: 2}])
def test_what_is_no_mapping(data):
    with pytest.raises(PruneError, match="this is no plan"):
        Plan.from_dict(data)


def test_inputs_too_large_to_be_made_up():
    """The plan is one; only the inputs have to be given."""
    plan = changed(good(), (*INPUT, "shape"), [1 << 28, 4])
    with pytest.raises(PruneError, match="too large to be made up"):
        Plan.from_dict(plan).apply(small_model())
    assert Plan.from_dict(plan).apply(small_model(), torch.randn(2, 4)).get_submodule("0").out_features == 4
