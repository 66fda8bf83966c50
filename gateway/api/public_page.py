"""Pages for people who come by a link in a mail: plain HTML that works without scripts, in the colours of the other pages.

The token in the address is all that opens them, so it goes nowhere else: no referrer, nothing loaded, nothing kept.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from aiohttp import web

_STYLE: Final = """
:root {
  color-scheme: light dark;
  --ground: #f3f6f7; --paper: #ffffff; --ink: #12262b; --soft: #52686e; --line: #dbe4e6;
  --sea: #0b6e75; --sea-ink: #ffffff; --tint: #e4f1f1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0c1518; --paper: #131f23; --ink: #e3eef0; --soft: #97adb3; --line: #24353a;
    --sea: #4fc3c8; --sea-ink: #06272a; --tint: #16302f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 38rem; margin: clamp(1rem, 6vh, 4rem) auto; padding: 1.4rem clamp(1rem, 5vw, 2rem) 1.8rem;
  background: var(--paper); border: 1px solid var(--line); border-radius: 14px; }
h1 { font-size: 1.3rem; letter-spacing: -.015em; margin: 0 0 .6rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
p.soft, td.soft { color: var(--soft); }
p.notice { background: var(--tint); border-radius: 8px; padding: .5rem .8rem; }
a { color: var(--sea); }
:focus-visible { outline: 2px solid var(--sea); outline-offset: 2px; border-radius: 6px; }
button { font: inherit; font-weight: 600; background: var(--sea); color: var(--sea-ink); border: 1px solid var(--sea);
  border-radius: 8px; padding: .45rem .9rem; margin-top: .8rem; cursor: pointer; }
table { border-collapse: collapse; width: 100%; margin-top: .8rem; }
th, td { text-align: left; padding: .5rem .6rem .5rem 0; border-bottom: 1px solid var(--line); font-weight: 400;
  overflow-wrap: anywhere; }
thead th { font-size: .85rem; font-weight: 600; color: var(--soft); }
th + th, td { text-align: center; width: 5.5rem; }
td label { display: block; padding: .2rem; }
input[type="checkbox"] { width: 1.1rem; height: 1.1rem; accent-color: var(--sea); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>{title}</title><style>{style}</style></head>
<body><main>
{content}
</main></body></html>
"""

HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
}


def public_page(title: str, content: str) -> web.Response:
    """A page. `content` is HTML: whatever in it comes from elsewhere is escaped by the caller."""
    return web.Response(
        text=_PAGE.format(title=title, style=_STYLE, content=content), content_type="text/html", headers=HEADERS
    )
