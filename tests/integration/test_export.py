"""``kvctl export`` and ``kvctl import``: sessions and blocks arrive in another daemon whole, or not at all."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_api.keys import BlockChain, block_key
from kvservice_client import Client, Layout, Shard
from kvservice_client.cli import main
from kvservice_client.exports.export_file import (
    BlockRecord,
    EndRecord,
    ExportReader,
    ExportWriter,
    LayoutRecord,
    UnusableFile,
)
from kvservice_client.exports.importer import Importer
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain, small_layout

KVCTL = Path(sys.executable).with_name("kvctl")
LAYOUT = small_layout("exported")  # 8 tokens per block, slices of 1 KiB.
NewDaemon = Callable[..., DaemonProcess]


def kvctl(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a verb in this process, which starts faster. Only standard streams that are pipes need a process."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["kvctl", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="300"),
        redirect_stdout(out),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == code, errors.getvalue()
    return subprocess.CompletedProcess([], code, out.getvalue(), errors.getvalue())


def exported(source: DaemonProcess, file: Path, *what: object, code: int = 0) -> dict[str, Any]:
    done = kvctl("export", file, *what, "--address", source.address, "--json", code=code)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def imported(target: DaemonProcess, file: Path, *how: object, code: int = 0) -> dict[str, Any]:
    done = kvctl("import", file, *how, "--address", target.address, "--json", code=code)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon of other tier sizes, which has nothing of the source's."""
    with DaemonProcess(
        tmp_path_factory.mktemp("target"), dram__capacity_bytes=24 * MIB, ssd__capacity_bytes=96 * MIB
    ) as daemon:
        yield daemon


@pytest.fixture
def empty(target: DaemonProcess) -> DaemonProcess:
    clear(target)
    return target


def clear(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        layouts = {each.fingerprint: Layout.from_proto(each.layout) for each in client.admin.list_layouts()}
        for each in client.admin.list_sessions():
            client.session(layouts[each.layout_fingerprint], each.session_id).end()
        client.admin.discard_all()


def talk(client: Client, session_id: str, tokens: int = 20, layout: Layout = LAYOUT) -> BlockChain:
    """A session of one turn, saved."""
    blocks, chain = client.open_layout(layout), new_chain(layout, tokens)
    blocks.save(chain, layers_of(blocks, chain))
    client.session(layout, session_id).append(chain)
    return chain


def cut_talk(client: Client, session_id: str) -> None:
    """A session that was truncated twice, with keys that were rotated elsewhere, and an open tail."""
    talk(client, session_id, 44)
    blocks, session = client.open_layout(LAYOUT), client.session(LAYOUT, session_id)
    session.truncate([(0, 4), (14, 25)], 1)
    for revision, positions in ((2, {"stored_position": 1000}), (4, {"stored_positions": [7, 9, 11, 12]})):
        state = session.get()
        chain = BlockChain(state.tip, (block_key(state.tip, [revision] * 4),), (4,))
        blocks.save(chain, layers_of(blocks, chain))
        session.append(chain, revision, **positions)
        if revision == 2:
            session.truncate([(0, 4), (6, 20)], 3)


def history(daemon: DaemonProcess, session_id: str, layout: Layout = LAYOUT) -> tuple[Any, list[NDArray[np.uint8]]]:
    """All that a session is, without its times, and its bytes."""
    with daemon.client() as client:
        session = client.session(layout, session_id)
        state = session.get()
        with session.lookup(state) as found:
            assert found.tokens == state.token_count
            layers = [layer.data for layer in found.load()]
        return (state.revision, state.tip, state.tail_tokens, state.cuts, state.slices, state.read_positions), layers


def same_history(one: DaemonProcess, other: DaemonProcess, session_id: str, layout: Layout = LAYOUT) -> bool:
    (before, bytes_before), (after, bytes_after) = (history(each, session_id, layout) for each in (one, other))
    return before == after and all(map(np.array_equal, bytes_before, bytes_after))


def has_blocks(client: Client, count: int) -> bool:
    return client.admin.status().blocks >= count


def test_a_cut_history_arrives_with_its_positions_and_bytes(
    daemon: DaemonProcess, empty: DaemonProcess, tmp_path: Path
) -> None:
    file = tmp_path / "chats.kvx"
    with daemon.client() as client:
        cut_talk(client, "cut")
        talk(client, "plain")

    answer = exported(daemon, file, "cut", "plain")
    assert (answer["sessions"], answer["missing"]) == (2, [])
    assert answer["size_bytes"] == file.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o600
    arrived = imported(empty, file)

    assert (arrived["sessions"], arrived["blocks"]) == (2, answer["blocks"])
    for session_id in ("cut", "plain"):
        assert same_history(daemon, empty, session_id)
    with empty.client() as client:  # The conversation continues there.
        blocks, session = client.open_layout(LAYOUT), client.session(LAYOUT, "cut")
        state = session.get()
        assert state.tail_tokens
        chain = BlockChain(state.tip, (block_key(state.tip, range(8)),), (8,))
        blocks.save(chain, layers_of(blocks, chain))
        assert session.append(chain, state.revision).revision == state.revision + 1
    again = imported(empty, file, code=1)
    assert (again["blocks"], again["sessions"], len(again["conflicts"])) == (1, 1, 1)  # The tail was replaced.
    assert (again["conflicts"][0]["session"], again["conflicts"][0]["layout"]) == ("cut", LAYOUT.fingerprint.hex())
    assert imported(empty, file, "--replace")["conflicts"] == []
    assert same_history(daemon, empty, "cut")


def test_a_killed_export_continues_to_the_same_file(daemon: DaemonProcess, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.kvx", tmp_path / "killed.kvx"
    layout = small_layout("killed export")
    with daemon.client() as client:
        chain = talk(client, "long", 80 * layout.block_tokens, layout)
        talk(client, "short", 3, layout)
    named = ("--layout", layout.fingerprint.hex()[:8])
    exported(daemon, whole, *named)

    with subprocess.Popen(
        [KVCTL, "export", "-", *named, "--address", daemon.address], stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        data = b""
        while len(data) < whole.stat().st_size // 3:
            data += process.stdout.read(1000)
        process.kill()
    killed.write_bytes(data)

    assert kvctl("export", killed, *named, "--address", daemon.address, code=2).stdout == ""
    assert killed.read_bytes() == data
    with daemon.client() as client:
        client.admin.discard(chain.keys[:1])  # It is in the file already.
    answer = exported(daemon, killed, *named, "--resume")
    assert answer["missing"] == []
    assert 0 < answer["resumed_at_bytes"] <= len(data)
    assert killed.read_bytes() == whole.read_bytes()
    done = kvctl("export", killed, *named, "--resume", "--address", daemon.address, code=2)
    assert "is complete" in done.stderr


def test_an_export_on_a_full_disk_says_so_and_continues(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "full.kvx"
    with daemon.client() as client:
        talk(client, "full-disk", 40 * LAYOUT.block_tokens)

    def little_space() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [KVCTL, "export", file, "full-disk", "--address", daemon.address],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=little_space,
    )
    assert (done.returncode, done.stderr) == (1, f"kvctl: {file}: File too large. Continue with --resume.\n")
    assert exported(daemon, file, "full-disk", "--resume")["resumed_at_bytes"] > 0
    with file.open("rb") as stream:
        assert sum(isinstance(each, BlockRecord) for each in ExportReader(stream)) == 40


def test_an_import_whose_kvctl_or_daemon_is_killed_is_repeated(
    daemon: DaemonProcess, new_daemon: NewDaemon, tmp_path: Path
) -> None:
    file, target = tmp_path / "chats.kvx", new_daemon()
    with daemon.client() as client:
        talk(client, "long-import", 400 * LAYOUT.block_tokens + 3)
    exported(daemon, file, "long-import")
    data = file.read_bytes()

    for who in ("kvctl", "daemon"):
        with subprocess.Popen(
            [KVCTL, "import", "-", "--address", target.address], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            process.stdin.write(data[: len(data) * (2 if who == "kvctl" else 4) // 5])
            process.stdin.flush()
            with target.client() as client:
                until(partial(has_blocks, client, 64 if who == "kvctl" else 192))
            if who == "kvctl":
                process.kill()
            else:
                target.kill()
                with suppress(BrokenPipeError):  # It reads no more once the daemon does not answer.
                    process.stdin.write(data[len(data) * 4 // 5 :])
                    process.stdin.close()
                assert process.wait(60) == 1
        if who == "daemon":
            target.start()
        with target.client() as client:
            assert not list(client.admin.list_sessions())

    answer = imported(target, file)
    assert answer["blocks"] + answer["already_stored"] == 401
    assert answer["already_stored"] >= 192
    assert same_history(daemon, target, "long-import")


def test_a_damaged_byte_anywhere_never_arrives(daemon: DaemonProcess, empty: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "chats.kvx"
    with daemon.client() as client:
        talk(client, "damaged", 20)
    exported(daemon, file, "damaged")
    data = file.read_bytes()
    before = history(daemon, "damaged")
    generator = np.random.default_rng(1)
    positions = [*range(0, 140, 20), *generator.integers(0, len(data), 30).tolist(), len(data) - 1]
    saved = before[1]

    with empty.client(transport="grpc") as client:
        blocks = client.open_layout(LAYOUT)
        chain = BlockChain(before[0][4][0].key, tuple(each.key for each in before[0][4]), (8, 8, 4))
        for position in positions:
            damaged = bytearray(data)
            damaged[position] ^= 1 << int(generator.integers(8))
            with pytest.raises(UnusableFile):
                Importer(client).run(ExportReader(io.BytesIO(damaged)))
            with pytest.raises(UnusableFile):
                Importer(client).run(ExportReader(io.BytesIO(data[:position])))
            with blocks.lookup(chain) as lease:
                for layer, whole in zip(lease.load() if lease.hit_blocks else (), saved, strict=False):
                    assert np.array_equal(layer.data, whole[: len(layer.data)])
            client.admin.discard_all()


def test_a_damaged_record_is_left_out_and_the_rest_is_imported(
    daemon: DaemonProcess, empty: DaemonProcess, tmp_path: Path
) -> None:
    file = tmp_path / "chats.kvx"
    with daemon.client() as client:
        for name in ("with-damage", "without-damage"):
            talk(client, name, 20)
    exported(daemon, file, "with-damage", "without-damage")
    with file.open("rb") as stream:
        reader = ExportReader(stream)
        first = next(iter(reader))
        assert isinstance(first, LayoutRecord)
        offset = reader.offset  # Of the first block.
    data = bytearray(file.read_bytes())
    data[offset + 200] ^= 1
    file.write_bytes(data)

    answer = imported(empty, file, code=1)

    assert (answer["damaged"], answer["damaged_at_bytes"]) == (1, [offset])
    assert [each["session"] for each in answer["incomplete"]] == ["with-damage"]
    assert (answer["sessions"], answer["blocks"]) == (2, 5)
    assert same_history(daemon, empty, "without-damage")
    done = kvctl("import", file, "--address", empty.address, code=1)
    assert f"kvctl: left out: the record at byte {offset} is damaged (block)\n" in done.stderr
    assert done.stdout.endswith("; records left out: 1 damaged\n")


def test_an_import_that_ends_early_has_stored_what_came_before_and_says_what_it_left_out(
    daemon: DaemonProcess, empty: DaemonProcess, tmp_path: Path
) -> None:
    """Fewer blocks than one save takes, and no record after them that can be read."""
    file = tmp_path / "chats.kvx"
    with daemon.client() as client:
        chain = talk(client, "cut-off", 10 * LAYOUT.block_tokens)
    exported(daemon, file, "cut-off")
    with file.open("rb") as stream:
        reader = ExportReader(stream)
        offsets = [reader.offset for _ in reader]  # Where the layout, 10 blocks, the session and the end record end.
    data = bytearray(file.read_bytes())
    data[offsets[2] + 200] ^= 1  # In the third block.
    data[offsets[10] + 8] ^= 1  # In the head of the session's record.
    file.write_bytes(data)

    answer = imported(empty, file, code=1)

    assert (answer["complete"], answer["blocks"], answer["damaged_at_bytes"]) == (False, 9, [offsets[2]])
    with empty.client() as client:
        assert {each.key for each in client.admin.list_blocks()} == {*chain.keys} - {chain.keys[2]}
    done = kvctl("import", file, "--address", empty.address, code=1)
    assert f"the record at byte {offsets[10]} is damaged in its head" in done.stderr
    assert f"kvctl: left out: the record at byte {offsets[2]} is damaged (block)\n" in done.stderr
    file.write_bytes(data[: offsets[5] + 100])
    clear(empty)
    assert imported(empty, file, code=1)["blocks"] == 4


def test_a_session_that_the_daemon_refuses_is_named_and_the_rest_is_imported(
    daemon: DaemonProcess, empty: DaemonProcess, tmp_path: Path
) -> None:
    file, changed = tmp_path / "chats.kvx", tmp_path / "changed.kvx"
    with daemon.client() as client:
        for name in ("of-a-short-tip", "behind-it"):
            talk(client, name)
    exported(daemon, file, "of-a-short-tip", "behind-it")
    with file.open("rb") as source, changed.open("wb") as target:
        writer = ExportWriter(target)
        for record in ExportReader(source):
            if isinstance(record, LayoutRecord):
                writer.layout(record)
            elif isinstance(record, BlockRecord):
                writer.block(record.name, [record.slices])
            elif isinstance(record, EndRecord):
                writer.end(record.missing)
            else:
                if record.session_id == "of-a-short-tip":
                    record.tip = record.tip[:5]
                writer.session(record)

    answer = imported(empty, changed, code=1)

    assert [each["session"] for each in answer["refused"]] == ["of-a-short-tip"]
    assert "tip" in answer["refused"][0]["why"]
    assert (answer["complete"], answer["sessions"], answer["blocks"]) == (True, 1, 6)
    assert same_history(daemon, empty, "behind-it")
    done = kvctl("import", changed, "--address", empty.address, code=1)
    assert "kvctl: refused: session 'of-a-short-tip' of layout " in done.stderr
    assert done.stdout.endswith("; records left out: 1 refused\n")


def test_an_export_may_flow_into_an_import(daemon: DaemonProcess, empty: DaemonProcess) -> None:
    """All sessions and blocks of two layouts, of which one is stored in four shards, through a pipe."""
    clear(daemon)
    layout = small_layout("of four ranks")
    chain = new_chain(layout, 5 * layout.block_tokens + 1)
    with daemon.client() as client:
        whole = client.open_layout(layout)
        layers = layers_of(whole, chain)
        arrays = [whole.layer_arrays(layer, chain.token_counts) for layer in layers]
        for first in (0, 2):
            for head in (0, 1):
                shard = Shard(first, first + 2, head, head + 1)
                parts = [
                    [np.stack([part[head : head + 1] for part in block]) for block in arrays[layer]]
                    for layer in range(first, first + 2)
                ]
                client.open_layout(layout, shard).save(chain, parts)
        client.session(layout, "of-ranks").append(chain)
        talk(client, "other-layout")

    with subprocess.Popen(
        [KVCTL, "export", "-", "--everything", "--address", daemon.address], stdout=subprocess.PIPE
    ) as exporting:
        done = subprocess.run(
            [KVCTL, "import", "-", "--address", empty.address, "--json"],
            stdin=exporting.stdout,
            stdout=subprocess.PIPE,
            check=True,
        )
        assert exporting.wait(60) == 0

    assert json.loads(done.stdout)["incomplete"] == []
    assert same_history(daemon, empty, "of-ranks", layout)
    assert same_history(daemon, empty, "other-layout")
    with daemon.client() as client, empty.client() as other:
        assert {(each.key, each.shard.head_begin, each.shard.layer_begin) for each in client.admin.list_blocks()} == {
            (each.key, each.shard.head_begin, each.shard.layer_begin) for each in other.admin.list_blocks()
        }


def test_blocks_that_are_gone_are_listed(daemon: DaemonProcess, empty: DaemonProcess, tmp_path: Path) -> None:
    with daemon.client() as client:
        chain = talk(client, "with-a-gap", 40)
        client.admin.discard(chain.keys[2:3])

    answer = exported(daemon, tmp_path / "chats.kvx", "with-a-gap", code=1)

    assert answer["missing"] == [{"key": chain.keys[2].hex(), "session": "with-a-gap"}]
    arrived = imported(empty, tmp_path / "chats.kvx", code=1)
    (incomplete,) = arrived["incomplete"]
    assert (arrived["missing"], incomplete["session"]) == (1, "with-a-gap")
    assert incomplete["why"] == "its first 16 of 40 tokens are stored"
    with empty.client() as client:
        assert client.session(LAYOUT, "with-a-gap").get().stored_tokens == 16


def test_sessions_of_one_id_and_two_layouts_are_both_named(
    daemon: DaemonProcess, empty: DaemonProcess, tmp_path: Path
) -> None:
    layouts = [small_layout(f"{name} of one id") for name in ("one", "other")]
    for each in (daemon, empty):
        with each.client() as client:
            for layout in layouts:
                talk(client, "same-id", 24 if each is daemon else 8, layout)

    exported(daemon, tmp_path / "chats.kvx", "same-id")
    arrived = imported(empty, tmp_path / "chats.kvx", code=1)

    assert {each["layout"] for each in arrived["conflicts"]} == {each.fingerprint.hex() for each in layouts}


def test_a_chain_is_exported_up_to_a_block(daemon: DaemonProcess, tmp_path: Path) -> None:
    with daemon.client() as client:
        chain = talk(client, "of-the-chain", 40)

    exported(daemon, tmp_path / "chain.kvx", "--chain", chain.keys[3].hex()[:12])

    with (tmp_path / "chain.kvx").open("rb") as stream:
        layout, *blocks, _ = ExportReader(stream)
    assert isinstance(layout, LayoutRecord)
    assert [each.name.key for each in blocks if isinstance(each, BlockRecord)] == list(chain.keys[:4])


def test_a_chain_without_a_beginning_is_named(daemon: DaemonProcess, tmp_path: Path) -> None:
    one, other = os.urandom(32), os.urandom(32)
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        for key, parent in ((one, other), (other, one)):
            chain = BlockChain(parent, (key,), (LAYOUT.block_tokens,))
            blocks.save(chain, layers_of(blocks, chain))

    done = kvctl("export", tmp_path / "chain.kvx", "--chain", one.hex(), "--address", daemon.address, code=1)

    assert f"block {one.hex()} continues itself, over 2 blocks" in done.stderr


def test_engines_of_another_key_generation_are_not_surprised(
    daemon: DaemonProcess, new_daemon: NewDaemon, tmp_path: Path
) -> None:
    layout, file, target = small_layout("of a generation"), tmp_path / "chats.kvx", new_daemon()
    with daemon.client() as client:
        generation = client.open_layout(layout).begin_generation()
        talk(client, "of-a-generation", layout=layout)
    exported(daemon, file, "of-a-generation")

    done = kvctl("import", file, "--address", target.address, code=1)

    assert f"has the key generation 0 here, and {generation} in the file" in done.stderr
    with target.client() as client:
        assert client.admin.status().blocks == 0
    imported(target, file, "--any-generation")
    assert same_history(daemon, target, "of-a-generation", layout)
    assert target.stop() == 0
    shutil.copy(daemon.store / "key_generations", target.store / "key_generations")
    target.start()
    with target.client() as client:
        assert client.open_layout(layout).generation() == generation
    assert imported(target, file)["conflicts"] == []


def test_a_file_without_anything_in_it_is_whole(new_daemon: NewDaemon, empty: DaemonProcess, tmp_path: Path) -> None:
    source = new_daemon()
    assert exported(source, tmp_path / "nothing", "--everything")["blocks"] == 0
    assert imported(empty, tmp_path / "nothing")["blocks"] == 0


def test_a_target_that_is_too_small_says_which_sessions_are_not_whole(
    daemon: DaemonProcess, new_daemon: NewDaemon, tmp_path: Path
) -> None:
    target = new_daemon(dram__capacity_bytes=10 * MIB, ssd__capacity_bytes=0)
    layout = Layout("of 256 KiB", "float16", layers=4, kv_heads=4, k_head_dim=64, v_head_dim=64, block_tokens=64)
    with daemon.client() as client:
        talk(client, "too-long", 45 * layout.block_tokens, layout)
    exported(daemon, tmp_path / "large", "too-long")

    done = kvctl("import", tmp_path / "large", "--address", target.address, code=1)

    assert "not all of it can stay" in done.stderr
    assert "incomplete: session too-long" in done.stderr


def test_an_older_daemon_is_exported_from_and_restores_no_session(
    daemon: DaemonProcess, new_daemon: NewDaemon, tmp_path: Path
) -> None:
    older = new_daemon(program=("-m", "tests.older_daemon"))
    with older.client() as client:
        talk(client, "of-the-older", 40)
    exported(older, tmp_path / "file", "of-the-older")
    done = kvctl("import", tmp_path / "file", "--address", older.address, code=1)
    assert "restores no sessions: upgrade it. `kvctl version` shows both versions." in done.stderr
