"""Following single notifications through every process (ADR 0046).

`contexts` reads `traceparent`, and decides about events that have none. `spans` has the other rules: for how many spans there is
room, what a span belongs to. `hopspans` makes and encodes a span, `export` sends it. These two need OpenTelemetry's SDK, and are
loaded only where spans are exported. `lines` says which notification lines of the log are about.

A new kind of span is a `Hop` in `names`; a new attribute goes into `names.ATTRIBUTES`, too. Who does the work asks
`spans.active()` and `Spans.room` before it makes one. docs/operations.md has all kinds in a table, which a test compares.
"""
