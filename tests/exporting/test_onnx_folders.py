"""`mixlm export onnx`: a folder that is enough by itself, and its report."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from remote_models import run_without_package, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertForQuestionAnswering

import mixlm
from mixlm import cli
from mixlm.data.passages import Passage
from mixlm.data.squad import ReadingExample
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.exporting import parity
from mixlm.exporting.parity import compare_encoders, compare_readers, speed_ratio
from mixlm.reader import Decoding, MixLMReader
from mixlm.tokenization import train_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
CONTEXT = "제주도는 우리나라에서 가장 큰 섬으로, 한반도 남쪽 바다에 있다."
QUESTION = "제주도는 어디에 있는가?"
TEXTS = ["제주도는 한반도 남쪽 바다에 있는 섬이다.", "한라산은 제주도에 있다."]
# Neither torch nor transformers can be imported after this.
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with an encoder, a reader, and a few questions."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = train_tokenizer([CONTEXT, QUESTION, *TEXTS] * 3, 200, show_progress=False)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 64}
    for name, model_class, settings in (
        ("retriever", mixlm.MixLMSwitchForRetrieval, Encoding(24, 12)),
        ("reader", mixlm.MixLMForQuestionAnswering, Decoding(64, 8, 24, max_answer_length=5)),
    ):
        tiny_model(model_class, **sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        settings.save(folder / name)
    questions = [
        {
            "id": str(number),
            "question": QUESTION[number:],
            "answers": [{"text": "섬", "answer_start": context.index("섬")}],
        }
        for number, context in enumerate([CONTEXT, TEXTS[0]])
    ]
    paragraphs = [
        {"context": context, "qas": [question]}
        for context, question in zip([CONTEXT, TEXTS[0]], questions, strict=True)
    ]
    document = {"version": "1.1", "data": [{"title": "제주도", "paragraphs": paragraphs}]}
    (folder / "questions.json").write_text(json.dumps(document), "utf-8")
    return folder


@pytest.mark.parametrize(("name", "flags"), [("retriever", ["--int8"]), ("reader", [])])
def test_a_folder_is_used_with_onnxruntime_and_tokenizers_alone(sources, tmp_path, capsys, name, flags):
    """By the code of the documentation, word for word; what is printed is what parity.json has."""
    out = tmp_path / "outputs" / f"my-{name}-onnx"
    questions = str(sources / "questions.json")
    cli.main(["export", "onnx", str(sources / name), str(out), "--squad_file", questions, *flags])
    printed = capsys.readouterr().out
    kinds = [".onnx", ".int8.onnx"][: 1 + len(flags)]
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "parity.json"}
    names |= {"reader.json" if name == "reader" else "encoder.json", *(f"model{kind}" for kind in kinds)}
    assert {path.name for path in out.iterdir()} == names
    assert "auto_map" not in (out / "config.json").read_text("utf-8")  # it would name code that is not there

    report = json.loads((out / "parity.json").read_text("utf-8"))
    assert report["questions"] == 2 and str(sources) not in json.dumps(report)
    assert report[".onnx"]["max_difference"] < 1e-5 < report[".onnx"]["largest_value"]
    same = [value for key, value in report[".onnx"].items() if key.startswith("same")]
    assert same and all(value == 1 for value in same)
    if flags:
        assert 1e-5 < report[".int8.onnx"]["max_difference"] < 0.5
    for key, value in report[kinds[-1]].items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [key])
        if key.startswith("speed"):
            assert value > 0 and line.split()[-1] == f"x{value:.2f}"

    (code,) = [block for block in code_blocks("export.md") if f"my-{name}-onnx" in block]
    shown = run_without_package(WITHOUT_TORCH + code, tmp_path).strip()
    if name == "reader":
        assert shown == MixLMReader.from_pretrained(sources / name).answer(QUESTION, CONTEXT).text
    else:
        encoder = MixLMEncoder.from_pretrained(sources / name, device="cpu")
        query = encoder.encode_queries(["우리나라에서 가장 큰 섬은 어디인가?"])
        passages = encoder.encode_passages([Passage("1", "제주도", TEXTS[0]), Passage("2", "", TEXTS[1])])
        found = np.array([float(number) for number in re.findall(r"-?\d+\.\d+", shown)])
        np.testing.assert_allclose(found, (query @ passages.T)[0], rtol=1e-4)


def test_both_languages_show_the_same_commands_and_code():
    pages = [(DOCS / name).read_text("utf-8") for name in ("export.md", "export.ko.md")]
    english, korean = (
        [re.sub(r'""".*?"""|# .*', "", block) for block in re.findall(r"```\w+\n.*?```", page, flags=re.DOTALL)]
        for page in pages
    )
    assert len(english) > 4 and english == korean


class TestParity:
    """What the numbers of a report mean, on models that are wrong in a known way."""

    PASSAGES = [Passage(str(n), "", text) for n, text in enumerate(["서울", "한국 의 수도", "한국", "이다 이다"])]
    QUERIES = ["서울", "한국", "수도 이다"]

    def encoder(self) -> MixLMEncoder:
        model = tiny_model(mixlm.MixLMForRetrieval, normalize_embeddings=True)
        return MixLMEncoder(model, tiny_tokenizer(), Encoding(8, 8))

    def test_a_model_is_like_itself(self):
        encoder = self.encoder()
        numbers = compare_encoders(encoder, encoder.model, self.QUERIES, self.PASSAGES)
        assert numbers["max_difference"] == 0 and 0 < numbers["largest_value"] <= 1
        assert numbers["same_best_passage"] == numbers["same_best_ten"] == 1

    def test_other_vectors_of_passages_are_another_ranking(self, monkeypatch):
        monkeypatch.setattr(parity, "BEST", 2)
        encoder = self.encoder()

        def turned(**inputs):
            outputs = encoder.model(**inputs)
            if outputs.context_embeddings is not None:
                outputs.context_embeddings = -outputs.context_embeddings
            return outputs

        numbers = compare_encoders(encoder, turned, self.QUERIES, self.PASSAGES)
        # Of four passages in the opposite order, the first two have become the last two.
        assert numbers["same_best_passage"] == numbers["same_best_ten"] == 0
        assert 0.1 < numbers["max_difference"] <= 2 * numbers["largest_value"]

    def test_other_logits_are_other_answers(self):
        reader = MixLMReader(
            tiny_model(mixlm.MixLMForQuestionAnswering), tiny_tokenizer(), Decoding(16, 4, 4, max_answer_length=2)
        )
        context = "서울 은 한국 의 수도 이다 ."
        examples = [
            ReadingExample(str(number), "", context, question, (), (), is_impossible=True, article=0)
            for number, question in enumerate(["서울", "수도"])
        ]
        numbers = compare_readers(reader, reader.model, examples)
        assert numbers["max_difference"] == 0 and numbers["same_answer"] == 1

        def turned(**inputs):
            outputs = reader.model(**inputs)
            outputs.start_logits, outputs.end_logits = -outputs.start_logits, -outputs.end_logits
            return outputs

        numbers = compare_readers(reader, turned, examples)
        assert numbers["max_difference"] == pytest.approx(2 * numbers["largest_value"])
        assert numbers["same_answer"] == 0

    def test_speed_is_a_ratio_of_medians_of_rounds_in_turns(self, monkeypatch):
        clock, order = [0.0], []
        monkeypatch.setattr(parity.time, "perf_counter", lambda: clock[0])

        def model_of(name, seconds):
            def model(rows):
                order.append(name)
                # The first round warms up, and once somebody else had the machine.
                clock[0] += 50 if len(order) in (1, 5) else seconds * rows

            return model

        assert speed_ratio(model_of("own", 3.0), model_of("other", 0.5), [{"rows": 1}, {"rows": 2}]) == 6
        assert order[:4] == ["own", "other"] * 2


def bert(folder):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForQuestionAnswering(BertConfig(vocab_size=15, **shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("nowhere", [], "nowhere: no such folder"),
        ("bert", [], "is of type bert; give one of mixlm or mixlm_switch"),
        ("retriever", ["--squad_file", "nowhere.json"], "nowhere.json"),
        ("retriever", ["--int9"], "unknown option --int9, did you mean --int8?"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(sources, tmp_path, capsys, model, flags, message):
    if model == "bert":
        bert(tmp_path / "bert")
    source = tmp_path / "bert" if model == "bert" else sources / model
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "onnx", str(source), str(tmp_path / "out"), *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_lacking_is_named_with_its_extra(sources, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "onnx", str(sources / "reader"), str(tmp_path / "out")])
    assert ended.value.code == 2
    assert f"{package} is not installed; install it with: pip install 'mixlm[export]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_broken_off_export_leaves_nothing(sources, tmp_path, monkeypatch):
    def broken(model, graph, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mixlm.exporting.onnx_folders.write_graph", broken)
    with pytest.raises(SystemExit):
        cli.main(["export", "onnx", str(sources / "reader"), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
