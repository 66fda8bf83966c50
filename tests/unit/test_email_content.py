"""What a mail shows cannot act, however its author or a value tries; and its text says the same as its HTML."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.email.content import html_and_text, sanitized


class Seen(HTMLParser):
    """What a mail program would find."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def assert_harmless(html: str) -> None:
    seen = Seen()
    seen.feed(html)
    assert not seen.tags & {
        "script",
        "style",
        "iframe",
        "object",
        "embed",
        "form",
        "input",
        "meta",
        "base",
        "link",
        "svg",
        "math",
        "title",
        "button",
    }
    for name, value in seen.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src"):
            assert value.startswith(("https://", "mailto:")), value
        if name == "style":
            assert not {"url", "expression", "@import", "\\"} & set(value.lower().replace("(", " ").split()), value
            assert "url(" not in value.lower()
        assert name not in ("srcset", "background", "formaction", "action", "srcdoc", "data", "id", "name"), name


HOSTILE = [
    "<script>alert(1)</script>", "<ScRiPt src=//evil>", "<img src=x onerror=alert(1)>",
    "<img src=https://a.example/x onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>", "<a href='java\nscript:alert(1)'>x</a>", "<a href=' javascript:alert(1)'>x</a>",
    "<a href='data:text/html;base64,AAAA'>x</a>", "<a href='vbscript:x'>x</a>", "<a href='//evil.example'>x</a>",
    "<a href='/x'>x</a>",
    "<a href='http://plain.example'>x</a>", "<svg onload=alert(1)>", "<svg><script>alert(1)</script></svg>",
    "<iframe src=https://evil>",
    "<object data=x>", "<embed src=x>", "<form action=https://evil><input name=password><button>",
    "<meta http-equiv=refresh content=0>",
    "<base href=https://evil>", "<link rel=stylesheet href=https://evil>", "<style>*{background:url(https://evil)}</style>",
    "<p style='background:url(https://evil)'>", "<p style='background-color:url(https://evil)'>",
    "<p style='color:expression(alert(1))'>",
    "<p style='color:\\75rl(https://evil)'>", "<p style='position:fixed;top:0'>", "<p style='@import \"https://evil\"'>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">', "<img srcset='https://evil 1x'>",
    "<table background=https://evil>",
    "<!--[if mso]><script>alert(1)</script><![endif]-->", "<title>gone</title>", "<img src='cid:x'>", "<p id=x name=y>",
    "<a target=_top href=x>",
]  # fmt: skip


@pytest.mark.parametrize("html", HOSTILE)
def test_html_is_disarmed(html: str) -> None:
    assert_harmless(sanitized(html))
    assert_harmless(html_and_text(html)[0])
    assert_harmless(html_and_text(f"- {html}\n\n# {html}")[0])


@given(
    st.lists(
        st.sampled_from([*HOSTILE, "<", ">", '"', "'", "<p ", "style=", "href=", "--", "&#x6a;", "\x00", "a"]),
        max_size=8,
    ).map("".join)
)
def test_pieces_put_together_are_disarmed_as_well(html: str) -> None:
    once = sanitized(html)
    assert_harmless(once)
    # A second time it may become another text: where an element between two paragraphs is gone, one ends the other.
    assert_harmless(sanitized(once))


def test_what_makes_a_mail_look_good_stays() -> None:
    html = (
        '<table width="600" style="color:rgb(1, 2, 3);padding:4px"><tbody><tr><td align="center" style="font-size:12px">'
        '<a href="https://example.com/?a=1&amp;b=2" style="color:#fff" rel="noopener noreferrer">go</a>'
        '<img src="https://example.com/x.png" alt="x" width="10"></td></tr></tbody></table>'
    )
    assert sanitized(html) == html


MARKDOWN = """# Shipped

Your *parcel* is on its **way**: [follow it](https://example.com/p/17?a=1&b=2), or write to <help@example.com>.

- one
- two
  1. first
  2. second

> quoted

| what | when |
|------|------|
| box  | today |

    as it is

![a map](https://example.com/map.png)
"""


def test_text_and_html_say_the_same() -> None:
    html, text = html_and_text(MARKDOWN)
    assert text == (
        "Shipped\n\nYour parcel is on its way: follow it (https://example.com/p/17?a=1&b=2), or write to help@example.com.\n\n"
        "- one\n- two\n  1. first\n  2. second\n\nquoted\n\nwhat | when\nbox | today\n\nas it is\n\na map\n"
    )
    for said in ("<h1>Shipped</h1>", "<em>parcel</em>", "<li>second</li>", "<td>today</td>", 'alt="a map"'):
        assert said in html


@given(st.text(st.sampled_from(list("#*->[]()`|_1.! \nab&<\\:/")), max_size=120))
def test_any_markdown_has_a_text_and_harmless_html(markdown: str) -> None:
    html, text = html_and_text(markdown)
    assert_harmless(html)
    assert text.endswith("\n")
