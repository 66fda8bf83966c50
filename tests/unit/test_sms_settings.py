"""The part of the providers' file that says who sends texts."""

import tomllib
from pathlib import Path

from engine.channels.sms.settings import sms_channels, sms_settings
from tests.support.documents import blocks


async def test_the_file_that_the_documentation_shows_is_one(tmp_path: Path) -> None:
    (shown,) = (block.text for block in blocks() if block.document == "docs/sms.md" and "[sms]" in block.text)
    for name in ("twilio.secret", "sns.secret"):
        (tmp_path / name).write_text("s3cret")
    channels = sms_channels(sms_settings(tomllib.loads(shown)["sms"]), tmp_path)
    assert list(channels) == ["twilio", "spare"]
    for channel in channels.values():
        await channel.close()
