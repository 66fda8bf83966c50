"""Pages with the JavaScript SDK, which keep what it tells them."""

from __future__ import annotations

import base64
import json
import os
import time
from typing import Any

from tests.support.chromium import Chromium, Page
from tests.support.gatewaysim import SimGateway

IN_CI = os.environ.get("SEAMARK_CI") == "1"
HELD_MS = 3_600_000
HELD = f"""{{
  const real = window.setTimeout;
  window.setTimeout = (act, ms, ...more) => {{
    if (ms === {HELD_MS}) window.fire = act;
    return real(act, ms, ...more);
  }};
}}"""
"""For a page: a timer of HELD_MS goes off when the test says `fire()`, however slow the machine is."""


def jwt(seconds: float = 600, user: str = "alice", number: int = 0) -> str:
    claims = json.dumps({"sub": user, "tenant": "t", "exp": time.time() + seconds, "n": number}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).rstrip(b'=').decode()}.s"


def minted(*tokens: tuple[str, float]) -> str:
    """A token source, counted in `got.asked`, that makes each token when asked: opening a page may take longer than one lives.

    Joining may take longer, too: each says when it was made, so that the client knows how long such a token lives.

    Args:
        tokens: user and seconds of validity of each; the last is given from then on.
    """
    return f"""token: (() => {{
      const list = {json.dumps(tokens)};
      let n = 0;
      return () => {{
        got.asked = n + 1;
        const [sub, seconds] = list[Math.min(n, list.length - 1)];
        const iat = Date.now() / 1000;
        const claims = {{ sub, tenant: "t", iat, exp: iat + seconds, n: n++ }};
        return `e30.${{btoa(JSON.stringify(claims)).replaceAll("=", "")}}.s`;
      }};
    }})()"""


def claims_of(token: str) -> dict[str, Any]:
    body = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims


async def client(browser: Chromium, gateway: SimGateway, options: str = "", *, connect: bool = True) -> Page:
    """A page with a client `s` that keeps what it is told in `got`."""
    page = await browser.open(f"{gateway.url}/")
    await page.evaluate(
        f"""(async () => {{
          const {{ Seamark }} = await import("/seamark.js");
          window.got = {{ records: [], resets: [], states: [], errors: [], unread: [], now: [] }};
          window.s = new Seamark({{
            token: {json.dumps(jwt())}, cursor: "start", device: "tab",
            times: {{ backoffFirst: 20, backoffMax: 100, ack: 20 }}, {options}
          }});
          s.addEventListener("record", (e) => got.records.push(e.detail.seq));
          s.addEventListener("reset", (e) => got.resets.push(e.detail.reason));
          s.addEventListener("state", (e) => got.states.push(e.detail.state));
          s.addEventListener("error", (e) => got.errors.push(e.detail));
          s.addEventListener("unread", (e) => got.unread.push(e.detail.count));
          s.addEventListener("now", (e) => got.now.push(e.detail.type));
          {"s.connect();" if connect else ""}
        }})()"""
    )
    return page


async def records(page: Page, expected: list[int]) -> None:
    """Wait for so many records and compare."""
    await page.until(f"got.records.length >= {len(expected)}")
    assert await page.evaluate("got.records") == expected


# --- state and position ---------------------------------------------------------------------------------------------

FRESH = "cursor: undefined, times: { backoffFirst: 20, backoffMax: 100, ack: 20 }"
