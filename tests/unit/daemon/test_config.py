"""The sources of settings, and the refusal of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice import effective_config
from kvservice.config import ConfigError, Settings
from kvservice.config_sources import SETTINGS, environment_name, load_settings
from kvservice.policy import PLACEMENTS

GIB = 2**30


def refusal(argv: list[str] | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_settings(argv or [], environ or {})
    return str(error.value)


def written(folder: Path, text: str) -> str:
    file = folder / "kvservice.toml"
    file.write_text(text)
    return str(file)


def test_every_setting_has_a_default_that_is_valid() -> None:
    assert load_settings([], {}) == Settings()


def test_flags_go_before_the_environment_before_the_file_before_the_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "[server]\nclients_max = 1\nloads_max = 1\nkeys_max = 1\n")
    environ = {"KVSERVICE_CONFIG": file, "KVSERVICE_SERVER__CLIENTS_MAX": "2", "KVSERVICE_SERVER__LOADS_MAX": "2"}

    server = load_settings(["--server.clients_max", "3"], environ).server

    assert (server.clients_max, server.loads_max, server.keys_max, server.transfer_slots) == (3, 2, 1, 4)


def test_config_prints_a_file_that_gives_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = '[{"name": "archive", "path": "/nfs/kv", "capacity_bytes": "1TiB"}]'
    flags = ["--ssd.paths", '/drives/"a":/drives/b', "--tiers.below_ssd", tiers, "--mover.dram_free_low", "0.01"]

    assert effective_config.main(flags, {"KVSERVICE_LOG__FORMAT": "text"}) == 0
    file = written(tmp_path, capsys.readouterr().out)

    assert load_settings(["--config", file], {}) == load_settings([*flags, "--log.format", "text"], {})


def test_config_names_the_source_of_each_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "[server]\nclients_max = 1\nloads_max = 1\n")
    environ = {"KVSERVICE_CONFIG": file, "KVSERVICE_SERVER__LOADS_MAX": "2"}

    assert effective_config.main(["--json", "--server.saves_max=3"], environ) == 0
    printed = json.loads(capsys.readouterr().out)

    assert printed["server.clients_max"] == {"value": 1, "source": file}
    assert printed["server.loads_max"] == {"value": 2, "source": "KVSERVICE_SERVER__LOADS_MAX"}
    assert printed["server.saves_max"] == {"value": 3, "source": "--server.saves_max"}
    assert printed["server.keys_max"] == {"value": 16384, "source": "default"}
    assert list(printed) == list(SETTINGS)


@pytest.mark.parametrize("flags", [["--nope", "1"], ["--ssd.io_threads", "many"], ["--config", "/nowhere"]])
def test_config_refuses_what_serve_refuses(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert effective_config.main(flags, {}) == 2
    assert capsys.readouterr().err == f"kvservice config: {refusal(flags)}\n"


def test_the_flag_names_another_file_than_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path, "[log]\nlevel = 'debug'\n")

    assert load_settings(["--config", file], {"KVSERVICE_CONFIG": "/nowhere"}).log.level == "debug"


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("4GiB", 4 * GIB), ("4 gib", 4 * GIB), ("1.5GiB", 3 * GIB // 2), ("4GB", 4 * 10**9)]
)
def test_sizes_are_written_as_people_write_them(tmp_path: Path, text: str, size_bytes: int) -> None:
    file = written(tmp_path, f"[dram]\ncapacity_bytes = '{text}'\n")

    assert load_settings(["--config", file], {}).dram.capacity_bytes == size_bytes
    assert load_settings(["--dram.capacity_bytes", text], {}).dram.capacity_bytes == size_bytes
    assert load_settings([], {"KVSERVICE_DRAM__CAPACITY_BYTES": text}).dram.capacity_bytes == size_bytes
    assert load_settings([], {"KVSERVICE_DRAM__CAPACITY_BYTES": str(size_bytes)}).dram.capacity_bytes == size_bytes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4GBB", "'4GBB' is not a size: give bytes, or a number with KiB, MiB, GiB"),
        ("-5", "'-5' is not a size"),
        ("1 MB/s", "'1 MB/s' is not a size"),
        ("4GiB, 8GiB", "'4GiB, 8GiB' is not a size"),
        ("many", "'many' is not a size"),
        ("99999999999TiB", "99999999999TiB is more than 1 EiB"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_units_there_are(text: str, why: str) -> None:
    assert refusal(["--dram.capacity_bytes", text]).startswith(f"dram.capacity_bytes among the flags: {why}")


def test_a_value_in_two_words_is_not_taken_for_a_setting() -> None:
    assert refusal(["--dram.capacity_bytes", "4", "GB"]) == (
        "'GB' among the flags belongs to no setting; put a value with a space in quotes"
    )


def test_a_size_of_a_tier_below_ssd_is_read_as_every_other_one() -> None:
    tier = '[{"name": "archive", "path": "/nfs/kv", "capacity_bytes": "4GiB, 8GiB"}]'

    assert "'4GiB, 8GiB' is not a size" in refusal(["--tiers.below_ssd", tier])


def test_several_drives_are_a_list_or_joined_by_colons(tmp_path: Path) -> None:
    drives = (Path("/drives/a"), Path("/drives/b"))
    file = written(tmp_path, "[ssd]\npaths = ['/drives/a', '/drives/b']\n")

    assert load_settings(["--config", file], {}).ssd_directories == drives
    assert load_settings(["--ssd.paths", "/drives/a:/drives/b"], {}).ssd_directories == drives
    assert load_settings([], {"KVSERVICE_STORE__PATH": "/store"}).ssd_directories == (Path("/store"),)


def test_an_address_in_the_file_that_is_only_a_port_is_refused_with_the_form_of_one(tmp_path: Path) -> None:
    for name in ("address", "bulk_address", "metrics_address"):
        file = written(tmp_path, f"[server]\n{name} = 7071\n")

        assert f"server.{name} in {file}: 7071 is not an address: write host:port in quotes" in refusal(
            ["--config", file]
        )


def test_a_folder_that_ssd_paths_names_twice_is_named() -> None:
    assert "ssd.paths names the folder /drives/b twice" in refusal(["--ssd.paths", "/drives/b:/drives/a:/drives/b"])


class TestTypos:
    def test_in_a_flag(self) -> None:
        assert refusal(["--server.adress", "x"]) == (
            "--server.adress among the flags is no setting; the nearest one is --server.address"
        )
        assert "--dram.capacity_bytes" in refusal(["--dram.capacity-bytes=4GiB"])
        assert "--server.address" in refusal(["--server.addr", "x"])  # Abbreviated names are not accepted.

    def test_in_the_environment(self) -> None:
        assert refusal(environ={"KVSERVICE_SERVER__ADRESS": "x"}) == (
            "KVSERVICE_SERVER__ADRESS in the environment is no setting; the nearest one is KVSERVICE_SERVER__ADDRESS"
        )
        assert "KVSERVICE_SERVER__ADDRESS" in refusal(environ={"KVSERVICE_SERVER_ADDRESS": "x"})
        assert "KVSERVICE_DRAM__CAPACITY_BYTES" in refusal(environ={"KVSERVICE_DRM__CAPACITY_BYTES": "1"})

    def test_in_the_file(self, tmp_path: Path) -> None:
        file = written(tmp_path, "[server]\nadress = 'x'\n")

        message = refusal(["--config", file])

        assert message == f"server.adress in {file} is no setting; the nearest one is server.address"

    @pytest.mark.parametrize(
        ("text", "nearest"),
        [
            ("[sever]\naddress = 'x'\n", "server.address"),
            ("capacity_bytes = 1\n", "capacity_bytes"),
            ("[mover.policy]\nname = 'lru'\n", "mover.policy"),
            ("[ssd]\nio_thread = 4\n", "ssd.io_threads"),
        ],
    )
    def test_in_the_file_at_any_place(self, tmp_path: Path, text: str, nearest: str) -> None:
        assert nearest in refusal(["--config", written(tmp_path, text)])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--server.clients_max", "0"], "server.clients_max among the flags"),
        (["--server.clients_max", "many"], "server.clients_max among the flags"),
        (["--dram.capacity_bytes", "4 GoB"], "dram.capacity_bytes among the flags"),
        (["--dram.capacity_bytes", "-1"], "dram.capacity_bytes"),
        (["--dram.capacity_bytes", "0"], "dram.capacity_bytes"),
        (["--dram.capacity_bytes", "4MiB"], "leaves nothing for blocks"),
        (["--ssd.capacity_bytes", "4MiB"], "leaves nothing for blocks"),
        (["--index.volatile_map_bytes", "4KiB"], "index.volatile_map_bytes"),
        (["--server.address", ""], "server.address among the flags"),
        (["--server.address", "7070"], "'7070' is not an address"),
        (["--server.address", "127.0.0.1:70700"], "'127.0.0.1:70700' is not an address"),
        (["--server.metrics_address", "localhost"], "server.metrics_address"),
        (["--server.bulk_address", "OFF"], "'OFF' is not an address"),
        (["--server.bulk_address", "OFF"], "; `off` means none"),
        (["--server.frame_bytes", "8MiB"], "server.frame_bytes"),
        (["--server.unix_socket", "/" + "x" * 107], "server.unix_socket"),
        (["--mover.policy", "mru"], "mover.policy"),
        (["--mover.dram_free_low", "0.2"], "mover.dram_free_low (0.2) is above mover.dram_free_high (0.1)"),
        (["--mover.ssd_free_low", "1"], "mover.ssd_free_low"),
        (["--log.level", "loud"], "log.level"),
        (["--log.level"], "log.level"),
        (["--config", "/nowhere/kvservice.toml"], "/nowhere/kvservice.toml cannot be read: No such file"),
        (["serve"], "serve"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(flags: list[str], named: str) -> None:
    assert named in refusal(flags)


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    assert "is not TOML" in refusal(["--config", written(tmp_path, "[server")])


def test_one_error_lists_every_problem() -> None:
    message = refusal(["--log.level", "loud"], {"KVSERVICE_SERVER__KEYS_MAX": "0"})

    assert "log.level among the flags" in message
    assert "server.keys_max in the environment" in message


@pytest.mark.parametrize("setting", ["server.address", "server.metrics_address"])
class TestAnAddress:
    @pytest.mark.parametrize("address", ["0.0.0.0:7070", "10.0.0.1:7070", "[::]:7070", "kv.example.com:7070"])
    def test_that_others_can_reach_needs_a_certificate_or_a_word(self, setting: str, address: str) -> None:
        flags = [f"--{setting}", address]
        assert refusal(flags).startswith(f"{setting} {address} can be reached from other hosts")
        for enough in (["--server.insecure"], ["--insecure"], ["--tls.certificate", "a", "--tls.key", "b"]):
            load_settings([*flags, *enough], {})

    @pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.9.1:7070", "[::1]:7070", "localhost:7070"])
    def test_on_this_host_needs_neither(self, setting: str, address: str) -> None:
        load_settings([f"--{setting}", address], {})


@pytest.mark.parametrize("missing", ["certificate", "key"])
def test_a_certificate_and_its_key_go_together(missing: str) -> None:
    flags = ["--tls.certificate", "a", "--tls.key", "b"]
    del flags[(index := flags.index(f"--tls.{missing}")) : index + 2]

    assert "tls.certificate and tls.key go together" in refusal(flags)


def test_a_client_ca_alone_is_refused_for_nothing_would_ask_for_it() -> None:
    assert "tls.client_ca has an effect only together with" in refusal(["--tls.client_ca", "a"])


def test_what_kubernetes_sets_beside_a_service_of_our_name_is_passed_over() -> None:
    environ = {
        "KVSERVICE_SERVICE_HOST": "10.0.0.1",
        "KVSERVICE_SERVICE_PORT": "7070",
        "KVSERVICE_SERVICE_PORT_GRPC": "7070",
        "KVSERVICE_PORT": "tcp://10.0.0.1:7070",
        "KVSERVICE_PORT_7070_TCP": "tcp://10.0.0.1:7070",
        "KVSERVICE_PORT_7070_TCP_ADDR": "10.0.0.1",
        "KVSERVICE_METRICS_SERVICE_HOST": "10.0.0.2",
    }

    assert load_settings([], environ) == Settings()


def test_every_setting_can_be_given_as_a_flag_and_in_the_environment() -> None:
    for name, setting in SETTINGS.items():
        default = setting.default
        if default in ("", ()):
            continue
        text = str(int(default)) if isinstance(default, int) else str(default)
        assert load_settings([f"--{name}={text}"], {}) == Settings()
        assert load_settings([], {environment_name(name): text}) == Settings()


def test_every_policy_can_be_chosen() -> None:
    for name in PLACEMENTS.keys() - {"foresight-unlearned"}:  # It is for comparisons.
        assert load_settings(["--mover.policy", name], {}).mover.policy == name


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(["--help"], {})
    shown = capsys.readouterr().out

    assert all(f"--{name} " in shown for name in SETTINGS)


class TestWhatFollowsFromSettings:
    def test_index_maps_are_a_64th_of_their_tier_within_limits(self) -> None:
        def maps(dram: str, ssd: str) -> tuple[int, int]:
            settings = load_settings(["--dram.capacity_bytes", dram, "--ssd.capacity_bytes", ssd], {})
            return settings.volatile_map_bytes, settings.durable_map_bytes

        assert maps("64MiB", "0") == (4 * 2**20, 4 * 2**20)
        assert maps("1GiB", "10GiB") == (16 * 2**20, 160 * 2**20)
        assert maps("128GiB", "4TiB") == (GIB, GIB)
        assert load_settings(["--index.durable_map_bytes", "8MiB"], {}).durable_map_bytes == 8 * 2**20

    def test_each_ssd_drive_has_threads_also_one_whose_blocks_leave(self) -> None:
        flags = ["--ssd.paths", "/drives/a:/drives/b", "--ssd.drained_paths", "/drives/c", "--ssd.io_threads", "5"]
        assert load_settings(flags, {}).ssd_threads == 15

    def test_the_unix_socket_is_in_the_store_by_default(self) -> None:
        def socket(*flags: str) -> Path | None:
            return load_settings(["--store.path", "/store", *flags], {}).unix_socket_path

        assert socket() == Path("/store/kvservice.sock")
        assert socket("--server.unix_socket", "/run/kv.sock") == Path("/run/kv.sock")
        assert socket("--server.unix_socket", "off") is None
        assert socket("--store.path", "/" + "x" * 100) is None
