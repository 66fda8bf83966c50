"""Which gateways there are: no entry outlives what it says, and what is not known is never called complete."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.presence.limits import ALONE_SECONDS, BEAT_SECONDS, GATEWAY_FORGOTTEN_SECONDS, GATEWAYS_MAX
from gateway.presence.roll import Roll


def test_a_gateway_that_falls_silent_is_known_for_as_long_as_it_may_have_sessions() -> None:
    roll = Roll(0.0)
    roll.heard("a", 10.0)
    assert roll.known(10.0 + ALONE_SECONDS + 2 * BEAT_SECONDS) == {"a"}
    assert roll.known(10.0 + GATEWAY_FORGOTTEN_SECONDS + 0.1) == set()


def test_a_gateway_that_leaves_is_forgotten_at_once() -> None:
    roll = Roll(0.0)
    roll.heard("a", 1.0)
    roll.left("a")
    roll.left("never there")
    assert roll.known(1.0) == set()


def test_who_has_just_begun_to_listen_or_was_deaf_does_not_know_all() -> None:
    roll = Roll(0.0)
    assert not roll.complete(GATEWAY_FORGOTTEN_SECONDS)
    assert roll.complete(GATEWAY_FORGOTTEN_SECONDS + 1)
    roll.deaf(200.0)
    assert not roll.complete(201.0)


def test_more_gateways_than_can_be_remembered_are_not_called_all() -> None:
    roll = Roll(0.0)
    for number in range(GATEWAYS_MAX + 1):
        roll.heard(f"g{number}", 500.0)
    assert len(roll.known(500.0)) == GATEWAYS_MAX
    assert not roll.complete(501.0)


events = st.lists(
    st.tuples(
        st.sampled_from(["start", "cut", "heal", "kill", "leave", "deaf"]), st.sampled_from("abc"), st.floats(0.1, 80)
    ),
    max_size=30,
)


@given(events)
def test_an_answer_that_is_called_complete_never_lacks_a_gateway_with_sessions(
    steps: list[tuple[str, str, float]],
) -> None:
    """A world in which gateways start, are cut off, killed and leave, while one listens and is deaf now and then.

    A gateway has sessions while it runs and was not cut off for longer than `ALONE_SECONDS`. It beats while it can be heard.
    """
    now, roll = 0.0, Roll(0.0)
    running: dict[str, float | None] = {"a": 0.0}  # cut off since; None: it is not
    deaf = False
    for what, who, seconds in steps:
        match what:
            case "start":
                running.setdefault(who, None)
            case "cut" if who in running:
                running[who] = now if running[who] is None else running[who]
            case "heal" if who in running:
                running[who] = None
            case "kill":
                running.pop(who, None)
            case "leave" if running.get(who, 0.0) is None:
                del running[who]
                if not deaf:
                    roll.left(who)
            case "deaf":
                deaf = not deaf
                roll.deaf(now)
            case _:
                pass
        end = now + seconds
        while now < end:
            now += BEAT_SECONDS
            for each, cut in running.items():
                if cut is None and not deaf:
                    roll.heard(each, now)
            if deaf:
                roll.deaf(now)  # who cannot ask gets no answer at all
            with_sessions = {each for each, cut in running.items() if cut is None or now - cut <= ALONE_SECONDS}
            if roll.complete(now) and not deaf:
                assert with_sessions <= roll.known(now)
