"""The recipe `universal-checkpointing`: training whose optimizer lives in one layout after another."""
