"""Runs containers of a pod as its manifest says: namespaces, root file systems, volumes, user and environment.

Each container has mount and PID namespaces and a root file system of its own, an overlay over that of the host. The
containers of a pod share the network, which has loopback only, IPC, and the volumes. Skips the test where this is
not possible.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

from tests.dockerfile import ROOT
from tests.manifests import Document, mounts, size_bytes
from tests.process_starter import python_path

_PROGRAMS = {
    "kvservice": "import sys; from kvservice.__main__ import main; sys.exit(main())",
    "kvctl": "from kvctl import main; main()",
}


class Pod:
    """A context manager: leaving it kills all processes of the pod, and removes its volumes in memory.

    `volumes` are those of the manifest. Volumes on disk are folders below `disks`, and stay, as claims do.
    `secrets` are files by the name of their secret.
    """

    def __init__(
        self, spec: Document, volumes: Mapping[str, Document], disks: Path, secrets: Mapping[str, Mapping[str, bytes]]
    ) -> None:
        self._user, self._group = spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]
        self._owner = f"{self._user}:{self._group}"
        self._volume_group = spec["securityContext"]["fsGroup"]
        self._volumes, self._disks, self._secrets = volumes, disks, secrets
        self._started: list[Container] = []
        self._base = disks / "pod"  # A tmpfs, in the pod's mount namespace only.

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.skip("mounts take root")
        self._base.mkdir(exist_ok=True)
        lines = [f"mount -t tmpfs -o mode=755 tmpfs {self._base}", "ip link set lo up"]
        for name, volume in self._volumes.items():
            lines += self._make_volume(name, volume, self._base / name)
        self._holder = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation=private",
                "--net",
                "--ipc",
                "sh",
                "-ec",
                "\n".join([*lines, "echo ready", "exec cat"]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            _, errors = self._holder.communicate()
            pytest.skip(f"no namespaces and mounts can be made here: {errors.strip()}")
        return self

    def __exit__(self, *exc: object) -> None:
        for container in self._started:
            container.kill()
        self._holder.kill()
        for process in (*(each.process for each in self._started), self._holder):
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
                stream.close()

    def start(
        self,
        container: Document,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        joined: Path | None = None,
        image: Path | None = None,
    ) -> Container:
        """`joined` is the file of a control group that takes the container's processes. `image` is an unpacked image;
        without it the container has the host's files, and the daemon of this checkout where the image has it.
        """
        root = self._base / f"root-{len(self._started)}"  # A container that starts again has a new one.
        lines = [f"echo $$ > {joined}"] if joined else []
        lines += self._make_root(root, container, image)
        inner = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            f"--root={root}",
            "--mount-proc=/proc",
            "--wd=/",
        ]
        lines.append(shlex.join(["exec", *inner, *self._as_user(command, environment)]))
        process = subprocess.Popen(
            ["nsenter", f"--target={self._holder.pid}", "--mount", "--net", "--ipc", "sh", "-ec", "\n".join(lines)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started = Container(process, lambda words, more: self._as_user(words, {**environment, **more}))
        self._started.append(started)
        return started

    def _as_user(self, command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """Without capabilities, and with no others than those variables."""
        user = [f"--reuid={self._user}", f"--regid={self._group}", f"--groups={self._volume_group}"]
        rights = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        variables = [f"{name}={value}" for name, value in environment.items()]
        return ["setpriv", *user, *rights, "env", "-i", *variables, *command]

    def _make_volume(self, name: str, volume: Document, path: Path) -> list[str]:
        """As kubelet makes it with an fsGroup; a folder of the node as the component host-paths makes it."""
        lines = [f"mkdir {path}"]
        if "emptyDir" in volume:
            size = int(size_bytes(volume["emptyDir"]["sizeLimit"]))
            lines.append(f"mount -t tmpfs -o mode=2777,gid={self._volume_group},size={size} tmpfs {path}")
        elif "secret" in volume:
            folder = self._disks / f"secret-{name}"
            folder.mkdir(exist_ok=True)
            for file, content in self._secrets[volume["secret"]["secretName"]].items():
                (folder / file).write_bytes(content)
                lines += [
                    f"install -g {self._volume_group} -m {volume['secret']['defaultMode']:o} {folder / file} {path}"
                ]
        elif volume.get("hostPath", {}).get("path", "").startswith("/dev/shm/"):
            lines.append(f"mount -t tmpfs -o mode=700,uid={self._user},gid={self._group} tmpfs {path}")
        else:
            disk = self._disks / f"disk-{name}"
            disk.mkdir(exist_ok=True)
            owner, mode = (f":{self._volume_group}", "2775") if "hostPath" not in volume else (self._owner, "700")
            lines += [f"chown {owner} {disk}", f"chmod {mode} {disk}", f"mount --bind {disk} {path}"]
        return lines

    def _make_root(self, root: Path, container: Document, image: Path | None) -> list[str]:
        layers = f"lowerdir={image or '/'},upperdir={root}/upper,workdir={root}/work"
        lines = [f"mkdir -p {root}/upper {root}/work", f"mount -t overlay -o {layers} overlay {root}"]
        if image is None:
            needed = {Path(sys.executable), Path(sys.executable).resolve(), ROOT}
            lines += [f"chmod a+rx {root}{folder}" for path in needed for folder in path.parents]
            lines += program_scripts(root, python_path())
        lines += [f"mount --bind /dev {root}/dev", f"mount --rbind /sys {root}/sys"]
        for path, name in mounts(container).items():
            lines += [f"mkdir -p {root}{path}", f"mount --bind {self._base / name} {root}{path}"]
        if container["securityContext"].get("readOnlyRootFilesystem"):
            lines.append(f"mount -o remount,bind,ro {root}")
        return lines


class Container:
    def __init__(
        self, process: subprocess.Popen[str], as_user: Callable[[Sequence[str], Mapping[str, str]], list[str]]
    ) -> None:
        self.process, self._as_user = process, as_user

    @property
    def pid(self) -> int:
        """Of the container's first process, in the host's PID namespace; 0 as long as there is none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        """The first process of a PID namespace takes all others with it."""
        if not self.has_ended() and self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()

    def run(
        self, command: Sequence[str], timeout_s: float = 120.0, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As ``kubectl exec`` and an exec probe run it; with `more` variables than the container has."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--root", "--wd"]
        return subprocess.run(
            [*enter, *self._as_user(command, more or {})],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def program_scripts(root: Path, path: str) -> list[str]:
    """Shell commands that make the daemon and ``kvctl`` below `root`, where the image has them. `path` is Python's."""
    folder = root / "opt/kvservice/bin"
    lines = [f"mkdir -p {folder}"]
    for name, program in _PROGRAMS.items():
        python = shlex.join(["exec", "env", f"PYTHONPATH={path}", sys.executable, "-c", program])
        script = f'#!/bin/sh\n{python} "$@"\n'
        lines.append(f"printf %s {shlex.quote(script)} > {folder / name}")
    return [*lines, f"chmod a+rx {folder.parent} {folder} {folder}/*"]
