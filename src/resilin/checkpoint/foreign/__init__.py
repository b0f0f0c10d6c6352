"""Checkpoints of other tools: each format is one reader or writer of `Stored`, so that none needs to know another."""
