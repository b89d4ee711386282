"""The dispatcher's own ops, called by name with sizes written out: `torch.ops.aten.view.default(x, [3, 24])`."""

import torch
from torch.nn import functional as F

from .registry import features, graph, index, linear, net, parameter

aten = torch.ops.aten
STEPS = {
    "view": lambda self, x: aten.view.default(x, [x.shape[0], 4, 6]).sigmoid().flatten(1),
    "zeros": lambda self, x: x + aten.zeros.default([3, 24], dtype=x.dtype),
    "new_full": lambda self, x: x * aten.new_full.default(x, [3, 24], 2.0),
    "expand": lambda self, x: x + aten.expand.default(self.shift, [3, 24]),
    "split": lambda self, x: torch.cat(aten.split.Tensor(x, 12, 1)[::-1], 1),
    "slices": lambda self, x: torch.cat([aten.slice.Tensor(x, 1, 7, 24), aten.slice.Tensor(x, 1, 0, 7)], 1),
    "strided_slices": lambda self, x: torch.cat([aten.slice.Tensor(x, 1, i, 24, 2) for i in (0, 1)], 1),
    "select": lambda self, x: x * aten.select.int(x, 1, 5).unsqueeze(1),
    "roll": lambda self, x: aten.roll.default(x, [3], [1]),
    "index": lambda self, x: aten.index.Tensor(x, [None, self.order]),
    "pad": lambda self, x: aten.constant_pad_nd.default(x[:, :20], [2, 2], 0.5),
    "as_strided": lambda self, x: x.relu().as_strided((x.shape[0], 24), (24, 1)),
    "groups": lambda self, x: aten.convolution.default(x.unsqueeze(2), self.weight, None, [1], [0], [1], False, [0], 4).flatten(
        1
    ),
    "transposed_groups": lambda self, x: F.conv_transpose1d(x.unsqueeze(2), self.weight, None, 1, 0, 0, 4).flatten(1),
    "layer_norm": lambda self, x: aten.native_layer_norm.default(x, [24], None, None, 1e-5)[0],
    "group_norm": lambda self, x: aten.native_group_norm.default(x, None, None, x.shape[0], 24, 1, 4, 1e-5)[0],
}


def by_op(name):
    def forward(self, x):
        return self.head(STEPS[name](self, self.a(x)).relu())

    parts = {"weight": parameter(24, 6, 1)} if "groups" in name else {}
    parts |= {"order": index(*((7 * i) % 24 for i in range(24)))} if name == "index" else {}
    parts |= {"shift": parameter(1)} if name == "expand" else {}
    return net(forward, a=linear(10, 24), **parts, head=linear(24, 5)), features()


for name in STEPS:
    weights = ("weight",) if "groups" in name else ()
    least = 0.3 if name == "select" else 0.4
    graph(f"aten_{name}", args=(name,), stats="norm" in name, targets=("a.weight", *weights), min_removed=least)(by_op)
