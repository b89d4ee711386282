"""Meta kernels: results that are not computed have the shape, strides and dtype that torch itself gives them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fxprune
from fxprune.passes.capture.opaque import LEAKS
from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.ir.meta_kernels import MetaKernels, attended, convolved

CONVOLUTIONS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


@pytest.mark.parametrize("ndim", CONVOLUTIONS)
def test_shape_of_a_convolution_is_that_of_torch(ndim):
    plain, transposed = CONVOLUTIONS[ndim]
    x = torch.empty(2, 4, *(13, 17, 11)[:ndim], device="meta")
    for k, s, p, d, g in itertools.product((1, 3, 4), (1, 2), (0, 2), (1, 2), (1, 2)):
        layer = plain(4, 6, k, s, p, d, g, device="meta")
        assert convolved(x, layer.weight, None, [s], [p], [d], False, [0], g) == list(layer(x).shape)
        layer = transposed(4, 6, k, s, p, s - 1, g, dilation=d, device="meta")
        assert convolved(x, layer.weight, None, [s], [p], [d], True, [s - 1], g) == list(layer(x).shape)


def test_channels_that_do_not_fit_a_convolution_raise():
    with pytest.raises(ValueError, match=r"weight of shape \(6, 3, 3\) is given \(2, 4, 9\)"):
        convolved(torch.empty(2, 4, 9), torch.empty(6, 3, 3), None, [1], [0], [1], False, [0], 1)


def on_meta(*shape, order=None):
    made = torch.empty(shape, device="meta")
    return made if order is None else torch.empty([shape[d] for d in order], device="meta").permute(order)


@pytest.mark.parametrize("order", [None, (0, 2, 1, 3), (0, 1, 3, 2)])  # each its own inverse
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("mask", [None, (7, 9), (1, 9), (2, 1, 7, 9), (9,)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float])
def test_attention_has_the_form_that_torch_gives_it(order, heads, mask, dtype):
    op = torch.ops.aten.scaled_dot_product_attention.default
    q, k, v = on_meta(2, 4, 7, 8, order=order), on_meta(2, heads, 9, 8, order=order), on_meta(2, heads, 9, 5, order=order)
    named = {"enable_gqa": heads == 1, "attn_mask": None if mask is None else torch.empty(mask, dtype=dtype, device="meta")}
    real = op(q, k, v, **named)
    assert attended(q, k, v, **named) == list(real.shape)
    if mask is not None:
        named["attn_mask"] = torch.zeros(mask, dtype=dtype)  # one that is computed from sizes has contents
    made = MetaKernels().result(op, (q, k, v), named)
    assert (made.shape, made.stride(), made.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    "given",
    [
        ((2, 4, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5)),  # other heads
        ((2, 4, 7, 8), (2, 4, 9, 6), (2, 4, 9, 5)),  # other widths
        ((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 3, 5)),  # other tokens
        ((2, 4, 7, 8), (4, 9, 8), (4, 9, 5)),  # other dimensions
        ((2, 4, 7, 8), (1, 4, 9, 8), (1, 4, 9, 5)),  # broadcast
    ],
)
def test_attention_of_what_does_not_fit_is_left_to_torch(given):
    q, k, v = (on_meta(*shape) for shape in given)
    assert attended(q, k, v) is None
    assert attended(q, q, q, torch.empty(5, 7, 7), 0.0) is None  # a mask that does not fit
    assert attended(q, q, q, torch.empty(7, 7), 0.0, True) is None  # which torch refuses
    assert attended(q, q, q) == [*q.shape]


A, B = torch.randn(2, 6, 5), torch.randn(6, 1)
OPS = {
    "same shapes": lambda a, b: a * a + 2,
    "broadcast": lambda a, b: a - b,
    "the narrow one first": lambda a, b: b / a,
    "both broadcast": lambda a, b: b + b.t(),
    "strided": lambda a, b: a.transpose(0, 2) * a.transpose(0, 2),
    "another dtype": lambda a, b: a + b.double(),
    "in place": lambda a, b: a.clone().mul_(b).relu_(),
    "activations": lambda a, b: torch.nn.functional.hardswish(a).sigmoid() + torch.nn.functional.gelu(a),
    "normalised": lambda a, b: torch.nn.functional.layer_norm(a, (5,)),
    "reduced": lambda a, b: (a.mean((0, 2), keepdim=True), a.amax(-1), a.argmax(1)),
    "compared": lambda a, b: (a > b, a == a),
    "twice the same": lambda a, b: (a @ a.mT, a @ a.mT),
    "products": lambda a, b: (b.t() @ b, torch.bmm(a, a.mT), torch.addmm(b[:, 0], b, b.t()), a.mT @ a),
    "a whole matrix added": lambda a, b: torch.addmm(b @ b.t(), b, b.t()),
    "views": lambda a, b: (a.view(3, 4, 5), a.permute(2, 0, 1), b.expand(6, 3), b.t(), a.transpose(0, 1), b.squeeze(1), a[1]),
    "joined": lambda a, b: (torch.cat([a, a, a], 1), torch.cat([a, a], -1), torch.cat([b, b])),
    "strided ones joined": lambda a, b: torch.cat([a.mT, a.mT], 0),
    "images joined": lambda a, b: tuple(
        torch.cat([x, x], dim)
        for x in (a[None], a[None].mT, a[None].to(memory_format=torch.channels_last), a[None, :, ::2], a.expand(3, 2, 6, 5))
        for dim in (0, 1, 3)
    ),
    "other dtypes joined": lambda a, b: torch.cat([b, b.double()]),
    "norms": lambda a, b: tuple(
        norm(x)
        for x in (
            a[None, :, :2],
            a[None].mT,
            a.permute(1, 2, 0)[..., None],
            a[None].to(memory_format=torch.channels_last),
        )
        for norm in (
            lambda x: F.layer_norm(x, x.shape[-1:]),
            lambda x: F.group_norm(x, 1),
            lambda x: F.batch_norm(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])),
        )
    ),
    "broadcast one along the other": lambda a, b: (
        a[:, :1] - a[:, :, :1],
        b + b.t(),
        a[:1] * a[:, :1],
        b[:, None] / b.t()[None],
    ),
    "strided ones along each other": lambda a, b: a.mT[:, :1] - a.mT[:, :, :1],
    "compared to a number": lambda a, b: (a == 0, a.mT > 1, a[:, ::2] <= 0.5, b.long() != 2),
    "copies": lambda a, b: (a.clone(), a.mT.clone(), a.mT.contiguous(), a[None].clone(memory_format=torch.channels_last)),
    "rolled": lambda a, b: (a.roll([1, -2], [1, 2]), a.roll(3), a.mT.roll(1, -1), a[:0].roll(1, 0)),
    "filled": lambda a, b: tuple(
        x.masked_fill(mask, value)
        for x, mask in ((a, a > 0), (a, a[0] > 0), (a, a[:, :1, :1] > 0), (a.mT, a.mT > 0), (a[0], a > 0))
        for value in (-1.0, torch.ones(()))
    ),
    "looked up": lambda a, b: tuple(
        x[index]
        for x in (a, a.mT, b, a[:, 0, 0], a.long())
        for index in (torch.ones(3, 4).long(), torch.ones(1).long(), torch.tensor([1, 0]), torch.tensor([[[1]]]))
    ),
    "masked": lambda a, b: a[torch.tensor([True, False])],
    "nothing joined": lambda a, b: torch.cat([a.new_empty(0), a]),
}


@pytest.mark.parametrize("name", OPS)
def test_imagined_results_have_the_real_form(name):
    def form(result):
        found = result if isinstance(result, tuple) else (result,)
        return [(tuple(t.shape), t.stride(), t.dtype) for t in found]

    with Recorder({}):
        imagined = OPS[name](A.to("meta"), B.to("meta"))
    assert form(imagined) == form(OPS[name](A, B))


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: torch.mm(b, b),
        lambda a, b: torch.bmm(a, a[:1].mT),
        lambda a, b: torch.addmm(a[0, 0], b, b.t()),
        lambda a, b: torch.cat([a, a[:, :5]]),
        lambda a, b: a.view(7, 7),
        lambda a, b: torch.mm(a, a.mT),
        lambda a, b: torch.bmm(b, b.t()),
        lambda a, b: torch.addmm(b[:, 0], a, a.mT),
        lambda a, b: torch.cat([a, a], 3),
        lambda a, b: a.roll([1, 1], [0]),
        lambda a, b: a.roll(1, 3),
        lambda a, b: a.masked_fill(a[:, :5] > 0, 1.0),
        lambda a, b: a.masked_fill(a.long(), 1.0),
        lambda a, b: a[:, :2] - a[:, :3],
        lambda a, b: a.mean(3, keepdim=True),
        lambda a, b: a.sum((0, -4)),
    ],
)
def test_what_does_not_fit_raises_as_it_does_in_torch(call):
    with pytest.raises((RuntimeError, IndexError)) as real:
        call(A, B)
    with pytest.raises(real.type), Recorder({}):
        call(A.to("meta"), B.to("meta"))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_is_called_as_its_author_likes(training):
    """By position, by keyword, and as a function of `torch`: tracing stands in for it without values."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            n = self.norm
            options = {"training": training, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}
            by_name = torch.batch_norm(self.up(x), n.weight, n.bias, n.running_mean, n.running_var, **options)
            placed = torch.batch_norm(by_name, n.weight, n.bias, n.running_mean, n.running_var, *options.values())
            return self.down(n(placed))

    x = torch.randn(2, 3, 4, 4)
    pruned = fxprune.prune(Normed().eval(), 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.get_submodule("down").in_channels == 4
    assert not pruned.get_buffer("norm.running_mean").any()  # what a forward in verification writes is taken back


def test_that_contents_are_kept_is_not_seen():
    """What looks for contents that leave a tensor (`opaque.Watch`) must not take this for a question of the model's."""

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            asked.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    asked: list[str] = []
    recorder = Recorder({})
    places = torch.arange(3)
    with Seen():
        ref = recorder.ref(places)
        recorder.contents.note_writing(torch.ops.aten.add_.Tensor, (places, places), {}, False)
    assert LEAKS.isdisjoint(asked) and torch.equal(recorder.op_trace.values[ref.id].data, places)
