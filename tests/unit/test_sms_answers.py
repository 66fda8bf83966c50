"""Whatever an SMS provider, or a proxy before it, answers: it becomes an outcome, and only a 2xx a success."""

from datetime import UTC, datetime

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.exchange import Answer
from engine.channels.sms import sns, twilio
from engine.channels.sms.callbacks import inbound_of, report_of

json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 60), 1 << 60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["code", "sid", "num_segments", "error_code", "x"]), inner, max_size=5)
    ),
    max_leaves=9,
)
xml = st.builds(
    lambda *parts: "".join(parts).encode(),
    st.sampled_from(["", "<ErrorResponse><Error>"]), st.sampled_from(["<Code>", "<Code/>", ""]), st.text(max_size=9),
    st.sampled_from(["</Code>", ""]), st.sampled_from(["<Message>Invalid parameter: PhoneNumber", "<MessageId>", ""]),
    st.text(max_size=9),
)  # fmt: skip
bodies = st.binary(max_size=60) | json.map(msgspec.json.encode) | xml
statuses = st.integers(100, 599)
waits = st.none() | st.text(max_size=6) | st.integers(-5, 1 << 40).map(str)


@given(status=statuses, body=bodies, wait=waits)
def test_no_answer_is_too_odd(status: int, body: bytes, wait: str | None) -> None:
    answer = Answer(status, {} if wait is None else {"Retry-After": wait}, body)
    for judged in (twilio.judged, sns.judged):
        outcome = judged("p", answer, 3)
        assert (outcome.kind == "ok") <= (200 <= status < 300)
        assert len(outcome.code) <= 80
        assert len(outcome.provider_id) <= 64
        assert outcome.segments > 0 or outcome.kind != "ok"


@given(
    st.dictionaries(
        st.sampled_from(["MessageSid", "MessageStatus", "ErrorCode", "From", "To", "Body", "OptOutType"]),
        st.text(max_size=12),
    )
)
def test_no_report_is_too_odd(form: dict[str, str]) -> None:
    report, inbound = report_of("p", form, datetime.now(UTC)), inbound_of(form)
    assert report is None or report.provider_id == form["MessageSid"]
    assert inbound is None or inbound.number == form["From"]
