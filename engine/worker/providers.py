"""The providers' file: who sends what, in one TOML that SEAMARK_PROVIDERS names. It is read anew when it, or a secret, changes.

    [push.apple]            engine.channels.push.settings
    [email.providers.own]   engine.channels.email.settings
    [sms.providers.first]   engine.channels.sms.settings
    [webhook]               engine.channels.webhook.settings

A channel without a table is not served. Only webhooks need none: a worker of that channel uses the defaults then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import structlog

from engine.channels.channel import Channel
from engine.channels.email.settings import DomainSettings, email_channels, email_settings
from engine.channels.files import VARIABLE, ProvidersToml, watch
from engine.channels.push.channel import PushChannel
from engine.channels.push.settings import push_senders, push_settings
from engine.channels.sms.settings import sms_channels, sms_settings
from engine.channels.webhook.channel import PROVIDER as WEBHOOK
from engine.channels.webhook.settings import webhook_channel, webhook_settings
from engine.errors import InvalidSetting
from engine.jobs.bucket import Limit
from engine.plan import rules
from engine.tasks import Tasks

_log = structlog.get_logger("seamark.worker")

CLOSE_SECONDS: Final = 60.0
"""How long what was replaced still serves the sends that have begun with it: longer than any of them lasts."""

SENT_BY_WORKERS: Final[tuple[rules.Channel, ...]] = ("push", "email", "sms", "webhook")
"""The channels that workers send by; the app is none of them."""

_ELSEWHERE: Final = frozenset({"callbacks"})
"""Tables that gateways read."""

assert set(SENT_BY_WORKERS) < set(get_args(rules.Channel))


class Provider(NamedTuple):
    """A provider as a desk uses it.

    Args:
        name: in the file; outcomes, receipts, controls and metrics call it so.
        channel: sends to it, and to nobody else.
        limit: what its contract allows; None: it is not known.
        platform, apps: of push: which tokens it is for; no apps: all that nobody else is for.
        reading: which reading of the file it is of.
        channel_name: which channel that is; providers of two channels may have the same name.
        domains: of e-mail: how much domains of recipients get.
    """

    name: str
    channel: Channel[Any, Any]
    limit: Limit | None = None
    platform: str = ""
    apps: frozenset[str] = frozenset()
    reading: int = 0
    channel_name: str = ""
    domains: Mapping[str, DomainSettings] | None = None


class ProvidersFile:
    """The file, parsed. What is wrong in it is said before anything is sent.

    Raises:
        InvalidSetting: it cannot be read, or says something that is not understood. The message names the member and the remedy.
    """

    def __init__(self, path: Path) -> None:
        toml = ProvidersToml(path)
        self.path, self.changed = path, toml.changed
        self._tables = _known(path, toml.tables)
        self._push = push_settings(self._tables.get("push", {}))
        self._email = email_settings(self._tables["email"]) if "email" in self._tables else None
        self._sms = sms_settings(self._tables["sms"]) if "sms" in self._tables else None
        self._webhook = webhook_settings(self._tables.get("webhook", {}))

    @property
    def named(self) -> tuple[rules.Channel, ...]:
        """The channels that it has a table of."""
        return tuple(channel for channel in SENT_BY_WORKERS if channel in self._tables)

    def providers(self, channel: rules.Channel) -> list[Provider]:
        """Those of a channel, in the order in which they are asked. They belong to the event loop that runs.

        Raises:
            InvalidSetting: a file that it names cannot be read, or there is no table of the channel.
        """
        folder = self.path.parent
        match channel:
            case "push" if self._push:
                senders = push_senders(self._push, folder)
                return [
                    Provider(one.name, PushChannel(one), limit_of(self._push[one.name]), one.platform, one.apps)
                    for one in senders
                ]
            case "email" if self._email is not None:
                mails, domains = email_channels(self._email, folder), self._email.domains
                return [
                    Provider(name, mails[name], limit_of(entry), domains=domains)
                    for name, entry in self._email.providers.items()
                ]
            case "sms" if self._sms is not None:
                texts = sms_channels(self._sms, folder)
                return [Provider(name, texts[name], limit_of(entry)) for name, entry in self._sms.providers.items()]
            case "webhook":
                return [Provider(WEBHOOK, webhook_channel(self._webhook, folder))]
        raise InvalidSetting(f"{self.path}: there is no table [{channel}]: write one, or run no worker of this channel")


def read_providers(setting: str | None) -> ProvidersFile:
    """The providers' file.

    Args:
        setting: `Settings.providers`.

    Raises:
        InvalidSetting: as `ProvidersFile`, or it is not set.
    """
    if setting is None:
        raise InvalidSetting(f"{VARIABLE} is not set: name the file that says who sends what (docs/worker.md)")
    return ProvidersFile(Path(setting))


class Providers:
    """The providers of some channels, as the file has them now.

    Args:
        channels: those that are served.
        forget: told of a reading of the file that nothing is sent by any more.

    Raises:
        InvalidSetting: as `ProvidersFile`.
    """

    def __init__(
        self, file: ProvidersFile, channels: Sequence[rules.Channel], forget: Callable[[int], Awaitable[None]]
    ) -> None:
        self._file, self._channels, self._forget = file, tuple(channels), forget
        self._reading = 0
        self._now = self._read(file)
        self._replaced: list[Mapping[rules.Channel, Sequence[Provider]]] = []
        self._closing = Tasks()

    def of(self, channel: rules.Channel) -> tuple[Provider, ...]:
        """Those of a channel. The same tuple until the file has changed."""
        return self._now[channel]

    def _read(self, file: ProvidersFile) -> dict[rules.Channel, tuple[Provider, ...]]:
        found = {channel: file.providers(channel) for channel in self._channels}
        self._reading += 1  # counted only once everything could be read
        return {
            channel: tuple(one._replace(reading=self._reading, channel_name=channel) for one in several)
            for channel, several in found.items()
        }

    async def watch(self) -> None:
        """Read the files anew when they change, until cancelled. What cannot be read is said, and what was before goes on."""
        await watch(self._file.changed, self._read_anew)

    def _read_anew(self) -> Callable[[], bool]:
        file = ProvidersFile(self._file.path)
        before, self._now = self._now, self._read(file)
        self._file = file
        self._replaced.append(before)
        self._closing.begin(self._close_later(before, self._reading - 1), "providers-close")
        return file.changed

    async def _close_later(self, providers: Mapping[rules.Channel, Sequence[Provider]], reading: int) -> None:
        await asyncio.sleep(CLOSE_SECONDS)
        await _close(providers)
        self._replaced.remove(providers)
        await self._forget(reading)

    async def close(self) -> None:
        """Close all connections."""
        await self._closing.end()
        # Not in a `finally` of the tasks: one that is cancelled before its first turn runs nothing, and would close nothing.
        for providers in (*self._replaced, self._now):
            await _close(providers)


async def _close(providers: Mapping[rules.Channel, Sequence[Provider]]) -> None:
    closing = [one.channel.close() for several in providers.values() for one in several]
    for error in await asyncio.gather(*closing, return_exceptions=True):
        if isinstance(error, Exception):
            _log.warning("provider_not_closed", error=type(error).__name__)


def _known(path: Path, tables: dict[str, Any]) -> dict[str, Any]:
    """These tables; InvalidSetting where one is none that we know."""
    known = {*SENT_BY_WORKERS, *_ELSEWHERE}
    if unknown := sorted(tables.keys() - known):
        raise InvalidSetting(f"{path}: there is no table [{unknown[0]}]; known are {', '.join(sorted(known))}")
    if wrong := [name for name, table in tables.items() if not isinstance(table, dict)]:
        raise InvalidSetting(f"{path}: {wrong[0]} must be a table: write [{wrong[0]}]")
    return tables


def limit_of(entry: Any) -> Limit | None:
    """The limit that an entry of the file says; None: it says none."""
    return Limit(entry.per_second, entry.burst) if entry.per_second else None
