"""Campaigns: one message for an audience too large to name in one event, brought page by page onto the stream BULK."""
