"""Presence and sign-out over several gateways on a real broker: nothing that could be stale, and nobody left out unsaid."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from engine.topology import server as topology
from gateway.presence.gateways import ASK, HERE
from gateway.presence.limits import ANSWER_SECONDS, GATEWAY_FORGOTTEN_SECONDS, SIGN_OUTS_OLD_SECONDS
from ops.dev.servers import NatsServer
from tests.integration.test_events_api import KEY, add_key
from tests.support.gateways import Device, TestGateway, gateway_on
from tests.support.logs import FAST, eventually
from tests.support.network import bad_network
from tests.support.tokens import bearer, token

READ, WRITE = "sk_reads", "sk_writes"


@pytest.fixture(autouse=True)
def answers_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All gateways of a test live in one process, on a machine that does more: whoever answers is not to be called silent."""
    monkeypatch.setattr("gateway.presence.gateways.ANSWER_SECONDS", 20.0)
    monkeypatch.setattr("gateway.presence.gateways.OBEY_SECONDS", 19.0)


@pytest.fixture
def answers_in_a_second(monkeypatch: pytest.MonkeyPatch, answers_are_waited_for: None) -> None:
    """As it is: whoever has not answered by then is named, on a busy machine perhaps also one that does answer."""
    monkeypatch.setattr("gateway.presence.gateways.ANSWER_SECONDS", ANSWER_SECONDS)


@asynccontextmanager
async def gateways(nats: NatsServer, postgres: str, count: int = 2, **options: Any) -> AsyncIterator[list[TestGateway]]:
    """Some gateways that know each other."""
    await add_key(postgres, KEY, ["events:write"], "default")
    await add_key(postgres, READ, ["sessions:read"], "default")
    await add_key(postgres, WRITE, ["sessions:read", "sessions:write"], "default")
    async with AsyncExitStack() as stack:
        made = []
        for number in range(count):
            gateway = gateway_on(nats, postgres_url=postgres, topology_ready=number > 0, **options)
            made.append(await stack.enter_async_context(gateway))
        await eventually(lambda: all(len(known(each)) == count for each in made))

        async def keys_known() -> bool:
            return all([(await asked(each))[0] == 200 for each in made])

        await eventually(keys_known)
        yield made


def known(gateway: TestGateway) -> set[str]:
    return gateway.context.gateways._roll.known(time.monotonic())


async def asked(
    gateway: TestGateway, path: str = "", *, method: str = "GET", user: str = "alice", key: str = READ
) -> tuple[int, dict[str, Any]]:
    """`/v1/users/<user>/sessions<path>`."""
    url = f"{gateway.url}/v1/users/{user}/sessions{path}"
    async with gateway.http.request(method, url, headers={"Authorization": f"Bearer {key}"}) as response:
        answer: dict[str, Any] = await response.json(content_type=None)
        return response.status, answer


async def ended(gateway: TestGateway, path: str = "", user: str = "alice") -> tuple[int, dict[str, Any]]:
    return await asked(gateway, path, method="DELETE", user=user, key=WRITE)


@asynccontextmanager
async def connected_device(
    gateway: TestGateway, user: str = "alice", name: str = "phone", **claims: Any
) -> AsyncIterator[Device]:
    """A device that is live, with a token of its own."""
    async with gateway.socket() as device:
        given = token(user, **{"iat": int(time.time()) - 5, **claims})
        await device.say("hello", token=given, device=name, cursor="start")
        await device.until("live")
        yield device


async def test_every_gateway_tells_of_the_devices_on_all_of_them(nats_server: NatsServer, postgres: str) -> None:
    async with (
        gateways(nats_server, postgres) as (first, second),
        connected_device(first, name="phone"),
        connected_device(second, name="laptop"),
        connected_device(second, "bob", name="tablet"),
    ):
        for gateway in (first, second):
            status, found = await asked(gateway)
            assert status == 200
            assert {each["device"]: each["gateway"] for each in found["sessions"]} == {
                "phone": first.context.gateways.id,
                "laptop": second.context.gateways.id,
            }
            assert all(each["carrier"] == "ws" and each["silent_seconds"] < 60 for each in found["sessions"])
            assert found["silent"] == []
        assert [each["device"] for each in (await asked(first, user="bob"))[1]["sessions"]] == ["tablet"]
        assert (await asked(first, user="nobody"))[1]["sessions"] == []


async def test_a_session_that_is_over_is_not_told_of(nats_server: NatsServer, postgres: str) -> None:
    async with gateways(nats_server, postgres) as (first, second):
        async with connected_device(second):
            assert len((await asked(first))[1]["sessions"]) == 1

        async def none() -> bool:
            return not (await asked(first))[1]["sessions"]

        await eventually(none)


@pytest.mark.usefixtures("answers_in_a_second")
async def test_a_gateway_that_does_not_answer_is_named_and_one_that_leaves_is_forgotten(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateways(nats_server, postgres, 1) as (first,):
        async with gateway_on(nats_server, topology_ready=True) as second:
            await eventually(lambda: len(known(first)) == 2)
            name = second.context.gateways.id
            # A frozen process: it is connected, and does nothing.
            for subscription in second.context.gateways._subscriptions:
                subscription.unsubscribe()
            await second.context.broker.flush()
            _, found = await asked(first)
            assert name in found["silent"]
            assert found["complete"] is False
        await eventually(lambda: name not in known(first))
        monkeypatch.setattr("gateway.presence.gateways.ANSWER_SECONDS", 20.0)
        assert (await asked(first))[1]["silent"] == []


async def test_whether_all_were_asked_is_known_only_after_having_listened_for_long_enough(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def complete() -> bool:
        return bool((await asked(first))[1]["complete"])

    async with gateways(nats_server, postgres) as (first, _):
        roll = first.context.gateways._roll
        assert not await complete(), "it has just started"
        roll.deaf(time.monotonic() - GATEWAY_FORGOTTEN_SECONDS - 1)
        assert await complete()
        roll.deaf(time.monotonic())
        assert not await complete()
        monkeypatch.setattr("gateway.presence.roll.GATEWAY_FORGOTTEN_SECONDS", 1.0)
        await eventually(complete)


async def test_one_session_is_ended_and_its_device_may_come_back(nats_server: NatsServer, postgres: str) -> None:
    async with (
        gateways(nats_server, postgres) as (first, second),
        connected_device(second, name="phone") as phone,
        connected_device(second, name="laptop") as laptop,
    ):
        sessions = {each["device"]: each["id"] for each in (await asked(first))[1]["sessions"]}
        status, found = await ended(first, f"/{sessions['phone']}")
        assert (status, [each["device"] for each in found["sessions"]]) == (200, ["phone"])
        assert (await phone.closed())[0] == 1012
        assert phone.frames[-1]["op"] == "bye"
        await laptop.say("ping")
        await laptop.until("pong")
        assert (await ended(first, f"/{sessions['phone']}"))[0] == 404
        async with connected_device(first, name="phone"):
            pass


async def test_all_sessions_are_ended_without_signing_out(nats_server: NatsServer, postgres: str) -> None:
    async with (
        gateways(nats_server, postgres) as (first, second),
        connected_device(first, name="phone") as phone,
        connected_device(second, name="laptop") as laptop,
    ):
        _, found = await ended(first, "?sign_out=false")
        assert len(found["sessions"]) == 2
        for device in (phone, laptop):
            assert (await device.closed())[0] == 1012
        async with connected_device(second, name="phone"):
            pass


async def test_signed_out_a_user_is_refused_on_every_gateway_and_a_newer_token_is_believed(
    nats_server: NatsServer, postgres: str
) -> None:
    old = {"iat": int(time.time()) - 5}
    async with (
        gateways(nats_server, postgres, 3) as (first, second, third),
        connected_device(second, name="phone") as phone,
        connected_device(third, name="old token", iat=0) as undated,
        connected_device(third, "bob") as bob,
    ):
        status, found = await ended(first)
        assert (status, found["silent"]) == (200, [])
        assert {each["device"] for each in found["sessions"]} == {"phone", "old token"}
        for device in (phone, undated):
            code, reason = await device.closed()
            assert code == 4401
            assert reason.startswith("signed_out")
        for gateway in (first, second, third):
            url = f"{gateway.url}/v1/inbox"
            for claims in (old, {}):
                async with gateway.http.get(url, headers=bearer(**claims)) as response:
                    assert response.status == 401
            async with gateway.http.get(url, headers=bearer(iat=int(time.time()) + 1)) as response:
                assert response.status == 200
        await bob.say("ping")
        await bob.until("pong")
        async with connected_device(second, iat=int(time.time()) + 1):
            assert len((await asked(first))[1]["sessions"]) == 1


async def test_a_gateway_that_starts_later_knows_who_was_signed_out_before(
    nats_server: NatsServer, postgres: str
) -> None:
    old = bearer(iat=int(time.time()) - 5)
    async with gateways(nats_server, postgres, 1) as (first,):
        for number in range(10):
            assert (await ended(first, user=f"user-{number}"))[0] == 200
        assert (await ended(first))[0] == 200
        async with gateway_on(nats_server, topology_ready=True) as later:
            async with later.http.get(f"{later.url}/v1/records?device=tab", headers=old) as response:
                assert response.status == 401
            headers = bearer(user="user-7", iat=int(time.time()) - 5)
            async with later.http.get(f"{later.url}/v1/records?device=tab", headers=headers) as response:
                assert response.status == 401


async def test_a_gateway_without_its_bucket_says_what_to_do_and_believes_tokens_when_it_is_there(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway of this version over the topology of the one before."""
    async with gateways(nats_server, postgres, 1) as (first,):
        monkeypatch.setattr("gateway.access.sign_outs.FIRST_READ_SECONDS", 0.1)
        await first.broker.api("STREAM.DELETE.KV_signouts")
        async with gateway_on(nats_server, topology_ready=True, postgres_url=postgres) as gateway:
            async with gateway.http.get(f"{gateway.url}/readyz") as response:
                assert response.status == 503
                assert "there is no stream KV_signouts: run `seamark topology apply`" in await response.text()
            async with gateway.http.get(f"{gateway.url}/v1/inbox", headers=bearer()) as response:
                assert response.status == 503
            await topology.apply(first.broker, await topology.plan(first.broker, "dev", overrides=FAST, recreate=True))
            await eventually(lambda: gateway.context.sign_outs.known)
            assert gateway.context.sign_outs.not_ready() == []


async def test_keys_that_are_no_users_in_the_bucket_end_nobody(nats_server: NatsServer, postgres: str) -> None:
    async with gateways(nats_server, postgres, 1) as (gateway,):
        for key in ("default", "default.alice.x", "default.=", "=.="):
            await gateway.broker.append(f"$KV.signouts.{key}", b'{"until":9e9}')
        status, _ = await ended(gateway, user="bob")
        assert status == 200
        async with gateway.http.get(f"{gateway.url}/v1/inbox", headers=bearer()) as response:
            assert response.status == 200


async def test_a_user_who_is_remembered_can_be_signed_out_again_though_no_more_users_can(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.api.sessions.SIGN_OUTS_PER_TENANT", 1)
    async with gateways(nats_server, postgres, 1) as (gateway,):
        assert (await ended(gateway))[0] == 200
        assert (await ended(gateway, user="bob"))[0] == 429
        assert (await ended(gateway))[0] == 200


async def test_a_sign_out_is_never_taken_back_by_an_older_one(nats_server: NatsServer, postgres: str) -> None:
    now = int(time.time())
    async with gateways(nats_server, postgres, 1) as (gateway,):
        assert (await ended(gateway))[0] == 200
        assert (await ended(gateway, f"?issued_until={now - 1000}"))[0] == 200
        async with gateway.http.get(f"{gateway.url}/v1/inbox", headers=bearer(iat=now - 5)) as response:
            assert response.status == 401
        status, problem = await ended(gateway, f"?issued_until={now + 1000}")
        assert (status, problem["field"]) == (400, "issued_until")


@pytest.mark.usefixtures("answers_in_a_second")
async def test_a_cut_off_gateway_believes_no_token_and_obeys_what_it_missed_when_it_is_back(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = bearer(iat=int(time.time()) - 5), bearer(iat=int(time.time()) + 20)
    async with gateways(nats_server, postgres, 1) as (first,), bad_network(nats_server.port) as way:
        behind: Any = SimpleNamespace(url=f"nats://127.0.0.1:{way.port}")
        async with gateway_on(behind, topology_ready=True, postgres_url=postgres) as far:
            await eventually(lambda: len(known(first)) == 2)
            async with connected_device(far) as phone:
                way.blackhole()
                _, found = await ended(first)
                assert far.context.gateways.id in found["silent"]
                assert found["complete"] is False
                monkeypatch.setattr("gateway.access.sign_outs.SIGN_OUTS_OLD_SECONDS", 1.5)
                await eventually(lambda: not far.context.sign_outs.known)
                for headers in (old, new):
                    async with far.http.get(f"{far.url}/v1/inbox", headers=headers) as response:
                        assert response.status == 503
                async with far.http.get(f"{far.url}/readyz") as response:
                    assert "signed out" in (await response.text())
                monkeypatch.setattr("gateway.access.sign_outs.SIGN_OUTS_OLD_SECONDS", SIGN_OUTS_OLD_SECONDS)
                way.restore()
                assert (await phone.closed(30))[0] == 4401
                await eventually(lambda: far.context.sign_outs.known)
                async with far.http.get(f"{far.url}/v1/inbox", headers=old) as response:
                    assert response.status == 401


async def test_a_gateway_that_is_cut_off_for_long_sends_its_devices_elsewhere(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.presence.gateways.BEAT_SECONDS", 0.2)
    async with gateways(nats_server, postgres, 1) as (gateway,), connected_device(gateway) as phone:
        nats_server.kill()
        monkeypatch.setattr("gateway.presence.gateways.ALONE_SECONDS", 1.0)
        assert (await phone.closed())[0] == 1012
        assert phone.frames[-1]["op"] == "bye"
        nats_server.start()
        await eventually(lambda: gateway.context.broker.connected and gateway.broker.connected)


async def test_a_token_older_than_what_is_remembered_is_not_believed(nats_server: NatsServer, postgres: str) -> None:
    async with gateways(nats_server, postgres, 1) as (gateway,):
        for days, status in ((30, 200), (32, 401)):
            headers = bearer(iat=int(time.time()) - days * 86_400)
            async with gateway.http.get(f"{gateway.url}/v1/inbox", headers=headers) as response:
                assert response.status == status


async def test_a_service_sees_and_ends_sessions_of_its_own_tenant_only_and_as_its_scopes_allow(
    nats_server: NatsServer, postgres: str
) -> None:
    await add_key(postgres, "globex's", ["sessions:read", "sessions:write"], "globex")
    async with gateways(nats_server, postgres, 1) as (gateway,), connected_device(gateway) as phone:
        assert (await asked(gateway, key="globex's"))[1]["sessions"] == []
        assert (await asked(gateway, "?tenant=default", key="globex's"))[0] == 403
        assert (await asked(gateway, method="DELETE", key="globex's"))[1]["sessions"] == []
        assert (await asked(gateway, key=KEY))[0] == 403
        assert (await asked(gateway, method="DELETE", key=READ))[0] == 403
        assert (await asked(gateway, key=token()))[0] == 401
        await phone.say("ping")
        await phone.until("pong")


async def test_a_tenant_that_asks_without_end_is_slowed_down(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.context.QUESTIONS_PER_MINUTE", 20)
    async with gateways(nats_server, postgres, 1) as (gateway,):
        statuses = [(await asked(gateway))[0]]
        while statuses[-1] == 200:
            assert len(statuses) < 60, "more than comes back meanwhile, however slow the machine is"
            statuses.append((await asked(gateway))[0])
        assert statuses[0] == 200
        assert statuses[-1] == 429


@pytest.mark.usefixtures("answers_in_a_second")  # one of them passes for a gateway, which does not answer
async def test_what_is_no_question_or_answer_harms_nobody(nats_server: NatsServer, postgres: str) -> None:
    async with gateways(nats_server, postgres) as (first, _):
        for subject in (ASK, f"{HERE}.x", f"gateways.answer.{first.context.gateways.id}"):
            for payload in (b"", b"{", b'{"id":7}', b"\xff"):
                first.broker.publish(subject, payload)
        await first.broker.flush()
        await asyncio.sleep(0.1)
        assert (await asked(first))[0] == 200
