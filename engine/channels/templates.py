"""Templates of tenants, rendered: a small part of Jinja that shows values and can do nothing else.

A template's author is somebody else's employee, and its values may come from anybody. So a template is checked as a syntax tree
against a list of what it may hold: no calls, no attributes of objects, no assignments, no arithmetic that makes long things of
short ones. What remains ends by itself and grows no further than its template and its values do, so no process of its own has
to guard it. Rounds of loops, looks at values and what is written are counted, and have an end.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Literal

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError, meta, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from engine.channels import template_steps as steps
from engine.channels.template_filters import FILTERS_ALLOWED, TESTS_ALLOWED, check_given, text_of
from engine.channels.template_steps import LOOP_ROUNDS_MAX, TemplateFailed

__all__ = [
    "LOOP_ROUNDS_MAX",
    "OUTPUT_CHARS_MAX",
    "TAGS_MAX",
    "TAG_CHARS_MAX",
    "TemplateFailed",
    "check",
    "render",
    "value_names",
]

OUTPUT_CHARS_MAX: Final = 200 << 10
"""Twice the largest template, and twice what mail programs show."""

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

_NODES: Final = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Name, nodes.Const, nodes.Getattr,
                 nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Keyword, nodes.Test, nodes.Compare, nodes.Operand, nodes.And,
                 nodes.Or,
                 nodes.Not, nodes.CondExpr, nodes.Sub, nodes.Neg)  # fmt: skip

_LOOP: Final = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length"})

_MARKDOWN: Final = str.maketrans({mark: f"\\{mark}" for mark in r"""\`*_{}[]()<>#+-.!|~&"':="""} | {"\r": ""})
"""CommonMark lets every punctuation character be itself behind a backslash."""

_MARKDOWN_CHARS_A_STEP: Final = 16
"""Of a value that is escaped."""


class _Missing(StrictUndefined):
    """What is not given may be asked for (`if`, `or`), and not shown."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False


class _Generator(CodeGenerator):
    """Has comparisons and slices done by functions that count: Jinja writes them as operators of Python's."""

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        """Each operand is computed once, and only if those before it compare: `a < b < c`."""
        left: nodes.Expr | str = node.expr
        self.write("(")
        for operand in node.ops:
            last = operand is node.ops[-1]
            self.write(f"environment.compared({operand.op!r}, ")
            self.write(left) if isinstance(left, str) else self.visit(left, frame)
            left = self.temporary_identifier()
            self.write(", " if last else f", ({left} := ")
            self.visit(operand.expr, frame)
            self.write(")" if last else ")) and ")
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        self.write("environment.getitem(")
        self.visit(node.node, frame)
        self.write(", ")
        self.visit(node.arg, frame)
        self.write(")")

    def visit_Slice(self, node: nodes.Slice, frame: Frame) -> None:  # noqa: N802
        self.write("slice(")
        for bound in (node.start, node.stop, node.step):
            self.write("None") if bound is None else self.visit(bound, frame)
            self.write(", ")
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """Values are JSON: what stands behind a dot is a member of an object, never an attribute of Python's."""

    code_generator_class = _Generator
    compared = staticmethod(steps.compared)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, LoopContext) and attribute in _LOOP:
            return getattr(obj, attribute)
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Undefined):
            raise TemplateFailed("a member of a value that is not given")
        if isinstance(argument, slice):
            return steps.sliced(obj, argument)
        steps.take_for(argument)  # an object's member is found by going through its name
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
        escape: the language that `text` is written in, which says how values are escaped.
        chars_max: of what it may write.

    Raises:
        TemplateFailed: it holds something else, names a value that is not given, or writes too much.
    """
    compiled, chars = _compiled(text, escape), 0
    steps.begin()
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


def value_names(text: str) -> set[str]:
    """The names that a text asks to be given: those of its values, without what its loops name. `check` must have passed it."""
    return meta.find_undeclared_variables(_environment("none").parse(text))


@lru_cache(CACHE_TEMPLATES)
def _compiled(text: str, escape: Escape) -> Any:
    environment = _environment(escape)
    try:
        _check_lengths(environment, text)
        tree = environment.parse(text)
        _check(tree, 0)
        # Each loop counts its rounds: `for x in y` becomes `for x in y | counted(nodes inside)`. No author can write that filter:
        # `_check` has passed by then.
        for loop in tree.find_all(nodes.For):
            nodes_inside = nodes.Const(sum(_nodes_of(part) for part in (*loop.body, *loop.else_)))
            loop.iter = nodes.Filter(loop.iter, "counted", [nodes_inside], [], None, None)
        return environment.from_string(tree)
    except TemplateSyntaxError as error:
        raise TemplateFailed(f"line {error.lineno}: {error.message}") from error
    except (RecursionError, SyntaxError) as error:  # Python's own: it nests loops 20 deep
        raise TemplateFailed("it is nested too deeply") from error
    except ValueError as error:
        raise TemplateFailed("a number of it is too long") from error


def _check_lengths(environment: _Environment, text: str) -> None:
    """Refuse what the parser would take long for: by its tokens, since what ends a value may also stand in a text inside it."""
    tags = chars = 0
    for _, kind, token in environment.lex(text):
        if kind in ("variable_begin", "block_begin"):
            tags, chars = tags + 1, 0
        chars = 0 if kind == "data" else chars + len(token)
        if kind == "comment" or kind.startswith("raw"):
            chars = 0
        if tags > TAGS_MAX or chars > TAG_CHARS_MAX:
            raise TemplateFailed(
                f"more than {TAGS_MAX} values and statements, or one of more than {TAG_CHARS_MAX} characters"
            )


def _nodes_of(node: nodes.Node) -> int:
    """What is done for a node in one round of the loop that it stands in. Loops inside it count their own rounds."""
    if isinstance(node, nodes.For):
        return 1 + _nodes_of(node.iter)
    written = len(node.nodes) if isinstance(node, nodes.Output) else 0
    return 1 + steps.WRITTEN_NODES * written + sum(_nodes_of(child) for child in node.iter_child_nodes())


def _check(node: nodes.Node, depth: int) -> None:
    what = type(node).__name__.lower()
    if depth > DEPTH_MAX:
        raise TemplateFailed("it is nested too deeply")
    if not isinstance(node, _NODES):
        raise TemplateFailed(f"line {node.lineno}: templates have no {what}; they show values, and know `if` and `for`")
    if isinstance(node, nodes.For) and (node.recursive or node.test is not None):
        raise TemplateFailed(f"line {node.lineno}: a loop is neither recursive nor filtered; put an `if` into it")
    if isinstance(node, (nodes.Filter, nodes.Test)):
        known = FILTERS_ALLOWED if isinstance(node, nodes.Filter) else TESTS_ALLOWED
        if node.name not in known:
            raise TemplateFailed(f"line {node.lineno}: there is no {what} `{node.name}`; there are {', '.join(known)}")
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise TemplateFailed(f"line {node.lineno}: what the {what} `{node.name}` is given must be written out")
        if isinstance(node, nodes.Filter):
            check_given(node)
    for child in node.iter_child_nodes():
        _check(child, depth + 1)


@lru_cache
def _environment(escape: Escape) -> _Environment:
    environment = _Environment(
        autoescape=escape == "html",
        undefined=_Missing,
        finalize=_markdown if escape == "markdown" else _plain,
        keep_trailing_newline=True,
        optimized=False,
    )
    environment.globals.clear()
    environment.filters = {**FILTERS_ALLOWED, "counted": _counted}
    environment.tests = dict(TESTS_ALLOWED)
    return environment


def _counted(value: Any, nodes_inside: int) -> Any:
    if isinstance(value, _Missing):
        return []
    if not isinstance(value, list):
        raise TemplateFailed("a loop over something that is no list")
    steps.take_rounds(len(value), nodes_inside)
    return value


@pass_context  # There is no context while Jinja compiles, so it cannot compute constants then.
def _plain(_context: Context, value: Any) -> Any:
    return value if isinstance(value, Undefined) else text_of(value)


@pass_context
def _markdown(_context: Context, value: Any) -> Any:
    if isinstance(value, (Undefined, Markup)):
        return value
    text = text_of(value)
    steps.take(len(text) // _MARKDOWN_CHARS_A_STEP)  # not all of it need be written: no spaces are
    return "\n".join(line.strip() for line in text.translate(_MARKDOWN).split("\n"))


def _said(error: Exception) -> str:
    if isinstance(error, UndefinedError):
        return "it names a value that is not given; say `| default('…')`, or `if … is defined`"
    return f"{type(error).__name__} while it was rendered"
