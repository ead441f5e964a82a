"""The coordinator's configuration: layers, and one clear line for what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vswap.coordinator.config import load_config, state_directory
from vswap.wire.errors import BadConfig


def test_defaults() -> None:
    config = load_config(None, {}, {})
    assert (config.listen, config.lease_s, config.insecure) == ("127.0.0.1:7070", 10.0, False)
    assert config.policy.balance
    assert config.policy.compact


def test_the_sample_shows_the_defaults(tmp_path: Path) -> None:
    sample = (Path(__file__).parents[2] / "deploy/coordinator.toml").read_text()
    shown = tmp_path / "c.toml"
    shown.write_text(re.sub(r"(?m)^#(?=\S)", "", sample))
    config, defaults = load_config(shown, {}, {}), load_config(None, {}, {})
    for section in ("balance", "compaction"):
        assert getattr(config, section) == getattr(defaults, section)
        fields = getattr(config, section)
        assert fields.model_fields_set == set(type(fields).model_fields)


def test_flags_win_over_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('listen = "127.0.0.1:1"\nlease_s = 2.0\nstate_dir = "/s"\n')
    environ = {"VSWAP_COORDINATOR_LISTEN": "127.0.0.1:2", "VSWAP_COORDINATOR_LEASE_S": "3"}
    config = load_config(file, environ, {"listen": "127.0.0.1:3", "lease_s": None})
    assert (config.listen, config.lease_s, config.state_dir) == ("127.0.0.1:3", 3.0, "/s")


@pytest.mark.parametrize(
    ("toml", "environ", "flags", "says"),
    [
        ("lisen = 1", {}, {}, "c.toml: lisen: unknown key"),
        ("lease_s = 0", {}, {}, "c.toml: lease_s"),
        ("[compaction]\nbelow = 1", {}, {}, "c.toml: compaction.below: unknown key"),
        ("[compaction]\nbelow_utilisation = 2.0", {}, {}, "compaction.below_utilisation"),
        (
            "[[tiers]]\nname = 'a'",
            {},
            {},
            "c.toml: tiers[0]: a tier without redundancy has one url",
        ),
        ("[[tiers]]\nname = 'a'\nurl = 'ram://'", {}, {}, "cannot be shared"),
        ("x =", {}, {}, "not valid TOML"),
        ("", {"VSWAP_COORDINATOR_LEASE_S": "soon"}, {}, "VSWAP_COORDINATOR_LEASE_S"),
        ("", {"VSWAP_COORDINATOR_LEES": "1"}, {}, "VSWAP_COORDINATOR_LEES"),
        ("", {}, {"lease_s": -1}, "--lease"),
    ],
)
def test_a_wrong_value_is_named_with_its_source(
    tmp_path: Path, toml: str, environ: dict[str, str], flags: dict[str, Any], says: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(toml)
    with pytest.raises(BadConfig) as caught:
        load_config(file, environ, flags)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_state_outlives_the_host() -> None:
    assert state_directory({"XDG_STATE_HOME": "/x"}) == Path("/x/vswap/coordinator")
    home = Path.home() / ".local/state/vswap/coordinator"
    assert state_directory({"XDG_STATE_HOME": "relative"}) == home
    assert state_directory({}) == home
