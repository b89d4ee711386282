"""Every short script of `examples/` runs from its own main()."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# What a script is given so that it is quick here: the demo prunes the same model on smaller images.
ARGUMENTS = {"demo": [["--image-size", "64"]]}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Python looks for the source of a class
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example_runs(name, capsys):
    load(name).main(*ARGUMENTS.get(name, []))
    assert capsys.readouterr().out.strip()


def test_demo_prunes_a_real_model_exactly():
    pruned = load("demo").main(ARGUMENTS["demo"][0])
    assert pruned.verification.ok
    assert sum(p.numel() for p in pruned.parameters()) < 0.35 * 25_557_032


def test_training_after_pruning_reaches_a_useful_accuracy():
    assert load("train").main() > 0.9


def test_both_kinds_of_attention_pruning_shrink_the_model():
    left = load("vit_heads").main()
    assert set(left) == {"heads", "dims"}
    assert all(share < 0.5 for share in left.values())


def test_one_training_run_goes_through_all_steps():
    reached, pruner = load("iterative").main()
    assert reached > 0.9
    assert pruner.done and pruner.history[-1].macs[1] <= 0.3 * pruner.history[0].macs[0]


def test_repair_gives_back_most_of_what_pruning_took():
    found = load("repair").main()
    assert found["repaired"] - found["pruned"] > 0.7 * (found["trained"] - found["pruned"]) > 0.1
