"""Evaluations that run: what a model writes, what it finds likely, and what a judge prefers."""
