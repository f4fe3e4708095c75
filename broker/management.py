"""RabbitMQ's management pages, as far as a federation's operator needs them.

Knows HTTP, TLS and the answers. Does not know what is asked, nor why. No redirect is followed and no proxy used:
the password goes to the one address that was named.
"""

import http.client
import json
import ssl
import time
from base64 import b64encode
from typing import Any
from urllib.parse import quote

from yarl import URL

from broker.errors import BrokerRefused, LinkError, UsageError
from broker.invitation import is_loopback, strict, url_of

ANSWER_S = 20.0
"""How long RabbitMQ may take to connect, and again for each answer."""
PAUSES_S = (0.1, 0.2, 0.4, 0.8)
"""How long before what may be asked twice is asked again."""


def checked(url: str) -> URL:
    """The address of management pages.

    Raises:
        UsageError: it is none, or a password would travel unsecured; the sentence does not repeat it.
    """
    parsed = url_of(url, "http", "https")
    if parsed is None:
        raise UsageError("--management must look like https://USER:PASSWORD@HOST:PORT, or without USER:PASSWORD.")
    if parsed.scheme == "http" and not is_loopback(parsed.host or ""):
        raise UsageError(f"a password for {parsed.host} must not travel unsecured: use https in --management.")
    return parsed


class Management:
    """One user's way to the pages.

    Args:
        url: where they are, as `checked`; the user in it is not looked at.
        login: name and password.
        ca: who may vouch for them, as PEM.
        public: those whom this machine trusts may, too.
    """

    def __init__(self, url: URL, login: tuple[str, str], ca: str, *, public: bool = False) -> None:
        self._where = f"{url.host}:{url.port}"
        self._user = login[0]
        self._headers = {
            "Authorization": "Basic " + b64encode(":".join(login).encode()).decode(),
            "Content-Type": "application/json",
        }
        assert url.host
        if url.scheme == "https":
            context = strict(ssl.create_default_context(cadata=ca))
            if public:
                context.load_default_certs()
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                url.host, url.port, timeout=ANSWER_S, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(url.host, url.port, timeout=ANSWER_S)

    def ask(self, method: str, *path: str, body: object = None) -> Any:
        """One request to `/api/PATH…`; its answer, True when that is empty, None when there is no such thing.

        Raises:
            LinkError: nobody answers there.
            BrokerRefused: it says no, or is not to be trusted.
        """
        page = "/api/" + "/".join(quote(part, safe="") for part in path)
        for pause_s in (*(PAUSES_S if method != "POST" else ()), 0.0):
            status, text = self._once(method, page, body)
            if status < http.client.INTERNAL_SERVER_ERROR:  # of what goes away meanwhile they say it now and then
                break
            time.sleep(pause_s)
        if status == http.client.NOT_FOUND:
            return None
        if status >= http.client.BAD_REQUEST:
            said = text.decode(errors="replace")[:300]
            raise BrokerRefused(
                f"RabbitMQ at {self._where} refuses {method} {page} to user {self._user} ({status}: {said}): "
                "check --management, and that this user is an administrator."
            )
        try:
            return json.loads(text) if text else True
        except (ValueError, RecursionError):
            raise BrokerRefused(f"what answers at {self._where} is not RabbitMQ: check --management.") from None

    def _once(self, method: str, page: str, body: object) -> tuple[int, bytes]:
        try:
            self._connection.request(method, page, None if body is None else json.dumps(body).encode(), self._headers)
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except ssl.SSLError as problem:
            raise BrokerRefused(
                f"the management pages at {self._where} are not to be trusted ({problem.reason}): check --management."
            ) from None
        except (OSError, UnicodeError, http.client.HTTPException) as problem:  # the second: of a host like a..b
            raise LinkError(f"RabbitMQ's management pages do not answer at {self._where} ({problem}).") from None
        finally:
            self._connection.close()  # a connection that has been idle may be gone: a new one costs 5 ms
