"""Reports whose pages are looked at: small models of three kinds, and what a page says as data."""

import functools
import json
from html.parser import HTMLParser

import torch
import torchvision
import transformers

import fxprune

RATIOS = (0.1, 0.5, 0.75)


def resnet():
    return torchvision.models.resnet18(weights=None, num_classes=10).eval(), torch.randn(1, 3, 32, 32)


def swin():
    model = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=10).eval()
    return model, torch.randn(1, 3, 32, 32)


def llama():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=48, vocab_size=60)
    words = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": words, "use_cache": False}


MODELS = {"resnet": resnet, "swin": swin, "llama": llama}


@functools.cache
def reported(name):
    """A model, its inputs and the report of it with half of every family removed."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    small = fxprune.prune(model, 0.5, x)
    sensitivity = None
    if name == "swin":
        sensitivity = fxprune.sensitivity(model, x, lambda m: m(x).square().mean(), ratios=(0.5,))
    return model, x, small, fxprune.report(model, small, x, ratios=RATIOS, sensitivity=sensitivity)


@functools.cache
def swept():
    """Two budgets and two criteria of a small net, without timing."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval(), torch.randn(4, 8)
    evaluate = lambda m: -float((m(x) - model(x)).detach().square().mean())  # noqa: E731
    asked = {"budgets": {"macs": [0.5, 0.25]}, "criteria": ["magnitude", "random"], "rankings": "local", "measure": False}
    return fxprune.sweep(model, x, evaluate, **asked)


VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())


class Page(HTMLParser):
    """Every element of a page with its attributes, in order; checks that what is opened is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> at {self.getpos()} closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text):
        for _, at in self.open:
            self.texts[at] = self.texts.get(at, "") + text

    def all(self, tag, **attributes):
        """The elements of a tag with these attributes: (attributes, text)."""
        return [
            (found, self.texts.get(i, ""))
            for i, (name, found) in enumerate(self.elements)
            if name == tag and all(found.get(k) == v for k, v in attributes.items())
        ]

    @property
    def data(self):
        [(_, text)] = self.all("script", id="data")
        return json.loads(text)
