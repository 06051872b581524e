"""The server's socket."""

import pytest

from m1jax.errors import UserError
from m1jax.serve.server import listen


def test_a_port_in_use():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as error:
            listen("127.0.0.1", port)
    text = str(error.value)
    assert f"127.0.0.1 port {port} is in use" in text
    assert "--port" in text
    assert "Errno" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", 70_000, "port 70000 is none"),
        ("192.0.2.1", 0, "cannot listen on 192.0.2.1 port 0: Cannot assign requested address; choose others"),
        ("no host", 0, "cannot listen on no host port 0: "),
    ],
)
def test_places_that_are_not_to_be_had(host, port, says):
    with pytest.raises(UserError, match=says) as error:
        listen(host, port)
    assert "Errno" not in str(error.value)
