"""What comes from elsewhere is data: nothing in it runs, and no name in it reaches out of its folder.

The sources are searched for what could break that, and then attacked. Of the web page see also test_serving.py and
browser/.
"""

import ast
import http.client
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from answering import StubReader, save_reader
from local_server import running

import mixlm
from mixlm.cli import main
from mixlm.data.batching import Position
from mixlm.data.hashing import hash_file, hash_json
from mixlm.data.passages import Passage
from mixlm.encoder import MixLMEncoder
from mixlm.errors import UserError
from mixlm.open_qa import OpenQA
from mixlm.profiling import saved_model
from mixlm.reader import MixLMReader
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.index import build_index, open_index
from mixlm.retrieval.vectors import StoredVectors, encode_passages
from mixlm.serving import build_app
from mixlm.tokenization import load_tokenizer
from mixlm.training import checkpoint
from mixlm.training.arguments import PretrainingArguments, parse_arguments

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("mixlm", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")) + sorted(
    REPOSITORY.glob("*.py")
)

# Modules that run what they read, or that unpack names into folders.
MODULES = set("pickle _pickle cPickle dill cloudpickle joblib marshal shelve tarfile zipfile yaml".split())
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save", "shutil.unpack_archive"}


def dangers(source: str) -> list[tuple[int, str]]:
    """Line and name of each thing in a source that could run, or unpack, what comes from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            found += [(node.lineno, name) for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in CALLS:
            found.append((node.lineno, called))
        if called.endswith("torch.load") and options.get("weights_only") != "True":
            found.append((node.lineno, "torch.load without weights_only=True"))
        for option in ("shell", "allow_pickle", "trust_remote_code"):
            if options.get(option) == "True":
                found.append((node.lineno, f"{option}=True"))
        is_loaded_by_name = called.endswith(".from_pretrained") and called.lower().startswith("auto")
        if is_loaded_by_name and not options.keys() & {"trust_remote_code", None}:  # without it, it may ask
            found.append((node.lineno, f"{called} without trust_remote_code=False"))
        has_weights = is_loaded_by_name and not called.startswith(("AutoConfig", "AutoTokenizer"))
        if has_weights and options.get("use_safetensors") != "True" and None not in options:
            found.append((node.lineno, f"{called} without use_safetensors=True"))
    return found


def test_dangers_are_found():
    """The search below would be empty if it found nothing."""
    source = (
        "import pickle, os\n"
        "from dill import loads\n"
        "eval('1')\n"
        "torch.load(file)\n"
        "torch.load(file, weights_only=False)\n"
        "torch.load(file, weights_only=True)\n"
        "np.load(file, allow_pickle=True)\n"
        "subprocess.run('ls', shell=True)\n"
        "AutoModel.from_pretrained(name)\n"
        "AutoModel.from_pretrained(name, trust_remote_code=True)\n"
        "AutoModel.from_pretrained(name, trust_remote_code=False)\n"
        "AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True)\n"
        "AutoConfig.from_pretrained(name, trust_remote_code=False)\n"
        "model.eval()\n"
        "re.compile('x')\n"
    )
    assert sorted({line for line, _ in dangers(source)}) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_source_has_any(path):
    found = dangers(path.read_text("utf-8"))
    if path.is_relative_to(REPOSITORY / "benchmarks"):  # they load what they have written themselves
        found = [(line, what) for line, what in found if "trust_remote_code" not in what and "safetensors" not in what]
    assert not found, path


@pytest.fixture
def sign(tmp_path):
    """What an attack makes where it succeeds."""
    return tmp_path / "it-ran"


class Bomb:
    """A pickle that makes a folder where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(capsys, *arguments) -> str:
    """The one line in which a command says no."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    error = capsys.readouterr().err
    error = error[error.index("error: ") :]  # behind a bar of loading, where no test before has hidden it
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.fixture
def model(tmp_path):
    """A whole folder of a reader, with its tokenizer."""
    return Path(save_reader(tmp_path / "model", ["서울은 한국의 수도이다."]))


LOADERS = {
    "tokenizer": load_tokenizer,
    "reader": MixLMReader.from_pretrained,
    "encoder": MixLMEncoder.from_pretrained,
    "profile": lambda name: saved_model(name, length=8, inference=True),
}


class TestCodeDoesNotRun:
    @pytest.mark.parametrize("protocol", [2, "torch"])
    def test_in_an_older_checkpoint(self, tmp_path, sign, capsys, protocol):
        older, config = tmp_path / "older.bin", tmp_path / "older.json"
        if protocol == "torch":
            torch.save({"weight": Bomb(sign)}, older)
        else:
            older.write_bytes(pickle.dumps({"weight": Bomb(sign)}, protocol))
        config.write_text((REPOSITORY / "mixlm" / "configs" / "mixlm-tiny.json").read_text())
        options = ["--family", "mixlm", "--head", "sop"]
        error = refused(capsys, "convert", older, config, tmp_path / "out", *options)
        assert "not a file of plain tensors" in error and not sign.exists() and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("loader", LOADERS)
    def test_in_weights_that_are_a_pickle(self, model, sign, loader):
        (model / "model.safetensors").unlink()
        torch.save({"weight": Bomb(sign)}, model / "pytorch_model.bin")
        if loader == "tokenizer":
            LOADERS[loader](str(model))
        else:
            with pytest.raises(UserError):
                LOADERS[loader](str(model))
        assert not sign.exists()

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("knows_type", [True, False])
    def test_beside_a_model(self, model, sign, loader, knows_type, monkeypatch):
        """Folders from the Hub may have code; it is neither run nor asked about, here where the class is known."""
        monkeypatch.setattr("builtins.input", lambda prompt: "y")
        (model / "evil.py").write_text(f"import os\nos.mkdir({str(sign)!r})\nclass Evil: pass\n")
        for name in ("config.json", "tokenizer_config.json"):
            fields = json.loads((model / name).read_text())
            auto_classes = ["AutoConfig", *(name for name in dir(mixlm.configuration) if name.startswith("Auto"))]
            auto_classes += ["AutoModel", "AutoModelForQuestionAnswering", "AutoModelForTextEncoding"]
            fields["auto_map"] = dict.fromkeys(auto_classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil"] * 2}
            if not knows_type:
                fields |= {"model_type": "evil", "tokenizer_class": "Evil"}
            (model / name).write_text(json.dumps(fields))
        try:
            LOADERS[loader](str(model))
        except UserError:
            assert not knows_type
        assert not sign.exists()

    def test_in_an_array(self, tmp_path, sign, retriever):
        """An array of Python objects is a pickle; here with hashes that are right."""
        vectors = tmp_path / "vectors"
        encode_passages([Passage("1", "", "섬")], retriever, vectors)
        (shard,) = vectors.glob("shard-*")
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        array = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
        (shard / "vectors.npy").write_bytes(array + pickle.dumps([Bomb(sign)]))
        record = json.loads((shard / "shard.json").read_text())
        record["files"]["vectors.npy"] = hash_file(shard / "vectors.npy")
        (shard / "shard.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="Python objects"):
            next(StoredVectors(vectors).shards())
        assert not sign.exists()


def forge(manifest: Path, change) -> None:
    """Change a manifest and the hash that it has of itself."""
    contents = json.loads(manifest.read_text("utf-8"))
    contents.pop("blake2b")
    change(contents)
    manifest.write_text(json.dumps({**contents, "blake2b": hash_json(contents)}), "utf-8")


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return save_reader(tmp_path_factory.mktemp("retriever"), ["서울은 한국의 수도이다."])


NAMES = ["../secret", "/dev/zero", "lexical/../../secret", ".."]  # /dev/zero has no end


class TestNamesStayInTheirFolder:
    @pytest.mark.parametrize("name", NAMES)
    def test_of_an_index(self, tmp_path, capsys, name):
        build_index([Passage("1", "", "섬")], tmp_path / "index", BigramAnalyser())
        (tmp_path / "secret").write_text("secret")
        forge(tmp_path / "index" / "manifest.json", lambda manifest: manifest["files"].update({name: "0"}))
        error = refused(capsys, "search", "--index", tmp_path / "index", "--query", "섬")
        assert f"manifest.json: names {name}, outside of its folder" in error

    @pytest.mark.parametrize("name", NAMES)
    def test_of_vectors(self, tmp_path, capsys, retriever, name):
        for folder, text in (("vectors", "섬"), ("secret", "바다")):
            encode_passages([Passage("1", "", text)], retriever, tmp_path / folder)
        (other,) = (tmp_path / "secret").glob("shard-*")
        for stolen in (name, f"../secret/{other.name}"):
            forge(tmp_path / "vectors" / "vectors.json", lambda manifest: manifest.update(shards=[stolen]))  # noqa: B023
            error = refused(capsys, "index", "--vectors", tmp_path / "vectors", "--out", tmp_path / "index")
            assert f"vectors.json: names {stolen}, outside of its folder" in error
        assert not (tmp_path / "index").exists()

    @pytest.mark.parametrize("name", NAMES)
    def test_of_a_checkpoint(self, tmp_path, name):
        config = mixlm.MixLMConfig.from_preset("mixlm-tiny", vocab_size=10)
        model = mixlm.MixLMForMaskedLM(config)
        folder, state = tmp_path / "step-00000001", checkpoint.TrainingState(1, Position(0, 0))
        parameters = dict(model.named_parameters())
        checkpoint.save_checkpoint(folder, checkpoint.skeleton_of(model), parameters, {}, state, {})
        checkpoint.verify(folder)
        contents = checkpoint.read_state(folder)
        contents["files"][name] = "0"
        contents["hash"] = checkpoint._hash_of_state(contents)
        (folder / "state.json").write_text(json.dumps(contents))
        with pytest.raises(UserError, match=f"state.json: names {name}, outside of its folder"):
            checkpoint.verify(folder)

    @pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", "x\\..\\y"])
    def test_of_a_run(self, tmp_path, name):
        given = {"model_name": name, "output_dir": str(tmp_path / "runs"), "corpus_path": "c", "tokenizer": "t"}
        (tmp_path / "arguments.json").write_text(json.dumps(given))
        flags = [part for option, value in given.items() for part in (f"--{option}", value)]
        for argv in ([str(tmp_path / "arguments.json")], flags):
            with pytest.raises(UserError, match="must be a plain folder name, without slashes"):
                parse_arguments(PretrainingArguments, argv)

    def test_ids_and_titles_are_no_paths(self, tmp_path, retriever, monkeypatch):
        """Passages are kept in tables: whatever their ids, no file is called by them."""
        passages = [Passage("../../id", "../title", "섬"), Passage("/dev/null", "", "바다")]
        work = tmp_path / "deep" / "work"
        work.mkdir(parents=True)
        monkeypatch.chdir(work)
        encode_passages(passages, retriever, Path("vectors"))
        build_index(passages, Path("index"), BigramAnalyser(), StoredVectors(Path("vectors")))
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
            path for path in work.rglob("*") if path.is_file()
        }
        assert not list(work.rglob("*id*")) and open_index(Path("index")).passages[0] == passages[0]


class TestServer:
    @pytest.fixture(scope="class")
    def address(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("served")
        build_index([Passage("1", "", "한글 1443")], folder / "index", BigramAnalyser())
        with running(build_app(OpenQA(open_index(folder / "index"), StubReader()), [])) as address:
            yield address

    def answered(self, address, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request(method, path, body, headers)  # as it is: urllib would take dots out of the path
        response = connection.getresponse()
        return response.status, response.read()

    @pytest.mark.parametrize(
        "path",
        [
            "/gradio_api/file=/etc/hostname",
            "/gradio_api/file=../../../../../../etc/hostname",
            f"/gradio_api/file={Path(__file__)}",
            "/static/../../../../../../../../etc/hostname",
            "/static/%2e%2e/%2e%2e/__init__.py",
            "/assets/..%2f..%2f..%2f..%2fetc%2fhostname",
            "/../../../../etc/hostname",
            "/gradio_api/proxy=http://127.0.0.1:1/",
        ],
    )
    def test_no_file_of_the_machine_is_shown(self, address, path):
        status, _ = self.answered(address, "GET", path)
        assert status in (400, 403, 404)

    @pytest.mark.parametrize("path", ["/gradio_api/upload", "/en/gradio_api/upload", "/upload"])
    def test_no_file_is_taken(self, address, path):
        name = b'form-data; name="files"; filename="../../evil.html"'
        body = b"--x\r\nContent-Disposition: " + name + b"\r\n\r\n<script></script>\r\n--x--\r\n"
        found = self.answered(address, "POST", path, body, **{"Content-Type": "multipart/form-data; boundary=x"})
        assert found == (404, b'{"error":"files are not taken"}')
