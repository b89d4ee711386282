"""What Python does around tensors: static sizes, loops, containers, structured inputs and outputs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import conv, features, graph, image, linear, net, pool, tokens

AB = ("a.weight", "b.weight")


@graph(targets=AB, min_removed=0.4)
def static_channels_in_view():
    def forward(self, x):
        x = self.a(x).relu().view(-1, self.channels, self.height * 10)
        return self.head(self.b(x.reshape(x.shape[0], self.channels * 60)).relu())

    layers = {"a": conv(3, 7), "b": linear(420, 20), "head": linear(20, 5)}
    return net(forward, **layers, channels=7, height=6), image()


@graph(targets=AB, min_removed=0.4)
def static_channels_of_a_layer():
    """Sizes read from another layer's own attributes."""

    def forward(self, x):
        x = self.a(x).relu()
        x = x.view(x.shape[0], self.a.out_channels, -1).mean(-1).view(-1, self.b.in_features)
        return self.head(self.b(x).relu()[:, : self.b.out_features])

    return net(forward, a=conv(3, 14), b=linear(14, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def static_channels_checked():
    """The forward insists on the size it was built with."""

    def forward(self, x):
        x = self.a(x)
        if x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {x.shape[1]}")
        assert x.size(1) == self.b.in_channels
        return self.head(pool(self.b(x.relu())))

    return net(forward, a=conv(3, 14), b=conv(14, 20), head=linear(20, 5), channels=14), image()


@graph(targets=AB, min_removed=0.4)
def results_kept_on_the_module():
    """What a forward leaves on its module (anchors of a detector) is made anew for another size."""

    def forward(self, x):
        x = self.a(x).relu()
        for _ in range(150):  # too many for a copy that would follow the program from one node to the next
            x = x + 0.001
        if self.shape != x.shape:
            self.shape, self.steps = x.shape, [torch.arange(n, dtype=x.dtype) / n for n in x.shape[2:]]
            self.places = self.steps[0][:, None] + self.steps[1]
        return self.head(pool(self.b(x + self.places)))

    return net(forward, a=conv(3, 14), b=conv(14, 20), head=linear(20, 5), shape=None, places=None), image()


@graph(targets=AB, min_removed=0.4)
def autocast_switched_off_by_device():
    """The kind of device is read off a tensor, and the sizes behind are written out."""

    def forward(self, x):
        x = self.a(x).relu()
        with torch.autocast(device_type=x.device.type, enabled=not torch.is_autocast_enabled(x.device.type) and False):
            x = x.view(x.shape[0], 2, 7, -1).sum(1)
        return self.head(self.b(x.reshape(x.shape[0], 7 * 60)))

    return net(forward, a=conv(3, 14), b=linear(420, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def inputs_by_name():
    def forward(self, x, *, scale=1.0, extra=None):
        x = self.a(x) * scale
        if extra is not None:
            x = x + self.b(extra)
        return self.head(x.relu())

    model = net(forward, a=linear(10, 14), b=linear(9, 14), head=linear(14, 5))
    return model, {"x": features(), "extra": features(9), "scale": 0.5}


@graph(targets=AB, min_removed=0.4)
def inputs_and_outputs_in_dicts():
    def forward(self, batch):
        x = self.a(batch["left"]).relu() + self.b(batch["rest"][0])
        return {"logits": self.head(x), "parts": [self.head_two(x.tanh()), batch["rest"][1] * 2]}

    layers = {"a": linear(10, 14), "b": linear(9, 14), "head": linear(14, 5), "head_two": linear(14, 3)}
    return net(forward, **layers), ({"left": features(), "rest": [features(9), features(4)]},)


@graph(targets=AB, min_removed=0.4)
def inputs_in_a_list():
    def forward(self, levels):
        return [self.head(layer(x).relu()) for layer, x in zip((self.a, self.b), levels, strict=True)]

    model = net(forward, a=conv(3, 14), b=conv(7, 14), head=conv(14, 5, 1))
    return model, ([image(), image(7, 3, 5)],)


class Prediction(NamedTuple):
    boxes: Tensor
    scores: Tensor


@graph(targets=AB, min_removed=0.4)
def outputs_in_a_named_tuple():
    def forward(self, x):
        x = self.b(self.a(x).relu())
        return Prediction(boxes=self.head_boxes(x), scores=self.head_scores(x.relu()).sigmoid())

    layers = {"a": conv(3, 12), "b": conv(12, 20), "head_boxes": conv(20, 4), "head_scores": conv(20, 5)}
    return net(forward, **layers), image()


@graph(targets=("a.weight",), min_removed=0.2)
def output_of_a_hidden_layer():
    """Hidden features are returned too, so they stay; what is between need not."""

    def forward(self, x):
        hidden = self.fixed(self.a(x).relu())
        return self.head(hidden.relu()), hidden

    return net(forward, a=linear(10, 14), fixed=linear(14, 9), head=linear(9, 5)), features()


@graph(targets=("layers.0.weight", "layers.1.weight", "layers.2.weight"), min_removed=0.4)
def layers_in_containers():
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.acts["even" if i % 2 == 0 else "odd"](layer(x))
        return self.head(x)

    layers = nn.ModuleList([linear(10, 14), linear(14, 22), linear(22, 9)])
    acts = nn.ModuleDict({"even": nn.ReLU(), "odd": nn.GELU()})
    return net(forward, layers=layers, acts=acts, head=linear(9, 5)), features()


@graph(targets=AB, min_removed=0.4)
def sizes_decide_the_program():
    """Lengths, shapes and types are asked for, and a loop runs over a size."""

    def forward(self, x):
        x = self.a(x)
        total = torch.zeros_like(x[:, 0])
        for i in range(x.size(1)):
            total = total + x[:, i] * (0.5 if i % 2 else 1.0)
        if len(x) > 1 and x.dim() == 3 and isinstance(total, torch.Tensor):
            total = total / len(x.shape)
        return self.head(self.b(total.relu()))

    return net(forward, a=linear(10, 14), b=linear(14, 20), head=linear(20, 5)), tokens(10, 4)


@graph(targets=AB, min_removed=0.4)
def checkpointed_block():
    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(lambda y: self.b(self.a(y).relu()), x, use_reentrant=False)
        return self.head(pool(x))

    return net(forward, a=conv(3, 12), b=conv(12, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def dead_branch_and_unused_layer():
    def forward(self, x):
        x = self.a(x).relu()
        self.unused_too(x)
        return self.head(pool(self.b(x)))

    layers = {"a": conv(3, 12), "b": conv(12, 20), "unused": conv(20, 9), "unused_too": conv(12, 7)}
    return net(forward, **layers, head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def forward_hook_doubles():
    def forward(self, x):
        return self.head(pool(self.b(F.relu(self.a(x)))))

    a = conv(3, 12)
    a.register_forward_hook(lambda module, inputs, output: output * 2)
    return net(forward, a=a, b=conv(12, 20), head=linear(20, 5)), image()
