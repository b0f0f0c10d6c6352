"""Plans made before a run, and predictions made during one: sizes, iterations, data, time and memory."""
