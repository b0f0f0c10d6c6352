"""Optimizers, their schedules, parameter groups and gradient clipping."""
