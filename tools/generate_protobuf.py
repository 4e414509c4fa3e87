"""Generates the Python code of the .proto files into a folder: `python tools/generate_protobuf.py FOLDER`.

Run by `make proto`, and by the test that compares the committed code with its output. The
protoc is the one in grpcio-tools, held by pyproject.toml at the oldest release whose code runs on every
protobuf runtime that the bounds allow: an engine's image brings its own.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).resolve().parent.parent / "proto"


def generate(into: Path) -> None:
    """Writes `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` below `into`."""
    files = sorted(str(file.relative_to(SOURCES)) for file in SOURCES.glob("kvservice_api/**/*.proto"))
    outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", *(f"--proto_path={folder}" for folder in _proto_paths()), *outputs, *files])
    if status:
        raise SystemExit(status)


def _proto_paths() -> list[Path]:
    google_rpc = find_spec("google.rpc")
    grpc_tools = find_spec("grpc_tools")
    assert google_rpc and google_rpc.submodule_search_locations
    assert grpc_tools and grpc_tools.origin
    # Ours, google/rpc/*.proto, and google/protobuf/*.proto.
    return [
        SOURCES,
        Path(next(iter(google_rpc.submodule_search_locations))).parents[1],
        Path(grpc_tools.origin).parent / "_proto",
    ]


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    generate(arguments.parse_args().folder)
