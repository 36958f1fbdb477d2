"""The models of a zoo: those that are packed, of a folder, and downloaded from a server on this machine."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import advmoe
from advmoe.cli import main
from advmoe.errors import InputError
from advmoe.files import checksum
from advmoe.rundir import stored_digest
from advmoe.zoo import FILES, INDEX, PACKED, PLACE, Entry, entries, entries_of, find

NAMES = ("at-s-dense", "at-moe", "advmoe-image-mod", "advmoe", "advmoe-embedding-random", "moe-vit")
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of somebody's own, with one model under a name of its own."""
    folder = tmp_path / "zoo"
    shutil.copytree(PACKED / "at-s-dense", folder / "mine")
    told = json.loads((PACKED / INDEX).read_text())["models"]["at-s-dense"] | {"url": "mine", "title": "Mine"}
    (folder / INDEX).write_text(json.dumps({"models": {"mine": told}}))
    monkeypatch.setenv(PLACE, str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def change(zoo: Path, **fields: Any) -> None:
    """Change fields of the entry in a zoo's index."""
    index = json.loads((zoo / INDEX).read_text())
    index["models"]["mine"] |= fields
    (zoo / INDEX).write_text(json.dumps(index))


class Server:
    """A server of a folder, which remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.paths: list[str] = []
        self.cut = 0
        """Bytes after which answers stop, 0: never."""
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.paths.append(self.path)
                if not server.cut or self.path.endswith(INDEX):
                    return super().do_GET()
                content = (folder / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: server.cut])

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    served = Server(zoo)
    monkeypatch.setenv(PLACE, f"{served.url}/")
    yield served
    served.http.shutdown()
    served.http.server_close()


@pytest.mark.parametrize("name", NAMES)
def test_packed_models_are_what_the_index_says(name: str) -> None:
    entry = entries_of(PACKED)[name]
    model = advmoe.load(f"zoo:{name}")
    assert model.origin is not None and model.origin.digest == entry.digest
    assert not model.training and all(each.dtype == torch.float32 for each in model.parameters())
    assert entry.model.split()[:2] == [model.spec["name"], f"({model.spec['kind']}),"]
    assert entry.routed == model.routed and model.spec["classes"] == CIFAR10
    assert sum(each.numel() for each in model.parameters()) == entry.parameters
    weights = load_file(PACKED / name / "model.safetensors")
    floats = {each.dtype for each in weights.values() if each.is_floating_point()}
    assert floats == {torch.float16} and stored_digest(PACKED / name / "model.safetensors") == entry.digest
    said = model.predict(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)), top=10)
    assert set(said.classes) == set(CIFAR10) and (said.pathway is not None) == entry.routed


def test_the_package_stays_small_and_holds_nothing_else() -> None:
    assert tuple(entries_of(PACKED)) == NAMES
    folders = [each for each in PACKED.iterdir() if each.is_dir() and each.name != "__pycache__"]
    assert {each.name for each in folders} == set(NAMES)
    assert all({file.name for file in each.iterdir()} == {*FILES, "README.md"} for each in folders)
    assert sum(file.stat().st_size for each in folders for file in each.iterdir()) < 5_000_000


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [(None, "kind", "x"), (None, "kind", None), (None, "masking_gap", 1e5), ("worst_case", "images", 1e308),
     ("worst_case", "attacks", "x"), ("threat", "eps", -1), ("cost", "gmacs", -1), ("cost", "gmacs", 1e308),
     ("cost", "parameters", -1), (None, "url", "http://[::1")],
)  # fmt: skip
def test_numbers_that_no_model_has_are_refused(zoo: Path, group: str | None, field: str, value: Any) -> None:
    index = json.loads((zoo / INDEX).read_text())
    told = index["models"]["mine"]
    (told if group is None else told[group])[field] = value
    (zoo / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError):
        entries()["mine"].folder()


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, "http://[::1")
    with pytest.raises(InputError, match=r"^ADVMOE_ZOO must be a folder or an address"):
        entries()


def test_a_run_is_loaded_as_well(zoo: Path) -> None:
    assert advmoe.load(zoo / "mine").origin == advmoe.load_run(zoo / "mine").origin
    with pytest.raises(ValueError, match=r"^a run directory must hold model.json, got 'nowhere'$"):
        advmoe.load("nowhere")


def test_another_zoo_comes_before_the_packed_one(zoo: Path) -> None:
    assert list(entries()) == ["mine", *NAMES]
    assert find("zoo:mine").folder() == zoo / "mine"
    (zoo / INDEX).write_text((zoo / INDEX).read_text().replace('"mine": {', '"advmoe": {'))
    assert next(iter(entries())) == "advmoe" and find("advmoe").title == "Mine"
    assert find("at-moe").folder() == PACKED / "at-moe"


def test_unknown_names_and_zoos_are_named(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"^zoo:NAME must be one of mine, at-s-dense, .*, got 'mime' \(did you mean mi"
    ):
        advmoe.load("zoo:mime")
    monkeypatch.setenv(PLACE, str(zoo / "mine"))
    with pytest.raises(
        ValueError, match=rf"^ADVMOE_ZOO must be a folder or an address that holds {INDEX}, got '.*mine'"
    ):
        entries()
    monkeypatch.setenv(PLACE, "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"^ADVMOE_ZOO must be a folder or an address .*, got 'http://127.0.0.1:9': URLEr"
    ):
        entries()


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "../mine"},
        {"url": "/etc"},
        {"model_sha256": "../../../x"},
        {"url": "file:///etc"},
        {"files": {"model.json": "0" * 64}},
        {"files": dict.fromkeys(FILES, "../x")},
        {"worst_case": {"value": 1.5, "images": 10, "attacks": []}},
        {"accuracy": {"pgd-50": {"value": 0.5, "images": 10}}},
        {"agreement": {"same": 1, "images": 0}},
        {"cost": None},
        {"flags": ["x"]},
    ],
)
def test_an_entry_of_another_kind_is_refused_in_one_line(zoo: Path, fields: dict[str, Any]) -> None:
    change(zoo, **fields)
    with pytest.raises(ValueError, match=r"index.json must hold entries as `advmoe zoo entry` writes them, got 'mine'"):
        entries()


def test_what_is_shown_moves_no_cursor(zoo: Path, capsys: Any) -> None:
    change(zoo, title="a\x1b[2Jb", flags={"pgd-50": ["c\rd"]})
    assert main(["zoo", "show", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "a\\x1b[2Jb" in shown and "flag  pgd-50: c\\rd" in shown and "\x1b" not in shown


def test_a_damaged_file_is_refused_by_name(zoo: Path) -> None:
    path = zoo / "mine" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{path} must be the file of zoo:mine \(SHA-256 0d098.*\), got [0-9a-f]{{64}}$"
    ):
        advmoe.load("zoo:mine")
    path.unlink()
    with pytest.raises(ValueError, match=r"got no file$"):
        advmoe.load("zoo:mine")


def test_weights_of_another_digest_are_refused(zoo: Path) -> None:
    change(zoo, model_sha256="1" * 64)
    with pytest.raises(
        ValueError, match=r"^zoo:mine must be the model of the index \(SHA-256 1{16}\), got c06f77661bdb"
    ):
        advmoe.load("zoo:mine")


def test_a_model_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    first = advmoe.load("zoo:mine")
    assert server.paths == [f"/{INDEX}", *(f"/mine/{file}" for file in FILES)]
    folder = tmp_path / "cache" / "advmoe" / "zoo" / f"mine-{find('mine').digest[:16]}"
    assert sorted(each.name for each in folder.iterdir()) == sorted(FILES)
    server.paths.clear()
    assert advmoe.load("zoo:mine").origin.digest == first.origin.digest  # type: ignore[union-attr]
    assert server.paths == [f"/{INDEX}"]


def test_an_entry_may_have_an_address_of_its_own(server: Server, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(zoo))
    change(zoo, url=f"{server.url}/mine/")
    advmoe.load("zoo:mine")
    assert server.paths == [f"/mine/{file}" for file in FILES]


def test_another_file_than_the_index_names_is_refused(server: Server, zoo: Path, tmp_path: Path, capsys: Any) -> None:
    (zoo / "mine" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["predict", "zoo:mine", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    got = rf"got sha256 {checksum(zoo / 'mine' / 'model.safetensors')} from {server.url}/\S+ \(removed\)"
    rule = r"advmoe: error: zoo:mine must fetch model.safetensors with sha256 0d098\w+"
    assert re.fullmatch(f"{rule}, {got}\n", error), error
    assert not [*tmp_path.rglob("cache/**/model.safetensors*")]


def test_a_cut_download_leaves_no_file_and_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut = 1  # of each file: config.yaml comes first
    with pytest.raises(ValueError, match=r"^zoo:mine must reach the end of http\S+/config.yaml, got \d+ bytes"):
        advmoe.load("zoo:mine")
    assert {each.name for each in tmp_path.rglob("cache/**/*") if each.is_file()} == {"config.yaml.part"}
    server.cut = 0
    advmoe.load("zoo:mine")
    assert {each.name for each in tmp_path.rglob("cache/**/*") if each.is_file()} == set(FILES)


def test_list_and_show(zoo: Path, capsys: Any) -> None:
    assert main(["zoo", "list"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    ranked = [line.split()[:2] for line in text.splitlines() if re.match(r"[\d-] ", line)]
    assert sorted(ranked[:2]) == [["1", "at-s-dense"], ["1", "mine"]]
    assert ranked[2:5] == [["3", "advmoe"], ["4", "at-moe"], ["5", "advmoe-image-mod"]]
    assert main(["zoo", "show", "zoo:mine"]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert shown["zoo:mine"] == "Mine" and shown["worst case"].split()[0] == "24.5"
    assert main(["zoo", "show", "mine", "--json"]) == 0
    assert Entry.of("mine", json.loads(capsys.readouterr().out), zoo) == find("mine")
    assert main(["zoo", "list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["mine", *NAMES]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shw"], "zoo must do one of list, show, entry, got 'shw' (did you mean show?)"),
        (["list", "advmoe"], "zoo list must get no name, got 'advmoe'"),
        (["show"], f"zoo show must get one of {', '.join(NAMES)}, got nothing"),
        (["show", "advmoe", "--out", "x"], "--out must go with zoo entry, got show"),
        (["entry", "--json"], "--json must go with zoo list or show, got entry"),
        (["entry"], "zoo entry must get a run directory, got nothing"),
        (["entry", "nowhere"], "RUN must be a run directory (one that holds a config.yaml), got 'nowhere'"),
        (
            ["entry", str(PACKED / "advmoe"), "--name", "x"],
            "zoo entry must get --title (see advmoe zoo --help), got none",
        ),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["zoo", *words]) == 2
    assert capsys.readouterr().err == f"advmoe: error: {message}\n"


def test_a_zoos_model_is_no_run_to_continue(capsys: Any) -> None:
    assert main(["train", "--resume", "zoo:advmoe"]) == 2
    assert "--resume must be a run directory" in capsys.readouterr().err
