"""Runs that keep their updates: each version is made again to the bit, and whatever was changed since is found."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.errors import UsageError
from broker.files import checksum
from broker.messages import Update
from coordinator import updates
from coordinator.replay import replay
from coordinator.store import Store
from coordinator.verify import verify
from tests.system.rig import MODEL, federation, start_weights
from tests.system.test_rounds import NAMES, when

WAYS: list[dict[str, Any]] = [
    {"format": "float32"},
    {"format": "bfloat16"},
    {"format": "int8"},
    {"format": "top-k", "keep": 0.05},
    {"format": "int8", "down": "int8"},
    {"down": "bfloat16"},
    {"schedule": "cyclic", "workers": ("c", "a", "b")},
    {"schedule": "cyclic", "format": "top-k", "keep": 0.5},
]


async def run_in(folder: Path, **words: Any) -> Store:
    """A run of three rounds, at its end."""
    async with federation(folder, **{"rounds": 3, "keep_updates": True, **words}) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert not any(kept.stat().st_mode & 0o077 for kept in (fed.run / updates.FOLDER).glob("*"))
        return fed.store


def bad(store: Store, **words: str) -> list[str]:
    """What `verify` finds that is not as it was written."""
    return [finding.said for finding in verify(store.folder, **words)[0] if finding.bad]


def spoil(path: Path, at: int = -1) -> None:
    """Change one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("words", WAYS, ids=lambda words: "-".join(str(value) for value in words.values()))
async def test_every_version_is_made_again_from_the_updates_that_were_kept(
    tmp_path: Path, words: dict[str, Any]
) -> None:
    store = await run_in(tmp_path, **words)
    assert verify(store.folder)[0] == []
    assert [replay(store, to, to - 1) for to in (1, 2, 3)] == [(3, [])] * 3
    assert replay(store, 3, 0) == (9, [])
    assert replay(store, 3, 1) == (6, [])
    before = sorted(store.folder.rglob("*"))
    with pytest.raises(UsageError, match="version 3 cannot be made from version 3: name an earlier one"):
        replay(store, 3, 3)
    with pytest.raises(UsageError, match=r"has no round that made version 4\."):
        replay(store, 5, 2)
    assert sorted(store.folder.rglob("*")) == before, "to look at a run leaves it as it was"


async def test_the_line_of_a_round_vouches_for_its_version_and_its_updates(tmp_path: Path) -> None:
    store = await run_in(tmp_path)
    rounds = [line for line in store.history() if line["event"] == "round"]
    assert [line["weights"] for line in rounds] == [checksum(store.load(n)[1]) for n in (1, 2, 3)]
    assert [line.get("start") for line in rounds] == [checksum(memoryview(start_weights())), None, None]
    assert [set(line["updates"]) for line in rounds] == [set(NAMES)] * 3
    assert min(updates.sizes(store.folder)) > MODEL.size_bytes
    assert len(list(updates.sizes(store.folder))) == 9


async def test_a_run_that_keeps_no_updates_says_so_when_a_version_is_to_be_made_again(tmp_path: Path) -> None:
    store = await run_in(tmp_path, keep_updates=False)
    assert not (store.folder / "updates").exists()
    assert verify(store.folder)[0] == []
    with pytest.raises(
        UsageError, match=r"the updates of a, b, c are not in .*000002\. A run keeps them if .*--keep-u"
    ):
        replay(store, 2, 1)


async def test_an_update_is_kept_before_anyone_is_told_and_in_every_life_of_the_coordinator(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=4, keep_updates=True) as fed:
        for number, name in enumerate(NAMES, 3):
            fed.join(name).wire.hook = when(Update, number, fed.kill)
        await fed.end()
        assert fed.counted() == [list(NAMES)] * 4
        assert verify(fed.run)[0] == []
        assert replay(fed.store, 4, 0) == (12, [])


async def test_what_a_round_has_not_counted_is_not_kept(tmp_path: Path) -> None:
    store = await run_in(tmp_path, rounds=1)
    folder = updates.folder_of(store.folder, 1)
    for name in ("late.update", ".a.update.7.new"):
        (folder / name).write_bytes(b"x")
    assert bad(store) == [f"{folder / 'late.update'} was not counted: move it elsewhere."]
    assert sorted(updates.settle(store.folder, 1, NAMES)) == list(NAMES)
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.update" for name in NAMES]


async def test_a_full_disk_ends_the_coordinator_with_a_sentence_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(tmp_path, rounds=2, keep_updates=True) as fed:
        for name in NAMES:
            fed.join(name)

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(updates, "draft_version", full)
            with pytest.raises(UsageError, match=r"000001/.\.update cannot be written \(No space"):
                await fed.end()
        assert fed.lines() == []
        await fed.end()
        assert fed.counted() == [list(NAMES)] * 2
        assert replay(fed.store, 2, 0) == (6, [])


# -- what was changed afterwards ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run that tests make copies of."""
    return asyncio.run(run_in(tmp_path_factory.mktemp("made")))


@pytest.fixture
def copy(made: Store, tmp_path: Path) -> Store:
    shutil.copytree(made.folder, tmp_path / "run")
    return Store.open(tmp_path / "run")


def test_a_version_with_a_changed_byte_is_found_and_told_from_what_its_updates_make(copy: Store) -> None:
    spoil(copy.path(2))
    assert bad(copy) == [f"{copy.path(2)} is not what the history speaks of: its bytes have changed. Restore it."]
    assert replay(copy, 2, 1) == (3, ["b: 1 of 1000 numbers, by at most 0.015625"])
    with pytest.raises(UsageError, match=r"000002\.safetensors is not the version 2 of this run's history"):
        replay(copy, 3, 2)
    assert replay(copy, 3, 1) == (6, []), "there is a way around it"


def test_what_differs_is_said_tensor_by_tensor(copy: Store) -> None:
    raw = bytearray(copy.path(1).read_bytes())
    first = len(raw) - MODEL.size_bytes + MODEL.offsets["w"]
    floats = np.frombuffer(raw, np.float32, 132_000, first).copy()
    floats[[5, -1]] += 0.5
    raw[first : first + floats.nbytes] = floats.tobytes()
    copy.path(1).write_bytes(raw)
    assert replay(copy, 1, 0).differences == ["w: 2 of 132000 numbers, by at most 0.5"]
    copy.path(1).unlink()
    (said,) = replay(copy, 1, 0).differences
    assert said.endswith("000001.safetensors cannot be read: No such file or directory")


def test_an_update_with_a_changed_byte_is_found(copy: Store) -> None:
    where = updates.path(copy.folder, 2, "b")
    spoil(where)
    said = f"{where} is not what was counted: its bytes have changed since; restore it."
    assert bad(copy) == [said]
    with pytest.raises(UsageError) as caught:
        replay(copy, 3, 1)
    assert str(caught.value) == said


def test_an_update_that_was_removed_or_put_in_anothers_place_is_found(copy: Store) -> None:
    a, b = (updates.path(copy.folder, 1, name) for name in "ab")
    shutil.copy(a, b)
    assert bad(copy) == [f"{b} is not the update of b for version 1: put the right file back."]
    b.unlink()
    assert bad(copy) == [f"{b} cannot be read: No such file or directory."]
    with pytest.raises(UsageError, match="version 1 cannot be made again: the updates of b are not in"):
        replay(copy, 2, 0)
    shutil.rmtree(a.parent)
    assert verify(copy.folder)[0] == [("the updates of version 1 are not kept any more.", False)]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda run: (run / "versions/000002.safetensors").unlink(), "000002.safetensors is missing: restore it"),
        (lambda run: (run / "versions/000003.safetensors").unlink(), "000003.safetensors is missing: restore it"),
        (lambda run: spoil(run / "versions/000000.safetensors"), "000000.safetensors is not what the history speaks"),
        (lambda run: spoil(run / "versions/000001.safetensors", 3), "000001.safetensors is damaged or not a version"),
        (lambda run: (run / "versions/best.pt").touch(), "best.pt is not one of this run's versions: move it"),
        (lambda run: (run / "versions/7.safetensors").touch(), "7.safetensors is not one of this run's versions"),
        (
            lambda run: shutil.copy(run / "versions/000003.safetensors", run / "versions/000002.safetensors"),
            "000002.safetensors is not version 2 of this run: its fluffle_version is 3, not 2",
        ),
        (
            lambda run: shutil.copy(run / "versions/000003.safetensors", run / "versions/000004.safetensors"),
            "000004.safetensors has no line in the history; if its coordinator was stopped there",
        ),
        (lambda run: (run / "plan.toml").write_text("rounds = "), "plan.toml is not TOML"),
        (
            lambda run: (run / "history.jsonl").write_bytes(
                (run / "history.jsonl").read_bytes().replace(b'"examples":', b'"examples":1', 1)
            ),
            "line 1 of the history does not follow from the beginning: it was changed, or a line between them",
        ),
    ],
)
def test_whatever_is_not_as_it_was_written_is_named(
    copy: Store, change: Callable[[Path], object], found: str
) -> None:
    assert bad(copy) == []
    change(copy.folder)
    assert any(found in said for said in bad(copy)), bad(copy)


def test_a_history_that_was_written_anew_is_found_by_whoever_remembers_its_chain(copy: Store) -> None:
    file, lines = copy.folder / "history.jsonl", copy.history()
    remembered = json.loads(file.read_bytes().splitlines()[-1])["chain"]
    assert remembered in verify(copy.folder)[1]
    copy.note({"event": "score", "version": 3, "worker": "z", "metrics": {}, "at": 1.0})
    assert bad(copy, remembered=remembered) == []
    file.unlink()
    for line in lines[1:]:
        copy.note(line)
    assert any("has the chain" in said for said in bad(copy, remembered=remembered))


def test_the_first_versions_need_not_be_kept(copy: Store) -> None:
    for number in (0, 1):
        copy.path(number).unlink()
    assert verify(copy.folder)[0] == [("the versions before 2 are not kept: nothing can be said of them.", False)]
    assert replay(copy, 3, 2) == (3, [])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["a", "../x", "z\0", "round"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@given(st.integers(0, 3), st.booleans(), st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_line_is_made_to_say_is_found_in_a_sentence(
    made: Store, where: int, keyed: bool, data: st.DataObject
) -> None:
    file = made.folder / "history.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines()
    line = json.loads(lines[where])
    line[data.draw(st.sampled_from(sorted(line)))] = data.draw(ANYTHING)
    lines[where] = json.dumps(line, sort_keys=keyed, separators=(",", ":")).encode()
    if lines == whole.splitlines():
        return
    try:
        file.write_bytes(b"\n".join(lines) + b"\n")
        assert any(f"line {where + 1}" in said for said in bad(made))
        if where < 3:
            with contextlib.suppress(UsageError):
                replay(made, where + 1, where)
    finally:
        file.write_bytes(whole)


@given(st.integers(0, 2), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_byte_of_a_versions_numbers_goes_unnoticed(made: Store, number: int, data: st.DataObject) -> None:
    path, whole = made.path(number), made.path(number).read_bytes()
    try:
        spoil(path, -data.draw(st.integers(1, MODEL.size_bytes)))
        assert bad(made) == [f"{path} is not what the history speaks of: its bytes have changed. Restore it."]
    finally:
        path.write_bytes(whole)
