"""Channels folded into one dimension with something else, and back."""

from torch import nn

from .registry import conv, features, graph, image, linear, net, parameter, pool, tokens

A = ("a.weight",)


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def flatten_nchw():
    def forward(self, x):
        return self.head(self.a(x).relu().flatten(1))

    return net(forward, a=conv(3, 12), head=linear(12 * 60, 5)), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def flatten_nhwc():
    def forward(self, x):
        return self.head(self.a(x).relu().permute(0, 2, 3, 1).flatten(1))

    return net(forward, a=conv(3, 12), head=linear(60 * 12, 5)), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def flatten_module_after_pool():
    def forward(self, x):
        return self.head(self.flatten(self.pool(self.a(x))))

    parts = {"pool": nn.AdaptiveAvgPool2d((2, 5)), "flatten": nn.Flatten()}
    return net(forward, a=conv(3, 14), head=linear(140, 5), **parts), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def flatten_reshape_by_size():
    def forward(self, x):
        x = self.a(x).sigmoid()
        return self.head(x.reshape(x.shape[0], -1))

    return net(forward, a=conv(3, 12), head=linear(720, 5)), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def flatten_constant_view():
    def forward(self, x):
        return self.head(self.a(x).view(2, 720))

    return net(forward, a=conv(3, 12), head=linear(720, 5)), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def flatten_constant_channels_view():
    def forward(self, x):
        return self.head(self.a(x).view(-1, 12 * 6 * 10))

    return net(forward, a=conv(3, 12), head=linear(720, 5)), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def flatten_width_before_height():
    def forward(self, x):
        return self.head(self.a(x).transpose(2, 3).flatten(1))

    return net(forward, a=conv(3, 12), head=linear(720, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def flatten_channels_with_width():
    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1).flatten(2)
        return self.head(self.b(x).mean(1))

    return net(forward, a=conv(3, 12), b=linear(120, 20), head=linear(20, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def flatten_channels_between_height_and_width():
    def forward(self, x):
        x = self.a(x).permute(0, 2, 1, 3).reshape(2, 6, 12 * 10)
        return self.head(self.b(x).relu().flatten(1))

    return net(forward, a=conv(3, 12), b=linear(120, 9), head=linear(54, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def patches_to_tokens():
    def forward(self, x):
        x = self.a(x).flatten(2).transpose(1, 2)
        return self.head(self.b(x).relu().mean(1))

    return net(forward, a=conv(3, 14, 2, stride=2, padding=0), b=linear(14, 20), head=linear(20, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def tokens_to_map():
    def forward(self, x):
        x = self.a(x)
        b, _, c = x.shape
        x = x.transpose(1, 2).reshape(b, c, 3, 4)
        return self.head(pool(self.b(x).relu()))

    return net(forward, a=linear(10, 14), b=conv(14, 20), head=linear(20, 5)), tokens(10, 12)


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def unflatten_module():
    def forward(self, x):
        return self.head(pool(self.b(self.unflatten(self.a(x).relu()))))

    parts = {"unflatten": nn.Unflatten(1, (12, 3, 5)), "b": conv(12, 20)}
    return net(forward, a=linear(10, 180), **parts, head=linear(20, 5)), features()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def view_linear_as_map():
    def forward(self, x):
        return self.head(pool(self.b(self.a(x).view(-1, 12, 3, 5)).relu()))

    return net(forward, a=linear(10, 180), b=conv(12, 20), head=linear(20, 5)), features()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def unflatten_channels_last():
    def forward(self, x):
        x = self.a(x).unflatten(1, (3, 5, 12)).permute(0, 3, 1, 2)
        return self.head(pool(self.b(x).relu()))

    return net(forward, a=linear(10, 180), b=conv(12, 20), head=linear(20, 5)), features()


@graph(targets=("a.weight", "b.weight", "c.weight"), min_removed=0.4)
def movedim_there_and_back():
    def forward(self, x):
        x = self.b(self.a(x).movedim(1, -1)).relu().movedim(-1, 1)
        return self.head(pool(self.c(x)))

    return net(forward, a=conv(3, 12), b=linear(12, 20), c=conv(20, 9), head=linear(9, 5)), image()


@graph(targets=A, min_removed=0.4)
def swapaxes_to_sequence():
    def forward(self, x):
        return self.head(self.b(self.a(x).swapaxes(1, 2)).amax(2))

    return net(forward, a=linear(10, 14), b=nn.Conv1d(14, 20, 3), head=linear(20, 5)), tokens()


@graph(targets=("a.weight", "head"), min_removed=0.4)
def transpose_attribute():
    def forward(self, x):
        return (self.head @ self.a(x).relu().T).T

    return net(forward, a=linear(10, 24), head=parameter(5, 24)), features()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def merge_batch_and_tokens():
    def forward(self, x):
        b, n, _ = x.shape
        x = self.a(x)
        x = self.b(x.reshape(-1, x.shape[-1]).relu())
        return self.head(x.view(b, n, 20).mean(1))

    return net(forward, a=linear(10, 14), b=linear(14, 20), head=linear(20, 5)), tokens()


@graph(targets=A, min_removed=0.4)
def unsqueeze_and_squeeze():
    def forward(self, x):
        x = self.b(self.a(x).unsqueeze(2).relu()).squeeze(2)
        return self.head(x)

    return net(forward, a=linear(10, 14), b=nn.Conv1d(14, 20, 1), head=linear(20, 5)), features()


@graph(targets=A, min_removed=0.4)
def sum_within_groups_of_channels():
    def forward(self, x):
        b, _, h, w = x.shape
        x = self.a(x).view(b, 5, 4, h, w).sum(2)
        return self.head(pool(self.b(x).relu()))

    return net(forward, a=conv(3, 20), b=conv(5, 14), head=linear(14, 3)), image()


@graph(targets=A, min_removed=0.4)
def sum_across_groups_of_channels():
    def forward(self, x):
        b, _, h, w = x.shape
        x = self.a(x).view(b, 4, 5, h, w).sum(1)
        return self.head(pool(self.b(x).relu()))

    return net(forward, a=conv(3, 20), b=conv(5, 14), head=linear(14, 3)), image()


@graph(targets=A, min_removed=0.4)
def transpose_channel_grid_then_flatten():
    def forward(self, x):
        x = self.a(x).relu().view(x.shape[0], 4, 6).transpose(1, 2).flatten(1)
        return self.head(self.b(x))

    return net(forward, a=linear(10, 24), b=linear(24, 15), head=linear(15, 5)), features()
