"""Pipeline schedules: what each rank does in which order, and what that costs. Pure: nothing here sends or computes."""

from resilin.parallel.pipeline.build import METHODS, Method, build
from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.member_run import Member
from resilin.parallel.pipeline.members import MemberSchedule, follow, level, lower_members, simulate_members
from resilin.parallel.pipeline.messages import Message, Op, Part, Receive, Send, check_rendezvous, lower, result_of
from resilin.parallel.pipeline.replay import replay
from resilin.parallel.pipeline.schedule import Action, Kind, Schedule, loop, vee
from resilin.parallel.pipeline.simulate import Costs, simulate
from resilin.parallel.pipeline.slots import SlotTable, Transfer, in_blocks, in_turns, slots_of, transfers
from resilin.parallel.pipeline.split import Split, balanced, by_count, even
from resilin.parallel.pipeline.timeline import Record, Time, Timeline
from resilin.parallel.pipeline.validate import peak_in_flight, validate
from resilin.parallel.pipeline.zero_bubble import split_backward

__all__ = [
    "METHODS",
    "Action",
    "Costs",
    "Kind",
    "Member",
    "MemberSchedule",
    "Message",
    "Method",
    "Op",
    "Part",
    "Receive",
    "Record",
    "Schedule",
    "ScheduleError",
    "Send",
    "SlotTable",
    "Split",
    "Time",
    "Timeline",
    "Transfer",
    "balanced",
    "build",
    "by_count",
    "check_rendezvous",
    "even",
    "follow",
    "in_blocks",
    "in_turns",
    "level",
    "loop",
    "lower",
    "lower_members",
    "peak_in_flight",
    "replay",
    "result_of",
    "simulate",
    "simulate_members",
    "slots_of",
    "split_backward",
    "transfers",
    "validate",
    "vee",
]
