"""What sentence-transformers makes of an exported folder, in a process without this package."""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from remote_models import run_without_package, tiny_model, tiny_tokenizer

import mixlm
from mixlm import cli
from mixlm.data.passages import Passage
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.errors import UserError
from mixlm.exporting.sentences import export_sentence_transformers
from mixlm.hub import files_to_push

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
CODE_OF_DOCS = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), flags=re.DOTALL)[0]
LONG = "서울 은 한국 의 수도 이다 . " * 4
DECOMPOSED = unicodedata.normalize("NFD", "한국 수도")
QUERIES = ["서울", "서울 은 한국 의 수도 이다 .", "[SEP] 한국 [MASK]", LONG, "", " 한국", DECOMPOSED]
TITLES = ["", "한국", "[CLS]", "서울 수도", "한국", " ", DECOMPOSED]
PASSAGES = [Passage(str(n), title, text) for n, (title, text) in enumerate(zip(TITLES, QUERIES, strict=True))]
MODELS = {
    "decoder": (mixlm.MixLMForRetrieval, {}),
    "mean": (mixlm.MixLMForRetrieval, {"pooler": "mean", "normalize_embeddings": True}),
    "cls": (mixlm.MixLMForRetrieval, {"pooler": "cls"}),
    "two towers": (mixlm.MixLMForRetrieval, {"two_towers": True, "normalize_embeddings": True}),
    "switch": (mixlm.MixLMSwitchForRetrieval, {"pooler": "decoder", "normalize_embeddings": True}),
    "switch mean": (mixlm.MixLMSwitchForRetrieval, {"pooler": "mean"}),
    "switch cls": (mixlm.MixLMSwitchForRetrieval, {"pooler": "cls", "two_towers": True}),
}

# Saved again by sentence-transformers, and loaded from there.
SAVED_AGAIN = {f"{name} again": name for name in ("decoder", "switch cls")}

# One process for all models: starting it takes longest.
SCRIPT = """
import json
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

asked = json.loads(Path("asked.json").read_text("utf-8"))
pairs = [(title, text) if title else text for title, text in zip(asked["titles"], asked["queries"])]
for source, target in asked["saved_again"].items():
    SentenceTransformer(target, trust_remote_code=True, device="cpu").save_pretrained(source)
for folder in asked["folders"]:
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    assert type(model[0]).__module__.startswith("transformers_modules."), type(model[0])
    assert model.get_embedding_dimension() == 16 and model.max_seq_length == 12
    assert model.similarity_fn_name == "dot"
    model.max_seq_length = 5
    assert torch.equal(model.preprocess([asked["queries"][3]])["input_ids"][0, [0, -1]], torch.tensor([2, 3]))
    assert model.preprocess([asked["queries"][3]])["input_ids"].shape == (1, 5)
    for too_much in (1, 33):
        try:
            model.max_seq_length = too_much
            raise AssertionError
        except ValueError:
            assert model.max_seq_length == 5
    model.max_seq_length = 12
    dicts = [{"title": title, "text": text} for title, text in zip(asked["titles"], asked["queries"])]
    without_titles = model.preprocess([{"text": text} for text in asked["queries"]])["input_ids"]
    assert torch.equal(without_titles, model.preprocess(asked["queries"])["input_ids"])
    assert torch.equal(model.preprocess(dicts)["input_ids"], model.preprocess(pairs)["input_ids"])
    others = [np.array(["", text]) for text in asked["queries"]] + [(None, text) for text in asked["queries"]]
    found = model.preprocess(others)["input_ids"]
    assert torch.equal(found, torch.cat([without_titles, without_titles]))
    for no_text in ({"title": "text"}, {"title": 5, "text": "a"}, ("a", "b", "c"), 5):
        try:
            model.preprocess([no_text])
            raise AssertionError
        except ValueError as error:
            assert "is no text: give a str, (title, text), or a dict with 'text'" in str(error)
    for batch_size in (1, 4):
        np.savez(
            f"{folder} {batch_size}.npz",
            queries=model.encode_query(asked["queries"], batch_size=batch_size),
            passages=model.encode_document(pairs, batch_size=batch_size),
            texts=model.encode(asked["queries"], batch_size=batch_size),
        )
"""


def save(folder, model, encoding=None):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if encoding is not None:
        encoding.save(folder)
    return folder


def test_vectors_are_those_of_the_model_without_the_package(tmp_path):
    """For every pooler, one tower and two, questions and passages; also after sentence-transformers has saved it."""
    expected = {}
    for name, (model_class, fields) in MODELS.items():
        source = save(tmp_path / "source" / name, tiny_model(model_class, **fields), Encoding(8, 12))
        export_sentence_transformers(source, tmp_path / name)
        encoder = MixLMEncoder.from_pretrained(source, device="cpu", batch_size=1)
        expected[name] = {
            "queries": encoder.encode_queries(QUERIES),
            "passages": encoder.encode_passages(PASSAGES),
            "texts": encoder.encode_passages([passage._replace(title="") for passage in PASSAGES]),
        }
        # What is compared below would be the same anyway if lengths and titles made no difference.
        assert np.abs(expected[name]["passages"] - expected[name]["texts"]).max() > 1e-2
        assert np.abs(expected[name]["queries"] - expected[name]["texts"]).max() > 1e-2
    folders = [*MODELS, *SAVED_AGAIN]
    asked = {"queries": QUERIES, "titles": TITLES, "folders": folders, "saved_again": SAVED_AGAIN}
    (tmp_path / "asked.json").write_text(json.dumps(asked), "utf-8")
    export_sentence_transformers(tmp_path / "source" / "mean", tmp_path / "outputs" / "for-sentence-transformers")
    shown = run_without_package(SCRIPT + CODE_OF_DOCS, tmp_path)
    assert re.search(r"tensor\(\[\[-?\d.*, -?\d.*\]\]\)", shown)  # one question, two passages
    for folder in folders:
        for batch_size, rounding in ((1, 0), (4, 1e-5)):  # other texts in a batch change the last digits
            found = np.load(tmp_path / f"{folder} {batch_size}.npz")
            for kind, vectors in expected[SAVED_AGAIN.get(folder, folder)].items():
                np.testing.assert_allclose(found[kind], vectors, rtol=rounding, atol=1e-6, err_msg=f"{folder}: {kind}")


def test_an_export_is_still_a_model_of_this_package(tmp_path, capsys):
    source = save(tmp_path / "source", tiny_model(mixlm.MixLMForRetrieval, two_towers=True), Encoding(8, 12))
    cli.main(["export", "sentence-transformers", str(source), str(tmp_path / "out")])
    assert "8 tokens" in capsys.readouterr().out
    found, expected = (MixLMEncoder.from_pretrained(tmp_path / name, device="cpu") for name in ("out", "source"))
    assert found.fingerprint() == expected.fingerprint()


def test_an_export_is_pushed_whole(tmp_path):
    """Without modules.json sentence-transformers would make other vectors of it, and say nothing."""
    save(tmp_path / "source", tiny_model(mixlm.MixLMForRetrieval), Encoding(8, 12))
    export_sentence_transformers(tmp_path / "source", tmp_path / "out")
    files = files_to_push(tmp_path / "out")
    assert files == sorted(file.name for file in (tmp_path / "out").iterdir())
    assert {"modules.json", "config_sentence_transformers.json", "sentence_encoder.py"} < set(files)

    modules = json.loads((tmp_path / "out" / "modules.json").read_text("utf-8"))
    modules.append({"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"})
    modules[0]["type"] = "sentence_transformers.models.Transformer"  # whose code is in no file of the folder
    (tmp_path / "out" / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(UserError, match="has a module in the folder 1_Normalize, and mixlm push takes none"):
        files_to_push(tmp_path / "out")
    (tmp_path / "out" / "modules.json").write_text("{}", "utf-8")
    assert files_to_push(tmp_path / "out") == [name for name in files if name != "sentence_encoder.py"]


def test_a_pretrained_model_is_exported_with_lengths_that_it_takes(tmp_path):
    source = save(tmp_path / "source", tiny_model(mixlm.MixLMForMaskedLM))
    export_sentence_transformers(source, tmp_path / "out")
    assert Encoding.load(tmp_path / "out") == Encoding(32, 32)


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("nowhere", "out", "nowhere: cannot be loaded"),
        ("source", "source", "source: exists and is not empty"),
        ("source", "source/config.json", "config.json: is a file"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, source, out, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "source", tiny_model(mixlm.MixLMForRetrieval), Encoding(8, 12))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "sentence-transformers", source, out])
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_off_export_leaves_nothing(tmp_path, monkeypatch):
    source = save(tmp_path / "source", tiny_model(mixlm.MixLMForRetrieval), Encoding(8, 12))

    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("mixlm.exporting.sentences.shutil.copyfile", broken)
    with pytest.raises(KeyboardInterrupt):
        export_sentence_transformers(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
