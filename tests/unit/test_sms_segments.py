"""What a text costs as SMS: alphabets of 3GPP TS 23.038, segments of 23.040."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.sms.segments import BASIC, EXTENSION, MULTI, SINGLE, segmented

GSM_TABLE = BASIC[:27] + "\x1b" + BASIC[27:]
"""With the escape in its place, so that an index is a septet."""

texts = st.text(max_size=700) | st.text(BASIC + EXTENSION, max_size=700) | st.text("aé€^[😀ш", max_size=700)


def octets(segment: str, encoding: str) -> int:
    """What a segment takes of its 140 bytes, by writing it out: an encoder of its own, not the counter that is tested."""
    if encoding == "ucs-2":
        return len(segment.encode("utf-16-be", "surrogatepass"))
    septets = [
        one for c in segment for one in ((GSM_TABLE.index(c),) if c in BASIC else (0x1B, EXTENSION.index(c)))
    ]  # fmt: skip
    assert all(0 <= septet < 128 for septet in septets)
    return -(-len(septets) * 7 // 8)


def test_the_alphabet_has_every_septet_once() -> None:
    assert len(GSM_TABLE) == len(set(GSM_TABLE)) == 128
    assert {c: GSM_TABLE.index(c) for c in "@\n\rA aà§¿¡É"} == {
        "@": 0x00, "\n": 0x0A, "\r": 0x0D, "É": 0x1F, " ": 0x20, "¡": 0x40, "A": 0x41, "§": 0x5F, "¿": 0x60, "a": 0x61, "à": 0x7F,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "encoding", "units", "segments"),
    [
        ("", "gsm-7", 0, 0),
        ("a" * 160, "gsm-7", 160, 1),
        ("a" * 161, "gsm-7", 161, 2),
        ("a" * 306, "gsm-7", 306, 2),
        ("a" * 307, "gsm-7", 307, 3),
        ("€" * 80, "gsm-7", 160, 1),
        ("€" * 81, "gsm-7", 162, 2),
        ("a" * 159 + "€", "gsm-7", 161, 2),
        ("a" * 152 + "€" + "a" * 152, "gsm-7", 306, 3),
        ("ш" * 70, "ucs-2", 70, 1),
        ("ш" * 71, "ucs-2", 71, 2),
        ("ш" * 134, "ucs-2", 134, 2),
        ("a" * 69 + "ш", "ucs-2", 70, 1),
        ("😀" * 35, "ucs-2", 70, 1),
        ("a" * 66 + "😀" + "a" * 66, "ucs-2", 134, 3),
        ("^{}[]~\\|€\f", "gsm-7", 20, 1),
        ("ç", "ucs-2", 1, 1),
        ("`", "ucs-2", 1, 1),
        ("\x1b", "ucs-2", 1, 1),
    ],
)
def test_a_text_costs_what_the_standard_says(text: str, encoding: str, units: int, segments: int) -> None:
    found = segmented(text)
    assert (found.encoding, found.units, len(found.segments)) == (encoding, units, segments)


@given(texts)
def test_segments_are_the_text_whole_characters_and_fit(text: str) -> None:
    found = segmented(text)
    assert "".join(found.segments) == found.text == text
    bytes_max = 140 if len(found.segments) == 1 else 134
    assert all(segment and octets(segment, found.encoding) <= bytes_max for segment in found.segments)


@given(texts)
def test_no_segment_has_room_for_the_character_after_it(text: str) -> None:
    found = segmented(text)
    room = 134 * 8 // (7 if found.encoding == "gsm-7" else 16)
    for segment, following in zip(found.segments, found.segments[1:], strict=False):
        escaped = EXTENSION if found.encoding == "gsm-7" else ""
        used = sum(2 if c in escaped or c > "\uffff" else 1 for c in segment + following[0])
        assert used > room


@given(texts)
def test_one_segment_is_used_wherever_one_is_enough(text: str) -> None:
    found = segmented(text)
    assert (len(found.segments) <= 1) == (found.units <= SINGLE[found.encoding])
    assert len(found.segments) >= -(-found.units // MULTI[found.encoding]) or len(found.segments) == 1


@given(texts)
def test_smart_encoding_changes_nothing_unless_it_makes_the_text_cheaper(text: str) -> None:
    bare, smart = segmented(text), segmented(text, smart=True)
    assert smart.text == text or (bare.encoding, smart.encoding) == ("ucs-2", "gsm-7")
    assert len(smart.segments) <= len(bare.segments)
    assert segmented(smart.text, smart=True) == smart


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("“It’s – well… 5\u00a0€”", '"It\'s - well... 5 €"'),
        ("cafe\u0301", "café"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("“привет”", "“привет”"),
        ("ça va – oui", "ça va – oui"),
        ("plain", "plain"),
        ("…" * 70, "…" * 70),
    ],
)
def test_smart_encoding_replaces_what_writing_programs_put_in(text: str, plain: str) -> None:
    assert segmented(text, smart=True).text == plain
