"""How the house refuses: in one sentence that names what is wrong."""

from contextlib import contextmanager

import pytest

from trainers.config import ConfigError


@contextmanager
def check_refused(*words: str):
    """The block raises ConfigError; its message is one line and contains every word."""
    with pytest.raises(ConfigError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
