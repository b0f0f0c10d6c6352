"""The recipe `flexolmo`: experts of three owners, trained apart and joined, beside other ways of joining."""
