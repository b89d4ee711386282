"""A pruned model of the original's own class: its Python stays, its tensors, attributes and configuration shrink."""
