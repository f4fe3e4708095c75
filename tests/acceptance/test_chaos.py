"""Whatever is killed, stopped, cut or deleted, and whenever: the run ends by itself, with an undisturbed run's bits.

Real RabbitMQ, real processes, a network that fails, and faults drawn from a seed.
"""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.chaos import KINDS, Arena, handles, resident, schedule
from tests.acceptance.proxy import Network
from tests.node import Node

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what processes hold is read in /proc"),
]
QUIET = 6
"""Rounds after the last fault: what was left behind would show in them."""
MB = 1_000_000

MakeArena = Callable[..., Arena]


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[MakeArena]:
    """Makes one federation with its broker and its network, all of it ended with the test."""
    with Node(tmp_path / "rabbitmq") as node, Network(port_of(node.url)) as network:
        made: list[Arena] = []

        def make(**how: int) -> Arena:
            made.append(Arena(tmp_path, node, network, **how))
            return made[0]

        yield make
        for each in made:
            each.end()


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1].rstrip("/"))


def undisturbed(a: Arena, rounds: int) -> bytes:
    """All workers, and the last version of a run that nothing happens to."""
    for worker in a.workers:
        a.start(worker)
    a.begin("undisturbed", rounds)
    a.suffer((), within_s=120.0)
    assert_whole(a, rounds)
    return a.federation.version(rounds)


def assert_whole(a: Arena, rounds: int) -> None:
    """Every version was made once, and of one update of each worker."""
    assert [(line["round"], sorted(line["counted"])) for line in a.federation.rounds()] == [
        (number, a.workers) for number in range(1, rounds + 1)
    ]


def files(folder: Path) -> set[str]:
    return {each.relative_to(folder).as_posix() for each in folder.rglob("*")}


def assert_nothing_left(a: Arena) -> None:
    """No file of a model, no message, no queue of a run; the workers leave when they are told to.

    An owner's ledger is kept on purpose, and only ever grows: some 400 bytes for each task and each update.
    """
    f = a.federation
    assert files(f.run) == files(f.folder / "undisturbed")
    for worker in a.workers:
        assert f.kill(worker, signal.SIGTERM) == 0, f.log(worker)[-600:]
    state = [each for each in (f.folder / "state").rglob("*") if each.is_file()]
    left = {each: each.stat().st_size for each in state if each.suffix != ".ledger"}
    assert sum(left.values()) < 65536, left
    queues = {"dead"} | {f"{kind}.{worker}" for kind in ("down", "control", "upload") for worker in a.workers}
    assert a.depths() == dict.fromkeys((f"fluffle.{queue}" for queue in queues), 0)


def endure(a: Arena, seed: int, count: int, *, within_s: float, record: Callable[[str, object], None]) -> None:
    faults = schedule(seed, count, a.workers)
    rounds = faults[-1].round + QUIET
    bits = undisturbed(a, rounds)
    f, quiet_handles, quiet_memory = a.federation, a.handles, a.memory
    before = {worker: handles(f.processes[worker].pid) for worker in a.workers}
    a.handles = a.memory = 0
    a.begin("run", rounds)
    a.suffer(faults, within_s=within_s)
    record("faults", dict(a.counts()))
    story = f"seed {seed}\n{a.story(faults)}"
    assert len(a.struck) == count
    assert f.version(rounds) == bits, story
    assert_whole(a, rounds)
    assert a.handles <= quiet_handles + 4, story
    assert a.memory <= quiet_memory + 16 * MB, story
    after = {worker: handles(f.processes[worker].pid) for worker in a.workers}
    assert all(after[worker] <= before[worker] + 4 for worker in a.workers), (before, after, story)
    assert_nothing_left(a)


SHORT = 13245
"""The seed of the short form: its first nine faults are of nine kinds, everything killed once."""


def test_a_run_ends_with_the_same_bits_under_a_handful_of_faults(
    arena: MakeArena, record_property: Callable[[str, object], None]
) -> None:
    endure(arena(workers=2), SHORT, 9, within_s=150.0, record=record_property)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("seed", "floats"), [(101, 1000), (102, 1000), (103, 1_000_000), (104, 1000)])
def test_a_run_ends_with_the_same_bits_under_fifty_faults_and_more(
    arena: MakeArena, record_property: Callable[[str, object], None], seed: int, floats: int
) -> None:
    endure(arena(workers=3 + seed % 2, floats=floats), seed, 54, within_s=1200.0, record=record_property)


def test_the_same_seed_gives_the_same_schedule_and_a_deck_has_every_kind() -> None:
    workers = ["w1", "w2", "w3"]
    assert schedule(7, 60, workers) == schedule(7, 60, workers) != schedule(8, 60, workers)
    deck = sum(cards for *_, cards in KINDS.values())
    assert {fault.kind for fault in schedule(7, deck, workers)} == set(KINDS)
    assert schedule(7, 10, workers) == schedule(7, 60, workers)[:10]


DARK_S = 90.0


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_broker_that_is_dark_for_90_s_in_the_middle_of_uploads_costs_no_upload_more_than_one_new_start(
    arena: MakeArena,
) -> None:
    floats = 10_000_000
    a = arena(workers=2, floats=floats)
    bits = undisturbed(a, 1)
    lines = [a.lines[worker] for worker in a.workers]
    for line in lines:
        line.slow(8 * MB)
    began = [line.carried["up"] for line in lines]

    def carried() -> list[int]:
        return [line.carried["up"] - before for line, before in zip(lines, began, strict=True)]

    a.begin("run", 1)
    a.federation.until(lambda: min(carried()) > 12 * MB)
    assert max(carried()) < 36 * MB  # both are in the middle
    for line in a.lines.values():
        line.stop()
    time.sleep(DARK_S)  # it is dark: there is no event to wait for
    for line in a.lines.values():
        line.go()
    a.suffer((), within_s=240.0)
    assert a.federation.version(1) == bits
    assert_whole(a, 1)
    assert all(4 * floats < each < 2.2 * 4 * floats for each in carried()), carried()
    assert_nothing_left(a)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_connections_of_which_only_one_end_is_left_are_noticed_by_whoever_has_it(arena: MakeArena) -> None:
    a = arena(workers=3)
    bits = undisturbed(a, 6)
    a.begin("run", 6, gate=2)
    a.federation.until(lambda: a.made() == 2)
    assert a.lines["coordinator"].halve("broker") >= 2
    assert a.lines["w1"].halve("broker") >= 2
    assert a.lines["w2"].halve("party") >= 2
    a.suffer((), within_s=300.0)
    assert a.federation.version(6) == bits
    assert_whole(a, 6)
    assert "no sign of life" in a.federation.log("w1") + a.federation.log("coordinator")
    assert_nothing_left(a)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_memory_and_handles_stay_flat_over_200_rounds(arena: MakeArena) -> None:
    a = arena(workers=2)
    for worker in a.workers:
        a.start(worker)
    f = a.federation
    a.begin("undisturbed", 200, gate=50, nap=0.0)

    def held() -> dict[str, tuple[int, int]]:
        return {who: (resident(process.pid), handles(process.pid)) for who, process in f.processes.items()}

    f.until(lambda: a.made() == 50)
    early = held()
    a.open_gate(199)
    f.until(lambda: a.made() == 199)
    # a file that is being sealed behind the round's back is open for a moment
    f.until(lambda: all(now[1] <= early[who][1] for who, now in held().items()))
    late = held()
    a.suffer((), within_s=60.0)
    assert_whole(a, 200)
    assert all(late[who][0] - early[who][0] < 6 * MB for who in early), (early, late)
    assert_nothing_left(a)
