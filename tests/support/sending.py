"""Workers with simulated providers: their file, a worker in the test's own loop or as a process, users who are reached."""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.cancels import watching
from engine.channels.channel import Job
from engine.closing import Held
from engine.controls.watching import watched_controls
from engine.directory.changes import changing_in
from engine.directory.changing import Directory, ProfileChange
from engine.directory.push_tokens import NewToken, register_token
from engine.directory.users import UserFields, put_user
from engine.directory.webhooks import NewEndpoint, create_endpoint
from engine.jobs.messages import message_of
from engine.plan.rules import Channel
from engine.postgres import Pool
from engine.settings import Secret, Settings
from engine.worker.providers import SENT_BY_WORKERS
from ops.dev.providers.acceptlog import Accepted, AcceptLog
from ops.dev.providers.certificates import server_tls, write_certificate
from ops.dev.providers.push import AUTHORITY, AUTHORITY_KEY, PushProviders
from ops.dev.providers.sms import SnsSimulator, TwilioSimulator
from ops.dev.providers.smtp import SmtpSimulator
from ops.dev.providers.webhook import WebhookReceiver
from ops.working import Parts, working
from seamark.protocol.receipts import Receipt, decode_receipt
from tests.support.logs import at_work, connected, redis_at
from tests.support.roles import RoleProcess

TENANT, USER = "default", "alice"
PHONE, EMAIL = "+4366412345678", "alice@example.com"
DEVICE = "ab" * 32
RECEIVER = "receiver.example.com"
SECRET = "whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"
UNSUBSCRIBE_SECRET = "u" * 40


@dataclass
class Simulated:
    """Providers of every channel, and the file that names them."""

    push: PushProviders
    mail: SmtpSimulator
    texts: TwilioSimulator
    spare: SnsSimulator
    hooks: WebhookReceiver
    folder: Path
    per_second: dict[str, float] = field(default_factory=dict)
    sole_texts: bool = False
    """Whether no other provider of texts stands in for the first."""

    @property
    def file(self) -> Path:
        return self.folder / "providers.toml"

    @property
    def logs(self) -> dict[str, AcceptLog]:
        """What each channel's usual provider has accepted."""
        return {
            "push": self.push.production.log,
            "email": self.mail.log,
            "sms": self.texts.log,
            "webhook": self.hooks.log,
        }

    def accepted(self, channel: str) -> list[Accepted]:
        return self.logs[channel].messages()

    def write(self) -> None:
        """The file, and the secrets it names."""
        (self.folder / "mail.password").write_text("sesame")
        (self.folder / "twilio.secret").write_text(self.texts.secret)
        (self.folder / "sns.secret").write_text(self.spare.secret)
        relay = {"kind": "smtp", "host": "127.0.0.1", "port": self.mail.port, "tls": "none"}
        first = {
            "kind": "twilio",
            "account": self.texts.account,
            "secret_file": "twilio.secret",
            "sender": "+15005550006",
        }
        spare = {"kind": "sns", "region": "eu-central-1", "key_id": self.spare.key_id, "secret_file": "sns.secret"}
        texts = {"first": first | {"url": self.texts.url}, "spare": spare | {"url": self.spare.url}}
        if self.sole_texts:
            del texts["spare"]
        tables = {
            "push": self.push.table,
            "email": {
                "providers": {"relay": relay},
                "senders": {"default": {"address": "news@example.com", "name": "Example"}},
            },
            "sms": {"providers": texts},
            "webhook": {"authority_file": AUTHORITY, "hosts": {RECEIVER: f"127.0.0.1:{self.hooks.port}"}},
        }
        for table in (tables["push"], tables["email"]["providers"], tables["sms"]["providers"]):
            for name, entry in table.items():
                entry.update({"per_second": self.per_second[name]} if name in self.per_second else {})
        self.file.write_text("\n".join(f"{name} = {toml(table)}" for name, table in tables.items()))


def toml(value: Any) -> str:
    """A value as TOML writes it inline."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


@contextlib.asynccontextmanager
async def simulated(folder: Path) -> AsyncIterator[Simulated]:
    """Providers at work, and their file written."""
    folder.mkdir(parents=True)
    authority, key = folder / AUTHORITY, folder / AUTHORITY_KEY
    write_certificate(authority, key, [RECEIVER])
    async with (
        PushProviders(folder) as push,
        SmtpSimulator() as mail,
        TwilioSimulator("AC" + "1" * 32, "twilio-token") as texts,
        SnsSimulator("AKIDEXAMPLE", "sns-token") as spare,
        WebhookReceiver(SECRET, tls=server_tls(authority, key)) as hooks,
    ):
        found = Simulated(push, mail, texts, spare, hooks, folder)
        found.write()
        yield found


def settings_of(nats_url: str, redis_url: str, postgres_url: str, providers: Path) -> Settings:
    return Settings(
        nats_url=Secret(nats_url),
        redis_url=Secret(redis_url),
        postgres_url=Secret(postgres_url),
        providers=str(providers),
        public_url="https://notify.example.com",
        unsubscribe_secrets=Secret(UNSUBSCRIBE_SECRET),
    )


@contextlib.asynccontextmanager
async def sending(
    settings: Settings, pool: Pool, channels: Sequence[Channel] = SENT_BY_WORKERS
) -> AsyncIterator[Broker]:
    """A worker in the test's loop, put together as the role is; its broker."""
    async with (
        connected(settings.nats_url.reveal()) as broker,
        redis_at(settings.redis_url.reveal()) as redis,
        watched_controls(broker) as controls,
        watching(broker) as cancels,
        Held() as held,
    ):
        work = await working(Parts(settings, broker, redis, pool, controls, cancels), channels, held)
        async with at_work(work, "worker"):
            yield broker


class StoresRole(RoleProcess):
    """`seamark <role>` of a role that needs all stores; options may follow the role's name."""

    def __init__(self, name: str, role: str, folder: Path, settings: Settings) -> None:
        super().__init__(name, folder, settings.nats_url.reveal())
        assert settings.postgres_url is not None
        self._role = role
        self._env = {
            "SEAMARK_REDIS_URL": settings.redis_url.reveal(),
            "SEAMARK_POSTGRES_URL": settings.postgres_url.reveal(),
            "SEAMARK_PROVIDERS": settings.providers or "",
        }

    def command(self) -> list[str]:
        return ["ops", *self._role.split()]

    def settings(self) -> dict[str, str]:
        return self._env


@contextlib.contextmanager
def role_processes(folder: Path, settings: Settings, *roles: str) -> Iterator[list[StoresRole]]:
    """A process of each role, at work; they are killed at the end."""
    processes = [
        StoresRole(f"{role.partition(' ')[0]}-{number}", role, folder, settings) for number, role in enumerate(roles)
    ]
    try:
        for process in processes:
            process.spawn()
        yield processes
    finally:
        for process in processes:
            process.kill()


async def reached(change: ProfileChange, user: str = USER, *, device: str = DEVICE, phone: str = PHONE) -> None:
    """Give a user an address of every channel; the endpoint is the tenant's, and made where there is none."""
    fields = UserFields(email=f"{user}@example.com", phone=phone)
    await put_user(change, user, fields)
    await register_token(change, user, "phone", NewToken(platform="apns", token=device, app="com.example.app"))


async def known(pool: Pool, *users: str, endpoint: bool = True) -> None:
    """Users in the directory who can be reached by every channel, each at addresses of his own."""
    async with Directory(pool).changing(TENANT, users) as change:
        for number, user in enumerate(users):
            device = DEVICE if user == USER else f"{number:064x}"
            phone = PHONE if user == USER else f"+436641{number:07d}"
            await reached(change, user, device=device, phone=phone)
        if endpoint:
            async with changing_in(change.connection, TENANT) as rules:
                await create_endpoint(rules, NewEndpoint(url=f"https://{RECEIVER}/hook", secret=SECRET))


def a_job(channel: Channel, id: str, **other: Any) -> Job:
    """A job of a notification whose event named its channels."""
    now = datetime.now(UTC)
    job = Job(
        id=id,
        tenant=TENANT,
        user=USER,
        type="parcel.shipped",
        channel=channel,
        first_at=now,
        stored_at=now,
        requested=True,
        category="parcels",
        data={"title": "Shipped", "text": "It is on its way"},
    )
    return replace(job, **other)


async def add(broker: Broker, *jobs: Job) -> None:
    """Put jobs into JOBS, as a planner does."""
    await broker.commit([message_of(job) for job in jobs])


async def receipts_of(broker: Broker, id: str) -> list[Receipt]:
    """What is stored about a notification's way by its channels."""
    found = [decode_receipt(one.payload) for one in await whole_stream(broker, "RECEIPTS", "rcpt.>")]
    return [one for one in found if one.id == id and one.channel]
