"""Plain methods for pruning a Llama, from their papers, in as few lines as they take: what fxprune is held against.

Each takes a model, batches of tokens and the share of the parameters that may stay, and returns a smaller copy. ShortGPT
removes blocks, SliceGPT cuts the residual stream; the others cut hidden layers of the FFN alone, in the Hugging Face modules,
whose widths then differ. Torch-Pruning is beside them, told to do the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[Tensor]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def once(look: Callable[[Any, Batches], Any]) -> Callable[[Any, Batches], Any]:
    """A function of a model and batches that looks at the same ones once, whatever the budget."""
    seen: list[tuple[Any, Batches, Any]] = []

    def remembered(model: Any, batches: Batches) -> Any:
        for other, those, found in seen:
            if other is model and those is batches:
                return found
        seen.append((model, batches, look(model, batches)))
        return seen[-1][2]

    return remembered


def watch(model: Any, batches: Batches, look: Callable[[int, Tensor], None], *, backward: bool = False) -> None:
    """Run a model and show what each `down_proj` reads, with the layer's number."""
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: look(i, args[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.set_grad_enabled(backward):
        for ids in batches:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if backward:
                torch.autograd.grad(loss * ids.numel(), model.model.embed_tokens.weight)
    for hook in hooks:
        hook.remove()


def cut_hidden(model: Any, kept: Sequence[Tensor]) -> Any:
    """A copy whose hidden layers keep these channels."""
    small = copy.deepcopy(model)
    for layer, rows in zip(small.model.layers, kept, strict=True):
        mlp = layer.mlp
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight = nn.Parameter(part.weight.detach()[rows].clone())
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, rows].clone())
    return small


def lowest(model: Any, scores: Tensor, keep: float) -> list[Tensor]:
    """The channels that stay where the lowest scored of all layers go; scores of shape (layers, channels)."""
    each = sum(p.numel() for p in model.model.layers[0].mlp.parameters()) // scores.shape[1]
    threshold = scores.flatten().sort().values[math.ceil((1 - keep) * count(model) / each)]
    return [(row >= threshold).nonzero().flatten() for row in scores]


@once
def moments(model: Any, batches: Batches) -> tuple[Tensor, Tensor, int]:
    """Of each hidden channel the sum and the sum of squares, (layers, channels), and the number of tokens."""
    layers, width = len(model.model.layers), model.config.intermediate_size
    sums, squares = torch.zeros(2, layers, width, dtype=torch.float64)

    def look(i: int, x: Tensor) -> None:
        sums[i] += x.double().flatten(0, 1).sum(0)
        squares[i] += x.double().flatten(0, 1).square().sum(0)

    watch(model, batches, look)
    return sums, squares, sum(ids.numel() for ids in batches)


def flap(model: Any, batches: Batches, keep: float) -> Any:
    """FLAP (arXiv:2312.11983): variance times squared norm, standardised by layer, one threshold, and a bias for the means."""
    sums, squares, n = moments(model, batches)
    weights = [layer.mlp.down_proj.weight.detach() for layer in model.model.layers]
    scores = (squares - sums.square() / n) / (n - 1) * torch.stack([w.square().sum(0) for w in weights])
    scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    kept = lowest(model, scores, keep)
    small = cut_hidden(model, kept)
    for layer, weight, mean, rows in zip(small.model.layers, weights, sums / n, kept, strict=True):
        gone = mean.float().clone()
        gone[rows] = 0
        layer.mlp.down_proj.bias = nn.Parameter(weight @ gone)
    return small


def wanda_sp(model: Any, batches: Batches, keep: float) -> Any:
    """Wanda-sp (as in FLAP's paper): the sum of |w| times the norm of its input; every layer loses the same share."""
    _, squares, _ = moments(model, batches)
    norms = torch.stack([layer.mlp.down_proj.weight.detach().abs().sum(0) for layer in model.model.layers])
    ranks = (norms * squares.sqrt()).argsort(1).argsort(1).double()
    return cut_hidden(model, lowest(model, ranks, keep))


@once
def terms_and_grams(model: Any, batches: Batches) -> tuple[Tensor, Tensor]:
    """Of each hidden channel the sum of squared loss terms, (layers, channels), and the moments of all pairs in a layer."""
    layers, width = len(model.model.layers), model.config.intermediate_size
    scores, grams = torch.zeros(layers, width, dtype=torch.float64), torch.zeros(layers, width, width)

    def look(i: int, x: Tensor) -> None:
        flat = x.detach().flatten(0, 1)
        grams[i] += flat.mT @ flat

        def add(g: Tensor) -> None:
            scores[i] += (flat * g.flatten(0, 1)).square().sum(0)

        x.register_hook(add)

    watch(model, batches, look, backward=True)
    return scores, grams


def loss_terms(model: Any, batches: Batches, keep: float) -> Any:
    """Squared first-order loss terms of each token, one threshold, and `down_proj` refitted from the original's moments."""
    scores, grams = terms_and_grams(model, batches)
    kept = lowest(model, scores, keep)
    small = cut_hidden(model, kept)
    for layer, old, single, rows in zip(small.model.layers, model.model.layers, grams, kept, strict=True):
        gram = single.double()
        weight = old.mlp.down_proj.weight.detach().double()
        inner = gram[rows][:, rows]
        lost = weight @ gram[:, rows] - weight[:, rows] @ inner
        inner = inner + 0.01 * inner.diagonal().mean() * torch.eye(len(rows))
        layer.mlp.down_proj.weight.data += torch.linalg.solve(inner, lost.mT).mT.float()
    return small


@once
def likeness(model: Any, batches: Batches) -> Tensor:
    """For each block the sum over tokens of the cosine between its input and its output, (blocks,)."""
    alike = torch.zeros(len(model.model.layers), dtype=torch.float64)

    def look(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            alike[i] += torch.cosine_similarity(before, after, -1).double().sum()

        return hook

    hooks = [layer.register_forward_hook(look(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return alike


def shortgpt(model: Any, batches: Batches, keep: float) -> Any:
    """ShortGPT (arXiv:2403.03853): the blocks go whose inputs and outputs are most alike by cosine."""
    alike = likeness(model, batches)
    small = copy.deepcopy(model)
    limit = keep * count(model)
    block = count(model.model.layers[0])
    gone = set(alike.argsort(descending=True)[: math.ceil((count(model) - limit) / block)].tolist())
    small.model.layers = nn.ModuleList([layer for i, layer in enumerate(small.model.layers) if i not in gone])
    for i, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = i
    small.config.num_hidden_layers = len(small.model.layers)
    return small


class Sliced(nn.Module):
    """A block of SliceGPT: its layers in the bases of their own inputs, and matrices from one basis to the next.

    Arguments:
        layer: the block, whose layers have been rotated and cut.
        first, second: what takes the stream over attention, and over the FFN, shape (channels, channels).
    """

    def __init__(self, layer: Any, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        x = x @ self.first + self.attention(hidden_states=unit_rms(x), **others)[0]
        return x @ self.second + self.mlp(unit_rms(x))


WIDTH = 576  # of the stream before it is cut: what a mean of squares is over


def unit_rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / WIDTH + 1e-5)


class Final(nn.Module):
    """The norm before the head, in the basis of the embeddings, which the head shares.

    Arguments:
        back: from the basis of the last block's result to that of the embeddings, with the norm's scale between.
    """

    def __init__(self, back: Tensor) -> None:
        super().__init__()
        self.back = nn.Parameter(back)

    def forward(self, x: Tensor) -> Tensor:
        return unit_rms(x) @ self.back


@once
def stream_bases(model: Any, batches: Batches) -> Tensor:
    """Principal directions of what each norm reads, the largest first, shape (norms, channels, directions)."""
    norms = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(model.model.norm)
    moment = torch.zeros(len(norms), WIDTH, WIDTH, dtype=torch.float64)

    def look(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            x = unit_rms(args[0]).flatten(0, 1)
            moment[i] += (x.mT @ x).double()

        return hook

    hooks = [norm.register_forward_pre_hook(look(i)) for i, norm in enumerate(norms)]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for h in hooks:
        h.remove()
    return torch.linalg.eigh(moment).eigenvectors.flip(-1).float()


def slicegpt(model: Any, batches: Batches, keep: float) -> Any:
    """SliceGPT (arXiv:2401.15024): principal components of what each norm reads, the smallest of which go."""
    bases = stream_bases(model, batches)
    low, high = 8, WIDTH
    while high - low > 8:
        middle = (low + high) // 16 * 8
        low, high = (low, middle) if count(sliced(model, bases[:, :, :middle])) > keep * count(model) else (middle, high)
    return sliced(model, bases[:, :, :low])


@torch.no_grad()
def sliced(model: Any, bases: Tensor) -> Any:
    """The model with the stream cut to some directions of each norm's input, shape (norms, channels, directions)."""
    small = copy.deepcopy(model)
    for i, layer in enumerate(small.model.layers):
        here, middle, there = bases[2 * i : 2 * i + 3]
        for norm, parts, basis in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj), here),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj), middle),
        ):
            for part in parts:
                part.weight = nn.Parameter(part.weight * norm.weight @ basis)
        for part, basis in ((layer.self_attn.o_proj, middle), (layer.mlp.down_proj, there)):
            part.weight = nn.Parameter(basis.mT @ part.weight)
        small.model.layers[i] = Sliced(layer, here.mT @ middle, middle.mT @ there)
    small.model.norm = Final(bases[-1].mT @ (small.model.norm.weight.unsqueeze(1) * bases[0]))
    small.model.embed_tokens.weight = nn.Parameter(small.model.embed_tokens.weight @ bases[0])
    small.lm_head.weight = small.model.embed_tokens.weight
    return small


@once
def with_gradients(model: Any, batches: Batches) -> Any:
    """A copy whose parameters hold the gradients of the mean loss."""
    copied = copy.deepcopy(model)
    for ids in batches:
        (copied(input_ids=ids, labels=ids).loss / len(batches)).backward()
    return copied


def torch_pruning_taylor(model: Any, batches: Batches, keep: float) -> Any:
    """Torch-Pruning 1.6 by its Taylor importance, one threshold, on the hidden layers of the FFN alone."""
    import torch_pruning

    seen = with_gradients(model, batches)
    small = copy.deepcopy(model)
    for p, q in zip(small.parameters(), seen.parameters(), strict=True):
        p.grad = q.grad.clone()
    hidden = {part for layer in small.model.layers for part in (layer.mlp.gate_proj, layer.mlp.up_proj)}
    others = [m for m in small.modules() if isinstance(m, nn.Linear | nn.Embedding) and m not in hidden]
    within = sum(count(layer.mlp) for layer in small.model.layers)
    torch_pruning.pruner.BasePruner(
        small,
        {"input_ids": batches[0][:1]},
        importance=torch_pruning.importance.TaylorImportance(),
        global_pruning=True,
        pruning_ratio=(1 - keep) * count(model) / within,
        max_pruning_ratio=0.99,
        ignored_layers=others,
        root_module_types=[nn.Linear],
        forward_fn=lambda m, inputs: m(**inputs).logits,
    ).step()
    small.zero_grad()
    return small


PLAIN = {
    "FLAP": flap,
    "Wanda-sp": wanda_sp,
    "ShortGPT": shortgpt,
    "SliceGPT": slicegpt,
    "Torch-Pruning, Taylor": torch_pruning_taylor,
    "loss terms, refitted": loss_terms,
}
