"""How good a model is: perplexity and bits per byte of held-out text, multiple-choice accuracy."""
