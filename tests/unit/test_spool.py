"""Room for models: used again when nobody looks at it any more, never before, and never more than there is."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import LearnerFailed, UsageError
from broker.messages import PART_BYTES_MIN, Payload
from broker.parts import split
from broker.tensors import Layout, TensorSpec
from workers import spool as spools
from workers.spool import Spool

LARGE = 64 * 1024 + 1
MODEL = Layout.of([TensorSpec("w", "float32", (200_000,))])


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "models", workers=30)
    yield made
    made.remove()
    assert not (tmp_path / "models").exists()


def payload(name: str = "p") -> Payload:
    return Payload(name, PART_BYTES_MIN, MODEL.specs)


def files(spool: Spool) -> list[str]:
    return sorted(file.name for file in spool.folder.iterdir())


def test_a_model_without_bytes_has_a_place_too(spool: Spool) -> None:
    assert [len(spool.take(0).data) for _ in range(2)] == [0, 0]


def test_a_model_lies_in_a_file_where_another_process_finds_it(spool: Spool) -> None:
    one, two, three = (spool.take(LARGE) for _ in range(3))
    assert not any(slot.file[0].stat().st_mode & 0o077 for slot in (one, two, three)), "whoever reads it reads rows"
    for number, slot in enumerate((one, two, three)):
        slot.data[:] = bytes([number + 1]) * LARGE
    for number, slot in enumerate((one, two, three)):
        path, at = slot.file
        assert path.read_bytes()[at : at + LARGE] == bytes([number + 1]) * LARGE


def test_a_slot_is_used_again_when_nobody_looks_at_it(spool: Spool) -> None:
    first = spool.take(LARGE)
    place = first.file
    del first
    again = spool.take(LARGE)
    assert again.file == place
    assert len(files(spool)) == 1


def test_a_slot_is_not_used_again_while_somebody_looks_at_a_piece_of_it(spool: Spool) -> None:
    first = spool.take(LARGE)
    place, piece = first.file, first.data[5:10]
    del first
    assert spool.in_use == 1
    other = spool.take(LARGE)
    assert other.file != place
    del piece
    assert spool.in_use == 1


def test_many_slots_take_few_files_and_no_more_than_twice_their_room(spool: Spool) -> None:
    slots = [spool.take(400_000) for _ in range(300)]
    assert spool.in_use == len(slots)
    assert len(files(spool)) < 12
    assert sum(file.stat().st_size for file in spool.folder.iterdir()) < 2 * 300 * 404_000
    assert len({slot.file for slot in slots}) == len(slots)


def test_slots_that_come_and_go_take_the_room_of_those_that_are_there_at_once(spool: Spool) -> None:
    for _ in range(50):
        slots = [spool.take(LARGE) for _ in range(3)]
        del slots
    assert sum(file.stat().st_size for file in spool.folder.iterdir()) <= 4 * (LARGE + spools.PAGE_BYTES)


def test_a_full_disk_is_a_refusal_that_says_where(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as no_room:
        no_room.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            LearnerFailed, match=r"no room for 69,632 bytes of models \(No space left on device\): make"
        ):
            spool.take(LARGE)
        assert files(spool) == []
    assert spool.take(LARGE).file is not None


def test_a_limit_on_the_size_of_files_is_a_refusal_and_not_a_crash(spool: Spool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(LearnerFailed, match=r"no room for .* bytes of models \(File too large\)"):
            spool.take(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_an_earlier_process_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("0.models", "17.models", "ann.run.left", "ann.run.residual"):
        (folder / name).write_bytes(b"x")
    made = Spool(folder)
    assert files(made) == ["ann.run.residual"]
    made.remove()
    assert files(made) == ["ann.run.residual"]  # what is owed outlives the process


def test_a_folder_that_is_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    slot = first.take(LARGE)
    with pytest.raises(UsageError, match="is in use: give this worker another --name"):
        Spool(tmp_path)
    assert slot.file[0].exists()
    first.remove()
    Spool(tmp_path).remove()


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"cannot be used for this worker's files \(Not a directory\): choose another"
    ):
        Spool(tmp_path / "file" / "deeper")


# -- landing ---------------------------------------------------------------------------------------------------------


def test_a_payload_lands_once_for_all_who_expect_it(spool: Spool) -> None:
    data = memoryview(os.urandom(MODEL.size_bytes))
    ann, ben = spool.expect(payload()), spool.expect(payload())
    assert ann is ben
    parts = list(split(payload(), data))
    for part in parts[:2]:
        ann.parts.add(part)
    for part in parts[1:]:
        assert not ann.parts.complete
        ben.parts.add(part)
    assert ann.parts.complete
    assert ann.slot.data == data
    assert spool.in_use == 1
    late = spool.expect(payload())
    assert late.parts.complete
    del ann, ben, late
    assert spool.in_use == 0
    assert not spool.expect(payload()).parts.complete, "nobody had it any more"


def test_another_payload_lands_elsewhere_and_so_does_one_that_only_has_the_same_name(spool: Spool) -> None:
    landings = [spool.expect(payload("p")), spool.expect(payload("q"))]
    landings.append(spool.expect(Payload("p", 2 * PART_BYTES_MIN, MODEL.specs)))
    assert len({landing.slot.file for landing in landings}) == 3


def test_the_newest_versions_are_held_and_older_ones_are_not(spool: Spool) -> None:
    held = []
    for number in range(4):
        landing = spool.expect(payload(f"p{number}"))
        landing.weights = landing.slot
        held.append(spool.hold(("run", number), landing))
        assert held[-1].weights is landing.slot
    del landing
    assert [each.weights is not None for each in held] == [False, False, True, True]
    assert spool.in_use == spools.HELD_MAX
    assert spool.expect(payload("p3")) is held[3].landing(), "whoever is sent it late finds it"


def test_models_of_ever_other_sizes_do_not_pile_up(spool: Spool) -> None:
    """A coordinator asks for an update of another length each time; what is in use stays where it is."""
    held = [spool.take(LARGE), spool.take(LARGE)]
    for slot in held:
        slot.data[:] = b"x" * LARGE
    del slot, held[1]  # there is room left of this size
    for number in range(1, 50):
        several = [spool.take(LARGE + number) for _ in range(3)]
        assert all(other.file for other in several)
        del several
    assert sum(file.stat().st_size for file in spool.folder.iterdir()) < (spools.SIZES_MAX + 1) * 4 * 2 * LARGE
    assert held[0].data == b"x" * LARGE
    place = held[0].file
    assert spool.take(LARGE).file != place
