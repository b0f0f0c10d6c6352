"""Data steered by the model while it trains: which samples, in what proportions, with what weights."""
