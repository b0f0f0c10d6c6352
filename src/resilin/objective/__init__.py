"""Objectives: `(model, batch, keys) -> Loss`, always a sum over valid units and their count."""
