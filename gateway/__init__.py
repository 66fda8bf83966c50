"""Everything a device or a service talks to: WebSocket, SSE and polling sessions, resume, authentication, HTTP."""
