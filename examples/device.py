"""A device that shows a user's notifications: `python device.py http://127.0.0.1:8080 "$TOKEN" kitchen.cursor`."""

import asyncio
import sys

from seamark import FileCursor, Live, NotAuthenticated, Record, Reset, TooManySessions, Unread, connect


async def follow(url: str, token: str, cursor_file: str) -> str:
    """Show everything from where this device stopped; why it cannot go on is returned."""
    connection = connect(url, token=token, device="kitchen", cursor="start", store=FileCursor(cursor_file))
    try:
        async with connection:
            async for item in connection.events():
                match item:
                    case Record(kind="notification"):
                        print(f"{item.seq}: {item.type} {item.data}", flush=True)
                    case Reset():
                        print(f"shown anew ({item.reason}): {len(item.inbox)} in the inbox", flush=True)
                    case Unread():
                        print(f"{item.count}{'+' if item.more else ''} unread", flush=True)
                    case Live():
                        print("caught up", flush=True)
                    case _:
                        pass
    except NotAuthenticated:
        return "sign in again"
    except TooManySessions:
        return "the notifications are open elsewhere"
    return "closed"


if __name__ == "__main__":
    print(asyncio.run(follow(*sys.argv[1:4])))
