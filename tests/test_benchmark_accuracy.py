"""The parts of `examples/benchmarks/accuracy.py` that can be wrong without being seen: the reader, the networks, the table."""

import gzip
import struct

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks")


def written(folder, split, shape, start):
    """An idx file of counting bytes, and one of labels."""
    for name, dims in (("images-idx3", shape), ("labels-idx1", shape[:1])):
        body = bytes((start + i) % 251 for i in range(torch.Size(dims).numel()))
        head = struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims)
        with gzip.open(folder / f"{split}-{name}-ubyte.gz", "wb") as file:
            file.write(head + body)


def test_the_reader(tmp_path):
    import data

    written(tmp_path, "train", (5, 4, 3), 7)
    images, labels = data.fashion("train", 2, folder=tmp_path)
    assert images.shape == (2, 1, 4, 3) and labels.tolist() == [7, 8]
    pixels = torch.arange(7, 31).reshape(2, 1, 4, 3)
    torch.testing.assert_close(images * data.DEVIATION + data.MEAN, pixels / 255)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.fashion("train", 2, folder=tmp_path / "none")
    with gzip.open(tmp_path / "short.gz", "wb") as file:
        file.write(struct.pack(">HBBI", 0, 8, 1, 9) + b"1234")
    with pytest.raises(ValueError, match="holds 4 bytes, not 9"):
        data.idx(tmp_path / "short.gz")


def test_the_networks_and_their_training():
    import networks
    import training

    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    for name in training.EPOCHS:
        network = networks.build(name)
        before = torch.nn.functional.cross_entropy(network(images), labels)
        training.train(network, images, labels, steps=4, rate=3e-3, seed=0)
        assert not network.training
        network.train()
        assert torch.nn.functional.cross_entropy(network(images), labels) < before
    constant = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.arange(10.0))
    assert training.accuracy(constant, images, labels) == pytest.approx(float((labels == 9).float().mean()))


def test_the_table_says_where_it_is_behind():
    import accuracy

    def row(seed, mine, other):
        found = dict.fromkeys(("pruned", "repaired", "tuned", "tuned_alone"), mine) | dict.fromkeys(
            ("other_pruned", "other_norms", "other_tuned"), other
        )
        budgets = {str(n): found | {"left": 0.9 / n, "other_left": 1 / n} for n in accuracy.FEWER}
        job = {"network": "vit", "seed": seed, "criterion": "magnitude", "ranking": "local"}
        return {**job, "status": "measured", "base": 0.9, "budgets": budgets, "machine": "here"}

    rows = [row(0, 0.5, 0.4), row(1, 0.7, 0.6)]
    rows[0]["budgets"]["3"] |= {"tuned": 0.1}
    rows[1]["budgets"]["4"] |= {"tuned_alone": 0.3}
    rows[1]["budgets"]["2"] |= {"other_fails": "TypeError: no"}
    text = accuracy.table(rows)
    assert "ahead in 4 of 4 lines, by +10.0 points in the median\n" in text
    assert "against its result after fine-tuning: fxprune is ahead in 3 of 4 lines, by +10.0 points" in text
    assert (
        "without repair, against the same: fxprune is ahead in 3 of 4 lines, by +10.0 points in the median; behind in" in text
    )
    assert "; behind in vit at 3, magnitude local (-10.0)" in text
    assert "fine-tuning this short makes a repaired model worse in 1 of 4 lines: vit at 3, magnitude local (-20.0)" in text
    assert "fxprune 90.0% to 90.0%, Torch-Pruning 100.0% to 100.0%" in text
    assert "Torch-Pruning fails in 1 of 8 runs with magnitude, local: TypeError: no" in text
    assert "| vit | 2 | magnitude, local | 2 | 90.0 ± 0.0 | 60.0 ± 14.1 |" in text
    globally = [{**row(seed, mine, 0.4), "ranking": "global"} for seed, mine in ((0, 0.5), (1, 0.66))]
    globally[0]["budgets"] = {"2": {**globally[0]["budgets"]["2"], "repaired": 0.45}}
    text = accuracy.table([*rows, *globally])
    assert (
        "behind by more than a point in 4 of 4 lines: vit at 2, magnitude global (-4.5), vit at 3, magnitude global (-4.0)"
        in text
    )
    assert "1 of 4 rows have no 8 times" in text
    assert accuracy.known_of_rival([{**rows[1], "macs": 3}], {"network": "vit", "seed": 1}, 3)["2"].keys() == {
        "other_pruned",
        "other_norms",
        "other_tuned",
        "other_left",
        "other_fails",
    }


@pytest.mark.parametrize("criterion", ["magnitude", "bn_scale", "lamp", "fpgm", "taylor", "hessian", "random"])
def test_torch_pruning_is_within_the_budget_too(criterion):
    import accuracy
    import networks

    torch.manual_seed(0)
    model = networks.ResNet20(width=8).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    whole = accuracy.macs_of(model, images[:1])
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    rival = accuracy.rival_of(model, images, labels, criterion, "global")
    found = rival.within_budget(whole / 2)
    assert 0.35 < accuracy.macs_of(found, images[:1]) / whole <= 0.5
    assert found(images).shape == (8, 10)
    with pytest.raises(ValueError, match="no ratio up to"):
        rival.within_budget(whole / 10_000)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_torch_prunings_hessian_is_that_of_the_last_sample():
    """Its documented loop leaves what `Rival` puts into `.grad` at once."""
    import accuracy
    import networks
    import rival

    torch.manual_seed(0)
    model = networks.ResNet20(width=8).eval()
    images, labels = torch.randn(3, 1, 28, 28), torch.arange(3)
    importance = rival.IMPORTANCES["hessian"]()
    for loss in torch.nn.functional.cross_entropy(model(images), labels, reduction="none"):
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    model.zero_grad()
    wanted = [importance._accu_grad[p] / importance._counter[p] for p in model.parameters()]
    for ours, theirs in zip(accuracy.rival_of(model, images, labels, "hessian", "global").gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-9)
