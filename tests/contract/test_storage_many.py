"""Many processes at once: everything is handed out once, also when they are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_storage import ASSIGNMENT, PARAMS, baselines, claimed, create

from droptune.storage import Budget, Storage
from droptune.training import Measurement, NewTraining, State, TrainingKind

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["droptune.storage"])


def value(number, interval):
    """What training `number` measures at the end of an interval."""
    return 1 / (number + 1) + 0.1**interval


def work(url, name, width, pause=0.0, lease_seconds=60.0):
    """A worker that trains nothing: claims, measures, ends, until the study has no more."""
    storage = Storage.open(url, patience=60.0, lease_seconds=lease_seconds)
    study = storage.study(name)
    worker = storage.register_worker(host="here", pid=os.getpid(), device="cpu")
    ended = []
    while not storage.progress(study.id).idle:
        storage.requeue_stale()
        group = storage.claim(study.id, worker, width)
        if not group:
            time.sleep(0.05)
            continue
        new = [t for t in group if t.assignment is None]
        storage.assign(new, [ASSIGNMENT] * len(new), [PARAMS] * len(new))
        done = {r.training.id: r.intervals_done for r in records_of(storage, study, group)}
        for interval in range(1, study.intervals + 1):
            items = [
                (t, Measurement(interval, {"val/nll": value(t.number, interval)}))
                for t in group
                if interval > done[t.id]
            ]
            storage.record(items, ["val/nll"])
            time.sleep(pause)
        for training in group:
            final = value(training.number, study.intervals)
            if storage.finish(training, State.COMPLETE, values=[final]):
                ended.append(training.number)
    storage.end_worker(worker)
    return ended


def records_of(storage, study, group):
    return storage.records(study.id, ids=[training.id for training in group])


def run_workers(url, name, count, width):
    with processes.Pool(count) as pool:
        ended = pool.starmap(work, [(url, name, width)] * count)
    return [number for numbers in ended for number in numbers]


def check_complete(storage, study, count):
    """Every trial ended once, with every measurement there once and right."""
    records = storage.records(study.id)
    assert [r.training.number for r in records] == list(range(count))
    intervals = range(1, study.intervals + 1)
    for record in records:
        assert record.state is State.COMPLETE
        expected = tuple(value(record.training.number, i) for i in intervals)
        assert record.curves == {"val/nll": expected}
        assert record.values == expected[-1:]
    assert storage.progress(study.id).idle


def test_sixteen_workers_and_an_exact_budget(storage, url):
    count = 400
    study = create(storage, intervals=1, budget=Budget(trials=count), queue=baselines("none"))
    storage.close()
    ended = run_workers(url, study.name, 16, width=5)
    assert sorted(ended) == list(range(count))
    check_complete(storage, study, count)


def test_an_exact_budget_of_intervals(storage, url):
    study = create(storage, intervals=3, budget=Budget(intervals=100))
    storage.close()
    ended = run_workers(url, study.name, 8, width=3)
    assert sorted(ended) == list(range(33))


def claim_all(url, name):
    storage = Storage.open(url)
    study, mine = storage.study(name), []
    while group := storage.claim(study.id, os.getpid(), random.randint(1, 4)):
        mine += [training.id for training in group]
    return mine


def test_three_hundred_queued_trainings_are_each_taken_once(storage, url):
    seeds = range(300)
    kind = TrainingKind.CONFIRMATION
    queue = [NewTraining(kind, ASSIGNMENT, "none", seed_index=i) for i in seeds]
    study = create(storage, queue=queue)
    storage.update_study(study.id, phase="confirming")
    storage.close()
    with processes.Pool(8) as pool:
        taken = pool.starmap(claim_all, [(url, study.name)] * 8)
    times = Counter(i for ids in taken for i in ids)
    assert len(times) == 300
    assert set(times.values()) == {1}


def plan(url, name):
    storage = Storage.open(url)
    study = storage.study(name)
    queue = [
        NewTraining(TrainingKind.CONFIRMATION, ASSIGNMENT, label, seed_index=i)
        for label in ("none", "trial 3")
        for i in range(3)
    ]
    added = storage.enqueue(study.id, queue)
    return len(added), storage.update_study(study.id, phase="confirming", if_phase="searching")


def test_eight_planners_queue_one_plan(storage, url):
    study = create(storage)
    storage.close()
    with processes.Pool(8) as pool:
        results = pool.starmap(plan, [(url, study.name)] * 8)
    assert sorted(added for added, _ in results) == [0] * 7 + [6]
    assert sorted(moved for _, moved in results) == [False] * 7 + [True]
    assert len(storage.records(study.id)) == 6


@pytest.mark.parametrize("kills", [8])
def test_killed_workers_lose_nothing(storage, url, kills):
    """Workers die by SIGKILL at random moments; others and their successors do it all once."""
    count = 40
    study = create(storage, intervals=4, budget=Budget(trials=count), queue=baselines("none"))
    storage.close()
    chance = random.Random(5)
    arguments = (url, study.name, 3, 0.02, 2.0)

    def start():
        process = processes.Process(target=work, args=arguments)
        process.start()
        return process

    crew = [start() for _ in range(3)]
    for _ in range(kills):
        time.sleep(chance.uniform(0.05, 0.5))
        victim = chance.randrange(len(crew))
        crew[victim].kill()
        crew[victim].join()
        crew[victim] = start()
    for process in crew:
        process.join(timeout=120)
        assert process.exitcode == 0
    check_complete(storage, study, count)


def finish_each(url, trainings):
    storage = Storage.open(url, patience=60.0)
    for training in trainings:
        storage.finish(training, State.COMPLETE, values=[0.5])


def test_a_study_is_deleted_while_its_trainings_end(storage, url):
    study = create(storage, intervals=1)
    trainings = claimed(storage, study, 40)
    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(finish_each, url, trainings[i::4]) for i in range(4)]
        while storage.records(study.id, states=[State.COMPLETE]) == []:
            time.sleep(0.01)
        assert set(storage.delete_study(study.name)) == {t.id for t in trainings}
        for end in ends:
            end.result()
    assert storage.studies() == []
    assert storage.records(study.id) == []
