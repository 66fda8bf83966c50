"""What a rendered pod finds when Kubernetes starts it, on this machine: variables, secrets as files, folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Object = dict[str, Any]

_REFERENCE: Final = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


@dataclass(frozen=True, slots=True)
class Started:
    """A container's command line and variables, with folders of this machine in the place of its mounts."""

    command: list[str]
    env: dict[str, str]


class PodHere:
    """One pod, whose volumes are folders of ours.

    Args:
        pod: metadata and spec, as rendered.
        folder: for its volumes.
        secrets: what each Secret holds by its keys.
        fields: what the downward API says, by the path of the field.
    """

    def __init__(
        self,
        pod: Object,
        folder: Path,
        secrets: Mapping[str, Mapping[str, str]],
        fields: Mapping[str, str] | None = None,
    ) -> None:
        self.spec = pod["spec"]
        self._folder, self._secrets, self._fields = folder, secrets, fields or {}
        for volume in self.spec.get("volumes", []):
            self._make(volume)

    def _make(self, volume: Object) -> None:
        folder = self._folder / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        if whole := volume.get("secret"):
            for key, value in self._secrets[whole["secretName"]].items():
                _write(folder / key, value)
        for source in volume.get("projected", {}).get("sources", []):
            secret = self._secrets[source["secret"]["name"]]
            for item in source["secret"]["items"]:
                _write(folder / item["path"], secret[item["key"]])

    def start(self, container: Object) -> Started:
        """What is run, and with which variables."""
        mounts = {mount["mountPath"]: str(self._folder / mount["name"]) for mount in container.get("volumeMounts", [])}
        env: dict[str, str] = {}
        for each in container.get("env", []):
            env[each["name"]] = here(self._value(each, env), mounts)
        words = [*container.get("command", []), *container.get("args", [])]
        return Started([here(expanded(word, env), mounts) for word in words], env)

    def _value(self, variable: Object, before: Mapping[str, str]) -> str:
        source = variable.get("valueFrom")
        if source is None:
            return expanded(str(variable.get("value", "")), before)
        if secret := source.get("secretKeyRef"):
            return self._secrets[secret["name"]][secret["key"]]
        return self._fields[source["fieldRef"]["fieldPath"]]


def _write(file: Path, text: str) -> None:
    """A file that is there already is left alone: a process of this pod may be reading it."""
    if not file.exists():
        file.write_text(text)


def expanded(text: str, env: Mapping[str, str]) -> str:
    """`$(NAME)` as the kubelet replaces it: by a variable that was defined before, else not at all."""
    return _REFERENCE.sub(lambda found: env.get(found[1], found[0]), text)


def here(text: str, mounts: Mapping[str, str]) -> str:
    """The text with our folders in the place of the pod's."""
    for path, folder in mounts.items():
        text = re.sub(rf"{re.escape(path)}(?=/|$)", lambda _, folder=folder: folder, text)
    return text
