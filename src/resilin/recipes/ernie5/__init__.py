"""Elastic pre-training of a small mixture of experts beside plain training: what the recipe `ernie5` measures."""
