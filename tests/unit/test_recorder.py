from __future__ import annotations

import threading

import pytest

from droptune.recorder import Decision, Recorder


def pruning(number, seen):
    def work():
        seen.append(number)
        return Decision(pruned=frozenset([number]))

    return work


def test_decisions_come_one_boundary_later_each_once_and_in_order():
    seen = []
    recorder = Recorder(threading.Event())
    assert recorder.decisions() == Decision()
    recorder.add(pruning(1, seen))
    assert recorder.decisions().pruned == {1}
    recorder.add(pruning(2, seen))
    assert recorder.flush()  # what a flush waited for is not lost
    assert recorder.decisions().pruned == {2}
    assert recorder.decisions() == Decision()
    recorder.close()
    assert seen == [1, 2]


def test_while_the_database_is_away_training_runs_ahead_and_nothing_is_lost():
    away, back = threading.Event(), threading.Event()
    seen = []

    def losing(number):
        def work():
            assert back.wait(20)
            seen.append(number)
            return Decision(lost=frozenset([number]))

        return work

    recorder = Recorder(away)
    away.set()
    for number in range(3):
        recorder.add(losing(number))
        assert not recorder.flush()
        assert recorder.decisions() == Decision()
    away.clear()
    back.set()
    assert recorder.decisions().lost == {0, 1, 2}
    recorder.close()
    assert seen == [0, 1, 2]


def test_what_went_wrong_is_raised_in_the_loop_and_nothing_is_done_after_it():
    def failing():
        raise ValueError("no")

    seen = []
    recorder = Recorder(threading.Event())
    recorder.add(failing)
    recorder.add(pruning(1, seen))
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            recorder.decisions()
    recorder.close()
    assert seen == []


def test_what_has_not_begun_when_it_is_closed_is_dropped():
    begun, go = threading.Event(), threading.Event()
    seen = []

    def slow():
        begun.set()
        assert go.wait(20)
        seen.append("slow")
        return Decision()

    recorder = Recorder(threading.Event())
    recorder.add(slow)
    recorder.add(pruning(1, seen))
    assert begun.wait(20)
    threading.Timer(0.1, go.set).start()
    recorder.close()
    assert seen == ["slow"]
