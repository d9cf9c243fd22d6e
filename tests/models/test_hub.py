"""Models of the hub out of a cache made by hand, and from a hub of our own on this machine; never over the network."""

import hashlib
import http.server
import json
import shutil
import socket
import threading
import warnings
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import processive as pv
import pytest
import torch
from processive import models
from processive.backbones import XLSTMConfig
from processive.errors import InputError, MissingExtra
from processive.models import LanguageModel, hub
from processive.models.hub import HubName, fetch, hub_name, licence, needed, whole

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT, OLD = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    """Every connection fails; the attempts are kept."""
    attempts = []

    def refuse(self, address):
        attempts.append(address)
        raise OSError(101, "Network is unreachable")

    def unknown(host, *arguments, **options):
        attempts.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return attempts


@pytest.fixture
def model(tokenizer):
    return LanguageModel(tokenizer, XLSTMConfig(12, 32, 1, heads=2), name="letters").eval()


def put(cache, folder, *, repository="ada/letters", commit=COMMIT, reference="main"):
    """Lay a folder into the cache as huggingface_hub does: blobs by their hash, links to them, references."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            link = place / "snapshots" / commit / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    if reference:
        (place / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / reference).write_text(commit)
    return place


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_names():
    assert hub_name("hf://ada/letters") == HubName("ada/letters")
    assert hub_name(Path("hf://ada/letters@v1.0")) == HubName("ada/letters", "", "v1.0")
    assert hub_name("hf://ada/letters/small/old@refs/pr/1") == HubName("ada/letters", "small/old", "refs/pr/1")
    assert hub_name("hf://gpt2") == HubName("gpt2")
    assert str(hub_name("hf://ada/letters/small@v1")) == "hf://ada/letters/small@v1"
    for path in ("runs/chem", "hf", Path("hf/ada"), "/hf:/x"):
        assert hub_name(path) is None
    for path in ("hf://", "hf://ada/letters@", "hf://a b/c", "hf://ada/../x", "hf://../x", "hf://ada/letters@../x"):
        with pytest.raises(InputError, match=r"hf://owner/name|hf:"):
            hub_name(path)


@pytest.mark.parametrize("offline", [False, True])
def test_out_of_the_cache_without_a_network(offline, model, cache, no_network, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    model.save(tmp_path / "m")
    put(cache, tmp_path / "m")
    for name in ("hf://ada/letters", Path("hf://ada/letters"), "hf://ada/letters@main"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            back = pv.load(name)
        assert [COMMIT in str(w.message) for w in told if "not reached" in str(w.message)] == (
            [] if offline else [True]
        )
        assert same(model, back)
        assert back.card.source == f"hf://ada/letters@{COMMIT}"
    assert offline != bool(no_network)
    no_network.clear()
    assert pv.load(f"hf://ada/letters@{COMMIT}").name == "letters"
    assert not no_network  # a commit does not change
    back.save(tmp_path / "copy")
    assert COMMIT in (tmp_path / "copy" / "README.md").read_text()
    assert models.load(tmp_path / "copy").card.source == back.card.source


def test_revisions_and_folders(model, tokenizer, cache, no_network, tmp_path):
    other = LanguageModel(tokenizer, XLSTMConfig(12, 32, 2, heads=2))
    model.save(tmp_path / "new")
    other.save(tmp_path / "old")
    other.save(tmp_path / "new" / "small")
    put(cache, tmp_path / "new")
    put(cache, tmp_path / "old", commit=OLD, reference="v1.0")
    assert same(models.load("hf://ada/letters@v1.0"), other)
    assert models.load(f"hf://ada/letters@{OLD}").card.source.endswith(OLD)
    small = models.load("hf://ada/letters/small")
    assert same(small, other)
    assert small.card.source == f"hf://ada/letters/small@{COMMIT}"
    assert {(found.name.revision, found.references) for found in hub.cached_models()} == {
        (COMMIT, ("main",)),
        (OLD, ("v1.0",)),
    }


def test_what_is_not_there_is_one_sentence_that_says_what_to_do(model, cache, no_network, tmp_path):
    with pytest.raises(InputError, match="no such model") as error:
        pv.load("hf://ada/letters")
    assert "\n" not in str(error.value)
    assert "network" in str(error.value)
    model.save(tmp_path / "m")
    place = put(cache, tmp_path / "m")
    with pytest.raises(InputError, match=r"@v2 .*no such model"):
        pv.load("hf://ada/letters@v2")
    (place / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(InputError, match="only part of it") as error:
        pv.load("hf://ada/letters")
    assert "\n" not in str(error.value)


def test_without_huggingface_hub_the_extra_is_named(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"processive\[hub\]"):
        pv.load("hf://ada/letters")


def test_only_what_a_model_is_made_of():
    files = ["config.json", "README.md", "vocab.txt", "tokenizer.json", "modeling.py", "model.safetensors", "x/a.json"]
    foreign = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "training_args.bin", "optimizer.pt"]
    assert set(needed([*files, *foreign])) == set(files) - {"modeling.py", "x/a.json"}
    bins = needed(["config.json", "training_args.bin", "pytorch_model.bin", "other.bin", "optimizer.pt"])
    assert bins == ["config.json", "pytorch_model.bin"]
    assert needed(["esm.pt", "a.txt"]) == ["a.txt", "esm.pt"]
    assert needed(["README.md", "data/w.pth", "data/c.json"], "data") == ["data/c.json", "data/w.pth", "README.md"]
    fair = ["b/esm2.pt", "b/esm2-contact-regression.pt", "b/other.pt", "b/a.json"]
    assert needed(fair, "b/esm2.pt") == ["b/a.json", "b/esm2-contact-regression.pt", "b/esm2.pt"]
    with pytest.raises(InputError, match=r"no weights at its top\. There are some in data, data/b"):
        needed(["README.md", "data/w.pth", "data/b/model.safetensors"])
    with pytest.raises(InputError, match=r"no weights at its top\.$"):
        needed(["config.json", "training_args.bin"])


def test_a_missing_shard_is_noticed(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")
    assert not whole(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x")
    assert whole(tmp_path)
    assert not whole(tmp_path / "nowhere")


def test_licence(tmp_path):
    assert licence(tmp_path) == ""
    for text, found in {
        "---\ntags: [a]\nlicense: mit\n---\nlicense: gpl\n": "mit",
        "---\nlicense: other\nlicense_name: 'cambrian-non-commercial'\n---\n": "cambrian-non-commercial",
        "---\ntags: []\n---\nlicense: gpl\n": "",
        "license: gpl\n": "",
    }.items():
        (tmp_path / "README.md").write_text(text)
        assert licence(tmp_path) == found


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for."""

    files: ClassVar[dict] = {}
    asked: ClassVar[list] = []

    def reply(self, status, body=b"", headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.asked.append((self.command, path))
        if path.endswith(("/tree/v9", "/revision/v9")):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/ada/letters/tree/"):
            entries = [
                {"type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body), "path": name}
                for name, body in self.files.items()
            ]
            return self.reply(200, json.dumps(entries).encode())
        if path.startswith("/api/models/ada/letters"):
            info = {"id": "ada/letters", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            return self.reply(200, json.dumps(info).encode())
        name = path.rpartition(f"/{COMMIT}/")[2] if COMMIT in path else path.rpartition("/main/")[2]
        if path.startswith("/ada/letters/resolve/") and name in self.files:
            body = self.files[name]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.reply(200, body, headers)
        if path.startswith("/api/models/ada/locked"):
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def own_hub(monkeypatch, cache):
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetched_once_then_without_a_network(own_hub, model, cache, tmp_path, monkeypatch):
    from huggingface_hub import constants

    model.save(tmp_path / "m")
    own_hub.files.update({path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()})
    own_hub.files.update({"pytorch_model.bin": b"not for us", "notes.pdf": b"%PDF", "more/config.json": b"{}"})
    back = pv.load("hf://ada/letters")
    assert same(model, back)
    assert back.card.source == f"hf://ada/letters@{COMMIT}"
    folder, _ = fetch(HubName("ada/letters"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    fetched = {path.rpartition("/")[2] for command, path in own_hub.asked if command == "GET" and "resolve" in path}
    assert fetched == {"config.json", "model.safetensors", "README.md"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    own_hub.asked.clear()
    assert same(pv.load("hf://ada/letters"), back)
    assert not own_hub.asked


def test_what_the_hub_refuses(own_hub):
    own_hub.files["readme.txt"] = b"x"
    for name, words in {
        "ada/nothing": "no such model on the hub, or it is private",
        "ada/letters@v9": "no revision 'v9'",
        "ada/locked": "gated. Accept its terms at https://huggingface.co/ada/locked",
        "ada/letters": "hf://ada/letters: The repository has no weights at its top.",
        "ada/let..ters": "no such model",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            pv.load(f"hf://{name}")
        assert "\n" not in str(error.value)
