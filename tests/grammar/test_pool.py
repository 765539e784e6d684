"""Structures in real processes: what crashes is refused, what is killed is made again, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import pytest
from structures import children_of, constraint, ids_of, open_pool, processes_of

from kunserve.engine.text.constraint import GrammarConstraint
from kunserve.errors import InvalidRequestError, KunServeError, OverloadedError
from kunserve.grammar import matcher, process
from kunserve.grammar import pool as pool_module
from kunserve.grammar.compiled import Key
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.limits import RefusedError
from kunserve.grammar.pool import Pool
from kunserve.grammar.process import Process

DIGITS: Key = ("regex", "[0-9]{1,60}z")


def ref_chain(length: int) -> str:
    definitions = ",".join(f'"{i}":{{"items":{{"$ref":"#/$defs/{i + 1}"}}}}' for i in range(length))
    return f'{{"$ref":"#/$defs/0","$defs":{{{definitions},"{length}":{{"type":"string"}}}}}}'


def rule_chain(length: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(length)) + f'\nr{length}: "a"'


BOMBS: dict[str, Key] = {
    "a chain of references": ("json", ref_chain(1500)),
    "a chain of rules": ("grammar", rule_chain(3500)),
    "a large regex": ("regex", "(a|b)*" * 8000),
}


def watch_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is compiled from now on, in order."""
    begun: list[str] = []
    start = Process.start

    async def watched(*arguments: object) -> object:
        begun.append(str(arguments[2]))
        return await start(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Process, "start", watched)
    return begun


async def spell(place: GrammarConstraint, text: str) -> list[set[int] | None]:
    """Take the bytes of `text`; return what was allowed before each."""
    masks = []
    for num_accepted, byte in enumerate(text.encode()):
        masks.append(await asyncio.to_thread(ids_of, place.mask(num_accepted)))
        place.accept(byte)
        await place.decided()
        assert place.error is None
    return masks


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_true():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_refused_and_remembered_and_others_go_on(name: str) -> None:
    key = BOMBS[name]
    deaths: list[str] = []
    async with open_pool(on_death=deaths.append) as pool:
        other = await constraint(pool, DIGITS)
        masks = await spell(other, "12")
        for _ in range(2):
            with pytest.raises(RefusedError, match=r"nested too deeply|1 s of CPU"):
                await pool.compile(key, "x")
            assert deaths in (["crash"], ["cpu"])  # once: it was not tried again
        assert await spell(other, "34z") == [masks[1]] * 3
        assert other.is_finished


def kill_process(pool: Pool) -> None:
    for pid in processes_of(pool):
        os.kill(pid, signal.SIGKILL)


def kill_fork_server(pool: Pool) -> None:
    assert pool.fork_server_pid is not None
    os.kill(pool.fork_server_pid, signal.SIGKILL)


def crash_process(pool: Pool) -> None:
    for pid in processes_of(pool):
        os.kill(pid, signal.SIGSEGV)


@pytest.mark.parametrize("kill", [kill_process, kill_fork_server, crash_process])
@pytest.mark.parametrize("is_waiting", [False, True])
async def test_who_is_killed_goes_on_exactly(kill: Callable[[Pool], None], is_waiting: bool) -> None:
    text = "0123456789z"
    async with open_pool() as pool:
        expected = await spell(await constraint(pool, DIGITS), text)
        first, second = [await constraint(pool, DIGITS) for _ in range(2)]
        found, others = await spell(first, text[:4]), await spell(second, text[:2])
        stopped = processes_of(pool)
        if is_waiting:  # for an answer that does not come
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            first.accept(ord(text[4]))
            expected.pop(4)
        kill(pool)
        if is_waiting and kill is crash_process:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        await until(lambda: not set(stopped) & set(processes_of(pool)))  # on a busy machine one may answer until then
        found += await spell(first, text[4 + is_waiting :])
        others += await spell(second, text[2:])
        assert found == expected
        assert len(others) == len(text) and first.is_finished and second.is_finished


async def waiting(pool: Pool, num: int) -> list[GrammarConstraint]:
    """Constraints that wait for an answer of a process that was stopped."""
    places = [await constraint(pool, DIGITS) for _ in range(num)]
    for place in places:
        await spell(place, "1")
    for pid in processes_of(pool):
        os.kill(pid, signal.SIGSTOP)
    for place in places:
        place.accept(ord("2"))
    return places


async def test_who_ends_its_processes_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "MAX_OWN_DEATHS", 1)
    async with open_pool() as pool:
        other = await constraint(pool, ("regex", "ab"))
        await spell(other, "a")
        [kept] = processes_of(pool)
        [place] = await waiting(pool, 1)
        masks = asyncio.create_task(asyncio.to_thread(ids_of, place.mask(2)))
        os.kill(kept, signal.SIGCONT)
        for pid in set(processes_of(pool)) - {kept}:
            os.kill(pid, signal.SIGSEGV)
            os.kill(pid, signal.SIGCONT)
        await place.decided()
        assert isinstance(place.error, InvalidRequestError) and "cannot be used" in place.error.message
        assert await masks is None  # whoever samples goes on: the request ends with its next token
        with pytest.raises(RefusedError):
            await pool.compile(DIGITS, "x")
        assert await spell(other, "b") == [{ord("b")}]


async def test_who_is_killed_again_and_again_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "MAX_DEATHS", 1)
    async with open_pool() as pool:
        places = await waiting(pool, 3)
        kill_process(pool)
        for place in places:
            await place.decided()
            assert isinstance(place.error, OverloadedError)
        await pool.compile(DIGITS, "x")  # which is no fault of the structure's


async def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ANSWER_S", 0.2)
    for name in ("MAX_OWN_DEATHS", "MAX_DEATHS"):  # a busy machine may seem to hang as well
        monkeypatch.setattr(matcher, name, 1000)
    deaths: list[str] = []
    async with open_pool(on_death=deaths.append) as pool:
        [place] = await waiting(pool, 1)
        await place.decided()
        assert deaths and set(deaths) == {"hung"} and place.error is None
        assert await spell(place, "3z") and place.is_finished


async def test_requests_that_come_together_are_compiled_for_once() -> None:
    async with open_pool() as pool:
        first, second = await asyncio.gather(*(pool.compile(DIGITS, owner) for owner in ("a", "b")))
        assert first is second is await pool.compile(DIGITS, "c")
        assert len(processes_of(pool)) == 1


async def test_clients_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiles at a time here; which one is next depends on what its client has had, not on when it came."""
    begun = watch_starts(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # one for the compiler
    async with open_pool() as pool:
        asked: list[Awaitable[object]] = [pool.compile(("regex", f"a{i}"), "flood") for i in range(6)]
        asked += [pool.compile(("regex", "b"), "other")]
        await asyncio.gather(*asked)
    assert begun[0] == "a0" and begun.index("b") == 1 and begun[2:] == [f"a{i}" for i in range(1, 6)]


async def test_nothing_is_compiled_for_a_client_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = watch_starts(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    async with open_pool() as pool:
        first = asyncio.create_task(pool.compile(DIGITS, "x"))
        left, stays = [asyncio.create_task(pool.compile(("regex", name), "x")) for name in "ab"]
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(first, stays)
    assert begun == [DIGITS[1], "b"]


async def test_many_requests_of_a_structure_share_a_few_processes() -> None:
    async with open_pool() as pool:
        pool.num_cores = 2
        places = [await constraint(pool, DIGITS) for _ in range(30)]
        for place in places:
            await spell(place, "7")
        await until(lambda: len(processes_of(pool)) == 2)
        for place in places:
            assert await spell(place, "z") is not None and place.is_finished


async def test_unused_processes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_S", 0.02)
    async with open_pool() as pool:
        used, unused = await constraint(pool, DIGITS), await constraint(pool, ("regex", "ab"))
        await spell(used, "1")
        await spell(unused, "a")
        unused.close()
        await until(lambda: len(processes_of(pool)) == 1)
        assert await spell(used, "2z") and used.is_finished
        await until(lambda: not processes_of(pool))


async def test_room_is_made_for_new_ones_and_old_ones_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_PROCESSES", 3)
    async with open_pool() as pool:
        places = [await constraint(pool, ("regex", f"{i}abc")) for i in range(8)]
        for i, place in enumerate(places):
            assert await spell(place, str(i)) == [{ord(str(i))}]
        assert len(processes_of(pool)) <= 4
        for place in places:
            assert (await spell(place, "abc"))[0] == {ord("a")} and place.is_finished


async def test_few_processes_that_nobody_follows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_IDLE", 2)
    async with open_pool() as pool:
        followed = await constraint(pool, DIGITS)
        await spell(followed, "1")
        [kept] = processes_of(pool)
        for i in range(6):
            place = await constraint(pool, ("regex", f"{i}abc"))
            await spell(place, str(i))
            place.close()
        await until(lambda: len(processes_of(pool)) <= 4)  # it, two, and the one that came last
        assert kept in processes_of(pool)
        assert await spell(followed, "2z") and followed.is_finished


async def test_a_vocabulary_that_cannot_be_used() -> None:
    async with open_pool(Vocabulary(lambda: "no tokenizer", 300, ())) as pool:
        with pytest.raises(KunServeError, match="vocabulary cannot be used"):
            await pool.compile(DIGITS, "x")


async def test_nothing_is_left_after_the_end() -> None:
    async with open_pool() as pool:
        await spell(await constraint(pool, DIGITS), "1")
        await waiting(pool, 1)
        left = [pool.fork_server_pid, *processes_of(pool)]
        assert len(left) == 2
    await until(lambda: not any(pid and os.path.exists(f"/proc/{pid}") for pid in left))


def test_nothing_is_left_when_the_server_is_killed() -> None:
    code = """
import asyncio, os
from structures import constraint, open_pool, processes_of
async def main():
    async with open_pool() as pool:
        places = [await constraint(pool, ("regex", name)) for name in "ab"]
        asyncio.create_task(pool.compile(("regex", "(a|b)*" * 8000), "x"))  # busy: it reads nothing
        while len(processes_of(pool)) < 3:
            await asyncio.sleep(0.01)
        print(pool.fork_server_pid, *processes_of(pool), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as server:
        assert server.stdout is not None
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 4
        assert set(children_of(server.pid)) == {pids[0]}
        server.kill()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


async def test_structures_run_below_the_server() -> None:
    async with open_pool() as pool:
        await pool.compile(("regex", "a"), "x")
        [pid] = processes_of(pool)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, own + 10)
