"""Who decides what when workers come and go: pure state machines, for the real runtime and for its simulation alike."""
