"""The parts of a job that goes to several targets: a job for each. Pure.

They follow from the claim of the whole, as everything does: whoever finds the claim makes the same parts again, whatever would be
decided about the whole by then. Each part is decided about by itself, and ends with a reason of its own.
"""

from __future__ import annotations

from msgspec.structs import replace

from engine.channels.channel import Job
from engine.jobs.claims import Done
from engine.plan.decisions import ESCALATION


def parts_of(job: Job, done: Done) -> list[Job]:
    """The jobs into which a job was split: one for each target. Those of a digest all have the same members.

    The id of a digest's parts says which: a digest that is settled anew, as its claim was lost, has parts of its own, or those of
    the former one would be taken for them.
    """
    if not done.targets:
        return []
    # That nobody has seen it was asked a moment ago: to ask again for each device would cost as long once more.
    stage = "retry" if job.stage == ESCALATION else job.stage
    whole = replace(job, members=done.members, again=True, stage=stage, untried_at=done.untried_at)
    id = f"{job.id}/{whole.message_key.rpartition('/')[2]}" if job.digest else job.id
    return [replace(whole, id=id, target=target) for target in done.targets]
