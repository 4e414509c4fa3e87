"""The secret of a store: created once and kept; it never prevents a start. Which stores have older blocks."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from kvservice.index.block_index import BlockIndex
from kvservice.index.descriptor_secret import DESCRIPTORS_KEY, SECRET_NAME, DescriptorSecret, read_secret
from kvservice.index.environment import META, Environment
from kvservice.index.identity import STORE_KEY

MIB = 2**20


def started(store: Path, *, create: bool = True) -> DescriptorSecret | None:
    """The secret of a start."""
    index = BlockIndex.open(store / "index", map_bytes=MIB, create=create)
    index.close()
    return index.secret


def be_of_an_earlier_version(store: Path) -> None:
    (store / SECRET_NAME).unlink()
    environment = Environment(store / "index", map_bytes=MIB, durable=True)
    environment.delete_now(META, [DESCRIPTORS_KEY])
    environment.close()


def test_a_new_store_has_a_secret_of_its_own_and_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, other = started(tmp_path), started(tmp_path / "other")
    assert first is not None and other is not None
    assert first.key != other.key and len(first.key) == 32
    assert first.every_block
    assert started(tmp_path) == read_secret(tmp_path) == first
    assert not caplog.records


def test_a_start_that_was_cut_off_before_its_index_keeps_the_secret_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = started(tmp_path)
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "store_id").unlink()
    assert started(tmp_path) == first
    assert not caplog.records


def test_a_new_store_in_the_folder_of_an_older_one_is_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / SECRET_NAME).write_bytes(DescriptorSecret.new(every_block=False).encode())
    made = started(tmp_path)
    assert made is not None and made.every_block and made == read_secret(tmp_path)
    assert not caplog.records


def test_a_store_of_an_earlier_version_is_not_marked_and_stays_so_without_its_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started(tmp_path)
    be_of_an_earlier_version(tmp_path)
    made = started(tmp_path)
    assert made is not None and not made.every_block
    assert not caplog.records, "nothing was lost"

    (tmp_path / SECRET_NAME).unlink()
    again = started(tmp_path)
    assert again is not None and not again.every_block and again.key != made.key
    assert "gone, and a new one was made" in caplog.text


@pytest.mark.parametrize("content", [b"", b"short", bytes(48), b"x" * 4096])
def test_a_damaged_secret_is_replaced_and_the_store_stays_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    first = started(tmp_path)
    (tmp_path / SECRET_NAME).write_bytes(content)
    second = started(tmp_path)
    assert first is not None and second is not None
    assert second.every_block and second.key != first.key
    assert "damaged, and a new one was made" in caplog.text
    assert started(tmp_path) == second


def test_every_flipped_bit_of_the_file_is_noticed(tmp_path: Path) -> None:
    started(tmp_path)
    whole = (tmp_path / SECRET_NAME).read_bytes()
    for position in range(8 * len(whole)):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        (tmp_path / SECRET_NAME).write_bytes(data)
        assert read_secret(tmp_path) is None


def test_a_secret_that_cannot_be_read_or_written_stops_no_start_and_is_left_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started(tmp_path)
    (tmp_path / SECRET_NAME).unlink()
    (tmp_path / SECRET_NAME).mkdir()
    secrets = started(tmp_path), started(tmp_path)
    assert None not in secrets and secrets[0] != secrets[1]
    assert (tmp_path / SECRET_NAME).is_dir()
    assert "cannot be used" in caplog.text


def test_others_than_the_daemons_user_cannot_read_it_also_where_a_copy_was_brought_back(tmp_path: Path) -> None:
    path = tmp_path / SECRET_NAME
    started(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    started(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_only_a_start_makes_a_secret(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / SECRET_NAME).unlink()
    assert started(tmp_path, create=False) is None
    assert not (tmp_path / SECRET_NAME).exists()


@pytest.mark.parametrize("every_block", [True, False])
def test_a_new_index_of_a_lost_one_keeps_the_mark(tmp_path: Path, every_block: bool) -> None:
    started(tmp_path)
    mark = DescriptorSecret.new(every_block=every_block).mark
    shutil.rmtree(tmp_path / "index")
    (tmp_path / SECRET_NAME).unlink()
    meta = {STORE_KEY: (bytes.fromhex((tmp_path / "store_id").read_text())), DESCRIPTORS_KEY: mark}
    BlockIndex.create(tmp_path / "index", map_bytes=MIB, meta=meta, layouts={}).close()
    found = started(tmp_path)
    assert found is not None and found.every_block == every_block


def test_the_secret_is_in_no_text_of_its_object(caplog: pytest.LogCaptureFixture) -> None:
    secret = DescriptorSecret.new(every_block=True)
    logging.getLogger("test").warning("%s %r", secret, secret)
    assert repr(secret.key) not in caplog.text and secret.key.hex() not in caplog.text
