"""The tokens in a mail's links: who wants no more of what, and whose preferences may be changed.

RFC 8058 (3.1) asks for a part that is hard to forge, as the request comes without a login. There is no expiry: a link of years
ago must still work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from engine.channels.sealed import SECRET_CHARS_MIN, Sealer, TokenRefused

TOKEN_CHARS_MAX: Final = 800
"""A line of a mail may have 998 characters, the link and the header's name included."""

__all__ = ["SECRET_CHARS_MIN", "TOKEN_CHARS_MAX", "TokenRefused", "Tokens", "Unsubscription"]


class Unsubscription(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a token stands for. `category`: the scope of the suppression that it leads to, or `all`."""

    tenant: str
    user: str
    channel: str
    category: str


class Tokens(Sealer[Unsubscription]):
    """Makes and reads the tokens of `/u/{token}`. Raises ValueError as `Sealer`."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__(secrets, purpose=b"seamark unsubscribe 1", form=Unsubscription, chars_max=TOKEN_CHARS_MAX)
