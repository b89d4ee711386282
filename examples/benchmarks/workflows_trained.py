"""Workflows: a model is trained, in one process and in two."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential
from workflow_cases import Case, call, check, fresh, loss_of, same, train, workflow

TRAIN, DISTRIBUTED = "train", "two processes"
PROCESSES = 2


@workflow(TRAIN, "AdamW, train and eval", "ResNet-18", "timm ViT")
def optimizer(case: Case) -> None:
    train(case.model, case.inputs, torch.optim.AdamW(case.model.parameters(), lr=1e-3))
    same(case.run(), case.run())


@workflow(TRAIN, "optimizer's state saved, loaded and continued", "ResNet-18")
def resumed(case: Case) -> None:
    first = torch.optim.AdamW(case.model.parameters(), lr=1e-3)
    train(case.model, case.inputs, first)
    model = copy.deepcopy(case.model)
    second = torch.optim.AdamW(model.parameters(), lr=1e-3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one, two in ((case.model, first), (model, second)):
        train(one, case.inputs, two)
    same(case.run(model), case.run())


@workflow(TRAIN, "moving average of the weights, update_bn", "ResNet-18")
def averaged(case: Case) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    average = AveragedModel(case.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        train(case.model, case.inputs, steps=1)
        average.update_parameters(case.model)
    update_bn([case.inputs], average)
    check(not torch.equal(case.run(average)[0], case.run()[0]), "the average is the model")


@workflow(TRAIN, "timm's ModelEmaV3", "timm ViT")
def model_ema(case: Case) -> None:
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(case.model, decay=0.5)
    train(case.model, case.inputs)
    average.update(case.model, step=1)
    check(case.run(average)[0].shape == case.run()[0].shape, "the average has another shape")


@workflow(TRAIN, "autocast to bfloat16", "ResNet-18", "Llama, labels")
def autocast(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        train(case.model, case.inputs)


@workflow(TRAIN, "checkpoint_sequential over the blocks", "ResNet-18")
def checkpointed(case: Case) -> None:
    x = case.model.maxpool(case.model.relu(case.model.bn1(case.model.conv1(case.inputs)))).detach().requires_grad_()
    blocks = nn.Sequential(*case.model.layer1, *case.model.layer2)
    found = []
    for out in (blocks(x), checkpoint_sequential(blocks, 2, x, use_reentrant=False)):
        blocks.zero_grad()
        out.square().mean().backward()
        found.append([p.grad.clone() for p in blocks.parameters()])
    same(found[1], found[0], 1e-5)


@workflow(TRAIN, "groups of parameters by kind of layer", "ResNet-18")
def groups(case: Case) -> None:
    """Weight decay for convolutions and matrices alone."""
    kinds = (nn.Conv2d, nn.Linear)
    decayed = [m.weight for m in case.model.modules() if isinstance(m, kinds)]
    known = {id(p) for p in decayed}
    rest = [p for p in case.model.parameters() if id(p) not in known]
    check(len(decayed) > 10 and rest, "there are no layers")
    train(case.model, case.inputs, torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=1e-3))


@workflow(TRAIN, "parametrizations: spectral_norm", "ResNet-18")
def parametrized(case: Case) -> None:
    torch.nn.utils.parametrizations.spectral_norm(case.model.layer1[0].conv1)
    train(case.model, case.inputs)


@workflow(TRAIN, "accelerate: prepare, save_state, load_state", "ResNet-18", needs=["accelerate"])
def accelerated(case: Case) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(case.model, torch.optim.AdamW(case.model.parameters(), lr=1e-3))
    train(model, case.inputs, optimizer)
    accelerator.save_state(str(case.folder / "state"))
    wanted = case.run(model)
    train(model, case.inputs, optimizer)
    accelerator.load_state(str(case.folder / "state"))
    same(case.run(model), wanted)


# -- two processes ----------------------------------------------------------------------------------------------------------


def ranked(rank: int, kind: str, case: Case) -> None:
    """What each process does: wrap the model, train two steps, compare with the model that is in one piece."""
    meeting = f"file://{case.folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    try:
        alone = copy.deepcopy(case.model)
        wrapped = WRAPPERS[kind](case.model)
        halves = both_halves(case.inputs)
        for model, inputs in ((alone, halves), (wrapped, halves[rank : rank + 1])):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            for _ in range(2):
                optimizer.zero_grad()
                for part in inputs:
                    (loss_of(call(model, fresh(part))) / len(inputs)).backward()
                optimizer.step()
        same(case.run(wrapped), case.run(alone), 1e-4)
    finally:
        torch.distributed.destroy_process_group()


def both_halves(inputs: Any) -> list[Any]:
    if isinstance(inputs, Tensor):
        return list(inputs.split(1))
    parts = [v.split(1) if isinstance(v, Tensor) else [v] * PROCESSES for v in inputs.values()]
    return [dict(zip(inputs, part, strict=True)) for part in zip(*parts, strict=True)]


def sharded(model: nn.Module) -> nn.Module:
    """Every block by itself, then the rest."""
    from torch.distributed.fsdp import fully_shard

    kinds = ("BasicBlock", "EncoderBlock", "LlamaDecoderLayer", "BertLayer")
    blocks = [m for m in model.modules() if type(m).__name__ in kinds]
    check(len(blocks) > 1, "there are no blocks")
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


WRAPPERS = {"ddp": nn.parallel.DistributedDataParallel, "fully_shard": sharded}


def in_two_processes(case: Case, kind: str) -> None:
    torch.multiprocessing.start_processes(ranked, (kind, case), PROCESSES, start_method="fork")


@workflow(DISTRIBUTED, "DistributedDataParallel", "ResNet-18")
def ddp(case: Case) -> None:
    in_two_processes(case, "ddp")


@workflow(DISTRIBUTED, "fully_shard, block by block", "ViT", "Llama")
def fsdp(case: Case) -> None:
    in_two_processes(case, "fully_shard")
