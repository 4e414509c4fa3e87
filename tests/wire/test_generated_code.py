"""The committed protobuf code agrees with the .proto files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "proto"


def test_the_committed_code_is_what_make_proto_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "generate_protobuf.py", tmp_path], check=True)

    def code(folder: Path) -> dict[Path, bytes]:
        return {file.relative_to(folder): file.read_bytes() for file in folder.glob("kvservice_api/v1/*_pb2*.py*")}

    generated, committed = code(tmp_path), code(COMMITTED)
    assert generated.keys() == committed.keys()
    differing = [str(name) for name, data in generated.items() if committed[name] != data]
    assert not differing, "run `make proto`"


def test_it_runs_on_the_oldest_protobuf_that_the_bounds_allow() -> None:
    for file in COMMITTED.glob("kvservice_api/v1/*_pb2.py"):
        assert "# Protobuf Python Version: 6.31.1\n" in file.read_text()
    for file in COMMITTED.glob("kvservice_api/v1/*_pb2_grpc.py"):
        assert "GRPC_GENERATED_VERSION = '1.74.0'\n" in file.read_text()
