"""Text from a model: sampling, generation with a key-value cache, and log-likelihoods of given text."""
