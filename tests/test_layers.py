"""One layer alone, by index: against plain slicing of its tensors, and its forward against that of the sliced function."""

import copy
import functools
import re

import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fxprune import PruneError, layers


def keep(size, gone):
    return [i for i in range(size) if i not in gone]


def cut(*slices):
    """What slicing leaves of a tensor: (dimension, indices that go) after each other."""

    def take(t):
        for dim, gone in slices:
            t = t.index_select(dim, torch.tensor(keep(t.shape[dim], gone)))
        return t

    return take


def channels(*names, gone=(1, 3)):
    """The same entries of several vectors."""
    return {name: cut((0, gone)) for name in names}


def gates(count, hidden, gone):
    """Rows of `count` gates of a recurrent layer."""
    return [g * hidden + i for g in range(count) for i in gone]


NORM = ("weight", "bias", "running_mean", "running_var")
OUT, IN = layers.remove_outputs, layers.remove_inputs
# layer, function, indices, what is left of each tensor that changes, attributes
CASES = {
    "conv1d out": (
        lambda: nn.Conv1d(4, 6, 3),
        OUT,
        {"weight": cut((0, (1, 3))), "bias": cut((0, (1, 3)))},
        {"out_channels": 4},
    ),
    "conv2d out": (
        lambda: nn.Conv2d(4, 6, 3),
        OUT,
        {"weight": cut((0, (1, 3))), "bias": cut((0, (1, 3)))},
        {"out_channels": 4},
    ),
    "conv3d out": (lambda: nn.Conv3d(4, 6, 2, bias=False), OUT, {"weight": cut((0, (1, 3)))}, {"out_channels": 4}),
    "conv1d in": (lambda: nn.Conv1d(4, 6, 3, dilation=2), IN, {"weight": cut((1, (1, 3)))}, {"in_channels": 2}),
    "conv2d in": (lambda: nn.Conv2d(4, 6, 3, stride=2), IN, {"weight": cut((1, (1, 3)))}, {"in_channels": 2}),
    "conv3d in": (lambda: nn.Conv3d(4, 6, (1, 2, 3)), IN, {"weight": cut((1, (1, 3)))}, {"in_channels": 2}),
    "transposed 1d out": (lambda: nn.ConvTranspose1d(4, 6, 3), OUT, {"weight": cut((1, (1, 3)))} | channels("bias"), {}),
    "transposed 2d out": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2),
        OUT,
        {"weight": cut((1, (1, 3)))} | channels("bias"),
        {"in_channels": 4, "out_channels": 4},
    ),
    "transposed 3d in": (lambda: nn.ConvTranspose3d(4, 6, 2), IN, {"weight": cut((0, (1, 3)))}, {"in_channels": 2}),
    "depthwise out": (
        lambda: nn.Conv2d(5, 5, 3, groups=5),
        OUT,
        channels("weight", "bias"),
        {"in_channels": 3, "out_channels": 3, "groups": 3},
    ),
    "depthwise in": (lambda: nn.Conv2d(5, 5, 3, groups=5), IN, channels("weight", "bias"), {"in_channels": 3, "groups": 3}),
    "depthwise 1d": (lambda: nn.Conv1d(5, 5, 3, groups=5), OUT, channels("weight", "bias"), {"groups": 3}),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(5, 5, 3, groups=5), OUT, channels("weight", "bias"), {"groups": 3}),
    "grouped out": (lambda: nn.Conv2d(4, 6, 3, groups=2), OUT, channels("weight", "bias"), {"out_channels": 4, "groups": 2}),
    "grouped in": (
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        IN,
        {"weight": cut((1, (1,)))},
        {"in_channels": 2, "groups": 2},
    ),
    "linear out": (lambda: nn.Linear(4, 6), OUT, channels("weight", "bias"), {"out_features": 4, "in_features": 4}),
    "linear in": (lambda: nn.Linear(4, 6), IN, {"weight": cut((1, (1, 3)))}, {"out_features": 6, "in_features": 2}),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), OUT, channels(*NORM), {"num_features": 3}),
    "batch norm 2d out": (lambda: nn.BatchNorm2d(5), OUT, channels(*NORM), {"num_features": 3}),
    "batch norm 2d in": (lambda: nn.BatchNorm2d(5), IN, channels(*NORM), {"num_features": 3}),
    "batch norm 3d": (lambda: nn.BatchNorm3d(5, affine=False), OUT, channels(*NORM[2:]), {"num_features": 3}),
    "layer norm out": (lambda: nn.LayerNorm(5), OUT, channels("weight", "bias"), {"normalized_shape": (3,)}),
    "layer norm in": (lambda: nn.LayerNorm(5, bias=False), IN, channels("weight"), {"normalized_shape": (3,)}),
    "rms norm": (lambda: nn.RMSNorm(5), OUT, channels("weight"), {"normalized_shape": (3,)}),
    "group norm out": (lambda: nn.GroupNorm(2, 6), OUT, channels("weight", "bias"), {"num_channels": 4, "num_groups": 2}),
    "group norm in": (lambda: nn.GroupNorm(2, 6), IN, channels("weight", "bias"), {"num_channels": 4, "num_groups": 2}),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(5, affine=True), OUT, channels("weight", "bias"), {"num_features": 3}),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(5, affine=True), IN, channels("weight", "bias"), {"num_features": 3}),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(5), OUT, {}, {"num_features": 3}),
    "prelu out": (lambda: nn.PReLU(5), OUT, channels("weight"), {"num_parameters": 3}),
    "prelu in": (lambda: nn.PReLU(5), IN, channels("weight"), {"num_parameters": 3}),
    "embedding": (lambda: nn.Embedding(7, 5), OUT, {"weight": cut((1, (1, 3)))}, {"embedding_dim": 3, "num_embeddings": 7}),
    "lstm hidden": (
        lambda: nn.LSTM(4, 6, 2, bidirectional=True),
        OUT,
        {
            f"{name}_l{layer}{way}": cut(
                (0, gates(4, 6, (1, 3))),
                *{"weight_hh": [(1, (1, 3))], "weight_ih": [(1, (1, 3, 7, 9))] * layer}.get(name, []),
            )
            for layer in (0, 1)
            for way in ("", "_reverse")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        },
        {"hidden_size": 4, "input_size": 4},
    ),
    "lstm input": (
        lambda: nn.LSTM(4, 6, 2),
        IN,
        {"weight_ih_l0": cut((1, (1, 3)))},
        {"hidden_size": 6, "input_size": 2},
    ),
    "gru hidden": (
        lambda: nn.GRU(4, 6, batch_first=True),
        OUT,
        {
            "weight_ih_l0": cut((0, gates(3, 6, (1, 3)))),
            "weight_hh_l0": cut((0, gates(3, 6, (1, 3))), (1, (1, 3))),
            "bias_ih_l0": cut((0, gates(3, 6, (1, 3)))),
            "bias_hh_l0": cut((0, gates(3, 6, (1, 3)))),
        },
        {"hidden_size": 4},
    ),
    "rnn hidden": (
        lambda: nn.RNN(4, 6, bias=False),
        OUT,
        {"weight_ih_l0": cut((0, (1, 3))), "weight_hh_l0": cut((0, (1, 3)), (1, (1, 3)))},
        {"hidden_size": 4},
    ),
    "rnn input": (lambda: nn.RNN(4, 6), IN, {"weight_ih_l0": cut((1, (1, 3)))}, {"input_size": 2}),
    "gru cell": (
        lambda: nn.GRUCell(4, 6, bias=False),
        OUT,
        {"weight_ih": cut((0, gates(3, 6, (1, 3)))), "weight_hh": cut((0, gates(3, 6, (1, 3))), (1, (1, 3)))},
        {"hidden_size": 4},
    ),
    "attention out": (
        lambda: nn.MultiheadAttention(8, 2),
        OUT,
        {"out_proj.weight": cut((0, (1, 3))), "out_proj.bias": cut((0, (1, 3)))},
        {"num_heads": 2},
    ),
    "bilinear out": (lambda: nn.Bilinear(4, 6, 5), OUT, channels("weight", "bias"), {"out_features": 3, "in2_features": 6}),
    "bilinear in": (lambda: nn.Bilinear(4, 6, 5), IN, {"weight": cut((1, (1, 3)))}, {"in1_features": 2, "in2_features": 6}),
    "bilinear, inputs of one width": (lambda: nn.Bilinear(6, 6, 5, bias=False), IN, {"weight": cut((1, (1, 3)))}, {}),
    "bilinear, second": (
        lambda: nn.Bilinear(4, 6, 5),
        functools.partial(IN, dim=2),
        {"weight": cut((2, (1, 3)))},
        {"in1_features": 4, "in2_features": 4},
    ),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 5, mode="max"), OUT, {"weight": cut((1, (1, 3)))}, {"embedding_dim": 3}),
    "grouped transposed out": (
        lambda: nn.ConvTranspose2d(4, 8, 3, groups=2),
        OUT,
        {"weight": cut((1, (1,))), "bias": cut((0, (1, 5)))},
        {"in_channels": 4, "out_channels": 6, "groups": 2},
    ),
    "projected lstm": (
        lambda: nn.LSTM(4, 6, proj_size=5),
        OUT,
        {"weight_hr_l0": cut((0, (1, 3))), "weight_hh_l0": cut((1, (1, 3)))},
        {"proj_size": 3, "hidden_size": 6},
    ),
    "lstm cell": (
        lambda: nn.LSTMCell(4, 6),
        OUT,
        {
            "weight_ih": cut((0, gates(4, 6, (1, 3)))),
            "weight_hh": cut((0, gates(4, 6, (1, 3))), (1, (1, 3))),
            "bias_ih": cut((0, gates(4, 6, (1, 3)))),
            "bias_hh": cut((0, gates(4, 6, (1, 3)))),
        },
        {"hidden_size": 4},
    ),
    "rnn cell in": (lambda: nn.RNNCell(4, 6), IN, {"weight_ih": cut((1, (1, 3)))}, {"input_size": 2}),
    "attention of other widths out": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=10, bias=False),
        OUT,
        {"out_proj.weight": cut((0, (1, 3)))},
        {"kdim": 6, "vdim": 10},
    ),
    "attention of other widths in": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=10),
        IN,
        {"q_proj_weight": cut((1, (1, 3)))},
        {"kdim": 6, "vdim": 10},
    ),
    "attention with biases of keys and values in": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        IN,
        {"in_proj_weight": cut((1, (1, 3)))},
        {"num_heads": 2},
    ),
    "attention in": (lambda: nn.MultiheadAttention(8, 2), IN, {"in_proj_weight": cut((1, (1, 3)))}, {"num_heads": 2}),
}
INDICES = {"grouped transposed out": (1, 5), "grouped out": (1, 3), "group norm out": (1, 3), "group norm in": (1, 3)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_equals_plain_slicing(name, inplace):
    make, function, left, attributes = CASES[name]
    layer = make()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1)
    for parameter in layer.parameters():
        parameter.grad = torch.rand_like(parameter)
    before, parameters = copy.deepcopy(layer), dict(layer.named_parameters())
    grads = {key: parameter.grad for key, parameter in parameters.items()}
    small = function(layer, INDICES.get(name, [1, 3]), inplace=inplace)
    assert type(small) is type(before) and small.training
    assert (small is layer) == inplace
    for key, was in before.state_dict().items():
        wanted = left[key](was) if key in left else was
        assert torch.equal(small.state_dict()[key], wanted), key
    for key, grad in grads.items():
        found = small.get_parameter(key)
        assert (found is parameters[key]) == inplace
        if inplace:  # a copy has no gradients, as with deepcopy
            assert torch.equal(found.grad, left[key](grad) if key in left else grad)
    assert {key: getattr(small, key) for key in attributes} == attributes
    if not inplace:
        assert all(torch.equal(t, before.state_dict()[key]) for key, t in layer.state_dict().items())
        assert {k: v for k, v in vars(layer).items() if isinstance(v, int | tuple)} == {
            k: v for k, v in vars(before).items() if isinstance(v, int | tuple)
        }


@pytest.mark.parametrize(
    "make, shape, dim, of_output",
    [
        (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7), 1, True),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 7), 1, True),
        (lambda: nn.Linear(4, 6), (2, 4), -1, True),
        (lambda: nn.LSTM(4, 6), (5, 2, 4), -1, True),
    ],
)
def test_outputs_that_stay_are_what_they_were(make, shape, dim, of_output):
    layer, x = make(), torch.randn(shape)
    gone = [1, 4]
    small = layers.remove_outputs(layer, gone)
    if isinstance(layer, nn.LSTM):  # a hidden unit that is gone was read by the others
        with torch.no_grad():
            layer.weight_hh_l0[:, gone] = 0
    out, wanted = (m(x)[0] if isinstance(m, nn.LSTM) else m(x) for m in (small, layer))
    torch.testing.assert_close(out, wanted.index_select(dim, torch.tensor(keep(6, gone))))


def test_heads():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    gone = [4, 5, 6, 7]
    small = layers.remove_heads(layer, [1])
    rows = cut((0, [*gone, *(8 + i for i in gone), *(16 + i for i in gone)]))
    assert torch.equal(small.in_proj_weight, rows(layer.in_proj_weight))
    assert torch.equal(small.out_proj.weight, cut((1, gone))(layer.out_proj.weight))
    with torch.no_grad():
        layer.out_proj.weight[:, gone] = 0
    torch.testing.assert_close(small(x, x, x)[0], layer(x, x, x)[0])


def test_heads_with_their_channels_have_the_forward_of_the_class():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    gone = [4, 5, 6, 7]
    small = layers.remove_heads(layer, [1], embedding=gone)
    rows = cut((0, [*gone, *(8 + i for i in gone), *(16 + i for i in gone)]), (1, gone))
    assert torch.equal(small.in_proj_weight, rows(layer.in_proj_weight))
    assert torch.equal(small.out_proj.weight, cut((0, gone), (1, gone))(layer.out_proj.weight))
    assert (small.embed_dim, small.num_heads, small.head_dim, "forward" in vars(small)) == (4, 1, 4, False)
    x, mask = torch.randn(2, 5, 4), torch.ones(5, 5).tril().log()
    assert small(x, x, x, attn_mask=mask)[0].shape == (2, 5, 4)


def test_parameters():
    parameter = nn.Parameter(torch.randn(3, 4, 5))
    parameter.grad = torch.randn(3, 4, 5)
    value, grad = parameter.detach().clone(), parameter.grad.clone()
    assert torch.equal(layers.remove_outputs(parameter, [0]), value[1:])
    assert torch.equal(layers.remove_inputs(parameter, [0, 3]), value[:, 1:3])
    assert torch.equal(layers.remove_outputs(parameter, [4], dim=-1), value[..., :4])
    assert torch.equal(parameter, value)
    assert layers.remove_outputs(parameter, [1], dim=2, inplace=True) is parameter
    assert torch.equal(parameter, cut((2, [1]))(value)) and torch.equal(parameter.grad, cut((2, [1]))(grad))
    frozen = layers.remove_outputs(nn.Parameter(torch.zeros(3), requires_grad=False), [1])
    assert isinstance(frozen, nn.Parameter) and not frozen.requires_grad


def test_weights_that_are_computed():
    layer = weight_norm(nn.Conv1d(4, 6, 3))
    small = layers.remove_outputs(layer, [1, 3])
    assert torch.equal(small.weight, layer.weight[keep(6, (1, 3))]) and small.out_channels == 4


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weights_that_a_hook_computes():
    layer, x = nn.utils.weight_norm(nn.Linear(4, 6)), torch.randn(2, 4)
    wanted = layer(x)[:, keep(6, (1, 3))].detach()
    small = layers.remove_outputs(layer, [1, 3])
    torch.testing.assert_close(small(x), wanted)
    assert small.weight_g.shape == (4, 1) and layer.weight_g.shape == (6, 1)


def test_normalized_shape_of_several_dimensions():
    layer = nn.LayerNorm((4, 2, 2))
    small = layers.remove_outputs(layer, [0], dim=0)
    assert small.normalized_shape == (3, 2, 2) and small.weight.shape == (3, 2, 2)


def test_device_type_and_mode_stay():
    layer = nn.Conv2d(4, 6, 3, device="meta", dtype=torch.bfloat16).eval()
    small = layers.remove_outputs(layer, [1])
    assert small.weight.is_meta and small.weight.dtype is torch.bfloat16 and not small.training
    assert small.weight.shape == (5, 4, 3, 3)


@pytest.mark.parametrize(
    "call, what, fix",
    [
        (lambda: OUT(nn.Conv2d(4, 6, 3), [6]), "channel 6 of its outputs is none: it has 6", "indices from 0 to 5"),
        (lambda: OUT(nn.Conv2d(4, 6, 3), [-1]), "indices holds the index -1", "indices=[2, 6, 9]"),
        (lambda: OUT(nn.Conv2d(4, 6, 3), [1, 1]), "indices names 1 twice", "each index once"),
        (lambda: OUT(nn.Conv2d(4, 6, 3), range(6)), "indices names all of its outputs: 0-5", "leave one"),
        (
            lambda: OUT(nn.Conv2d(4, 6, 3, groups=2), [1]),
            "1 of its weight:0 cannot go alone: each of 2 rows",
            "name 1 more of 3-5",
        ),
        (lambda: OUT(nn.Conv2d(2, 4, 3, groups=2), [1]), "channel 1 of its outputs cannot go without 0", "indices=[0, 1]"),
        (lambda: OUT(nn.Linear(4, 6), []), "indices names no index", "indices=[2, 6, 9]"),
        (lambda: OUT(nn.Linear(4, 6), 3), "indices needs a list of indices, not 3", "indices=[2, 6, 9]"),
        (lambda: OUT(nn.Parameter(torch.ones(3)), [-1]), "indices holds the index -1", "indices=[2, 6, 9]"),
        (lambda: IN(nn.Bilinear(4, 6, 5), [1], dim=0), "dim is for parameters", "leave dim out"),
        (lambda: OUT(nn.ReLU(), [1]), "fxprune.layers does not know how a ReLU is called", "fxprune.prune(model"),
        (lambda: OUT(nn.PReLU(), [0]), "its outputs have a single channel", "a layer with more channels"),
        (lambda: IN(nn.Embedding(5, 4), [1]), "a layer of type Embedding has no input channels", "remove_outputs"),
        (lambda: OUT(nn.LayerNorm((4, 4)), [1]), "dim must be that of channels in normalized_shape=(4, 4)", "dim=0"),
        (lambda: OUT(nn.Linear(4, 4), [1], dim=1), "dim is for parameters", "leave dim out"),
        (lambda: OUT("conv", [1]), "model is of type str", "module"),
        (lambda: OUT(nn.Parameter(torch.ones(3)), [3]), "a parameter cannot lose index 3 of 3", "0-2"),
        (lambda: OUT(nn.Parameter(torch.ones(3)), [0, 1, 2]), "a parameter cannot lose all of 0-2", "0-2"),
        (lambda: OUT(nn.Parameter(torch.ones(3)), [0], dim=1), "the parameter has 1 dimensions, and dim is 1", "dim=0"),
        (lambda: layers.remove_heads(nn.Linear(4, 4), [1]), "heads are those of a MultiheadAttention", "prune(model"),
        (
            lambda: layers.remove_heads(nn.MultiheadAttention(8, 2), [2]),
            "the layer has 2 heads, and none with number 2",
            "heads=[0]",
        ),
        (lambda: layers.remove_heads(nn.MultiheadAttention(8, 2), [0, 1]), "indices names all of", "leave one"),
        (lambda: OUT(nn.Linear(4, 4), [1], amount=3), "remove_outputs has no argument 'amount'", "ratio"),
    ],
)
def test_refused(call, what, fix):
    with pytest.raises(PruneError) as caught:
        call()
    assert caught.value.what.startswith(what)
    assert fix in caught.value.fix


HEAD = [4, 5, 6, 7]
# a function of Torch-Pruning (both of a kind where they are the same), the layer, the indices, and what does the same here
COUNTERPARTS = [
    ("conv_out_channels", lambda: nn.Conv2d(4, 6, 3), [1, 3], OUT),
    ("conv_in_channels", lambda: nn.Conv2d(4, 6, 3), [1, 3], IN),
    ("conv_out_channels", lambda: nn.ConvTranspose2d(4, 6, 3), [1, 3], OUT),
    ("conv_in_channels", lambda: nn.ConvTranspose2d(4, 6, 3), [1, 3], IN),
    ("depthwise_conv_out_channels", lambda: nn.Conv2d(6, 6, 3, groups=6), [1, 3], OUT),
    ("depthwise_conv_in_channels", lambda: nn.Conv2d(6, 6, 3, groups=6), [1, 3], IN),
    ("batchnorm_out_channels", lambda: nn.BatchNorm2d(6), [1, 3], OUT),
    ("batchnorm_in_channels", lambda: nn.BatchNorm2d(6), [1, 3], IN),
    ("linear_out_channels", lambda: nn.Linear(4, 6), [1, 3], OUT),
    ("linear_in_channels", lambda: nn.Linear(4, 6), [1, 3], IN),
    ("prelu_out_channels", lambda: nn.PReLU(6), [1, 3], OUT),
    ("prelu_in_channels", lambda: nn.PReLU(6), [1, 3], IN),
    ("layernorm_out_channels", lambda: nn.LayerNorm(6), [1, 3], OUT),
    ("layernorm_in_channels", lambda: nn.LayerNorm(6), [1, 3], IN),
    ("embedding_out_channels", lambda: nn.Embedding(5, 6), [1, 3], OUT),
    ("embedding_in_channels", lambda: nn.Embedding(5, 6), [1, 3], OUT),  # which are its outputs there
    ("groupnorm_out_channels", lambda: nn.GroupNorm(2, 6), [1, 3], OUT),
    ("groupnorm_in_channels", lambda: nn.GroupNorm(2, 6), [1, 3], IN),
    ("instancenorm_out_channels", lambda: nn.InstanceNorm2d(6, affine=True), [1, 3], OUT),
    ("instancenorm_in_channels", lambda: nn.InstanceNorm2d(6, affine=True), [1, 3], IN),
    *(
        # channels of the inputs and outputs and, of the same numbers, of the heads; those of a whole head here
        (f"multihead_attention_{way}_channels", lambda: nn.MultiheadAttention(8, 2), HEAD, None)
        for way in ("out", "in")
    ),
]


@pytest.mark.parametrize("name, make, indices, function", COUNTERPARTS)
def test_counterparts_of_torch_pruning(name, make, indices, function):
    layer = make()
    ours = layers.remove_heads(layer, [1], embedding=indices) if function is None else function(layer, indices)
    theirs = getattr(torch_pruning, f"prune_{name}")(copy.deepcopy(layer), list(indices))
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    if function is not None:
        names = "in_channels out_channels groups in_features out_features num_features num_channels embedding_dim hidden_size"
        for attribute in names.split():
            assert getattr(ours, attribute, None) == getattr(theirs, attribute, None), attribute


def test_counterparts_of_torch_pruning_for_parameters():
    parameter = nn.Parameter(torch.randn(3, 6))
    theirs = torch_pruning.prune_parameter_out_channels(parameter, [1, 3])
    assert torch.equal(layers.remove_outputs(parameter, [1, 3], dim=-1), theirs)
    assert torch.equal(layers.remove_inputs(parameter, [1, 3]), torch_pruning.prune_parameter_in_channels(parameter, [1, 3]))


def test_all_of_torch_pruning_have_a_counterpart():
    every = {name for name in dir(torch_pruning) if re.fullmatch(r"prune_\w+_channels", name)}
    known = {f"prune_{name}" for name, *_ in COUNTERPARTS} | {"prune_parameter_out_channels", "prune_parameter_in_channels"}
    assert len(every) == 22 and every == known
