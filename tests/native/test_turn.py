"""One pass at a time: whatever is raised where, the turn goes back, and only to whom it belongs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from flashlm._native import Turn

WAIT_S = 10


def nothing(value: object = None, has_failed: bool = False) -> None:
    pass


def is_free(turn: Turn) -> bool:
    """Return whether another thread gets the turn soon."""
    got = threading.Event()

    def take() -> None:
        with turn.take(nothing, nothing):
            got.set()

    threading.Thread(target=take, daemon=True).start()
    return got.wait(0.3)


def test_enter_and_leave_are_called_with_what_belongs_to_them() -> None:
    turn, left = Turn(), []
    with turn.take(lambda *given: given, lambda value, has_failed: left.append((value, has_failed)), 1, "two") as value:
        assert value == (1, "two")
        assert not is_free(turn)
    with pytest.raises(KeyError), turn.take(lambda: 3, lambda value, has_failed: left.append((value, has_failed))):
        raise KeyError
    assert left == [((1, "two"), False), (3, True)]
    assert is_free(turn)


def fail(*given: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("enter", "leave"), [(fail, nothing), (nothing, fail)])
def test_a_turn_goes_back_where_enter_or_leave_raises(enter: Callable[..., None], leave: Callable[..., None]) -> None:
    turn = Turn()
    with pytest.raises(KeyboardInterrupt), turn.take(enter, leave):
        pass
    assert is_free(turn)


def test_a_turn_that_was_never_left_goes_back_with_its_holder() -> None:
    turn = Turn()
    held = turn.take(nothing, nothing)
    held.__enter__()
    assert not is_free(turn)
    del held
    assert is_free(turn)


def test_the_same_thread_takes_over_and_the_one_before_gives_nothing_back() -> None:
    turn = Turn()
    first, second = turn.take(nothing, nothing), turn.take(nothing, nothing)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    del first
    assert not is_free(turn)
    second.__exit__(None, None, None)
    assert is_free(turn)


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Ring in so many seconds: raise KeyboardInterrupt in the main thread."""
    before = signal.signal(signal.SIGALRM, fail)
    yield lambda delay_s: signal.setitimer(signal.ITIMER_REAL, delay_s)  # type: ignore[func-returns-value]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_waiting_for_a_turn_can_be_interrupted(alarm: Callable[[float], None]) -> None:
    turn, has_it, may_go = Turn(), threading.Event(), threading.Event()

    def hold() -> None:
        with turn.take(nothing, nothing):
            has_it.set()
            may_go.wait(WAIT_S)

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    assert has_it.wait(WAIT_S)
    alarm(0.2)
    with pytest.raises(KeyboardInterrupt), turn.take(nothing, nothing):
        pytest.fail("two hold one turn")
    may_go.set()
    holder.join(WAIT_S)
    assert is_free(turn)
