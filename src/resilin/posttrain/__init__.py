"""After pretraining: preferences, reward models, and reinforcement learning with verifiable rewards."""
