"""Models: plain modules that know nothing of ranks, each described by a settings class that builds it."""
