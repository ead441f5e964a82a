"""A node's configuration: layers, defaults, and one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vswap.node.config import load_config
from vswap.wire.errors import BadConfig

RAM = '[[tiers]]\nname = "r"\nurl = "ram://"\ncapacity_bytes = 16777216\n'


def test_defaults_make_a_node_of_ram_alone() -> None:
    config = load_config(None, {}, {})
    assert (config.listen, config.coordinator) == ("127.0.0.1:7171", "")
    assert [tier.scheme for tier in config.tiers] == ["ram"]
    assert config.tiers[0].capacity_bytes >= 64 * 2**20


def test_flags_win_over_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text('name = "file"\nlisten = "127.0.0.1:1"\nthreads = 1\ncoordinator = "h:1"\n')
    environ = {
        "VSWAP_NODE_NAME": "variable", "VSWAP_NODE_THREADS": "2", "VSWAP_COORDINATOR": "h:2",
        "VSWAP_COORDINATOR_LISTEN": "not ours",
    }  # fmt: skip
    config = load_config(file, environ, {"name": "flag", "listen": None})
    assert (config.name, config.threads, config.coordinator, config.listen) == (
        "flag", 2, "h:2", "127.0.0.1:1",
    )  # fmt: skip


def test_spaces_have_limits() -> None:
    space = {"name": "s", "quota_bytes": 5, "tiers": ["r"], "tier_max_bytes": {"r": 0}}
    tier = {"name": "r", "url": "ram://", "capacity_bytes": 2**24}
    limits = load_config(None, {}, {"spaces": [space], "tiers": [tier]}).spaces[0].limits
    assert (limits.quota_bytes, limits.allows("r")) == (5, False)


def test_a_space_may_name_tiers_of_a_cluster_it_does_not_know_yet(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text(RAM + '[[spaces]]\nname = "s"\ntiers = ["red"]\n')
    with pytest.raises(BadConfig, match="no tier named 'red'"):
        load_config(file, {}, {})
    assert load_config(file, {"VSWAP_COORDINATOR": "h:1"}, {}).spaces[0].tiers == ("red",)


@pytest.mark.parametrize(
    ("toml", "environ", "flags", "says"),
    [
        ("nmae = 1", {}, {}, "n.toml: nmae: unknown key"),
        ("name = 'a b'", {}, {}, "n.toml: name: "),
        ("listen = '7171'", {}, {}, "n.toml: listen: address '7171'"),
        ("listen = 'h:99999'", {}, {}, "n.toml: listen: "),
        ("listen = 'unix:relative'", {}, {}, "n.toml: listen: "),
        ("coordinator = 'nowhere'", {}, {}, "n.toml: coordinator: address 'nowhere'"),
        ("advertise = 'me'", {}, {}, "n.toml: advertise: "),
        ("threads = 0", {}, {}, "n.toml: threads: "),
        ("exclusive_timeout_s = 0", {}, {}, "n.toml: exclusive_timeout_s: "),
        ("inflight_bytes = 1", {}, {}, "n.toml: inflight_bytes: "),
        ("insecure = 'perhaps'", {}, {}, "n.toml: insecure: "),
        ("tiers = []", {}, {}, "n.toml: tiers: "),
        ("tiers = 5", {}, {}, "n.toml: tiers: "),
        (RAM + "codec = 'zip'", {}, {}, "n.toml: tiers[0].codec: "),
        (RAM + "colour = 'red'", {}, {}, "n.toml: tiers[0].colour: unknown key"),
        (RAM + "low = 0.95", {}, {}, "n.toml: tiers[0]: low (0.95) must be below high (0.9)"),
        (RAM.replace("ram:", "ftp:"), {}, {}, "n.toml: tiers[0].url: unknown scheme 'ftp'"),
        (RAM + RAM, {}, {}, "n.toml: tier 'r' is named twice"),
        (RAM.replace("capacity_bytes = 16777216", ""), {}, {}, "needs capacity_bytes"),
        ("[[spaces]]\nname = 'a b'", {}, {}, "n.toml: spaces[0].name: space name 'a b'"),
        ("[[spaces]]\nname = ''", {}, {}, "n.toml: spaces[0].name: "),
        ("[[spaces]]\nname = 's'\npage_bytes = 5000", {}, {}, "n.toml: spaces[0]: page size 5000"),
        ("[[spaces]]\nname = 's'\nmax_slots = 0", {}, {}, "n.toml: spaces[0]: maximum of 0 slots"),
        ("[[spaces]]\nname = 's'\nquota_bytes = -1", {}, {}, "n.toml: spaces[0].quota_bytes: "),
        ("[[spaces]]\nname = 's'\n[[spaces]]\nname = 's'", {}, {}, "space 's' is named twice"),
        ("\nname = 'x", {}, {}, "n.toml: not valid TOML: "),
        ("\nname = \n", {}, {}, "line 2"),
        ("", {"VSWAP_NODE_THREADS": "many"}, {}, "environment: VSWAP_NODE_THREADS: "),
        ("", {"VSWAP_NODE_TREADS": "1"}, {}, "unknown variable VSWAP_NODE_TREADS"),
        ("", {"VSWAP_COORDINATOR": "nowhere"}, {}, "environment: VSWAP_COORDINATOR: "),
        ("", {}, {"name": "a/b"}, "--name: "),
        ("threads = 'x'\nname = ''", {}, {}, "(and 1 more)"),
    ],
)
def test_a_wrong_value_is_named_with_its_source(
    tmp_path: Path, toml: str, environ: dict[str, str], flags: dict[str, Any], says: str
) -> None:
    file = tmp_path / "n.toml"
    file.write_text(toml)
    with pytest.raises(BadConfig) as caught:
        load_config(file, environ, flags)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Value error" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"gone\.toml: No such file"):
        load_config(tmp_path / "gone.toml", {}, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadConfig, match="not valid TOML"):
        load_config(tmp_path / "binary.toml", {}, {})


def test_errors_keep_secrets(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text("[[tiers]]\nname='r'\nurl='ftp://me:hunter2@h'\ncapacity_bytes=1\n")
    with pytest.raises(BadConfig) as caught:
        load_config(file, {}, {})
    assert "hunter2" not in str(caught.value)
