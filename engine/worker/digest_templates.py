"""What a digest says where its tenant has no template for the type `digest`: how many there are, and a list of the newest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engine.plan.rules import Channel

_COUNT: Final = "{{ data.count }} new notification{% if data.count != 1 %}s{% endif %}"
_MORE: Final = "{% if data.more %}and {{ data.more }} more{% endif %}"

DIGEST_TEMPLATES: Final[Mapping[Channel, dict[str, str]]] = {
    "email": {
        "subject": _COUNT,
        "body": (
            f"**{_COUNT}**\n\n"
            "{% for item in data.items %}"
            "- {% if item.url %}[{{ item.title }}]({{ item.url }}){% else %}{{ item.title }}{% endif %}"
            "{% if item.text and item.text != item.title %}: {{ item.text }}{% endif %}\n"
            "{% endfor %}"
            f"\n{_MORE}\n"
        ),
    },
    "push": {
        "title": _COUNT,
        "body": "{% for item in data.items[:3] %}{{ item.title }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    },
    "sms": {"body": _COUNT + "{% if data.items %}: {{ data.items[0].title }}{% endif %}"},
}
"""By channel, the parts. A webhook gets the data as they are."""
