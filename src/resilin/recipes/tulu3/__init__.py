"""The recipe `tulu3`: supervised fine-tuning, preferences and verifiable rewards, each from the model before it."""
