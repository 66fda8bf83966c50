"""What a mail shows: Markdown becomes HTML that can do no harm, and a text that says the same.

Whatever an author or a value has put in, the HTML has no script, no style sheet, no form, no picture from elsewhere that loads
by a rule of CSS, and links to https and mailto only. It is sanitised last, behind everything that could have made it unsafe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

NESTING_MAX: Final = 20
"""Of lists and quotes; the parser recurses."""

MARKDOWN_CHARS_MAX: Final = 64 << 10
"""Of a body, behind its template: a list of hundreds. What is written to be slow takes the parser 10 s for each megabyte."""

LINE_CHARS_MAX: Final = 300
"""A link's address in a text that is longer stands on a line of its own."""

_markdown: Final = MarkdownIt("commonmark", {"html": False, "maxNesting": NESTING_MAX}).enable("table")

_TAGS: Final = {
    "a", "b", "blockquote", "br", "caption", "center", "code", "col", "colgroup", "del", "div", "em", "h1", "h2", "h3",
    "h4", "h5", "h6", "hr", "i", "img", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "sup", "table",
    "tbody", "td", "tfoot", "th", "thead", "tr", "u", "ul",
}  # fmt: skip

_BOX: Final = {
    "align", "bgcolor", "border", "cellpadding", "cellspacing", "class", "dir", "height", "lang", "role", "style",
    "valign", "width",
}  # fmt: skip
_ATTRIBUTES: Final = {
    "*": _BOX,
    "a": {"href", "title"},
    "img": {"src", "alt", "title"},
    "ol": {"start"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
}

_STYLES: Final = {
    "background-color", "border", "border-bottom", "border-collapse", "border-left", "border-radius", "border-right",
    "border-top", "color", "display", "font-family", "font-size", "font-style", "font-weight", "height", "letter-spacing",
    "line-height", "margin", "margin-bottom", "margin-left", "margin-right", "margin-top", "max-width", "min-width",
    "padding", "padding-bottom", "padding-left", "padding-right", "padding-top", "text-align", "text-decoration",
    "text-transform", "vertical-align", "white-space", "width", "word-break",
}  # fmt: skip
"""None of them takes an address in a form that programs load; `background` and `list-style` would. `position` could cover what
is not ours."""

_SCHEMES: Final = {"https", "mailto"}

_ACTIVE_STYLE: Final = re.compile(r"[\\@<]|(?<!rgb)(?<!rgba)(?<!hsl)(?<!hsla)\(", re.IGNORECASE)
"""Functions that load or compute (`url(…)`, `expression(…)`), escapes that could hide them, rules; colours are functions, too."""

_BLANK_LINES: Final = re.compile(r"\n{3,}")


def html_and_text(markdown: str) -> tuple[str, str]:
    """Markdown (CommonMark with tables) as HTML that is safe to show, and as it is read without a program for it.

    What looks like HTML in it stays text. In the text there are no marks, lists have dashes, links their addresses behind them.
    """
    tokens = _markdown.parse(markdown)
    text = _BLANK_LINES.sub("\n\n", _blocks(tokens)).strip() + "\n"
    return sanitized(_markdown.renderer.render(tokens, _markdown.options, {})), text


def sanitized(html: str) -> str:
    """HTML without anything that acts, or leads anywhere but to https and mailto. Pictures over https load from elsewhere."""
    return nh3.clean(
        html,
        tags=_TAGS,
        clean_content_tags={"script", "style", "title"},
        attribute_filter=_attribute,
        attributes=_ATTRIBUTES,
        url_schemes=_SCHEMES,
        filter_style_properties=_STYLES,
        link_rel="noopener noreferrer",
        strip_comments=True,
    )


def _attribute(tag: str, name: str, value: str) -> str | None:
    """Whether an attribute stays. What is relative in a page leads nowhere in a mail, or with `//` anywhere."""
    if name == "style":
        return None if _ACTIVE_STYLE.search(value) else value
    if name == "href":
        return value if value.startswith(("https://", "mailto:")) else None
    if name == "src":
        return value if value.startswith("https://") else None
    return value


def _blocks(tokens: Sequence[Token]) -> str:
    lists: list[int | None] = []
    """Of each list that is open: its next number, or None for a dash."""
    written: list[str] = []
    cells = 0
    for token in tokens:
        match token.type:
            case "bullet_list_open":
                lists.append(None)
            case "ordered_list_open":
                lists.append(int(token.attrs.get("start", 1)))
            case "bullet_list_close" | "ordered_list_close":
                lists.pop()
                written.append("" if lists else "\n")
            case "list_item_open":
                number = lists[-1]
                written.append(f"{'  ' * (len(lists) - 1)}{'-' if number is None else f'{number}.'} ")
                lists[-1] = None if number is None else number + 1
            case "inline":
                written.append(_inline(token.children or []))
            case "paragraph_close" | "heading_close":
                written.append("\n" if lists else "\n\n")
            case "fence" | "code_block":
                written.append(f"{token.content}\n")
            case "hr":
                written.append("---\n\n")
            case "tr_open":
                cells = 0
            case "th_open" | "td_open":
                written.append(" | " if cells else "")
                cells += 1
            case "tr_close":
                written.append("\n")
            case "table_close":
                written.append("\n")
            case _:
                pass
    return "".join(written)


def _inline(tokens: Sequence[Token]) -> str:
    written: list[str] = []
    links: list[tuple[str, int]] = []
    """Where the links that are open lead, and where their texts begin in `written`."""
    for token in tokens:
        match token.type:
            case "text" | "code_inline" | "text_special":
                written.append(token.content)
            case "softbreak" | "hardbreak":
                written.append("\n")
            case "image":
                written.append(token.content)
            case "link_open":
                links.append((str(token.attrs.get("href", "")), len(written)))
            case "link_close":
                address, begin = links.pop()
                if "".join(written[begin:]).strip() not in (address, address.removeprefix("mailto:")):
                    written.append(f" ({address})" if len(address) <= LINE_CHARS_MAX else f"\n{address}\n")
            case _:
                pass
    return "".join(written)
