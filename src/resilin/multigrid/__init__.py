"""Training on batches whose shape follows a schedule (Wu et al., CVPR 2020)."""
