"""Sources: from text on disk to batches by slot, the same for every worker, now and after a resume."""
