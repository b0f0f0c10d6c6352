"""The recipe `se-moe`: experts in tiers of memory, with and without reading ahead."""
