"""Secure rounds: only the sum is seen, it is the plain sum's bits, and whoever drops out or dies costs no more."""

from pathlib import Path

from tests.system.rig import SECURE, federation, secure_expected

NAMES = ("a", "b", "c", "d", "e")


async def test_a_secure_run_makes_the_versions_of_the_plain_sums_to_the_last_bit(tmp_path: Path) -> None:
    async with federation(tmp_path, **SECURE, cohort=5, quorum=5) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert fed.weights() == secure_expected(fed.store.plan, [NAMES, NAMES])
        line = fed.lines("round")[-1]
        assert line["secure"]["of"] == list(NAMES)
        assert line["counted"] == {name: {"examples": 0, "metrics": {}} for name in NAMES}
        assert line["metrics"] == {"loss": 0.5}
