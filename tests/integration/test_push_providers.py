"""The push providers of a development stack, reached by what the file of providers says of them."""

from pathlib import Path

from engine.channels.push.channel import PushChannel
from engine.channels.push.settings import push_senders, push_settings
from ops.dev.providers.push import PushProviders
from tests.support.pushing import DEVICE, a_message, android_device, apple_device, browser_target


async def test_a_push_to_each_kind_of_device_arrives_at_its_provider(tmp_path: Path) -> None:
    async with PushProviders(tmp_path / "providers") as providers:
        channel = PushChannel(
            push_senders(push_settings(providers.table), tmp_path / "providers"), lambda text, job, context: text
        )
        browser = providers.subscribe()
        targets = [apple_device(), apple_device(environment="sandbox"), android_device(), browser_target(browser)]
        for target in targets:
            outcome = await channel.send(a_message(), target, key=target.token, deadline_seconds=20)
            assert outcome.kind == "ok", outcome
        await channel.close()
    for simulator in (providers.production, providers.sandbox, providers.fcm, providers.webpush):
        (accepted,) = simulator.log.messages()
        assert (accepted.shown["title"], accepted.shown["body"]) == ("Shipped", "It is on its way")
    assert providers.production.log.messages()[0].to == DEVICE
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "providers").iterdir()}
    assert {name for name, mode in modes.items() if mode != 0o600} == {"authority.pem"}
