"""Adapters: a frozen model with small trainable additions, merged, switched and exchanged with PEFT."""
