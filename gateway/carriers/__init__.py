"""How frames travel: WebSocket, server-sent events, long polling."""
