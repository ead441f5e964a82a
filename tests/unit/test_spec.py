"""A tier's configuration: what is refused, how it travels, and that no secret shows."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vswap.tiers.spec import SCHEMES, TierSpec, redacted
from vswap.wire.errors import BadConfig


def spec(**fields: object) -> TierSpec:
    return TierSpec.model_validate({"name": "t", "url": "redis://h", **fields})


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"url": "ftp://h"}, "unknown scheme 'ftp'"),
        ({"url": "/just/a/path"}, "unknown scheme"),
        ({"name": "Upper"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 32}, "name"),
        ({"codec": "gzip"}, "codec"),
        ({"codec": "zstd"}, "codec"),
        ({"capacity_bytes": -1}, "capacity_bytes"),
        ({"high": 1.5}, "high"),
        ({"low": -0.1}, "low"),
        ({"high": 0.5, "low": 0.5}, r"low \(0.5\) must be below high \(0.5\)"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"colour": "red"}, "colour"),
        ({"url": ""}, "one url"),
        ({"urls": ["redis://a"]}, "one url"),
        ({"redundancy": "mirror:2", "url": "", "urls": ["", "file:///a"]}, "empty"),
        ({"redundancy": "raid"}, "not none, mirror:N or rs:K"),
        ({"redundancy": "mirror:1"}, "mirror:N needs N of 2"),
        ({"redundancy": "rs:1+1"}, "K of 2"),
        ({"redundancy": "rs:4+0"}, "M of 1"),
        ({"redundancy": "rs:14+2"}, "more than 15 servers"),
        ({"redundancy": "mirror:2"}, "needs 2 servers in urls"),
        ({"redundancy": "mirror:2", "url": "", "urls": ["redis://a"]}, "2 servers in urls, not 1"),
        ({"redundancy": "mirror:2", "url": "", "urls": ["redis://a"] * 2}, "names a server twice"),
        ({"redundancy": "mirror:2", "url": "", "urls": ["redis://a", "ftp://b"]}, "scheme 'ftp'"),
        ({"redundancy": "mirror:2", "url": "", "urls": ["redis://a", "ram://"]}, "no redundancy"),
    ],
)
def test_nonsense_is_refused_by_name(fields: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        spec(**fields)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_known(scheme: str) -> None:
    assert spec(url=f"{scheme}://x").scheme == scheme


def test_travels_unchanged() -> None:
    for one in (
        spec(),
        spec(rank=0),
        spec(rank=-5),
        spec(
            codec="zstd:-5", capacity_bytes=1 << 40, high=0.7, low=0.1, assert_noeviction=True,
            verify_writes=True, password_env="P", password_file="/f", timeout_s=0.25,
        ),
        spec(url="", urls=("redis://a", "redis://b", "file:///c"), redundancy="rs:2+1"),
    ):  # fmt: skip
        assert TierSpec.from_proto(one.to_proto()) == one


def test_travels_redacted_where_asked() -> None:
    message = spec(url="redis://u:hunter2@h").to_proto(redact=True)
    assert message.url == "redis://u:***@h"
    mirror = spec(url="", urls=("redis://u:hunter2@h", "redis://:pw@i"), redundancy="mirror:2")
    message = mirror.to_proto(redact=True)
    assert list(message.urls) == ["redis://u:***@h", "redis://:***@i"]
    assert mirror.safe_url == "redis://u:***@h redis://:***@i"


def test_servers_of_a_redundant_tier() -> None:
    assert spec().shape == (1, 0)
    assert not spec().redundant
    urls = tuple(f"redis://h{i}" for i in range(6))
    coded = spec(url="", urls=urls, redundancy="rs:4+2", password_env="P")
    assert coded.shape == (4, 2)
    assert [member.url for member in coded.members()] == list(urls)
    assert all(member.password_env == "P" for member in coded.members())
    assert spec(url="", urls=urls[:3], redundancy="mirror:3").shape == (1, 2)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("redis://user:secret@h", "redis://user:***@h"),
        ("redis+unix://:secret@/run/redis.sock", "redis+unix://:***@/run/redis.sock"),
        # Passwords that should have been percent-encoded, and were not.
        ("redis://:se/cret@h", "redis://:***@h"),
        ("redis://:se#cr?et@h", "redis://:***@h"),
        ("redis://:se@cret@h", "redis://:***@h"),
        (
            "s3://b?endpoint=http://h:9000&region=r",
            "s3://b?endpoint=http://h:9000&region=r",
        ),
        ("s3://b?secret_access_key=xyz&region=r", "s3://b?secret_access_key=***&region=r"),
        ("s3://b?SESSION_TOKEN=xyz", "s3://b?SESSION_TOKEN=***"),
        ("file:///srv/a@b", "file:///srv/a@b"),
    ],
)
def test_redaction(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert redacted(shown) == shown


@settings(deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1))
def test_no_password_survives_redaction(password: str) -> None:
    secret = f"<{password}>"
    assert secret not in redacted(f"redis://user:{secret}@host:6379/0")


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), min_size=1))
def test_any_password_reaches_the_url_whole(password: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIER_PASSWORD", password)
        parts = urlsplit(
            spec(url="redis://user@h:1/2", password_env="TIER_PASSWORD").resolved_url()
        )
    assert (parts.username, unquote(parts.password or "")) == ("user", password)
    assert (parts.hostname, parts.port, parts.path) == ("h", 1, "/2")


def test_password_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hunter2\n")
    assert spec(password_file=str(file)).resolved_url() == "redis://:hunter2@h"
    assert spec().resolved_url() == "redis://h"
    with pytest.raises(BadConfig, match=re.escape(str(tmp_path / "none"))):
        spec(password_file=str(tmp_path / "none")).resolved_url()


def test_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    with pytest.raises(BadConfig, match="NO_SUCH_VARIABLE"):
        spec(password_env="NO_SUCH_VARIABLE").password()
    monkeypatch.setenv("THE_PASSWORD", "p@ss/w#rd")
    tier = spec(password_env="THE_PASSWORD")
    assert tier.resolved_url() == "redis://:p%40ss%2Fw%23rd@h"
    assert "p@ss" not in repr(tier)
