"""Verifiable rewards: what says whether an answer is right, and how far."""

from resilin.posttrain.verifiers.table import VerifierTable, find_verifier

__all__ = ["VerifierTable", "find_verifier"]
