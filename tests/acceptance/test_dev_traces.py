"""`seamark dev --traces`: one notification's way through all processes, as a waterfall on a page."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chromium import Chromium
from tests.support.devstack import Stack
from tests.support.logs import eventually

pytestmark = pytest.mark.timeout(400)

ROWS = "[...document.querySelectorAll('#waterfall > li')]"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    stack.words.append("--traces")
    stack.start()
    yield stack
    if stack.process is not None and stack.process.poll() is None:
        stack.stop()


async def test_the_page_shows_the_way_of_a_notification_and_the_inbox_leads_there(
    stack: Stack, browser: Chromium
) -> None:
    inbox = await browser.open(f"{stack.describe().gateway_url}/")
    await inbox.until("document.querySelector('#state').dataset.state === 'live'")
    await asyncio.to_thread(stack.run, "publish", "--to", "alice", "--type", "demo.hello", "--id", "shown")
    await inbox.until("document.querySelector('#list details.plan') !== null")
    await inbox.evaluate("document.querySelector('#list details.plan').open = true")
    link = await inbox.until("document.querySelector('#list a.trace')?.href")

    proofs = await asyncio.to_thread(stack.run, "prove", "shown", "--json")
    proof = json.loads(proofs.splitlines()[0])
    template = stack.describe().trace_url
    assert template is not None
    assert proof["trace_url"] == link == template.replace("{trace_id}", proof["trace"])
    assert proof["trace_url"] in await asyncio.to_thread(stack.run, "prove", "shown")

    page = await browser.open(link)
    for name, service in {
        "dispatch events.{tenant}.{key}.{type}": "dispatcher",
        "append log.{partition}.{tenant}.{user}": "dispatcher",
        "plan log.{partition}.{tenant}.{user}": "planner",
        "fold log.{partition}.{tenant}.{user}": "projector",
        "deliver log.{partition}.{tenant}.{user}": "gateway",
        "ack log.{partition}.{tenant}.{user}": "gateway",
        "dispatch round events.{tenant}.{key}.{type}": "dispatcher",
    }.items():
        row = f"{ROWS}.find((row) => row.dataset.name === {json.dumps(name)} && row.dataset.service === 'seamark-{service}')"
        await page.until(f"document.querySelector('#again').click() || {row} !== undefined")
    appended = f"{ROWS}.find((row) => row.dataset.name.startsWith('append '))"
    assert await page.evaluate(f"{appended}.dataset.depth") == "1", "below the event's own span"
    overview = await browser.open(template.partition("/traces/")[0] + "/")
    await overview.until(f"[...document.querySelectorAll('#traces a')].some((one) => one.href === {json.dumps(link)})")
    await asyncio.to_thread(refuses_other_sites, template.partition("/traces/")[0])
    await eventually(lambda: "traces " in stack.output.read_text())


def refuses_other_sites(url: str) -> None:
    """A page elsewhere, by whatever name it has this machine asked, gets no trace and leaves none."""
    for path, headers in (
        ("/api/traces", {"Host": "evil.example"}),
        ("/api/traces", {"Origin": "https://evil.example"}),
        ("/v1/traces", {"Sec-Fetch-Site": "cross-site"}),
    ):
        data = b"" if path.startswith("/v1") else None
        request = urllib.request.Request(f"{url}{path}", data=data, headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code == 403
        refused.value.close()
