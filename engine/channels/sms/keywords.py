"""Words by which people end the texts of a sender, or have them begin again.

Carriers and providers act on them by themselves. So do we: then the wish holds for the tenant's other senders and providers, too,
and nobody pays for texts that are blocked.
"""

from __future__ import annotations

import unicodedata
from typing import Final, Literal

Keyword = Literal["stop", "start", "help"]

_STOPS: Final = (
    *("STOP", "STOPALL", "STOP ALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "OPTOUT", "OPT OUT", "REVOKE"),
    *("STOPP", "ARRET", "PARAR", "BAJA", "ALTO"),
)
"""The first line is Twilio's, who acts on them: https://help.twilio.com/articles/223134027. The others end texts in our books
only: to take a word for STOP that Twilio does not know is safe, to take one for START is not, since the number stays blocked."""

_WORDS: Final[dict[str, Keyword]] = {
    **dict.fromkeys(_STOPS, "stop"),
    **dict.fromkeys(("START", "YES", "UNSTOP"), "start"),
    **dict.fromkeys(("HELP", "INFO"), "help"),
}

_CHARS_MAX: Final = 32


def keyword_of(text: str) -> Keyword | None:
    """What a message asks for, if it is such a word and nothing else: `Please don't stop!` asks for nothing.

    Letter case, accents, and punctuation and space around it do not matter.
    """
    if len(text) > _CHARS_MAX:
        return None
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = "".join(c if c.isalnum() else " " for c in bare).upper().split()
    return _WORDS.get(" ".join(words))
