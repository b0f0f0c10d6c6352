"""Long runs on machines that fail, come back, are taken away or are slow: simulated event by event, way by way. Pure.

A trace says what happens to which machine when (`trace`, `draw`); a way to go on says what the run makes of it
(`ways`); `engine` plays one against the other and accounts for every second (`outcome`). `study` does that for a file
of settings.
"""

from resilin.planner.long_run.course import Course
from resilin.planner.long_run.engine import play
from resilin.planner.long_run.outcome import Outcome
from resilin.planner.long_run.study import Study, study
from resilin.planner.long_run.trace import Trace, TraceError

__all__ = ["Course", "Outcome", "Study", "Trace", "TraceError", "play", "study"]
