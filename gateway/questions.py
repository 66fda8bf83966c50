"""Questions that many sessions ask at once: the more of them are answered together, the longer the next are gathered."""

from __future__ import annotations

from typing import ClassVar

from engine import questions
from engine.questions import Answer, Question
from gateway.limits import SHARED_PAUSE_SECONDS, SHARED_PAUSE_SECONDS_MAX


class Questions(questions.Questions[Question, Answer]):
    """See `engine.questions`."""

    pause_seconds: ClassVar[float] = SHARED_PAUSE_SECONDS
    pause_seconds_max: ClassVar[float] = SHARED_PAUSE_SECONDS_MAX
