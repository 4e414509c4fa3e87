"""The unit under a real systemd, which boots in a container: the steps of the page, a stuck loop, a stop, a mistake."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dockerfile import ROOT
from tests.pod import program_scripts

pytestmark = pytest.mark.slow

SOURCE = Path("/srv/kvservice")  # Where the container has the repository: systemd mounts a new /tmp.
PACKAGES = ("", "proto", "client", "engine_adapter")
COPIED = ("client", "docs", "engine_adapter", "kvservice", "ops", "proto", "tests")

ENGINE = """
import sys
from kvservice_client import Client
from tests.integration.known_blocks import LARGE, new_chain, save, verify

with Client("/run/kvservice/kvservice.sock", transport="shm", timeout_s=30) as client:
    chain = new_chain(LARGE, 8, salt="boot")
    if sys.argv[1] == "save":
        save(client, LARGE, chain)
    verify(client, LARGE, chain)
print("ENGINE", sys.argv[1])
"""

STEPS = r"""
cd {source}
{install}
sed -i 's/=16GiB/=64MiB/; s/=200GiB/=256MiB/' /etc/kvservice/kvservice.env
{start}
echo STARTED $?
({look}) 2>&1 | cat
pid=$(systemctl show kvservice -p MainPID --value)
grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/$pid/status
{engine} save
kill -STOP $pid
until [ "$(systemctl show kvservice -p NRestarts --value)" = 1 ] && systemctl is-active kvservice; do sleep 1; done
{engine} load
systemctl stop kvservice
echo STOPPED $(systemctl show kvservice -p Result -p ExecMainStatus)
echo KVSERVICE_DRAM__SIZE=1 >> /etc/kvservice/kvservice.env
systemctl start kvservice
sleep 4
echo MISTAKEN $(systemctl show kvservice -p NRestarts -p Result -p ExecMainStatus -p ActiveState)
journalctl -u kvservice --no-pager
echo END
"""


def steps_of_the_page() -> list[str]:
    """What the page on deploying has people run: to install into a virtual environment, and the three steps after."""
    page = (ROOT / "docs" / "deploying.md").read_text().partition("## With systemd")[2].partition("\n## ")[0]
    return [re.sub(r"(?m)^ +", "", each) for each in re.findall(r"(?s)\n   ```sh\n(.*?)```", page)]


def booted(folder: Path, script: str) -> str:
    """Boot systemd over an overlay of the host's root, run the script, and power off. Returns what it printed."""
    out = folder / "out"
    out.mkdir()
    (out / "steps.sh").write_text(script)
    (out / "try.service").write_text(
        "[Service]\nType=oneshot\nExecStart=-/bin/bash /out/steps.sh\nTimeoutStartSec=200\n"
        "StandardOutput=append:/out/log\nStandardError=append:/out/log\n"
        "ExecStopPost=/bin/systemctl poweroff --no-block\n"
    )
    root = folder / "boot" / "root"
    folders = " ".join(f"{folder / 'boot'}/{name}" for name in ("root", "upper", "work"))
    python = {Path(sys.executable), Path(sys.executable).resolve()}
    home = any(path.is_relative_to("/root") or path.is_relative_to("/home") for path in python)
    lines = [
        f"mount -t tmpfs -o mode=755 tmpfs {folder}/boot && mkdir {folders}",
        f"mount -t overlay -o lowerdir=/,upperdir={folder}/boot/upper,workdir={folder}/boot/work overlay {root}",
        *(f"chmod a+rx {root}{above}" for path in python for above in path.parents),
        f"mkdir -p {root}/out {root}{SOURCE} {root}/etc/systemd/system/kvservice.service.d",
        f"cp {out}/try.service {root}/etc/systemd/system/",
        f"cp -r {' '.join(str(ROOT / name) for name in COPIED)} {root}{SOURCE}",
        *program_scripts(root, os.pathsep.join(str(SOURCE / name) for name in PACKAGES)),
    ]
    if home:  # The interpreter is one that ProtectHome=yes would hide.
        text = "[Service]\nProtectHome=no\n"
        lines.append(f"printf %s {shlex.quote(text)} > {root}/etc/systemd/system/kvservice.service.d/home.conf")
    options = ["--quiet", "--register=no", "--keep-unit", "--private-network", "--machine=kvservice-test"]
    boot = [
        "systemd-nspawn",
        *options,
        f"--directory={root}",
        f"--bind={out}:/out",
        "--boot",
        "systemd.unit=try.service",
    ]
    (folder / "boot").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--propagation=private", "sh", "-ec", "\n".join([*lines, shlex.join(boot)])],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if not (out / "log").exists():
        pytest.skip(f"systemd does not boot here: {(done.stdout + done.stderr)[-500:]}")
    return (out / "log").read_text()


def test_a_new_operator_gets_a_daemon_that_systemd_watches(tmp_path: Path) -> None:
    if shutil.which("systemd-nspawn") is None or os.geteuid() != 0:
        pytest.skip("systemd-nspawn is not installed, or this user may not boot a container")
    virtual_environment, install, start, look = steps_of_the_page()
    assert "/opt/kvservice/bin/pip install" in virtual_environment  # Here it has programs of this tree instead.
    path = ":".join(str(SOURCE / name) for name in PACKAGES)
    engine = ["setpriv", "--reuid=kvservice", "--regid=kvservice", "--clear-groups", "env", f"PYTHONPATH={path}"]
    engine += ["PYTHONDONTWRITEBYTECODE=1", sys.executable, "-c", ENGINE]

    log = booted(
        tmp_path,
        STEPS.format(source=SOURCE, install=install, start=start, look=look, engine=shlex.join(engine)),
    )

    assert "END" in log, log
    assert "STARTED 0" in log, log
    assert 'Status: "serving"' in log
    assert re.search(r"kvservice \S+ at /run/kvservice/kvservice.sock: serving", log), log
    for line in ("CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        assert line in log
    assert "ENGINE save" in log, log
    assert "Watchdog timeout" in log
    assert "ENGINE load" in log, "the blocks of DRAM are there after the watchdog's restart"
    assert "STOPPED Result=success ExecMainStatus=0" in log
    assert re.search(r"MISTAKEN .*Result=exit-code.*ExecMainStatus=2.*ActiveState=failed", log), log
    assert "NRestarts=0" in log.partition("MISTAKEN")[2]
    assert "the nearest one is KVSERVICE_" in log
