"""Conformance graphs: tiny models, each of which stresses one index map."""

from importlib import import_module

from .registry import GRAPHS, Graph

for _family in (
    "flatten",
    "indexing",
    "joining",
    "convolution",
    "rearranging",
    "gates",
    "attention",
    "attention_forms",
    "transformers",
    "grouped_query",
    "multihead",
    "recurrent",
    "parameters",
    "embeddings",
    "norms",
    "reductions",
    "reparametrised",
    "writing",
    "programs",
    "opaque",
    "segments",
    "topologies",
    "spatial",
    "constants",
    "sizes",
    "by_op",
):
    import_module(f"{__name__}.{_family}")

__all__ = ["GRAPHS", "Graph"]
