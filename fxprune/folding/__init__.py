"""Model folding: units that are alike become one (Wang et al., arXiv:2502.10216). No data is looked at."""
