"""Number formats of a run: what is computed in which, and how fast this machine is in each."""
