"""Tensor parallelism: the matrices of a model divided over ranks, by a plan that lies beside the model."""

from resilin.parallel.tensor.parallelise import parallelise, plan_of

__all__ = ["parallelise", "plan_of"]
