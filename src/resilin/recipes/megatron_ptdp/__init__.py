"""What the recipe `megatron-ptdp` needs."""
