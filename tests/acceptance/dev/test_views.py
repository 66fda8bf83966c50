"""The views of the page as a newcomer finds them: preferences, campaigns, and what its key allows."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import msgspec
import pytest

from engine.plan.preferences import Preferences
from engine.profiles.preferences import merged
from tests.support.chromium import Chromium, Page
from tests.support.devstack import Stack
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(400)


def text(id: str) -> str:
    return f"document.querySelector('#{id}').textContent"


async def choose(page: Page, selector: str, value: str) -> None:
    """Choose in a list, as a person does."""
    await page.evaluate(
        f"""(() => {{
          const list = document.querySelector({json.dumps(selector)});
          list.value = {json.dumps(value)};
          if (list.value !== {json.dumps(value)}) throw new Error("there is no such choice");
          list.dispatchEvent(new Event("change", {{ bubbles: true }}));
        }})()"""
    )


def holds(line: str, channel: str) -> str:
    """What stands in the table for a channel of a type: the choice and its source; null before it is drawn."""
    return (
        "[...document.querySelectorAll('#choices tbody tr')].filter((row) => row.querySelector('th').firstChild.textContent"
        f" === {json.dumps(line)}).map((row) => row.querySelector('[data-label=\"{channel}\"] .holds'))"
        ".map((cell) => cell && `${cell.dataset.choice} ${cell.dataset.source}`)[0]"
    )


async def test_what_is_switched_off_on_the_page_holds_for_the_next_event_and_its_plan_says_so(
    shared: Stack, browser: Chromium
) -> None:
    assert shared.served("PUT", "/v1/users/dora", {"email": "dora@example.com"})[0] == 200
    page = await browser.open(f"{shared.describe().gateway_url}/?user=dora#preferences")
    await page.until(f"{holds('parcel.*', 'E-mail')} === 'on rule'")
    await page.until(f"{holds('parcel.*', 'In the app')} === 'on always'")
    await choose(page, "select[data-path='types/parcel.*/email']", "off")
    await page.until(f"{text('saved')} === 'Not saved yet'")
    await page.click("#save")
    await page.until(f"{holds('parcel.*', 'E-mail')} === 'off user_type'")
    expected = {"types": {"parcel.*": {"email": "off"}}}
    wait_for(lambda: shared.served("GET", "/v1/users/dora/preferences")[1]["document"] == expected)
    for width in (1280, 360):
        await page.size(width, 800)
        for view in ("preferences", "campaigns"):
            await page.evaluate(f"location.hash = '{view}'")
            await page.until(f"!document.querySelector('#{view}').hidden")
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (view, width)
    await page.evaluate("location.hash = 'inbox'")
    await page.fill("#type", "parcel.sent")
    await page.click("#publish button:not(.quiet)")
    await page.until("!!document.querySelector('#list details')")
    await page.evaluate("document.querySelector('#list details').open = true")
    for channel, why in (("inapp", "default"), ("email", "type_off"), ("push", "no_token")):
        await page.until(f"document.querySelector('#list li[data-channel={channel}]')?.dataset.why === '{why}'")
    assert page.errors == []


async def test_who_saves_preferences_of_an_older_version_is_told_and_keeps_what_he_chose(
    shared: Stack, browser: Chromium
) -> None:
    page = await browser.open(f"{shared.describe().gateway_url}/?user=emil#preferences")
    await page.until(f"{holds('news.*', 'E-mail')} === 'on rule'")
    await choose(page, "select[data-path='channels/push']", "off")
    await choose(page, "#quiet-mode", "own")
    status, faster = shared.served("PATCH", "/v1/users/emil/preferences", {"categories": {"news": {"email": "off"}}})
    assert status == 200
    await page.click("#save")
    await page.until("!document.querySelector('#preferences-notice').hidden")
    said = await page.evaluate(text("preferences-notice"))
    assert f"version {faster['version']}; you began with 0" in said
    assert shared.served("GET", "/v1/users/emil/preferences")[1] == faster, "nothing was saved"
    await page.until(f"{holds('news.*', 'E-mail')} === 'off user_category'")  # what was saved elsewhere is shown
    await page.click("#save")
    await page.until(f"{holds('parcel.*', 'Push')} === 'off user_channel'")
    assert shared.served("GET", "/v1/users/emil/preferences")[1]["document"] == {
        "channels": {"push": "off"},
        "categories": {"news": {"email": "off"}},
        "quiet_hours": {"windows": [{"start": "22:00", "end": "07:00"}]},
    }
    await page.until("document.querySelector('#preferences-notice').hidden")
    await page.until(f"{text('quiet-holds')}.includes('22:00 to 07:00 every day (your choice)')")
    assert page.errors == []


NIGHT = {"windows": [{"start": "22:00", "end": "07:00"}]}
DOCUMENTS: list[dict[str, Any]] = [
    {},
    {"channels": {"push": "off"}},
    {"channels": {"push": "on", "*": "off"}, "timezone": "Europe/Vienna"},
    {"categories": {"__proto__": {"email": "off"}, "constructor": {"push": "off"}}},
    {"types": {"a.b": {"push": "off"}, "a.*": {"email": "digest"}}, "quiet_hours": {}},
    {"types": {"a.b": {"email": "off"}}, "quiet_hours": NIGHT},
    {"quiet_hours": {**NIGHT, "channels": ["push"]}},
    {"quiet_hours": {"windows": [*NIGHT["windows"], {"start": "12:00", "end": "13:00", "days": ["sun"]}]}},
]


async def test_the_patch_of_the_page_makes_any_document_of_any_other(shared: Stack, browser: Chromium) -> None:
    page = await browser.open(f"{shared.describe().gateway_url}/?user=nobody")
    told = json.dumps(json.dumps(DOCUMENTS))
    made = await page.evaluate(
        f"""import("/preferences.js").then(({{ difference, merged }}) => {{
          const all = JSON.parse({told});
          const patched = (one, patch) => [patch, merged(one, patch)];
          return JSON.stringify(all.map((one) => all.map((other) => patched(one, difference(one, other)))));
        }})"""
    )
    documents = [msgspec.convert(one, Preferences) for one in DOCUMENTS]
    for before, row in zip(documents, json.loads(made), strict=True):
        for after, [patch, here] in zip(documents, row, strict=True):
            assert merged(before, patch) == after, (before, patch)
            assert msgspec.convert(here, Preferences) == after


async def test_a_campaign_started_on_the_page_reaches_its_total_and_the_inbox(shared: Stack, browser: Chromium) -> None:
    url = shared.describe().gateway_url
    assert shared.served("GET", "/v1/topics/news")[1]["members"] == 3, "there is somebody from the first minute"
    assert shared.served("PUT", "/v1/topics/crew/members", {"users": ["fay", "gil"]}) == (200, {"members": 2})
    page = await browser.open(f"{url}/?user=fay#campaigns")
    await page.until("!!document.querySelector('#campaign-audience option[value=\"topic:crew\"]')")
    await page.click("#dry-run")
    await page.until(f"{text('campaign-said')}.startsWith('Dry run: ')")
    await choose(page, "#campaign-audience", "topic:crew")
    await page.click("#dry-run")
    await page.until(f"{text('campaign-said')} === 'Dry run: 2 of 2 would get it. Nothing was sent.'")
    why = await page.evaluate("[...document.querySelectorAll('#campaign-decisions li')].map((one) => one.textContent)")
    assert why == ["In the app, of all 2: 2 now: default", "E-mail, of all 2: 2 never: no_address"]
    id = await page.evaluate("document.querySelector('#campaign-id').value")
    assert shared.served("GET", f"/v1/campaigns/{id}")[0] == 404
    await page.fill("#campaign-title", "All hands")
    await page.click("#start")
    item = f"document.querySelector('[data-id=\"{id}\"]')"
    await page.until(f"{item}?.dataset.state === 'done'")
    # All of them are on their way by now, but perhaps not there.
    await page.until(f"{item}.querySelector('.sum').textContent === '2 users = 2 in their logs'")
    bar = f"{item}.querySelector('[role=progressbar]')"
    assert await page.evaluate(f"[{bar}.ariaValueNow, {bar}.ariaValueMax]") == ["2", "2"]
    await page.until(f"[...{item}.querySelectorAll('button')].every((one) => one.hidden)")
    await page.evaluate("location.hash = 'inbox'")
    await page.until("document.querySelector('#list h3')?.textContent === 'All hands'")
    assert page.errors == []


async def test_a_campaign_is_held_up_resumed_and_ended_by_the_buttons_and_its_numbers_always_add_up(
    shared: Stack, browser: Chromium
) -> None:
    crowd = [f"h{number:03}" for number in range(400)]
    assert shared.served("PUT", "/v1/topics/crowd/members", {"users": crowd}) == (200, {"members": 400})
    page = await browser.open(f"{shared.describe().gateway_url}/?user=h000#campaigns")
    await page.until("!!document.querySelector('#campaign-audience option[value=\"topic:crowd\"]')")
    await choose(page, "#campaign-audience", "topic:crowd")
    await page.fill("#campaign-rate", "1")  # five users to a page, and five seconds between them: time to press buttons
    await page.fill("#campaign-id", "slow")
    await page.evaluate(
        """window.sums = [];
        new MutationObserver(() => {
          const sum = document.querySelector("[data-id=slow] .sum");
          if (sum && sum.textContent !== sums.at(-1)) sums.push(sum.textContent);
        }).observe(document.querySelector("#campaign-list"), { childList: true, subtree: true, characterData: true })"""
    )
    await page.click("#start")
    state = "document.querySelector('[data-id=slow]')?.dataset.state"
    await page.until("window.sums.at(-1)?.includes('in their logs')")
    for button, then in (("Pause", "paused"), ("Resume", "running"), ("Pause", "paused"), ("Cancel", "cancelled")):
        await page.click(f"[data-id=slow] [data-do={button}]")
        await page.until(f"{state} === '{then}'")
        assert shared.served("GET", "/v1/campaigns/slow/progress")[1]["state"] == then
    await page.until("!!document.querySelector('[data-id=slow] .pace').textContent.includes('over since')")
    sums = await page.evaluate("sums")
    assert "cancelled" in sums[-1]
    for said in sums:
        audience, *parts = [int(number) for number in re.findall(r"\d+", said)]
        assert audience == sum(parts), said
    assert "do not add up" not in await page.evaluate("document.body.textContent")
    assert page.errors == []


async def test_every_control_of_the_views_has_a_name(shared: Stack, browser: Chromium) -> None:
    page = await browser.open(f"{shared.describe().gateway_url}/?user=iris#preferences")
    await page.until(f"{holds('parcel.*', 'E-mail')}")
    await choose(page, "#quiet-mode", "own")
    await page.call("Accessibility.enable")
    for view, least in (("preferences", 20), ("campaigns", 8)):
        await page.evaluate(f"location.hash = '{view}'")
        await page.until(f"!document.querySelector('#{view}').hidden")
        tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        roles = ("button", "textbox", "combobox", "checkbox", "spinbutton", "link", "list", "progressbar")
        controls = [one for one in tree if one.get("role", {}).get("value") in roles and not one.get("ignored")]
        assert len(controls) >= least
        assert [one for one in controls if not one.get("name", {}).get("value")] == []


def test_the_key_of_the_page_allows_what_the_page_does_and_no_more(shared: Stack) -> None:
    described = shared.describe()
    with urllib.request.urlopen(f"{described.gateway_url}/dev/session", timeout=60) as answer:
        key = json.load(answer)["api_key"]
    assert key != described.api_key
    for path in ("/v1/topics", "/v1/campaigns"):
        assert shared.served("GET", path, key=key)[0] == 200
    for method, path, body in (
        ("GET", "/v1/users", None),
        ("PUT", "/v1/users/alice", {}),
        ("PUT", "/v1/topics/news/members", {"users": ["mallory"]}),
        ("PUT", "/v1/types/a.b", {}),
        ("DELETE", "/v1/users/alice/sessions", None),
    ):
        assert shared.served(method, path, body, key=key)[0] == 403, path
