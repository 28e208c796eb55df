"""The configuration: what is accepted, what wins, and that each mistake is named where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pfvol import config
from pfvol.errors import ConfigError, InvalidError

MINIMAL: dict[str, Any] = {"node": {"name": "n1", "capabilities": ["sds"]}, "cluster": {"mdm": "10.0.0.1:8010"}}


def parse(changes: dict[str, Any] | None = None, environ: dict[str, str] | None = None) -> config.Config:
    document = {section: dict(keys) for section, keys in MINIMAL.items()}
    for section, keys in (changes or {}).items():
        document.setdefault(section, {}).update(keys)
    return config.parse(document, environ or {}, source="n1.toml")


def test_defaults_of_a_minimal_file() -> None:
    parsed = parse()
    assert parsed.cluster.mdm == ("10.0.0.1", 8010)
    assert parsed.sds.data_port == 8020
    assert parsed.node.bind == "127.0.0.1"


def test_the_environment_wins_over_the_file_and_overrides_over_both(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text('[node]\nname = "file"\ncapabilities = ["mdm"]\n[mdm]\ncontrol_port = 1\napi_port = 2\n')
    environ = {"PFVOL_NODE_NAME": "env", "PFVOL_MDM_API_PORT": "3", "PFVOL_NODE_DATA_DIR": str(tmp_path)}
    parsed = config.load(file, environ)
    assert (parsed.node.name, parsed.mdm.control_port, parsed.mdm.api_port) == ("env", 1, 3)
    assert config.load(file, environ, node_name="given", node_capabilities=None).node.name == "given"


def test_everything_can_come_from_the_environment() -> None:
    environ = {"PFVOL_NODE_NAME": "n", "PFVOL_NODE_CAPABILITIES": "sdc, mdm", "PFVOL_NODE_DATA_DIR": "/d"}
    parsed = config.parse({}, environ, source="environment")
    assert parsed.node.capabilities == ("mdm", "sdc")
    assert parsed.node_dir == Path("/d/n")
    assert parsed.secret_file == Path("/d/secret")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nodes": {}}, "[nodes]"),
        ({"node": {"nam": "x"}}, "[node] nam"),
        ({"node": {"name": "-x"}}, "[node] name"),
        ({"node": {"name": "x" * 32}}, "[node] name"),
        ({"node": {"name": "0123456789abcdef"}}, "[node] name"),
        ({"node": {"capabilities": []}}, "[node] capabilities"),
        ({"node": {"capabilities": ["sds", "sds"]}}, "[node] capabilities"),
        ({"node": {"capabilities": ["gui"]}}, "[node] capabilities"),
        ({"node": {"capabilities": [1]}}, "[node] capabilities"),
        ({"cluster": {"mdm": "nowhere"}}, "[cluster] mdm"),
        ({"cluster": {"mdm": "h:0"}}, "[cluster] mdm"),
        ({"cluster": {"mdm": "h:65536"}}, "[cluster] mdm"),
        ({"mdm": {"control_port": -1}}, "[mdm] control_port"),
        ({"mdm": {"api_port": True}}, "[mdm] api_port"),
        ({"sds": {"data_port": "x"}}, "[sds] data_port"),
        ({"sds": {"devices": 5}}, "[sds] devices"),
    ],
)
def test_a_mistake_names_file_section_and_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changes)
    assert "n1.toml" in caught.value.message
    assert named in caught.value.message


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="PFVOL_SDS_DATA_PORT"):
        parse(environ={"PFVOL_SDS_DATA_PORT": "many"})


@pytest.mark.parametrize("missing", ["name", "capabilities"])
def test_what_is_needed_is_asked_for(missing: str) -> None:
    document = {"node": {key: value for key, value in MINIMAL["node"].items() if key != missing}}
    with pytest.raises(ConfigError, match=rf"\[node\] {missing} is missing"):
        config.parse(document, {}, source="n1.toml")


def test_only_the_mdm_needs_no_mdm() -> None:
    document = {"node": {"name": "n", "capabilities": ["sds"]}}
    with pytest.raises(ConfigError, match=r"\[cluster\] mdm is missing"):
        config.parse(document, {}, source="n1.toml")
    document["node"]["capabilities"] = ["sds", "mdm"]
    assert config.parse(document, {}, source="n1.toml").cluster.mdm is None


@pytest.mark.parametrize("text", ["[node\n", "\xff", 'node = "text"\n'])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    file = tmp_path / "n.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"n\.toml"):
        config.load(file, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("text", "address"), [("h:1", ("h", 1)), ("[::1]:8010", ("::1", 8010)), ("10.0.0.1:65535", ("10.0.0.1", 65535))]
)
def test_addresses_read_and_written(text: str, address: tuple[str, int]) -> None:
    assert config.parse_address(text) == address
    assert config.format_address(address) == text


@pytest.mark.parametrize("text", ["", "h", "h:", ":1", "h:+1", "h:1 ", "h:१"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidError):
        config.parse_address(text)
