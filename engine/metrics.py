"""Every metric of the engine, and of any process; the other packages have a module of this name for theirs.

Names say the noun and the unit; labels never hold a user, device or token. A docstring lists the values of a label.

Processes that do the same work are added up: of a new gauge `ops/addedup.py` (`SUMMED`, `EARLIEST`) or `LARGEST` of
tests/unit/test_metrics.py says how, or that test fails. What somebody should be woken for stands in docs/operations.md
("What to watch"), the others below it, or in the document of what they are about; that test looks.
"""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client import Counter, Gauge, Histogram, Info

target = Info("target", "Who this process is: the resource attributes of its spans, with _ for the dots")

_PARTITION = ("stream", "consumer")


class PartitionMetrics(NamedTuple):
    """What one partition reader counts."""

    owned: Gauge
    stopped: Gauge
    handled: Counter
    take_overs: Counter
    resets: Counter
    gaps: Counter
    step_downs: Counter
    possibly_trimmed: Counter


_PARTITION_METRICS = PartitionMetrics(
    owned=Gauge("seamark_partition_owned", "1 while this process reads the partition", _PARTITION),
    stopped=Gauge("seamark_partition_stopped", "1 while the partition waits for an operator", _PARTITION),
    handled=Counter("seamark_partition_messages", "Messages whose effect and position are stored", _PARTITION),
    take_overs=Counter("seamark_partition_take_overs", "Take-overs begun", _PARTITION),
    resets=Counter("seamark_partition_resets", "Times the reading head was put back to the position", _PARTITION),
    gaps=Counter("seamark_partition_gaps", "Holes or restarts seen in the consumer's sequence", _PARTITION),
    step_downs=Counter("seamark_partition_step_downs", "Times another owner was found", _PARTITION),
    possibly_trimmed=Counter(
        "seamark_partition_possibly_trimmed", "Resets before the stream's first message", _PARTITION
    ),
)


def partition(stream: str, consumer: str) -> PartitionMetrics:
    """The metrics of one partition."""
    return PartitionMetrics(*(metric.labels(stream, consumer) for metric in _PARTITION_METRICS))  # type: ignore[arg-type]


dispatched_events = Counter("seamark_dispatcher_events", "Events settled, by outcome", ("outcome",))
"""outcome: appended, put_off, duplicate, dead."""

unfit_events = Counter(
    "seamark_dispatcher_unfit_events", "Events read that hold what nobody may publish any more, by field", ("field",)
)
"""field: category, channels, collapse_key, to, transaction_id."""

dispatched_records = Counter("seamark_dispatcher_records", "Records appended to logs")
dispatchers_absent = Counter(
    "seamark_dispatchers_absent",
    "Times that dispatchers began when none had been at work for as long as LATER keeps what is due: some may be lost",
)

dead_letters_trimmed = Counter(
    "seamark_dispatcher_dead_letters_trimmed",
    "Times that age may have removed events before their dead letters were stored",
)
append_retries = Counter(
    "seamark_dispatcher_append_retries", "Batches that were not committed at once, by reason", ("reason",)
)
append_stalled = Gauge(
    "seamark_dispatcher_append_stalled",
    "Partitions that wait for a stream which is full or has taken nothing for 30 s, or for Redis (claims)",
    ("stream",),
)
dispatch_delay_seconds = Histogram(
    "seamark_dispatcher_delay_seconds",
    "From the moment EVENTS stored an event to the commit of its records (one observation per round, the oldest event)",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
)
now_messages = Counter("seamark_now_messages", "Messages that are never stored, at the relay, by fate", ("fate",))
"""fate: relayed, invalid, expired, throttled (more than a tenant or a process may), lost (the broker was away)."""

cancels_unheard = Gauge(
    "seamark_cancels_unheard", "1 while this process does not know what is cancelled, and dispatches without knowing"
)
withheld_records = Counter(
    "seamark_dispatcher_withheld_records", "Records stored as not to be shown, by reason", ("reason",)
)
"""reason: cancelled, expired."""

claims_missed = Counter("seamark_claims_missed", "Claims not written because Redis was away, by fate", ("fate",))
"""fate: owed (to be written afterwards), lost (the bounded list was full)."""

horizon_restarts = Counter(
    "seamark_claims_horizon_restarts", "Times Redis had lost its claims: the horizon starts anew"
)

event_ids_taken = Counter(
    "seamark_event_ids_taken",
    "Events that were stored although another event had used their message id",
)

planner_records = Counter("seamark_planner_records", "Records passed by planners, by outcome", ("outcome",))
"""outcome: planned (a receipt says what was decided), passed (nothing but the app, or no notification)."""

planner_letters = Counter(
    "seamark_planner_letters",
    "Dead letters of jobs that were not made: their tenant has too many waiting, or JOBS can never take them",
    ("outcome",),
)
"""outcome: stored, full (DEAD-LETTERS had no room: only the receipt tells)."""

jobs_subjects = Gauge(
    "seamark_jobs_subjects",
    "Schedules, and users with jobs waiting, in JOBS, as planners have seen it last; at most 1 000 000",
)

jobs_unreadable = Counter(
    "seamark_jobs_unreadable",
    "Messages of JOBS that no worker could read, and that were set aside as dead letters",
    ("channel",),
)

planner_lag = Gauge(
    "seamark_planner_lag_seconds", "Age of the oldest record that waits to be planned; 0 when none waits", ("stream",)
)

worker_attempts = Counter(
    "seamark_worker_attempts", "Tries of workers, by what came of them", ("channel", "provider", "kind")
)
"""kind: as `engine.channels.channel.OutcomeKind` has them. A provider is named as in the providers' file."""

provider_unknown_codes = Counter(
    "seamark_provider_unknown_codes",
    "Answers and reports of providers that the tables do not name",
    ("channel", "provider"),
)
provider_alarms = Counter(
    "seamark_provider_alarms",
    "Answers and reports for a person to look at, though nothing is stopped",
    ("channel", "provider"),
)
worker_decisions = Counter("seamark_worker_decisions", "What workers decided about jobs", ("channel", "decision"))
"""decision: send, hold, over, split."""

worker_breaker_open = Gauge(
    "seamark_worker_breaker_open", "1 while this process sends nothing to a provider", ("provider",)
)
worker_limits_unknown = Counter(
    "seamark_worker_limits_unknown", "Slots taken without asking, as Redis was away", ("provider",)
)
worker_send_seconds = Histogram(
    "seamark_worker_send_seconds",
    "How long providers take to answer",
    ("channel",),
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
worker_delay_seconds = Histogram(
    "seamark_worker_delay_seconds",
    "From the moment a job was first to be sent until its provider took it",
    ("channel",),
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
providers_stale = Gauge(
    "seamark_providers_stale", "1 while the providers' file cannot be read, and what it said before is used"
)

traces_unfollowed = Counter(
    "seamark_traces_unfollowed", "Spans that were wanted and not made, as there were too many", ("reason",)
)
"""reason: tenant (it has had its share), process, errors (nobody follows them), resume (of one device)."""

traces_lost = Counter("seamark_traces_lost", "Spans that were made, and that no collector got", ("reason",))
"""reason: full (too many waited), refused (an export failed), end (they still waited as the process ended)."""
