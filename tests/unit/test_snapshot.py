"""The sums of a long round as a file: found again to the last bit, or not at all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from broker.errors import RunEnded
from broker.formats import CHUNK_ITEMS, FORMATS
from broker.messages import Attempt
from broker.tensors import Layout, TensorSpec, view
from coordinator.aggregation import MEAN, Sums
from coordinator.claim import Claim
from coordinator.history import Facts
from coordinator.round import Round
from coordinator.snapshot import FILE, Snapshot, naming, recall, tally_of
from tests.summed import finished

LAYOUT = Layout.of(
    [
        TensorSpec("big", "float32", (CHUNK_ITEMS + 5,)),
        TensorSpec("flags", "bool", (3,)),
        TensorSpec("seen", "int64", ()),
    ]
)
OF = ["run", 1, 1]


def update(seed: int, scale: float) -> memoryview:
    data = bytearray(LAYOUT.size_bytes)
    for segment in LAYOUT.segments:
        items = view(memoryview(data)[segment.start : segment.stop], segment.dtype)
        if segment.dtype == "float32":
            items[:] = np.random.default_rng(seed).standard_normal(len(items)) * scale
        else:
            items[:] = seed % 2
    return memoryview(data)


def summed(*seeds: int) -> Sums:
    sums = MEAN.init(LAYOUT, FORMATS["float32"])
    for seed in seeds:
        MEAN.add(sums, seed, update(seed, 10.0 ** (seed % 5)))
    return sums


def result(sums: Sums) -> bytearray:
    return finished(MEAN, sums, memoryview(bytearray(LAYOUT.size_bytes)))


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return Snapshot(tmp_path, Claim(tmp_path))


def test_sums_are_found_again_and_go_on_to_the_same_bits(snapshot: Snapshot, tmp_path: Path) -> None:
    assert snapshot.write(OF, {"n": 4}, summed(1, 2, 3, 4), wanted=lambda: True)
    again = summed(9)  # the memory of another turn
    again.clear()
    assert snapshot.read(OF, again) == {"n": 4}
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0  # the sum of one update is that update
    assert again.carried, "both limbs have been written"
    assert (again.updates, again.examples) == (4, 10)
    for seed in (5, 6):
        MEAN.add(again, seed, update(seed, 10.0 ** (seed % 5)))
    assert result(again) == result(summed(6, 5, 4, 3, 2, 1))


def test_what_is_not_there_is_nothing_to_speak_of(snapshot: Snapshot, caplog: pytest.LogCaptureFixture) -> None:
    assert snapshot.read(OF, summed()) is None
    assert not caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"short",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-9] + b"\x7f" + data[-8:],
        lambda data: data + b"\x00",
        lambda data: bytes(len(data)),
    ],
)
def test_damaged_sums_are_said_to_be_and_removed(
    tmp_path: Path, snapshot: Snapshot, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    snapshot.write(OF, {}, summed(1, 2), wanted=lambda: True)
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    sums = summed()
    assert snapshot.read(OF, sums) is None
    assert caplog.text.count("is of no use") == 1
    assert sums.updates == 0
    assert not (tmp_path / FILE).exists()


def test_sums_of_another_round_or_model_are_not_taken_for_this_one_s(
    snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot.write(OF, {}, summed(1), wanted=lambda: True)
    assert snapshot.read(["run", 1, 2], summed()) is None
    assert "it is of another round" in caplog.text
    snapshot.write(OF, {}, summed(1), wanted=lambda: True)
    small = MEAN.init(Layout.of([TensorSpec("big", "float32", (7,))]), FORMATS["float32"])
    assert snapshot.read(OF, small) is None
    assert small.updates == 0
    assert caplog.text.count("is of no use") == 2


def test_sums_that_are_wanted_no_longer_leave_the_former_ones(tmp_path: Path, snapshot: Snapshot) -> None:
    snapshot.write(OF, {}, summed(1), wanted=lambda: True)
    before = (tmp_path / FILE).read_bytes()
    asked = iter([True, True, False])
    assert not snapshot.write(OF, {}, summed(1, 2), wanted=lambda: next(asked))
    assert (tmp_path / FILE).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_no_sums_are_written_where_the_next_version_needs_the_room(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert not snapshot.write(OF, {}, summed(1), wanted=lambda: True)
    assert not [*tmp_path.iterdir()]


def test_a_coordinator_that_has_been_followed_writes_and_removes_nothing(tmp_path: Path) -> None:
    former, latter = Claim(tmp_path), Claim(tmp_path)
    former.begin()
    latter.begin()
    assert Snapshot(tmp_path, latter).write(OF, {}, summed(1), wanted=lambda: True)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(RunEnded):
        Snapshot(tmp_path, former).write(OF, {}, summed(2), wanted=lambda: True)
    with pytest.raises(RunEnded):
        Snapshot(tmp_path, former).drop()
    assert (tmp_path / FILE).read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".new"]


def test_a_round_is_recalled_in_every_field(snapshot: Snapshot) -> None:
    def begun() -> Round:
        made = Round(Attempt("run", 3, 2), [("a", "b", "c", "d")], quorum=2, turn_s=60.0)
        made.begin_turn(0.0)
        return made

    round_, facts = begun(), Facts()
    round_.count("a", 7)
    round_.refuse("b", "no data")
    facts.trained["a"] = {"loss": 0.5}
    facts.scored |= {"a": {"accuracy": 0.25}, "c": {"accuracy": 0.5}}
    facts.others.append({"worker": "x", "verdict": "stranger", "reason": "who?"})
    facts.bytes_down, facts.bytes_up = 11, 22
    assert snapshot.write(naming(round_, "plan"), tally_of(round_, facts), summed(1), wanted=lambda: True)
    again, known = begun(), Facts()
    tally = snapshot.read(naming(again, "plan"), summed())
    assert tally is not None
    recall(tally, again, known)
    assert (again.counted, again.refused, [*again.outstanding]) == (round_.counted, round_.refused, ["c", "d"])
    assert known == facts
