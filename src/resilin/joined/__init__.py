"""Experts that were trained apart, each beside one frozen model, joined into a mixture without joint training.

Source: Shi et al., "FlexOlmo: Open Language Models for Flexible Data Use", 2025 (arXiv 2507.07024).
"""

from resilin.joined.anchor import Anchor, make_anchor
from resilin.joined.attribution import attribution
from resilin.joined.beside import beside_anchor, joined_settings
from resilin.joined.errors import JoinError
from resilin.joined.expert import Expert, expert_of
from resilin.joined.join import join, join_models
from resilin.joined.record import JoinedRecord
from resilin.joined.without import without

__all__ = [
    "Anchor",
    "Expert",
    "JoinError",
    "JoinedRecord",
    "attribution",
    "beside_anchor",
    "expert_of",
    "join",
    "join_models",
    "joined_settings",
    "make_anchor",
    "without",
]
