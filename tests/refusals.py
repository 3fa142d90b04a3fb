"""What a person is told when a model cannot be had."""

import pytest

from dora_mlx.errors import UserError
from dora_mlx.registry import resolve


def message_of(name):
    with pytest.raises(UserError) as caught:
        resolve(name)
    message = str(caught.value)
    assert "\n" not in message
    return message
