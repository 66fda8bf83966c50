"""The history checker: a good history passes, and every kind of lie in it is caught by the invariant made for it."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from chaos.checker import check
from chaos.ledger import Ledger, Line
from tests.support.chaos import Chaos

USERS = [f"user{i}" for i in range(6)]
Mutant = Callable[[list[Line], random.Random], None]


def good_history(seed: int, events: int = 120) -> list[Line]:
    """What a faultless engine with one LOG per two users, two replicas and a few devices would leave behind."""
    rng = random.Random(seed)
    ledger = Ledger()
    logs: dict[str, list[tuple[int, str, str, int]]] = {user: [] for user in USERS}
    heads = {"LOG-0": 0, "LOG-1": 0, "LOG-2": 0}
    numbers: dict[str, int] = {}
    for seq in range(1, events + 1):
        key = rng.choice([*USERS, "room-1", "room-2"])
        to = [key] if key in USERS else rng.sample(USERS, rng.randint(2, 4))
        numbers[key] = numbers.get(key, 0) + 1
        call = ledger.invoke("p", "publish", event=f"e{seq}", to=to, key=key, number=numbers[key])
        phase = "info" if rng.random() < 0.1 else "ok"
        ledger.end(call, "p", "publish", phase, event=f"e{seq}", seq=seq)
        if phase == "ok" or rng.random() < 0.5:
            for user in to:
                heads[stream_of(user)] += 1
                logs[user].append((heads[stream_of(user)], f"e{seq}", key, seq))
    for replica in ("n0", "n1"):
        for name, last in heads.items():
            ledger.note("scan", "stream", name=name, epoch="aaaa", first=1, last=last, replica=replica)
        for user, log in logs.items():
            for seq, event, key, event_seq in log:
                place = {"replica": replica, "stream": stream_of(user), "epoch": "aaaa", "seq": seq}
                place |= {"event_epoch": "eeee", "event_seq": event_seq}
                ledger.note("scan", "record", **place, user=user, event=event, key=key)
    for user, log in logs.items():
        walk(ledger, rng, user, log)
    return ledger.lines


def walk(ledger: Ledger, rng: random.Random, user: str, log: list[tuple[int, str, str, int]]) -> None:
    """A device that reads the log in a few sessions, each from where the one before ended."""
    cursor, rest, number = 0, list(log), 0
    while rest:
        number += 1
        part, rest = rest[: max(3, len(rest) // 2)], rest[max(3, len(rest) // 2) :]
        name = f"{user}/{number}"
        call = ledger.invoke(user, "open", session=name, user=user, device="d", cursor=["aaaa", cursor])
        ledger.end(call, user, "open", "ok", session=name, resumed=True, reason=None, start=["aaaa", cursor])
        for seq, event, _, _ in part:
            ledger.note(user, "deliver", session=name, epoch="aaaa", seq=seq, prev=cursor, event=event)
            cursor = seq
            if rng.random() < 0.5:
                ledger.note(user, "ack", session=name, epoch="aaaa", seq=seq)
        if not rest:
            ledger.note(user, "settle", session=name)


def stream_of(user: str) -> str:
    return f"LOG-{int(user[-1]) // 2}"


def lines_of(lines: list[Line], op: str, phase: str = "ok") -> list[int]:
    return [index for index, line in enumerate(lines) if (line.op, line.phase) == (op, phase)]


def change(lines: list[Line], index: int, **facts: object) -> None:
    lines[index] = lines[index]._replace(facts=lines[index].facts | facts)


def acknowledged(lines: list[Line]) -> set[str]:
    return {lines[index].facts["event"] for index in lines_of(lines, "publish")}


def drop_a_record(lines: list[Line], rng: random.Random) -> None:
    ok = acknowledged(lines)
    chosen = lines[rng.choice([i for i in lines_of(lines, "record") if lines[i].facts["event"] in ok])].facts
    for index in reversed(lines_of(lines, "record")):
        if (lines[index].facts["event"], lines[index].facts["user"]) == (chosen["event"], chosen["user"]):
            del lines[index]


def drop_a_record_on_one_replica(lines: list[Line], rng: random.Random) -> None:
    ok = acknowledged(lines)
    there = [
        i for i in lines_of(lines, "record") if lines[i].facts["event"] in ok and lines[i].facts["replica"] == "n1"
    ]
    del lines[rng.choice(there)]


def double_a_record(lines: list[Line], rng: random.Random) -> None:
    line = lines[rng.choice(lines_of(lines, "record"))]
    lines.append(line._replace(facts=line.facts | {"seq": 10_000}))


def swap_two_records(lines: list[Line], rng: random.Random) -> None:
    by_key: dict[tuple[str, str, str], list[int]] = {}
    for index in lines_of(lines, "record"):
        facts = lines[index].facts
        by_key.setdefault((facts["replica"], facts["user"], facts["key"]), []).append(index)
    one, other = rng.sample(rng.choice([group for group in by_key.values() if len(group) > 1]), 2)
    here, there = lines[one].facts["seq"], lines[other].facts["seq"]
    change(lines, one, seq=there)
    change(lines, other, seq=here)


def invent_a_record(lines: list[Line], rng: random.Random) -> None:
    line = lines[rng.choice(lines_of(lines, "record"))]
    lines.append(line._replace(facts=line.facts | {"seq": 10_000, "event": "never published"}))


def store_a_refused_event(lines: list[Line], rng: random.Random) -> None:
    stored = {lines[index].facts["event"] for index in lines_of(lines, "record")}
    index = rng.choice([i for i in lines_of(lines, "publish") if lines[i].facts["event"] in stored])
    lines[index] = lines[index]._replace(phase="fail")


def give_to_a_stranger(lines: list[Line], rng: random.Random) -> None:
    index = rng.choice([i for i in lines_of(lines, "record") if lines[i].facts["key"] in USERS])
    change(lines, index, user=rng.choice([user for user in USERS if user != lines[index].facts["user"]]), seq=10_000)


def split_the_truth(lines: list[Line], rng: random.Random) -> None:
    """Two replicas show different records at one position."""
    n1 = [index for index in lines_of(lines, "record") if lines[index].facts["replica"] == "n1"]
    one, other = rng.sample(n1, 2)
    change(lines, one, event=lines[other].facts["event"])


def show_a_device_another_truth(lines: list[Line], rng: random.Random) -> None:
    one, other = rng.sample(lines_of(lines, "deliver"), 2)
    change(lines, one, event=lines[other].facts["event"])


def skip_a_delivery(lines: list[Line], rng: random.Random) -> None:
    """Even when the chain of `prev` is mended, so that the device cannot notice."""
    chosen = rng.choice(lines_of(lines, "deliver"))
    gone = lines.pop(chosen)
    for index in lines_of(lines, "deliver")[:]:
        facts = lines[index].facts
        if (facts["session"], facts["prev"]) == (gone.facts["session"], gone.facts["seq"]):
            change(lines, index, prev=gone.facts["prev"])


def double_a_delivery(lines: list[Line], rng: random.Random) -> None:
    index = rng.choice(lines_of(lines, "deliver"))
    lines.insert(index + 1, lines[index])


def swap_two_deliveries(lines: list[Line], rng: random.Random) -> None:
    pairs = [
        (i, j)
        for i, j in zip(lines_of(lines, "deliver"), lines_of(lines, "deliver")[1:], strict=False)
        if lines[i].facts["session"] == lines[j].facts["session"]
    ]
    one, other = rng.choice(pairs)
    lines[one], lines[other] = lines[other], lines[one]


def break_the_chain(lines: list[Line], rng: random.Random) -> None:
    index = rng.choice(lines_of(lines, "deliver"))
    change(lines, index, prev=lines[index].facts["prev"] + 1)


def settle_too_early(lines: list[Line], rng: random.Random) -> None:
    """The last record never came, and nothing said so."""
    settled = lines[rng.choice(lines_of(lines, "settle"))].facts["session"]
    del lines[max(i for i in lines_of(lines, "deliver") if lines[i].facts["session"] == settled)]


def resume_elsewhere(lines: list[Line], rng: random.Random) -> None:
    index = rng.choice(lines_of(lines, "open"))
    change(lines, index, start=["aaaa", lines[index].facts["start"][1] + 1])


def resume_in_another_epoch(lines: list[Line], rng: random.Random) -> None:
    index = rng.choice(lines_of(lines, "open", "invoke"))
    change(lines, index, cursor=["bbbb", lines[index].facts["cursor"][1]])
    ok = next(i for i in lines_of(lines, "open") if lines[i].call == lines[index].call)
    change(lines, ok, start=["bbbb", lines[ok].facts["start"][1]])


def resume_in_the_future(lines: list[Line], rng: random.Random) -> None:
    index = rng.choice(lines_of(lines, "open", "invoke"))
    change(lines, index, cursor=["aaaa", 99_999])
    ok = next(i for i in lines_of(lines, "open") if lines[i].call == lines[index].call)
    change(lines, ok, start=["aaaa", 99_999])


def reset_without_a_reason(lines: list[Line], rng: random.Random) -> None:
    change(lines, rng.choice(lines_of(lines, "open")), resumed=False)


def take_an_ack_back(lines: list[Line], rng: random.Random) -> None:
    line = lines[max(lines_of(lines, "ack"), key=lambda index: lines[index].facts["seq"])]
    lines.append(line._replace(facts=line.facts | {"seq": 0}))


def acknowledge_what_was_not_given(lines: list[Line], rng: random.Random) -> None:
    change(lines, rng.choice(lines_of(lines, "ack")), seq=5_000)


MUTANTS: dict[Mutant, str] = {
    drop_a_record: "lost",
    drop_a_record_on_one_replica: "lost",
    double_a_record: "duplicate",
    swap_two_records: "order",
    invent_a_record: "phantom",
    store_a_refused_event: "phantom",
    give_to_a_stranger: "phantom",
    split_the_truth: "truth",
    show_a_device_another_truth: "truth",
    skip_a_delivery: "session",
    double_a_delivery: "session",
    swap_two_deliveries: "session",
    break_the_chain: "session",
    settle_too_early: "session",
    resume_elsewhere: "resume",
    resume_in_another_epoch: "resume",
    resume_in_the_future: "resume",
    reset_without_a_reason: "resume",
    take_an_ack_back: "cursor",
    acknowledge_what_was_not_given: "cursor",
}


@pytest.mark.parametrize("seed", range(20))
def test_a_faultless_history_has_no_violation(seed: int) -> None:
    assert check(good_history(seed)) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_lie_is_caught_by_the_invariant_made_for_it(mutant: Mutant) -> None:
    for seed in range(20):
        lines = good_history(seed)
        mutant(lines, random.Random(seed))
        assert MUTANTS[mutant] in {violation.invariant for violation in check(lines)}, f"seed {seed}"


@pytest.mark.parametrize("missing", ["publish", "record"])
def test_a_history_without_acknowledged_events_or_without_records_proves_nothing(missing: str) -> None:
    chaos = Chaos()
    chaos.ledger = Ledger(line for line in good_history(1) if (line.op, line.phase) != (missing, "ok"))
    with pytest.raises(AssertionError, match="acknowledged" if missing == "publish" else "no log holds"):
        chaos.verdict()


def test_a_ledger_survives_its_file(tmp_path: Path) -> None:
    ledger = Ledger(good_history(1))
    ledger.dump(tmp_path / "ledger.jsonl")
    assert Ledger.load(tmp_path / "ledger.jsonl").lines == ledger.lines


def test_the_work_to_judge_grows_with_a_history_and_not_with_its_square() -> None:
    def lines_run(events: int) -> float:
        """How many lines of Python are run for each line of a history."""
        lines, count = good_history(1, events=events), 0

        def trace(_frame: FrameType, event: str, _arg: object) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert check(lines) == []
        finally:
            sys.settrace(before)
        return count / len(lines)

    assert lines_run(3_000) < 2 * lines_run(300)
