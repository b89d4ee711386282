"""torch.nn's own attention and transformer layers, in every form they take."""

import torch
from torch import nn

from .registry import graph, linear, net, tokens

INNER = ("attention.in_proj_bias", "attention.out_proj.weight", "embed.weight")
HINT = {"attention": 4}


@graph("multihead", targets=INNER, heads=HINT, min_removed=0.5)
@graph("multihead_sequence_first", args=(False,), targets=INNER, heads=HINT, min_removed=0.5)
@graph("multihead_no_bias", args=(True, False), targets=INNER[1:], heads=HINT, min_removed=0.5)
def multihead_plain(batch_first=True, bias=True):
    def forward(self, x):
        x = self.embed(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x)

    attention = nn.MultiheadAttention(24, 4, bias=bias, batch_first=batch_first)
    return net(forward, embed=linear(10, 24), attention=attention, head=linear(24, 5)), tokens()


@graph(targets=("attention.in_proj_weight", "attention.out_proj.weight"), heads=HINT, min_removed=0.4)
def multihead_on_the_input():
    """The embedding is the input and stays: only heads may go, which the module's own forward forbids."""

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])

    attention = nn.MultiheadAttention(24, 4, bias=False, batch_first=True)
    return net(forward, attention=attention, head=linear(24, 5)), tokens(24)


@graph(stats=True, targets=INNER, heads=HINT, min_removed=0.5)
def multihead_weights_used():
    """The averaged attention map is used as well: a mean over heads, of which some are gone."""

    def forward(self, x):
        x = self.embed(x)
        y, weights = self.attention(x, x, x, need_weights=True, average_attn_weights=False)
        return self.head(y + weights.mean(1) @ x)

    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    return net(forward, embed=linear(10, 24), attention=attention, head=linear(24, 5)), tokens()


@graph(stats=True, targets=INNER, heads=HINT, min_removed=0.5)
def multihead_weights_used_under_a_mask():
    """Where zeros are multiplied, what is added to them is left: the scores of a head that is gone are the mask."""

    def forward(self, x):
        x = self.embed(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, weights = self.attention(x, x, x, attn_mask=mask)
        return self.head(y), weights

    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    return net(forward, embed=linear(10, 24), attention=attention, head=linear(24, 5)), tokens()


@graph(targets=INNER, heads=HINT, min_removed=0.5)
def multihead_key_padding_mask():
    def forward(self, x, padding):
        x = self.embed(x)
        return self.head(self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0])

    padding = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    model = net(forward, embed=linear(10, 24), attention=attention, head=linear(24, 5))
    return model, {"x": tokens(), "padding": padding}


@graph(targets=INNER, heads=HINT, min_removed=0.5)
def multihead_causal_mask():
    def forward(self, x):
        x = self.embed(x)
        mask = torch.triu(torch.ones(7, 7, dtype=torch.bool), diagonal=1)
        return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])

    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    return net(forward, embed=linear(10, 24), attention=attention, head=linear(24, 5)), tokens()


@graph(targets=("embed.weight", "attention.out_proj.weight"), heads=HINT, min_removed=0.2)
def multihead_mask_for_each_head():
    """The mask has batch * heads rows and comes from outside, so no head may go; the rest may."""

    def forward(self, x, mask):
        x = self.embed(x)
        x, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return self.head(x)

    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    model = net(forward, embed=linear(10, 24), attention=attention, head=linear(24, 5))
    return model, (tokens(), torch.arange(8 * 49).view(8, 7, 7) % 5 == 1)


@graph(targets=(*INNER, "attention.bias_k", "attention.bias_v"), heads=HINT, min_removed=0.5)
def multihead_bias_kv():
    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(x, x, x)[0])

    attention = nn.MultiheadAttention(24, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    return net(forward, embed=linear(10, 24), attention=attention, head=linear(24, 5)), tokens()


@graph(targets=("query.weight", "memory.weight", *INNER[:2]), heads=HINT, min_removed=0.5)
def multihead_cross():
    """Queries and keys are of different width inside, after pruning, though not before."""

    def forward(self, x, y):
        x, y = self.query(x), self.memory(y)
        return self.head(self.attention(x, y, y, need_weights=False)[0])

    layers = {"query": linear(10, 24), "memory": linear(9, 24), "head": linear(24, 5)}
    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    return net(forward, attention=attention, **layers), (tokens(), tokens(9, 11))


@graph(targets=("query.weight", "key.weight", "value.weight", *INNER[:2]), heads=HINT, min_removed=0.5)
def multihead_three_inputs():
    def forward(self, x, y):
        x, k, v = self.query(x), self.key(y), self.value(y)
        return self.head(self.attention(x, k, v, need_weights=False)[0])

    layers = {"query": linear(10, 24), "key": linear(9, 24), "value": linear(9, 24), "head": linear(24, 5)}
    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    return net(forward, attention=attention, **layers), (tokens(), tokens(9, 11))


@graph(
    targets=(
        "query.weight",
        "key.weight",
        "value.weight",
        "attention.q_proj_weight",
        "attention.k_proj_weight",
        "attention.v_proj_weight",
        *INNER[:2],
    ),
    heads=HINT,
    min_removed=0.5,
)
def multihead_kdim_vdim():
    def forward(self, x, y):
        x, k, v = self.query(x), self.key(y), self.value(y)
        return self.head(self.attention(x, k, v, need_weights=False)[0])

    layers = {"query": linear(10, 24), "key": linear(9, 14), "value": linear(9, 22), "head": linear(24, 5)}
    attention = nn.MultiheadAttention(24, 4, kdim=14, vdim=22, batch_first=True)
    return net(forward, attention=attention, **layers), (tokens(), tokens(9, 11))


def layer_targets(layer):
    names = ("self_attn.in_proj_bias", "self_attn.out_proj.weight", "linear1.bias", "norm1.weight")
    return ("embed.weight", *(f"{layer}.{name}" for name in names))


@graph(
    "encoder_layer",
    args=({"batch_first": True},),
    stats=True,
    targets=layer_targets("layer"),
    heads={"layer.self_attn": 4},
    min_removed=0.5,
)
@graph(
    "encoder_layer_norm_first",
    args=({"norm_first": True, "activation": "gelu"},),
    stats=True,
    targets=layer_targets("layer"),
    heads={"layer.self_attn": 4},
    min_removed=0.5,
)
def encoder_layer(options):
    """With batch_first and post-norm the layer is eligible for the fast path, which hides everything."""

    def forward(self, x):
        return self.head(self.layer(self.embed(x)))

    layer = nn.TransformerEncoderLayer(24, 4, dim_feedforward=22, **options)
    return net(forward, embed=linear(10, 24), layer=layer, head=linear(24, 5)), tokens()


@graph(stats=True, targets=layer_targets("layer"), heads={"layer.self_attn": 4}, min_removed=0.5)
def encoder_layer_with_padding():
    def forward(self, x, padding):
        return self.head(self.layer(self.embed(x), src_key_padding_mask=padding))

    padding = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    layer = nn.TransformerEncoderLayer(24, 4, dim_feedforward=22, batch_first=True)
    model = net(forward, embed=linear(10, 24), layer=layer, head=linear(24, 5))
    return model, (tokens(), padding)


@graph(
    stats=True,
    targets=(
        *layer_targets("encoder.layers.0"),
        *layer_targets("encoder.layers.1")[1:],
        "encoder.norm.weight",
    ),
    heads={"encoder.layers.0.self_attn": 4, "encoder.layers.1.self_attn": 4},
    min_removed=0.5,
)
def encoder():
    def forward(self, x):
        return self.head(self.encoder(self.embed(x))[:, 0])

    layer = nn.TransformerEncoderLayer(24, 4, dim_feedforward=22, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(24), enable_nested_tensor=False)
    return net(forward, embed=linear(10, 24), encoder=stack, head=linear(24, 5)), tokens()


@graph(
    "decoder_layer",
    args=(False,),
    stats=True,
    heads={"layer.self_attn": 4, "layer.multihead_attn": 4},
    targets=(*layer_targets("layer"), "layer.multihead_attn.in_proj_bias", "memory.weight"),
    min_removed=0.5,
)
@graph(
    "decoder_layer_norm_first",
    args=(True,),
    stats=True,
    heads={"layer.self_attn": 4, "layer.multihead_attn": 4},
    targets=(*layer_targets("layer"), "layer.multihead_attn.in_proj_bias", "memory.weight"),
    min_removed=0.5,
)
def decoder_layer(norm_first):
    def forward(self, x, memory):
        x = self.layer(self.embed(x), self.memory(memory))
        return self.head(x)

    layer = nn.TransformerDecoderLayer(24, 4, 22, batch_first=True, norm_first=norm_first)
    layers = {"embed": linear(10, 24), "memory": linear(9, 24), "layer": layer, "head": linear(24, 5)}
    return net(forward, **layers), (tokens(), tokens(9, 11))
