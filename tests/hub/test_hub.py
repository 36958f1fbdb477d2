"""Checkpoints in folders and, over HTTP, in a stand-in for the Hub that keeps what the real client sends it."""

import base64
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import front_matter, rows

import advmoe
from advmoe.config import Config
from advmoe.evaluation.runs import evaluate_run
from advmoe.models import Classifier, create_model
from advmoe.training.run import train

ROOT = Path(__file__).parents[2]
FILES = ["README.md", "config.json", "config.yaml", "evaluation.json", "manifest.json", "model.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on digits, evaluated."""
    config = Config.from_dict(
        {
            "model": {"name": "wrn-10-1", "width": 8},
            "data": {"name": "digits", "image_size": 8, "augment": False, "train_examples": 128},
            "threat": {"eps": "0.1"},
            "training": {"method": "advmoe", "epochs": 1, "batch_size": 64, "attack_steps": 1, "step_size": 0.1},
            "attack": {"steps": 2},
        }
    )
    folder = train(config, run_dir=tmp_path_factory.mktemp("runs") / "tiny", accelerator="cpu", threads=1)
    evaluate_run(folder, num_examples=24, workers=1)
    return folder


def small(**kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    return create_model("resnet18", **{"num_classes": 3, "width": 8, "input_size": 16, **kwargs})


def assert_same(a: Classifier, b: Classifier) -> None:
    assert a.spec == b.spec
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) and value.dtype == second[name].dtype for name, value in first.items())


# Folders


@pytest.mark.parametrize("kwargs", [{"router": "embedding"}, {"kind": "s-dense", "in_channels": 1}], ids=str)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = small(**kwargs)
    model(torch.rand(8, model.spec["in_channels"], 16, 16))  # statistics of its own
    folder = advmoe.save_pretrained(model, tmp_path / "saved")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.json", "model.safetensors"]
    loaded = advmoe.from_pretrained(str(folder))
    assert_same(model, loaded)
    assert not any(module.training for module in loaded.modules())
    hub = json.loads((folder / "config.json").read_text())
    assert (hub["library_name"], hub["model"]) == ("advmoe", json.loads((folder / "model.json").read_text()))


def test_a_run_comes_back_as_a_run(run: Path, tmp_path: Path) -> None:
    folder = advmoe.save_pretrained(run, tmp_path / "saved")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "model.safetensors"])
    for name in ("config.yaml", "manifest.json", "evaluation.json", "model.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes(), name
    assert_same(advmoe.load_run(run), advmoe.from_pretrained(folder))
    again = evaluate_run(folder, num_examples=24, workers=1)
    assert again["robust_accuracy"] == json.loads((run / "evaluation.json").read_text())["robust_accuracy"]
    # A checkpoint takes an earlier one's place whole: what the new one does not say is said no more.
    advmoe.save_pretrained(small(), folder)
    assert not (folder / "evaluation.json").exists() and "Not evaluated" in (folder / "README.md").read_text()


def test_a_folder_of_other_things_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for folder in (tmp_path, run, tmp_path / "README.md"):
        before = sorted(run.iterdir())
        with pytest.raises(ValueError, match="folder must be new, empty or one that save_pretrained filled, got"):
            advmoe.save_pretrained(small(), folder)
        assert (tmp_path / "README.md").read_text() == "mine" and sorted(run.iterdir()) == before


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "ran")))


DAMAGE = {
    "weights are a pickle": ("model.safetensors", spoil_weights),
    "weights missing": ("model.safetensors", lambda folder: (folder / "model.safetensors").unlink()),
    "description missing": ("model.json", lambda folder: (folder / "model.json").unlink()),
    "description cut": ("model.json", lambda folder: (folder / "model.json").write_text('{"name": "res')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_runs(tmp_path: Path, damage: str) -> None:
    name, spoil = DAMAGE[damage]
    folder = advmoe.save_pretrained(small(), tmp_path / "saved")
    spoil(folder)
    with pytest.raises(ValueError) as error:
        advmoe.from_pretrained(folder)
    assert name in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("source", ["nowhere", "./a/b/c", "/absent/folder", "../b"])
def test_what_is_neither_folder_nor_repository_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="name must be a folder that exists, or a repository as owner/name, got"):
        advmoe.from_pretrained(source)
    with pytest.raises(ValueError, match="model must be a run directory or a model of advmoe's, got"):
        advmoe.save_pretrained(source, "unused")


def test_without_the_extra_folders_work_and_the_hub_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "advmoe.hub.mixin", raising=False)
    folder = advmoe.save_pretrained(small(), tmp_path / "saved")
    assert_same(small(), advmoe.from_pretrained(folder))
    for use in (lambda: advmoe.from_pretrained("a/b"), lambda: advmoe.push_to_hub(small(), "a/b")):
        with pytest.raises(ValueError, match=r"the Hub needs the extra hub: pip install 'advmoe\[hub\]', got: "):
            use()


OWN = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def test_a_network_of_its_authors_own_needs_its_code_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    )
    model = advmoe.to_moe(net, example=torch.rand(4, 3, 8, 8))
    folder = advmoe.save_pretrained(model, tmp_path / "saved")
    assert not list(folder.glob("*.py"))
    with pytest.raises(ValueError, match="code is never run unasked"):
        advmoe.from_pretrained(folder)
    source = f"{tmp_path / 'own.py'}:net"
    assert_same(model, advmoe.from_pretrained(folder, source=source))
    card = (folder / "README.md").read_text()
    assert "a network of its author's own, converted: 2 experts in each of its MoE layers" in card
    assert 'source="FILE.py:FACTORY"' in card and "own code does not travel" in card
    assert_same(
        model, advmoe.from_pretrained(advmoe.save_pretrained(folder, tmp_path / "again", source=source), source=source)
    )


# The Hub, over HTTP

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """As much of the Hub as pushing to a repository and loading from it ask for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, str, Any]] = []
        """Method, path and, of POST, the content of every request."""
        self.tokens: set[str | None] = set()
        self.objects: dict[str, bytes] = {}
        """Large files, by SHA-256."""
        self.files: dict[str, bytes] = {}
        """What the last commit holds, by path."""
        self.large = (".safetensors",)

    def bodies(self, path: str) -> list[Any]:
        return [body for _, where, body in self.seen if where == path]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        self.server.objects[self.path.rsplit("/", 1)[1]] = self.received()
        self.answer()

    def do_POST(self) -> None:
        lines = [json.loads(line) for line in self.received().splitlines()]
        path, (body, *_) = self.path, lines
        self.server.seen.append(("POST", path, lines if "/commit/" in path else body))
        self.server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/{body['organization']}/{body['name']}"})
        elif path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in path:
            self.answer({"files": [self.mode(each["path"]) for each in body["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            places = {
                each["oid"]: {"upload": {"href": f"{self.server.url}/store/{each['oid']}"}} for each in body["objects"]
            }
            self.answer({"objects": [{**each, "actions": places[each["oid"]]} for each in body["objects"]]})
        elif "/commit/" in path:
            self.commit(lines)
            self.answer({"commitUrl": f"{self.server.url}/lab/tiny/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": "no such call"}, 404)

    def mode(self, path: str) -> dict[str, Any]:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(self.server.large) else "regular",
            "shouldIgnore": False,
        }

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.seen.append((self.command, path, None))
        files = self.server.files
        if path in ("/api/models/lab/tiny/revision/main", "/api/models/lab/tiny"):
            self.answer({"id": "lab/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path == f"/api/models/lab/tiny/tree/{COMMIT}":
            self.answer(
                [
                    {"type": "file", "path": p, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                    for p, v in files.items()
                ]
            )
        elif path.startswith("/lab/tiny/resolve/") and (name := path.rsplit("/", 1)[1]) in files:
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(files[name], X_Repo_Commit=COMMIT, ETag=f'"{etag}"')
        elif path.startswith("/api/models/lab/tiny/revision/"):
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(hub: Hub, home: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process whose Hub is `hub`, and whose cache and token are its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    extra |= {"HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", **environment}
    words = [sys.executable, *command]
    return subprocess.run(words, env=inherited | extra, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_push_sends_every_file_and_the_hub_gives_the_model_back(run: Path, tmp_path: Path, hub: Hub) -> None:
    words = ("-m", "advmoe", "push", str(run), "lab/tiny", "--private", "--license", "mit")
    done = client(hub, tmp_path / "home", *words, HF_HUB_DISABLE_XET="1")  # its own protocol is not HTTP alone
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/lab/tiny/commit/{COMMIT}\n"
    assert hub.tokens == {"Bearer hf_secret"}
    (created,) = hub.bodies("/api/repos/create")
    assert (created["organization"], created["name"]) == ("lab", "tiny")
    assert created.get("private") is True or created.get("visibility") == "private"
    (asked,) = hub.bodies("/api/models/lab/tiny/preupload/main")
    assert sorted(each["path"] for each in asked["files"]) == sorted([*FILES, "model.safetensors"])
    (lines,) = hub.bodies("/api/models/lab/tiny/commit/main")
    assert lines[0] == {"key": "header", "value": {"summary": "Push model with advmoe", "description": ""}}
    assert sorted(line["value"]["path"] for line in lines[1:]) == sorted([*FILES, "model.safetensors"])
    weights = (run / "model.safetensors").read_bytes()
    (large,) = [line["value"] for line in lines[1:] if line["key"] == "lfsFile"]
    assert (large["oid"], large["size"]) == (hashlib.sha256(weights).hexdigest(), len(weights))
    assert hub.objects == {large["oid"]: weights}
    for name in ("model.json", "config.yaml", "manifest.json", "evaluation.json"):
        assert hub.files[name] == (run / name).read_bytes(), name
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("lab/tiny")' in card and front_matter(card)["license"] == "mit"
    shown = f"{100 * json.loads((run / 'evaluation.json').read_text())['worst_case']:.1f}"
    assert rows(card)["worst case over all of them"][0] == shown

    hub.seen.clear()
    script = f"""
import advmoe
model = advmoe.from_pretrained("lab/tiny", revision="main")
advmoe.save_pretrained(model, {str(tmp_path / "back")!r})
for repo, revision in (("lab/tiny", "absent"), ("lab/nothing", None)):
    try:
        advmoe.from_pretrained(repo, revision=revision)
    except ValueError as error:
        print(error)
"""
    done = client(hub, tmp_path / "home", "-c", script)
    assert done.returncode == 0, done.stderr
    assert_same(advmoe.load_run(run), advmoe.from_pretrained(tmp_path / "back"))
    fetched = {path for method, path, _ in hub.seen if method == "GET" and f"/resolve/{COMMIT}/" in path}
    assert {path.rsplit("/", 1)[1] for path in fetched} == {"model.json", "model.safetensors"}
    absent, nothing = done.stdout.splitlines()
    assert absent.startswith("lab/tiny cannot be had from the Hub: Re") and "404" in absent
    assert nothing.startswith("lab/nothing cannot be had from the Hub: Re") and "404" in nothing


def test_what_the_hub_refuses_is_one_line(tmp_path: Path, hub: Hub) -> None:
    """By the client's other way to upload (Xet installed, all files small enough for the commit), then no server."""
    hub.large = ("none",)
    script = f"""
import advmoe
from advmoe.models import create_model
model = create_model("resnet18", num_classes=2, width=4, input_size=8)
print(advmoe.push_to_hub(model, "lab/tiny", token="hf_given", branch="dev"))
import huggingface_hub.constants as constants
constants.ENDPOINT = {hub.url!r} + "/elsewhere"
try:
    advmoe.push_to_hub(model, "lab/tiny")
except ValueError as error:
    print(error)
"""
    done = client(hub, tmp_path / "home", "-c", script)
    assert done.returncode == 0, done.stderr
    url, refused = done.stdout.splitlines()
    assert url == f"{hub.url}/lab/tiny/commit/{COMMIT}" and "Bearer hf_given" in hub.tokens
    (lines,) = hub.bodies("/api/models/lab/tiny/commit/dev")
    assert {line["key"] for line in lines[1:]} == {"file"}
    assert sorted(hub.files) == ["README.md", "config.json", "model.json", "model.safetensors"]
    assert "**Not evaluated.**" in hub.files["README.md"].decode()
    assert refused.startswith("lab/tiny cannot be pushed to the Hub: ") and "404" in refused


def test_a_model_that_would_not_come_back_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model must be in float32 to be saved .*, got torch\.float16$"):
        advmoe.save_pretrained(small().half(), tmp_path / "half")
    unknown = advmoe.to_moe(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(5)))
    with pytest.raises(ValueError, match=r"^a model must know its number of classes"):
        advmoe.save_pretrained(unknown, tmp_path / "unknown")
    with pytest.raises(ValueError, match=r"^a model must know its number of classes"):
        unknown.predict(torch.rand(3, 9, 9))
    assert not (tmp_path / "half").exists() and not (tmp_path / "unknown").exists()
