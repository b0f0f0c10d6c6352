"""How one step's work is split over micro-batches and workers without changing its result."""
