"""Every metric of projections, declared in one place. See `engine.metrics`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

jobs_lost = Counter(
    "seamark_jobs_lost", "Deliveries that were open, and of which JOBS held neither a job nor a schedule", ("channel",)
)
projection_lag = Gauge(
    "seamark_projection_lag_seconds",
    "Age of the oldest record that waits to be folded; 0 when none waits",
    ("projection", "stream", "subject"),
)
projection_applied = Counter("seamark_projection_records", "Records folded", ("projection", "stream"))
projection_skipped = Counter(
    "seamark_projection_skipped_records", "Records a projection could not decode and passed over", ("projection",)
)
unread_frames = Counter("seamark_unread_frames", "Unread counts told to live sessions, by fate", ("fate",))
"""fate: sent, lost (the broker was away), forgotten (more users changed while catching up than are remembered)."""

funnel = Gauge(
    "seamark_funnel_notifications",
    "Notifications of one hour by how far they had come ten minutes later; the largest tenants and types, the rest as other",
    ("tenant", "type", "channel", "stage"),
)
"""stage: emitted and stored (events), dispatched, sent, acknowledged, read (notifications)."""

retention_overdue = Gauge(
    "seamark_retention_overdue_seconds",
    "How long ago the oldest month ended that is due to be dropped; 0 when none is due",
    ("projection",),
)
retention_undivided = Gauge(
    "seamark_retention_undivided", "1 while the tables are not divided by months: nothing leaves them", ("projection",)
)
retention_dropped = Counter("seamark_retention_dropped_months", "Months that were dropped", ("projection",))
retention_kept_at = Gauge(
    "seamark_retention_kept_timestamp_seconds",
    "When this projector last looked for months to drop, as Unix time; 0 where another projector does",
)
