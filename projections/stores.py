"""The stores of the projections in PostgreSQL: what a projector folds them into, and a rebuild."""

from __future__ import annotations

from typing import Final

from projections.deliveries.table import DeliveriesStore
from projections.inbox.table import InboxStore
from projections.postgres.store import TableStore

STORES: Final[dict[str, type[TableStore]]] = {one.projection.name: one for one in (InboxStore, DeliveriesStore)}
"""By the name of the projection."""
