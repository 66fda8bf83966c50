"""Templates of tenants, rendered: a small part of Jinja that shows values and can do nothing else.

A template's author is somebody else's employee, and its values may come from anybody. So a template is checked as a syntax tree
against a list of what it may hold: no calls, no attributes of objects, no assignments, no arithmetic that makes long things of
short ones. What remains ends by itself and grows no further than its template and its values do, so no process of its own has
to guard it. Rounds of loops, looks at values and what is written are counted, and have an end.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any, Final, Literal

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError, meta, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

OUTPUT_CHARS_MAX: Final = 200 << 10
"""Twice the largest template, and twice what mail programs show."""

LOOP_ROUNDS_MAX: Final = 1000
"""Rounds of all loops of a rendering together: more than a mail lists."""

STEPS_MAX: Final = 100_000
"""Looks at members and filters, of long texts one for every 256 characters: a hundred in each of these rounds, some 50 ms."""

DEPTH_MAX: Final = 50
"""Nesting of a template: the parser recurses."""

TAGS_MAX: Final = 1000
"""Values and statements of one part: compiling takes 0.3 ms for each, once."""

TAG_CHARS_MAX: Final = 1000
"""One value or statement: the parser takes seconds for one as long as a template may be."""

CACHE_TEMPLATES: Final = 256
"""Compiled parts kept in a process, some 10 KB each of usual size."""

Escape = Literal["none", "html", "markdown"]
"""How values are written: as they are; so that they are no HTML; so that they are no Markdown."""

_FILTERS: Final = ("capitalize", "default", "first", "float", "int", "last", "length", "lower", "round", "title", "trim",
                   "truncate", "upper")  # fmt: skip
"""Filters that make nothing much longer than what they get. `join` is our own."""

_TESTS: Final = ("defined", "undefined", "none", "string", "number", "mapping", "sequence", "true", "false", "odd", "even",
                 "eq", "ne", "lt", "le", "gt", "ge", "in")  # fmt: skip

_NODES: Final = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Name, nodes.Const, nodes.Getattr,
                 nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Keyword, nodes.Test, nodes.Compare, nodes.Operand, nodes.And,
                 nodes.Or,
                 nodes.Not, nodes.CondExpr, nodes.Sub, nodes.Neg)  # fmt: skip

_TAG: Final = re.compile(r"\{[{%].*?(?:[}%]\}|\Z)", re.DOTALL)

_LOOP: Final = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length"})

_MARKDOWN: Final = str.maketrans({mark: f"\\{mark}" for mark in r"""\`*_{}[]()<>#+-.!|~&"':="""} | {"\r": ""})
"""CommonMark lets every punctuation character be itself behind a backslash."""


class TemplateFailed(Exception):
    """A template cannot be rendered. The message is for its author: it holds nothing of the values."""


class _Missing(StrictUndefined):
    """What is not given may be asked for (`if`, `or`), and not shown."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False


class _Spent(threading.local):
    """What is left to the rendering that goes on in this thread: the environment that looks at values belongs to all."""

    rounds = 0
    steps = 0

    def step(self, value: Any = None) -> None:
        self.steps -= 1 + (len(value) >> 8 if isinstance(value, str) else 0)
        if self.steps < 0:
            raise TemplateFailed(f"more than {STEPS_MAX} looks at values")


_spent: Final = _Spent()


class _Environment(ImmutableSandboxedEnvironment):
    """Values are JSON: what stands behind a dot is a member of an object, never an attribute of Python's."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, LoopContext) and attribute in _LOOP:
            return getattr(obj, attribute)
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _spent.step()
        if isinstance(obj, Undefined):
            raise TemplateFailed("a member of a value that is not given")
        if isinstance(obj, (dict, list, str)):
            try:
                return obj[argument]
            except (KeyError, IndexError, TypeError):
                pass
        return self.undefined(obj=obj, name=argument)

    def is_safe_callable(self, obj: Any) -> bool:
        return False


def render(text: str, values: Mapping[str, Any], *, escape: Escape = "none", chars_max: int = OUTPUT_CHARS_MAX) -> str:
    """What a part of a template says with these values.

    Args:
        text: in Jinja's syntax, of which only a part is allowed: values, `if`, `for`, some filters and tests.
        values: JSON: dicts, lists, texts, numbers, true, false, None; and Markup, which is written as it is.
        escape: what `text` is.
        chars_max: of what it may write.

    Raises:
        TemplateFailed: it holds something else, names a value that is not given, or writes too much.
    """
    compiled, chars = _compiled(text, escape), 0
    _spent.rounds, _spent.steps = LOOP_ROUNDS_MAX, STEPS_MAX
    written: list[str] = []
    try:
        for piece in compiled.generate(values):
            chars += len(piece)
            if chars > chars_max:
                raise TemplateFailed(f"more than {chars_max} characters")
            written.append(piece)
    except TemplateFailed:
        raise
    except Exception as error:
        # Whatever it is: a template is a program of somebody else, and what it divides or compares comes from a third.
        # Its text may hold a value; so it is not kept as the cause, which logs would show.
        raise TemplateFailed(_said(error)) from None
    # A lone surrogate, which JSON may hold, fits into nothing that is sent.
    return "".join(written).encode("utf-8", "replace").decode()


def check(text: str) -> None:
    """Pass a text that can be rendered, whatever its values are.

    Raises:
        TemplateFailed: with what is wrong.
    """
    _compiled(text, "none")


@lru_cache(CACHE_TEMPLATES)
def _compiled(text: str, escape: Escape) -> Any:
    environment = _environment(escape)
    tags = [len(tag[0]) for tag in _TAG.finditer(text)]
    if len(tags) > TAGS_MAX or max(tags, default=0) > TAG_CHARS_MAX:
        raise TemplateFailed(
            f"more than {TAGS_MAX} values and statements, or one of more than {TAG_CHARS_MAX} characters"
        )
    try:
        tree = environment.parse(text)
        _check(tree, 0)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        return environment.from_string(tree)
    except TemplateSyntaxError as error:
        raise TemplateFailed(f"line {error.lineno}: {error.message}") from error
    except (RecursionError, SyntaxError) as error:  # Python's own: it nests loops 20 deep
        raise TemplateFailed("it is nested too deeply") from error
    except ValueError as error:
        raise TemplateFailed("a number of it is too long") from error


def _check(node: nodes.Node, depth: int) -> None:
    what = type(node).__name__.lower()
    if depth > DEPTH_MAX:
        raise TemplateFailed("it is nested too deeply")
    if not isinstance(node, _NODES):
        raise TemplateFailed(f"line {node.lineno}: templates have no {what}; they show values, and know `if` and `for`")
    if isinstance(node, nodes.For) and (node.recursive or node.test is not None):
        raise TemplateFailed(f"line {node.lineno}: a loop is neither recursive nor filtered; put an `if` into it")
    if isinstance(node, (nodes.Filter, nodes.Test)):
        known = (*_FILTERS, "join") if isinstance(node, nodes.Filter) else _TESTS
        if node.name not in known:
            raise TemplateFailed(f"line {node.lineno}: there is no {what} `{node.name}`; there are {', '.join(known)}")
        if not isinstance(node, nodes.Test) and not all(isinstance(one, nodes.Const) for one in _given_to(node)):
            raise TemplateFailed(f"line {node.lineno}: what the filter `{node.name}` is given must be written out")
    for child in node.iter_child_nodes():
        _check(child, depth + 1)


def _given_to(node: nodes.Filter) -> list[nodes.Expr]:
    return [*node.args, *(one.value for one in node.kwargs)]


@lru_cache
def _environment(escape: Escape) -> _Environment:
    environment = _Environment(
        autoescape=escape == "html",
        undefined=_Missing,
        finalize=_markdown if escape == "markdown" else _plain,
        keep_trailing_newline=True,
    )
    environment.globals.clear()
    environment.filters = {name: _metered(environment.filters[name]) for name in _FILTERS}
    environment.filters |= {"counted": _counted, "join": _metered(_join)}
    environment.tests = {name: environment.tests[name] for name in _TESTS}
    return environment


def _metered(filter: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(filter)  # keeps the marks by which Jinja knows what else a filter wants
    def metered(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            _spent.step(value)
        return filter(*args, **kwargs)

    return metered


def _counted(value: Any) -> Any:
    if isinstance(value, _Missing):
        return []
    if not isinstance(value, list):
        raise TemplateFailed("a loop over something that is no list")
    _spent.rounds -= len(value)
    if _spent.rounds < 0:
        raise TemplateFailed(f"more than {LOOP_ROUNDS_MAX} rounds of its loops")
    return value


def _join(value: Any, between: str = "") -> str:
    """Jinja's own takes texts, too, and puts itself between their letters: some of them in a row fill any memory."""
    if not isinstance(value, list) or len(value) > LOOP_ROUNDS_MAX or len(str(between)) > 10:
        raise TemplateFailed(f"`join` takes a list of at most {LOOP_ROUNDS_MAX}, and at most 10 characters between")
    return str(between).join(_text(one) for one in value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, Undefined) else _text(value)


def _markdown(value: Any) -> Any:
    if isinstance(value, (Undefined, Markup)):
        return value
    return "\n".join(line.strip() for line in _text(value).translate(_MARKDOWN).split("\n"))


def _text(value: Any) -> str:
    """A value as people write it: what Python makes of lists and objects is for nobody's eyes."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    raise TemplateFailed("a list or an object where a text should stand: say which of its members")


def _said(error: Exception) -> str:
    if isinstance(error, UndefinedError):
        return "it names a value that is not given; say `| default('…')`, or `if … is defined`"
    return f"{type(error).__name__} while it was rendered"


def names_of(text: str) -> set[str]:
    """The names that a text asks to be given: those of its values, without what its loops name. `check` must have passed it."""
    return meta.find_undeclared_variables(_environment("none").parse(text))
