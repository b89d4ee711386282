"""LSTM, GRU and RNN: gates packed into one weight, states that feed themselves."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .registry import features, graph, linear, net, tokens

LAYER = ("rnn.weight_ih_l0", "rnn.weight_hh_l0")
SECOND = ("rnn.weight_ih_l1", "rnn.weight_hh_l1")
BACKWARD = ("rnn.weight_ih_l0_reverse", "rnn.weight_hh_l0_reverse")


@graph("lstm", args=(nn.LSTM, 14), targets=(*LAYER, "rnn.bias_hh_l0", "head.weight"), min_removed=0.5)
@graph("gru", args=(nn.GRU, 14), targets=(*LAYER, "rnn.bias_hh_l0", "head.weight"), min_removed=0.5)
@graph("rnn", args=(nn.RNN, 14), targets=(*LAYER, "rnn.bias_hh_l0", "head.weight"), min_removed=0.5)
@graph("lstm_no_bias", args=(nn.LSTM, 14, {"bias": False}), targets=LAYER, min_removed=0.5)
@graph("rnn_relu", args=(nn.RNN, 14, {"nonlinearity": "relu"}), targets=LAYER, min_removed=0.5)
@graph("lstm_two_layers", args=(nn.LSTM, 14, {"num_layers": 2}), targets=(*LAYER, *SECOND), min_removed=0.5)
@graph("gru_two_layers", args=(nn.GRU, 14, {"num_layers": 2}), targets=(*LAYER, *SECOND), min_removed=0.5)
@graph(
    "lstm_bidirectional",
    args=(nn.LSTM, 28, {"bidirectional": True}),
    targets=(*LAYER, *BACKWARD),
    min_removed=0.5,
)
@graph(
    "gru_bidirectional",
    args=(nn.GRU, 28, {"bidirectional": True}),
    targets=(*LAYER, *BACKWARD),
    min_removed=0.5,
)
@graph(
    "lstm_two_layers_bidirectional",
    args=(nn.LSTM, 28, {"num_layers": 2, "bidirectional": True}),
    targets=(*LAYER, *SECOND, *BACKWARD, "rnn.weight_ih_l1_reverse"),
    min_removed=0.5,
)
@graph(
    "lstm_projected",
    args=(nn.LSTM, 9, {"proj_size": 9}),
    targets=(*LAYER, "rnn.weight_hr_l0", "rnn.bias_ih_l0", "head.weight"),
    min_removed=0.5,
)
def sequence(kind, width, options=None):
    """Every step's output is used; the embedding before it may shrink too."""

    def forward(self, x):
        x, _ = self.rnn(self.embed(x).relu())
        return self.head(x)

    layers = {"embed": linear(10, 11), "rnn": kind(11, 14, batch_first=True, **(options or {}))}
    return net(forward, **layers, head=linear(width, 5)), tokens()


@graph(targets=("embed.weight", *LAYER), min_removed=0.5)
def lstm_sequence_first_last_state():
    def forward(self, x):
        _, (h, c) = self.rnn(self.embed(x.transpose(0, 1)))
        return self.head(torch.cat([h[-1], c[-1]], 1))

    return net(forward, embed=linear(10, 11), rnn=nn.LSTM(11, 14), head=linear(28, 5)), tokens()


@graph(targets=("embed.weight", *LAYER, *BACKWARD, "head.weight"), min_removed=0.5)
def lstm_of_packed_sequences():
    def forward(self, x, lengths):
        x = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        x, (h, _) = self.rnn(x)
        return self.head(pad_packed_sequence(x, batch_first=True)[0]), self.head(h.transpose(0, 1).flatten(1))

    rnn = nn.LSTM(11, 14, batch_first=True, bidirectional=True)
    inputs = tokens(), torch.tensor([3, 7])
    return net(forward, embed=linear(10, 11), rnn=rnn, head=linear(28, 5)), inputs


@graph(targets=("embed.weight", *LAYER, *BACKWARD), min_removed=0.5)
def gru_bidirectional_states_joined():
    def forward(self, x):
        _, h = self.rnn(self.embed(x))
        return self.head(h.transpose(0, 1).flatten(1))

    rnn = nn.GRU(11, 14, batch_first=True, bidirectional=True)
    return net(forward, embed=linear(10, 11), rnn=rnn, head=linear(28, 5)), tokens()


@graph(targets=("start.weight", *LAYER), min_removed=0.5)
def gru_started_from_another_layer():
    def forward(self, x):
        h = self.start(x.mean(1)).tanh().unsqueeze(0)
        x, _ = self.rnn(x, h)
        return self.head(x[:, -1])

    rnn = nn.GRU(10, 14, batch_first=True)
    return net(forward, start=linear(10, 14), rnn=rnn, head=linear(14, 5)), tokens()


@graph(targets=LAYER, min_removed=0.5)
def lstm_started_from_zeros():
    def forward(self, x):
        h = torch.zeros(1, x.size(0), 14, dtype=x.dtype, device=x.device)
        x, _ = self.rnn(x, (h, h))
        return self.head(x)

    return net(forward, rnn=nn.LSTM(10, 14, batch_first=True), head=linear(14, 5)), tokens()


@graph(targets=("one.weight_hh_l0", "two.weight_hh_l0", "two.weight_ih_l0"), min_removed=0.4)
def rnn_residual_chain():
    def forward(self, x):
        x, _ = self.one(x)
        y, _ = self.two(x)
        return self.head(x + y)

    layers = {"one": nn.RNN(10, 14, batch_first=True), "two": nn.LSTM(14, 14, batch_first=True)}
    return net(forward, **layers, head=linear(14, 5)), tokens()


@graph(targets=("cell.weight_ih", "cell.weight_hh", "cell.bias_ih"), min_removed=0.4)
def lstm_cell_loop():
    def forward(self, x):
        h, c = x.new_zeros(x.shape[0], 14), x.new_zeros(x.shape[0], 14)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)

    return net(forward, cell=nn.LSTMCell(10, 14), head=linear(14, 5)), tokens(10, 4)


@graph(targets=("cell.weight_ih", "cell.weight_hh", "embed.weight"), min_removed=0.4)
def gru_cell_loop():
    def forward(self, x):
        h = self.start(x[:, 0])
        for i in range(x.shape[1]):
            h = self.cell(self.embed(x[:, i]).relu(), h)
        return self.head(h)

    layers = {"embed": linear(10, 11), "start": linear(10, 14), "cell": nn.GRUCell(11, 14)}
    return net(forward, **layers, head=linear(14, 5)), tokens(10, 4)


@graph(targets=("cell.weight_ih", "cell.weight_hh"), min_removed=0.4)
def rnn_cell_outputs_stacked():
    def forward(self, x):
        h, outputs = self.start.expand(x.shape[0], -1), []
        for i in range(x.shape[1]):
            h = self.cell(x[:, i], h)
            outputs.append(h)
        return self.head(torch.stack(outputs, 1))

    start = nn.Parameter(torch.empty(1, 14))
    return net(forward, start=start, cell=nn.RNNCell(10, 14), head=linear(14, 5)), tokens(10, 4)


@graph(targets=("inside.weight", "back.weight", "gates.bias"), min_removed=0.4)
def lstm_by_hand():
    """Four gates in one linear, cut by chunk, with peephole-like reuse of the state."""

    def forward(self, x):
        h = c = torch.zeros(x.shape[0], 14).to(x)
        for i in range(x.shape[1]):
            gates = self.gates(self.inside(x[:, i]).relu()) + self.back(h)
            i_gate, f_gate, g, o_gate = gates.chunk(4, 1)
            c = f_gate.sigmoid() * c + i_gate.sigmoid() * g.tanh()
            h = o_gate.sigmoid() * c.tanh()
        return self.head(h)

    layers = {"inside": linear(10, 11), "gates": linear(11, 56), "back": linear(14, 56, bias=False)}
    return net(forward, **layers, head=linear(14, 5)), tokens(10, 4)


@graph(targets=("a.weight", *LAYER, "head.weight"), min_removed=0.5)
def lstm_over_steps_made_of_channels():
    """Each channel of a step comes from a channel of its own: those of all steps go together."""

    def forward(self, x):
        x = self.a(x).view(-1, 11, 3).transpose(1, 2)
        return self.head(self.rnn(x)[1][0][-1])

    return net(forward, a=linear(10, 33), rnn=nn.LSTM(11, 14, batch_first=True), head=linear(14, 5)), features()


@graph(targets=("embed.weight", "rnn.weight_hh_l0", "head.weight"), min_removed=0.3)
def lstm_left_with_one_unit():
    """It returns a tuple, of tensors with a dimension of size 1."""

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[1][0][-1])

    return net(forward, embed=linear(10, 8), rnn=nn.LSTM(8, 2, batch_first=True), head=linear(2, 5)), tokens()


@graph(targets=("rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse"), min_removed=0.2)
def rows_of_a_recurrent_layer_by_mask():
    """Initial states of zeros are told apart by image; nothing is removed along images, so a mask over them stays as it is."""

    def forward(self, x, chosen):
        x = self.rnn(x)[0][:, -1]
        y = x * 2
        y[chosen] = x[chosen].tanh()
        return self.head(y)

    model = net(forward, rnn=nn.RNN(10, 7, batch_first=True, bidirectional=True), head=linear(14, 5))
    return model, {"x": tokens(), "chosen": torch.tensor([True, False])}
