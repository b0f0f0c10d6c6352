"""What all tests share: nothing but patience. A property is not wrong because a busy machine took 300 ms over it."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
