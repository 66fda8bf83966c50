"""A service that tells users what became of their orders: `python service.py nats://127.0.0.1:4222 alice 17`."""

import asyncio
import sys

from seamark import Published, Publisher, PublishFailed, PublishRefused


async def tell_shipped(publisher: Publisher, user: str, order: int) -> Published | None:
    """Publish "your order was shipped"; None: it has to be tried again later, with the same id."""
    try:
        return await publisher.publish(
            to=user, type="order.shipped", data={"order": order}, id=f"order-{order}-shipped", category="orders"
        )
    except PublishFailed as failed:  # the broker is away, and has been for half a minute
        print(f"order {order} is told later: {failed}")
        return None
    except PublishRefused as refused:  # it will be refused the next time, too: somebody has to look
        print(f"order {order} cannot be told: {refused.problem}")
        raise


async def main(address: str, user: str, order: int, api_key: str | None) -> None:
    """Over NATS, or over HTTP with an API key."""
    way = Publisher(nats_url=address) if api_key is None else Publisher(gateway_url=address, api_key=api_key)
    async with way as publisher:
        published = await tell_shipped(publisher, user, order)
        if published is not None:
            print(f"{published.event_id} is {'already ' if published.duplicate else ''}stored")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None))
