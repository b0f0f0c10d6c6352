"""One row of tokens divided over ranks: Ulysses, ring attention, and the batches that go with them."""
