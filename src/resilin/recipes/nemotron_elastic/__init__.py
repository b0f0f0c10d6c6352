"""The recipe nemotron-elastic: a trained hybrid becomes three models."""
