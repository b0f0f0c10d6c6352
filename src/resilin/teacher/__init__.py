"""A stronger model behind a chat endpoint, that writes answers, data and judgements."""

from resilin.teacher.chat import ChatTeacher
from resilin.teacher.request import Reply, Request, message

__all__ = ["ChatTeacher", "Reply", "Request", "message"]
