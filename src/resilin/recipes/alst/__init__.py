"""The recipe `alst`: what each part of Arctic Long Sequence Training saves, and that losses stay the same."""
