"""Templates of tenants, filled in for a job: what push and SMS show. E-mail fills in its own, which become HTML besides."""

from __future__ import annotations

from engine.channels.channel import Context, Job, Outcome, Unsendable
from engine.channels.templates import TemplateFailed, render


def fill(text: str, job: Job, context: Context) -> str:
    """One part of a template with the job's data.

    Raises:
        Unsendable: the template cannot say this.
    """
    values = {"data": job.data, "type": job.type, "tenant": job.tenant, "locale": context.locale}
    try:
        return render(text, values)
    except TemplateFailed as error:
        raise Unsendable(Outcome(kind="permanent", code="template")) from error
