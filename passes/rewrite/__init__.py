"""Rewrite: emit a new GraphModule with sliced tensors, changed attributes and new sizes."""
