"""Weights of which a moving mask keeps some: N:M sparsity that is trained, and exported for sparse kernels."""
