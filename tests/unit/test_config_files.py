"""Files say what the configuration says: what was written is read as it was, and a fault is told with its file."""

import tempfile
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.directory.configuration import Configuration, Difference, differences
from engine.directory.templates import ONE_LINE, SHAPES, TemplateKey
from engine.errors import InvalidSetting
from engine.plan.hours import DAYS, Digest, Window
from engine.plan.preferences import QuietHours, TenantDefaults
from engine.plan.rules import CHANNELS, Cap, ChannelRule, TypeRule
from ops.config_files import read_folder, toml_of, write_folder

WORD = st.text("ABCxyz019_-", min_size=1, max_size=6)
TYPES = st.lists(WORD, min_size=1, max_size=3).map(".".join)
PATTERNS = st.one_of(TYPES, TYPES.map("{}.*".format), st.just("*"))
LABELS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CLOCKS = st.tuples(st.integers(0, 23), st.integers(0, 59)).map(lambda at: f"{at[0]:02}:{at[1]:02}")
WINDOWS = st.lists(
    st.builds(
        Window, start=CLOCKS, end=CLOCKS, days=st.lists(st.sampled_from(DAYS), min_size=1, max_size=7).map(tuple)
    ),
    max_size=3,
).map(tuple)
SECONDS = st.integers(1, 86_400)
RULES = st.one_of(
    st.builds(ChannelRule, default=st.sampled_from(["on", "off"]), unless_seen_seconds=st.none() | SECONDS),
    st.builds(
        ChannelRule, digest=st.builds(Digest, at=CLOCKS), cap=st.none() | st.builds(Cap, st.integers(1, 9), SECONDS)
    ),
)
TYPE_RULES = st.builds(
    TypeRule,
    pattern=st.just("*"),
    category=st.none() | LABELS,
    channels=st.dictionaries(st.sampled_from(CHANNELS), RULES),
    priority=st.none() | st.just("critical"),
    ttl_seconds=st.none() | SECONDS,
)
CHOICES = st.dictionaries(st.sampled_from([*CHANNELS, "*"]), st.sampled_from(["on", "off", "digest"])).filter(
    lambda line: line.get("inapp") != "digest"
)
DOCUMENTS = st.builds(
    TenantDefaults,
    channels=CHOICES,
    categories=st.dictionaries(LABELS, CHOICES, max_size=3),
    types=st.dictionaries(PATTERNS, CHOICES, max_size=3),
    quiet_hours=st.none() | st.builds(QuietHours, windows=WINDOWS),
    send_windows=WINDOWS,
)
LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="{"), min_size=1, max_size=20).filter(
    str.strip
)
TEXTS = (
    st.lists(LINES | st.sampled_from(["{{ data.x }}", "", "\t "]), min_size=1, max_size=4)
    .map("\n".join)
    .filter(str.strip)
)


@st.composite
def template_parts(draw: st.DrawFn, channel: str) -> dict[str, str]:
    form = SHAPES[channel]
    names = form.must | draw(st.sets(st.sampled_from(sorted(form.may)))) if form.may else form.must
    return {name: draw(LINES if name in ONE_LINE else TEXTS) for name in sorted(names)}


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    rules = draw(st.dictionaries(PATTERNS, TYPE_RULES, max_size=3))
    keys = draw(
        st.sets(
            st.builds(
                TemplateKey, PATTERNS, st.sampled_from(sorted(SHAPES)), st.sampled_from(["default", "de", "de-AT"])
            ),
            max_size=3,
        )
    )
    return Configuration(
        types={pattern: msgspec.structs.replace(rule, pattern=pattern) for pattern, rule in rules.items()},
        templates={key: draw(template_parts(key.channel)) for key in sorted(keys)},
        defaults=draw(st.none() | DOCUMENTS),
    )


@settings(max_examples=50)  # each writes a folder
@given(configuration=configurations())
def test_what_was_written_is_read_as_it_was(configuration: Configuration) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), configuration)
        assert read_folder(Path(folder)) == (configuration, [])


@settings(max_examples=50)
@given(one=configurations(), other=configurations())
def test_differences_are_none_only_between_equals(one: Configuration, other: Configuration) -> None:
    assert differences(one, one, prune=True) == []
    assert (differences(one, other, prune=True) == []) is (one == other)
    kept = [change for change in differences(one, other, prune=False) if change.action == "keep"]
    deleted = [change for change in differences(one, other, prune=True) if change.action == "delete"]
    assert [(change.kind, change.name) for change in kept] == [(change.kind, change.name) for change in deleted]


JSON: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers(-(1 << 62), 1 << 62) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda value: (
        st.lists(value, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), value, max_size=3)
    ),
    max_leaves=8,
)


@given(document=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=4))
def test_toml_says_what_the_document_says(document: dict[str, Any]) -> None:
    assert tomllib.loads(toml_of(document)) == document


def test_a_change_names_the_members_that_differ() -> None:
    before = Configuration(types={"x": TypeRule(pattern="x", ttl_seconds=1)}, defaults=TenantDefaults())
    after = Configuration(
        types={"x": TypeRule(pattern="x", category="c")}, templates={TemplateKey("x", "sms", "de"): {"body": "b"}}
    )
    assert differences(before, after, prune=False) == [
        Difference("type", "x", "change", ("category", "ttl_seconds")),
        Difference("template", "x/sms/de", "add"),
        Difference("defaults", "tenant", "keep"),
    ]


@pytest.mark.parametrize(("path", "text", "said"), [
    ("types/x.toml", "ttl_seconds = ", "x.toml: "),
    ("types/x.toml", "ttl_seconds = 0", "ttl_seconds"),
    ("types/a..b.toml", "", "'a..b'"),
    ("types/x.toml", "[channels.fax]", "fax"),
    ("types/x.toml", "version = 3", "`version`"),
    ("types/x.toml", 'pattern = "y"', "`pattern`"),
    ("types/x.yaml", "", ".toml"),
    ("tenant.toml", "unknown = 1", "unknown"),
    ("tenant.toml", 'timezone = "Mars"', "`timezone`"),
    ("tenant.toml", 'locale = "xx_YY"', "`locale`"),
    ("tenant.toml", '[channels]\ninapp = "digest"', "`channels.inapp`"),
    ("tenant.toml", '[types."a..b"]\nsms = "off"', "'a..b'"),
    ("templates/x/sms.de/body.txt", "{{ order }}", "`order`"),
    ("templates/x/webhook.de/body.json", "x", "no templates"),
    ("templates/x/email.de/body.md", "x", "needs subject"),
    ("templates/x/sms.german/body.txt", "x", "email.de"),
    ("templates/x/sms.de/body.md", "x", "its files are body.txt"),
    ("templates/x/email.de/tenant", "x", "its files are body.md, html.html, subject.txt"),
    ("templates/a..b/x", "", "a..b"),
    ("templates/x/sms.de/body.txt", "{{", "not closed"),
    ("templates/x/sms.de/body.txt", "a\r\nb", "control"),
    ("templates/x", "", "folder"),
    ("types/x.toml", "# \udcff", "UTF-8"),
    ("types/x.toml", "#" * 300_000, "bytes"),
])  # fmt: skip
def test_a_fault_is_told_with_its_file_and_hides_no_other(tmp_path: Path, path: str, text: str, said: str) -> None:
    for name, content in (
        (path, text),
        ("types/bad.toml", "ttl_seconds = -1"),
        ("types/.hidden", "x"),
        ("README.md", "x"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    _, faults = read_folder(tmp_path)
    assert len(faults) == 2
    assert any(path.rpartition("/")[0] in fault and said in fault for fault in faults)
    assert any(fault.startswith("types/bad.toml: ") and "ttl_seconds" in fault for fault in faults)


def test_nothing_is_written_over_and_an_empty_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="config export"):
        read_folder(tmp_path)
    (tmp_path / "types").mkdir()
    with pytest.raises(InvalidSetting, match="there already"):
        write_folder(tmp_path, Configuration())


def test_a_template_that_nothing_uses_is_not_written_as_its_file_would_be_refused(tmp_path: Path) -> None:
    used, unused = TemplateKey("x", "sms", "de"), TemplateKey("x", "webhook", "de")
    stored = Configuration(templates={used: {"body": "b"}, unused: {"body": "b"}})
    assert [path.name for path in write_folder(tmp_path, stored)] == ["body.txt"]
    wanted, faults = read_folder(tmp_path)
    assert (dict(wanted.templates), faults) == ({used: {"body": "b"}}, [])
    assert [(one.action, one.name) for one in differences(stored, wanted, prune=False)] == [("keep", str(unused))]
