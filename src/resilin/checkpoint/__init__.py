"""Checkpoints: trees of tensors and JSON values on disk, written atomically, verified when read, never pickled."""
