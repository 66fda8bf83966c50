"""Questions that many ask at once: one request for those that came before it, and exactly one answer for each."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine.questions
from engine.errors import Unanswered
from gateway.questions import Questions


class Server:
    """Answers with the question itself, once it is let; some requests fail."""

    def __init__(self, failing: Sequence[bool] = ()) -> None:
        self.requests: list[list[int]] = []
        self.let = asyncio.Event()
        self._failing = list(failing)

    async def ask(self, questions: list[int]) -> list[int]:
        self.requests.append(questions)
        await self.let.wait()
        if self._failing and self._failing.pop(0):
            raise Unanswered if len(questions) % 2 else RuntimeError
        return questions


async def until(answers: list[int | None], number: int) -> None:
    async with asyncio.timeout(20):
        while len(answers) < number:
            await asyncio.sleep(0)


async def test_a_question_that_comes_alone_is_asked_at_once_and_those_that_come_meanwhile_share_the_next_request() -> (
    None
):
    server, answers = Server(), list[int | None]()
    questions = Questions("numbers", server.ask)
    questions.ask(1, answers.append)
    assert answers == [], "never inside the call"
    await asyncio.sleep(0)
    assert server.requests == [[1]]
    for number in (2, 3, 4):
        questions.ask(number, answers.append)
    server.let.set()
    await until(answers, 4)
    assert server.requests == [[1], [2, 3, 4]]
    assert answers == [1, 2, 3, 4]


async def test_kinds_that_take_turns_have_no_two_requests_under_way_and_gather_while_they_wait() -> None:
    one, other, turn = Server(), Server(), asyncio.Lock()
    answers = list[int | None]()
    first, second = Questions("one", one.ask, turn=turn), Questions("other", other.ask, turn=turn)
    first.ask(1, answers.append)
    await asyncio.sleep(0)
    second.ask(2, answers.append)
    await asyncio.sleep(0)
    second.ask(3, answers.append)
    assert (one.requests, other.requests) == ([[1]], [])
    other.let.set()
    one.let.set()
    await until(answers, 3)
    assert other.requests == [[2, 3]]


@pytest.mark.parametrize("begun", [False, True])
async def test_who_waits_when_asking_ends_gets_no_answer_instead_of_none_at_all(begun: bool) -> None:
    server, answers = Server(), list[int | None]()
    questions = Questions("numbers", server.ask, most=1)
    for number in (1, 2):
        questions.ask(number, answers.append)
    if begun:
        await asyncio.sleep(0)
    await questions.close()
    assert answers == [None, None]


@given(st.lists(st.integers(1, 5), max_size=6), st.lists(st.booleans(), max_size=12), st.integers(1, 3))
def test_each_question_gets_its_own_answer_or_none_exactly_once(
    bursts: list[int], failing: list[bool], most: int
) -> None:
    async def run() -> None:
        server, answers = Server(failing), dict[int, int | None]()
        server.let.set()
        questions = Questions("numbers", server.ask, most=most)
        asked = 0
        for burst in bursts:
            for _ in range(burst):
                questions.ask(asked, lambda answer, number=asked: answers.update({number: answer}))  # type: ignore[misc]
                asked += 1
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while len(answers) < asked:
                await asyncio.sleep(0.001)
        assert [number for request in server.requests for number in request] == list(range(asked))
        assert all(len(request) <= most for request in server.requests)
        failed = {
            number for request, fails in zip(server.requests, failing, strict=False) if fails for number in request
        }
        assert answers == {number: None if number in failed else number for number in range(asked)}

    asyncio.run(run())


async def test_whoever_awaits_an_answer_gets_it_or_what_asking_raised() -> None:
    server = Server([False, True])
    server.let.set()
    questions = Questions("numbers", server.ask, most=2)
    found = await asyncio.gather(*map(questions.answer, (1, 2, 3)), return_exceptions=True)
    assert found[:2] == [1, 2]
    assert isinstance(found[2], Unanswered)


async def test_a_request_goes_on_while_anybody_waits_for_it_and_is_given_up_with_the_last() -> None:
    server = Server()
    questions = Questions("numbers", server.ask)
    one, other = (asyncio.create_task(questions.answer(number)) for number in (1, 2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert server.requests == [[1, 2]]
    gone = asyncio.create_task(questions.answer(3))
    last = asyncio.create_task(questions.answer(4))
    await asyncio.sleep(0)
    for task in (one, gone):
        task.cancel()
        await asyncio.wait({task})
    assert questions.busy
    assert server.requests == [[1, 2]], "somebody waits for it"
    other.cancel()
    async with asyncio.timeout(20):
        while len(server.requests) < 2:
            await asyncio.sleep(0)
    assert server.requests == [[1, 2], [4]], "given up, and nobody wants to know of 3"
    server.let.set()
    assert await last == 4


async def test_who_gives_up_at_the_very_moment_of_the_deadline_is_cancelled_and_nothing_else() -> None:
    async def ask(questions: list[int]) -> list[int]:
        await asyncio.sleep(10)
        return questions

    for _ in range(20):
        questions = Questions("slow", ask, seconds=0.02)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await questions.answer(1)
        await questions.close()


async def test_questions_of_a_few_turns_of_the_loop_after_a_request_share_the_next() -> None:
    server, answers = Server(), list[int | None]()
    server.let.set()
    questions = engine.questions.Questions("numbers", server.ask, turns=7)
    assert await questions.answer(1) == 1
    for number in (2, 3, 4):
        questions.ask(number, answers.append)
        await asyncio.sleep(0)
    await until(answers, 3)
    assert server.requests == [[1], [2, 3, 4]]


async def test_a_request_has_a_deadline_and_the_next_is_asked_after_it() -> None:
    server = Server()
    questions = Questions("numbers", server.ask, seconds=0.01)
    with pytest.raises(TimeoutError):
        await questions.answer(1)
    server.let.set()
    async with asyncio.timeout(20):
        while True:
            try:
                assert await questions.answer(2) == 2
                return
            except TimeoutError:
                continue  # this machine stood still


async def test_nobody_waits_for_more_than_two_deadlines_however_many_wait_before_him() -> None:
    server = Server()
    questions = Questions("numbers", server.ask, seconds=0.05, most=2)
    found = await asyncio.gather(*map(questions.answer, range(20)), return_exceptions=True)
    assert [type(one) for one in found] == [TimeoutError] * 20
    assert server.requests == [[0, 1], [2, 3]]


async def test_one_that_raises_at_its_answer_takes_nobody_elses() -> None:
    server = Server()
    questions = Questions("numbers", server.ask)
    found = list[int | None]()

    def raising(_: int | None) -> None:
        raise LookupError

    questions.ask(1, found.append)
    questions.ask(2, raising)
    questions.ask(3, found.append)
    last = asyncio.create_task(questions.answer(4))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    questions.ask(5, found.append)
    server.let.set()
    async with asyncio.timeout(20):
        assert await last == 4
        while len(found) < 3:
            await asyncio.sleep(0)
    assert found == [1, 3, 5]
