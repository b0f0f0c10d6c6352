"""Recipe `family`: six ways to get models of several sizes from one training run, at equal compute."""
