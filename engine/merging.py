"""Merging a patch into a JSON document, as RFC 7396 says."""

from __future__ import annotations

from typing import Any


def merged(target: Any, patch: Any, levels: int) -> Any:
    """`target` with `patch` merged into it: what is left out stays, null takes away, on every level. `target` stays as it was.

    Args:
        levels: of objects that the document may have. What is deeper is taken as it stands and not followed, as recursion
            would be as deep as whoever sends it likes: the caller refuses it.
    """
    if not isinstance(patch, dict) or levels == 0:
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value, levels - 1)
    return result
