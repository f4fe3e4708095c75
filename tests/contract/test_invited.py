"""What a real RabbitMQ makes of invitations: who is let in, whose a message is, what happens when they change."""

import asyncio
import json
import logging
import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from yarl import URL

from broker.errors import BrokerRefused, LinkError
from broker.invitation import Access, Invitation
from broker.link import Lane, Outgoing
from broker.rabbit import connect
from tests.certificates import Authority
from tests.contract.ground import RabbitGround, direct, queue, to
from tests.node import Node


async def test_the_broker_says_who_has_published_and_nobody_is_named_who_was_not_invited(
    invited_ground: RabbitGround, vhost_url: str
) -> None:
    link = await invited_ground.link()
    await link.declare(direct(queue("a")))
    plain = await connect(vhost_url, name="plain")
    async with link.consume("a") as deliveries:
        for lane in Lane:
            await link.publish(replace(to("a", b"mine"), lane=lane, headers=(("x", "y"),)))
            assert (await anext(deliveries)).user == "contract"
        await plain.publish(to("a", b"whose?"))
        assert (await anext(deliveries)).user == ""
    assert (link.vouched, plain.vouched) == (True, False)
    await plain.close()


async def test_nobody_may_publish_in_the_name_of_another(invited_ground: RabbitGround) -> None:
    link = await invited_ground.link()
    await link.declare(direct(queue("a")))
    publisher = await link._lanes[Lane.CONTROL].publisher()  # type: ignore[attr-defined]  # RabbitMQ's
    publisher._connection.user = "ada"
    with pytest.raises(BrokerRefused, match="user_id property set to 'ada' but authenticated user was 'contract'"):
        await link.publish(to("a"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another authority's broker", r"no trusted TLS connection .*CERTIFICATE_VERIFY_FAILED"),
        ("another authority's party", r"no trusted TLS connection .*UNKNOWN_CA.*ask whoever runs the federation"),
        ("another host", r"no trusted TLS connection .*CERTIFICATE_VERIFY_FAILED"),
        ("nobody the broker knows", r"does not know mallory: ask whoever runs the federation if"),
    ],
)
async def test_whoever_is_not_to_be_trusted_is_refused_with_what_to_do(
    invitation: Path, authority: Authority, how: str, said: str
) -> None:
    known, other = Invitation.read(invitation), Authority()
    issued = other.issue("contract")
    changed: dict[str, Callable[[], Invitation]] = {
        "another authority's broker": lambda: replace(known, ca=other.pem),
        "another authority's party": lambda: replace(known, certificate=issued.certificate, key=issued.key),
        "another host": lambda: replace(known, broker=known.broker.replace("127.0.0.1", "127.1")),
        "nobody the broker knows": lambda: authority.invite("mallory", known.broker),
    }
    changed[how]().write(invitation)
    with pytest.raises(BrokerRefused, match=said):
        await connect(Access.invited(invitation), name="w1")


async def test_a_certificate_that_has_ended_is_said_with_what_the_clock_says(tmp_path: Path) -> None:
    authority, file = Authority(), tmp_path / "ada.fluffle"
    own = authority.issue("localhost", days=-1, server=True)
    (tmp_path / "broker.pem").write_text(own.certificate + own.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "broker.pem")
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    async with server:
        authority.invite("ada", f"amqps://127.0.0.1:{server.sockets[0].getsockname()[1]}/x").write(file)
        said = r"no trusted TLS connection .*: certificate has expired; this machine's clock says 2\d\d\d-"
        with pytest.raises(BrokerRefused, match=said):
            await connect(Access.invited(file), name="ada")


async def test_whoever_has_no_certificate_is_not_let_in(invitation: Path, tmp_path: Path) -> None:
    known = Invitation.read(invitation)
    (tmp_path / "ca.pem").write_text(known.ca)
    url = f"{known.broker.replace('//', '//fluffle:x@')}?cafile={tmp_path}/ca.pem"
    with pytest.raises(BrokerRefused, match=r"no trusted TLS connection .*CERTIFICATE_REQUIRED"):
        await connect(url, name="w1")


async def test_a_renewed_invitation_is_used_when_the_connection_comes_back(
    invitation: Path, authority: Authority, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """By all of its connections, aio-pika's too, and nobody is started anew."""
    caplog.set_level(logging.INFO)
    known = Invitation.read(invitation)
    authority.invite("contract", known.broker, days=20).write(invitation)
    link = await connect(Access.invited(invitation), name="rotates")
    await link.declare(direct(queue("a")))
    await asyncio.sleep(0)
    assert "in 19 days: ask whoever runs the federation for a new one" in caplog.text
    authority.invite("contract", known.broker, days=700).write(invitation)
    async with link.consume("a") as deliveries:
        vhost = URL(known.broker).path[1:]
        await asyncio.to_thread(node.ctl, "close_all_connections", "--vhost", vhost, "renewal")
        with pytest.raises(LinkError, match="renewal"):
            await anext(deliveries)
    await link.publish(Outgoing("post", ("a",), b"after"))
    assert await link.depth("a") == 1
    listing = await asyncio.to_thread(
        node.ctl, "list_connections", "vhost", "peer_cert_validity", "--formatter", "json"
    )
    ends = [each["peer_cert_validity"] for each in json.loads(listing) if each["vhost"] == vhost]
    assert len(ends) >= 2
    last = datetime.now(UTC).year + 1
    assert all(str(last) in end or str(last + 1) in end for end in ends), ends
    assert caplog.text.count("is another one by now") == 1
    await link.close()
