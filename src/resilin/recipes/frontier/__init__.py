"""The recipe `frontier`: layouts found by trying, on paper for a large machine and for real on this one."""
