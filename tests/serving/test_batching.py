"""Jobs that wait together run together, whole and in order; those that nobody waits for do not run."""

import asyncio
import threading

import pytest

from pinrec_hf.serving.batching import Batcher, Overloaded
from pinrec_hf.serving.metrics import Metrics


class Doubling:
    """Answers x with 2 x, when the gate is open; remembers the batches."""

    def __init__(self, is_open=True):
        self.batches, self.gate = [], threading.Event()
        if is_open:
            self.gate.set()

    def __call__(self, requests):
        self.gate.wait(10)
        self.batches.append(list(requests))
        if "bad" in requests:
            raise RuntimeError("bad")
        return "r1", [2 * request for request in requests]


async def settle(batcher, answer, first):
    """The first job runs, alone, so that the next ones gather behind it."""
    task = asyncio.create_task(batcher.submit([first]))
    while batcher._jobs.qsize() or not batcher.pending:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    return task


def test_jobs_run_together_whole_and_in_order():
    async def scenario():
        answer = Doubling(is_open=False)
        batcher = Batcher(answer, Metrics(), max_batch=4, max_wait=0)
        tasks = [await settle(batcher, answer, 0)]
        for requests in ([1], [2, 3, 4, 5], [6], [7], [8, 9], [10]):
            tasks.append(asyncio.create_task(batcher.submit(requests)))
            await asyncio.sleep(0)
        answer.gate.set()
        results = await asyncio.gather(*tasks)
        batcher.close()
        return answer.batches, results, batcher.pending

    batches, results, pending = asyncio.run(scenario())
    assert batches == [[0], [1, 2, 3, 4, 5], [6, 7, 8, 9], [10]]
    assert results[2] == ("r1", [4, 6, 8, 10])
    assert [x for _, answers in results for x in answers] == [2 * x for x in range(11)]
    assert pending == 0


def test_a_job_waits_for_others_only_after_a_batch_of_several():
    async def scenario():
        answer = Doubling(is_open=False)
        batcher = Batcher(answer, Metrics(), max_wait=0.2)
        tasks = [await settle(batcher, answer, 0)]
        tasks += [asyncio.create_task(batcher.submit([n])) for n in (1, 2)]
        answer.gate.set()
        await asyncio.gather(*tasks)
        taken = []
        for n in (3, 4):
            start = asyncio.get_running_loop().time()
            await batcher.submit([n])
            taken.append(asyncio.get_running_loop().time() - start)
        batcher.close()
        return answer.batches, taken

    batches, (crowded, alone) = asyncio.run(scenario())
    assert batches == [[0], [1, 2], [3], [4]]
    assert alone < 0.15 < 0.19 < crowded < 1


def test_too_many_are_refused_at_once_and_those_inside_are_answered():
    async def scenario():
        answer = Doubling(is_open=False)
        batcher = Batcher(answer, Metrics(), max_batch=1, max_pending=3)
        tasks = [asyncio.create_task(batcher.submit([n])) for n in range(3)]
        await asyncio.sleep(0)
        assert batcher.full
        with pytest.raises(Overloaded):
            await batcher.submit([3])
        answer.gate.set()
        results = await asyncio.gather(*tasks)
        assert not batcher.full
        # a job larger than all the room is taken when nothing else waits: it could never be otherwise
        assert (await batcher.submit(range(5)))[1] == [0, 2, 4, 6, 8]
        batcher.close()
        return results

    assert asyncio.run(scenario()) == [("r1", [0]), ("r1", [2]), ("r1", [4])]


def test_a_cancelled_job_is_not_run():
    async def scenario():
        answer = Doubling(is_open=False)
        batcher = Batcher(answer, Metrics(), max_batch=8, max_wait=0)
        tasks = [await settle(batcher, answer, 0)]
        tasks += [asyncio.create_task(batcher.submit([n])) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        answer.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        batcher.close()
        return answer.batches, results, batcher.pending

    batches, results, pending = asyncio.run(scenario())
    assert batches == [[0], [1, 3]]
    assert isinstance(results[2], asyncio.CancelledError)
    assert results[3] == ("r1", [6])
    assert pending == 0


def test_an_error_reaches_every_waiter_and_the_thread_goes_on():
    async def scenario():
        answer = Doubling(is_open=False)
        batcher = Batcher(answer, Metrics(), max_wait=0)
        tasks = [await settle(batcher, answer, 0)]
        tasks += [asyncio.create_task(batcher.submit([x])) for x in ("bad", 1)]
        await asyncio.sleep(0)
        answer.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert await batcher.submit([5]) == ("r1", [10])
        batcher.close()
        return results

    assert [type(result) for result in asyncio.run(scenario())] == [tuple, RuntimeError, RuntimeError]
