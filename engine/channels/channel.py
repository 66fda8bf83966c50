"""What a channel is to the worker: it renders a job, and sends what was rendered to one target.

Everything else is the worker's, and the same for all channels: when to send, whether to send at all, how often to try again. So a
channel keeps no state of jobs, never tries again by itself, and raises nothing of its providers: whatever they answer becomes an
`Outcome`, of which the kind decides what follows.
"""

from __future__ import annotations

import functools
import hashlib
from datetime import datetime
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec

from engine.plan.rules import Channel as ChannelName
from seamark.protocol.events import Semantics

Lane = Literal["critical", "normal", "bulk"]

OutcomeKind = Literal[
    "ok",
    "transient",
    "throttled",
    "permanent",
    "target_invalid",
    "opted_out",
    "config",
    "expired",
    "ambiguous",
]
"""What an attempt has come to.

- `ok`: the provider took it; that is no proof of arrival.
- `transient`: the same may work later.
- `throttled`: everything in `scope` waits.
- `permanent`: this message never works; others to the same target do.
- `target_invalid`: the target is none any more: the token is retired, the address suppressed.
- `opted_out`: the person does not want it, by the provider's word.
- `config`: our key or our set-up is wrong: nothing more is sent with it, jobs stay where they are, no attempt is counted.
- `expired`: there is no time left.
- `ambiguous`: the request has left, and no answer came: it may have been sent.
"""

Scope = Literal["message", "target", "domain", "key", "provider"]
"""What a `throttled` or `config` outcome holds up; `domain` is that of an address or an endpoint, `key` the credentials.

Of `config` it says whose fault it is. Whoever may set one webhook's address, or one user's number, must not be able to stop a
provider for everybody by it: such an outcome has the scope `target`.
"""


UNREPORTED: Final = "unreported"
"""What the code of an `ok` ends with if the provider never reports what became of the message: it stays `sent`."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one attempt at one target. It is stored as it is, so it holds no address, token or text.

    Args:
        kind: decides what follows.
        provider: whose answer this is, by its name in the configuration.
        code: the provider's own code, such as `410/Unregistered`: dead letters are grouped by it.
        provider_id: what the provider calls the message; its callbacks name it.
        scope: of a `throttled` or `config` outcome, what has to wait.
        retry_after_seconds: how long the provider wants us to wait.
        target_invalid_at: the target was already none at this time: one that was registered later is left alone.
        suppress_seconds: of an address that is `target_invalid`, how long it gets nothing; None: until somebody lifts it.
        soft_bounce: the address took nothing this time, which is no proof: too many of these suppress it for some days.
        retries_max: how often this may be tried again in all, where the provider's contract allows less than the channel.
        elsewhere: the next attempt goes to another provider, if there is one.
        alarm: a person has to look at it although nothing is stopped, as at texts that carriers filter.
        environment: of APNs, where the token is one, when that is not the environment it was stored with: it is to be
            stored anew.
        segments: of an SMS, how many the price is for.
        target_digest: what tells whether an address or token is the one that was tried; nobody can be reached by it.
        known: whether the code is one that the tables name; others are shown to operators.
        begun: whether the provider was asked. If not, as all connections to it were in use, this says nothing of it, and costs no
            attempt.
        unanswered: the request has left, and nobody has answered: the target may have taken it. That counts as a failure. It is
            tried again, as the target knows a repetition by its id; receipts say that this try is in doubt.
    """

    kind: OutcomeKind
    provider: str = ""
    code: str = ""
    provider_id: str = ""
    scope: Scope = "message"
    retry_after_seconds: float | None = None
    target_invalid_at: datetime | None = None
    suppress_seconds: float | None = None
    soft_bounce: bool = False
    retries_max: int | None = None
    elsewhere: bool = False
    alarm: bool = False
    environment: Literal["", "production", "sandbox"] = ""
    segments: int = 0
    target_digest: str = ""
    known: bool = True
    begun: bool = True
    unanswered: bool = False


class Members(msgspec.Struct, frozen=True, omit_defaults=True):
    """The notifications that a digest has been made of: whatever is repeated of it has exactly these.

    Args:
        ids: newest first.
        rendered_at: what was read before is not among them.
        more: there were too many for one message; the others go with the next.
        traces: W3C `traceparent` of those that are followed, by id.
        tried: how often one of them was tried before by messages that nobody remembers: receipts count on from there.
    """

    ids: tuple[str, ...]
    rendered_at: datetime
    more: bool = False
    traces: dict[str, str] = {}
    tried: int = 0


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What JOBS holds: one notification that goes to one user by one channel, to one target or to all that it has.

    Args:
        id: the notification's.
        target: which of the user's tokens, addresses or endpoints; "": not known yet, see `engine.jobs`.
        stage: what woke it, as `engine.plan.decisions.Stage` has it.
        tries_before: how many tries it had before it was replayed from its dead letter; 0: it was not. A replayed job has a
            claim of its own, because that of its former life says that it has ended.
        attempt: how often it has been tried; 0: never. A try whose end nobody knows is not counted here, but in the job's claim.
        again: another message of this very attempt may have been worked on before: it was put back.
        put_backs: how often that happened in this attempt. Names of schedules have it, so that none has the name of the one that
            handed the job out, and would be taken for a repetition of it.
        semantics: `effectively_once` is never tried again after a try of which nobody knows whether the provider took it.
        first_at: when it was first to be sent: before, nobody has worked on it.
        untried_at: when it was last seen that nobody had begun this attempt.
        tried_at: when it was first tried: the horizon of its retries counts from there.
        data: the notification's, any JSON, for templates; where there is none, what `members_of` it has of `title`, `text` or
            `body`, and `url` is shown.
        trace: the record's W3C `traceparent`.
        stored_at: when the log stored the record; none: it has none, as the job of a digest.
        requested: its event named the channel.
        transaction: what it belongs to, and is cancelled with; "": nothing.
        digest: of a digest, its category and the end of its window: what the plans of its notifications say.
        members: its notifications, once that is settled.
    """

    id: str
    tenant: str
    user: str
    type: str
    channel: ChannelName
    lane: Lane = "normal"
    target: str = ""
    stage: str = "first"
    tries_before: int = 0
    attempt: int = 0
    again: bool = False
    put_backs: int = 0
    semantics: Semantics = "at_least_once"
    first_at: datetime
    untried_at: datetime | None = None
    tried_at: datetime | None = None
    expires_at: datetime | None = None
    category: str = ""
    collapse_key: str = ""
    data: Any = {}
    trace: str = ""
    stored_at: datetime | None = None
    requested: bool = False
    transaction: str = ""
    digest: str = ""
    members: Members | None = None

    @property
    def key(self) -> str:
        """The idempotency key, for providers and receivers, and in each life for claims.

        A slash within a part is escaped: else one tenant could take a key of another, or an id one of another notification.
        """
        return key_of(self.tenant, self.id, self.user, self.channel, self.target)

    @property
    def claim_key(self) -> str:
        """What its claim and its schedules are named by: the key, and which life of the job this is. Providers never see it."""
        return claim_key_of(self.key, self.tries_before)

    @property
    def message_key(self) -> str:
        """The key of what is sent: a digest that was settled anew, as its claim was lost, is another message if it has others."""
        if self.members is None:
            return self.key
        return f"{self.key}/{hashlib.sha256(msgspec.json.encode(self.members.ids)).hexdigest()[:16]}"


@functools.lru_cache(1024)
def key_of(*parts: str) -> str:
    """The key of a job, of its parts: see `Job.key`."""
    joined = "/".join(parts)
    if "%" not in joined and joined.count("/") == len(parts) - 1:
        return joined  # nearly always, and the rest takes 6 us
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)


def claim_key_of(key: str, tries_before: int) -> str:
    """What a job's claim is named by: see `Job.claim_key`."""
    return f"{key}/{tries_before}" if tries_before else key


def members_of(data: Any) -> dict[str, Any]:
    """What a plain default can show of a notification's data: the members of an object; a text by itself is the `text`.

    Other JSON has nothing to show.
    """
    if isinstance(data, dict):
        return data
    return {"text": data} if isinstance(data, str) else {}


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a channel renders with.

    Args:
        template: the parts of the active template in the user's language, by name; None: the plain default is made.
        locale: the user's.
        unread: how many notifications are unread, where a badge shows it; None: not known.
        unsubscribe_url: of e-mail, where one click ends this kind of message; "": it cannot be ended.
        reference: what the provider gets with the message, and gives back with what it reports of it; see
            `engine.channels.references`. "": its reports find no notification.
        now: when.
    """

    template: dict[str, str] | None = None
    locale: str = "default"
    unread: int | None = None
    unsubscribe_url: str = ""
    reference: str = ""
    now: datetime


class Unsendable(Exception):
    """This job cannot be rendered: `outcome` says why, `permanent` or `config`."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.code)
        self.outcome = outcome


Target_contra = TypeVar("Target_contra", contravariant=True)
Rendered = TypeVar("Rendered")


class Channel(Protocol[Target_contra, Rendered]):
    """One channel of a worker. Its targets and what it renders are of types of its own.

    `render` is pure and raises Unsendable. `send` ends within `deadline_seconds`, whatever the provider does; what it raises is a
    fault of ours. `key` is the job's idempotency key, for providers that know one.
    """

    name: ChannelName

    def render(self, job: Job, context: Context) -> Rendered: ...

    async def send(
        self, rendered: Rendered, target: Target_contra, *, key: str, deadline_seconds: float
    ) -> Outcome: ...

    async def close(self) -> None: ...
