"""Expert parallelism: every rank holds some experts of each layer, and tokens travel to them and back."""

from resilin.parallel.expert.dispatch import Dispatch
from resilin.parallel.expert.exchange import Exchange, FlatExchange, Route
from resilin.parallel.expert.parallelise import parallelise_experts
from resilin.parallel.expert.table import ExpertTable
from resilin.parallel.expert.two_level import TwoLevelExchange

__all__ = [
    "Dispatch",
    "Exchange",
    "ExpertTable",
    "FlatExchange",
    "Route",
    "TwoLevelExchange",
    "parallelise_experts",
]
