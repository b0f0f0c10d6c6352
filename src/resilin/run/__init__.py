"""A run: four nouns taken step by step, watched, saved and resumed."""
