"""The recipe `scale`: real workers that are killed, and the same ways to go on simulated on up to 100,000 of them."""
