"""`mixlm tokenizer ...` as a person uses it: what is printed, what is written, what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixlm.cli import main

REPOSITORY = Path(__file__).parent.parent
CORPUS = "나는 학교에 간다.\n나는 학교에서 배운다.\n\nThe school is in Seoul.\n"


@pytest.fixture
def corpus(tmp_path) -> str:
    file = tmp_path / "corpus.dat"
    file.write_text(CORPUS * 3, encoding="utf-8")
    return str(file)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "made" / "tokenizer"


@pytest.fixture
def refused(capsys):
    """Run `mixlm` with arguments that it must refuse; returns the one line it says."""

    def run(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert exit_.value.code == 2
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err

    return run


def train(corpus: str, out: Path, *options: str) -> None:
    main(["tokenizer", "train", "--corpus_path", corpus, "--out", str(out), "--vocab_size", "100", *options])


class TestTrain:
    def test_folder_loads_and_the_size_is_told(self, corpus, out, capsys):
        train(corpus, out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.tokenize("나는 학교에") == ["나는", "학교", "##에"]
        assert tokenizer.model_max_length == 512
        assert set(tokenizer("나는")) == {"input_ids", "token_type_ids", "attention_mask"}
        printed = capsys.readouterr().out
        assert printed.startswith(f"{len(tokenizer)} tokens saved in {out}\n")
        # The corpus has fewer pieces than 100.
        assert f"Set the model's vocab_size to {len(tokenizer)}" in printed
        assert [entry.name for entry in out.parent.iterdir()] == ["tokenizer"]

    def test_options(self, corpus, out, capsys):
        train(corpus, out, "--vocab_size", "60", "--max_length", "64", "--lowercase")
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert len(tokenizer) == 60 and tokenizer.model_max_length == 64
        assert tokenizer.tokenize("SCHOOL") == tokenizer.tokenize("school")
        assert "fewer" not in capsys.readouterr().out
        train(corpus, out.with_name("frequent"), "--min_frequency", "100")
        tokens = AutoTokenizer.from_pretrained(out.with_name("frequent")).tokenize("나는")
        assert tokens == ["나", "##는"]

    def test_characters_that_do_not_fit_are_told(self, corpus, out, capsys):
        train(corpus, out, "--vocab_size", "10")
        tokenizer = AutoTokenizer.from_pretrained(out)
        characters = set(CORPUS) - {" ", "\n"}
        left_out = sum("[UNK]" in tokenizer.tokenize(character) for character in characters)
        assert 5 < len(tokenizer) < 10 and 0 < left_out < len(characters)
        printed = capsys.readouterr().out
        assert f"asked for: {left_out} characters of the corpus did not fit" in printed
        assert "larger --vocab_size" in printed and "no more pieces" not in printed

    def test_an_empty_folder_is_filled(self, corpus, out):
        out.mkdir(parents=True)
        train(corpus, out)
        assert (out / "tokenizer.json").exists()

    def test_existing_folders_are_left_alone(self, corpus, out, refused):
        arguments = ("tokenizer", "train", "--corpus_path", corpus, "--out", out)
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
        assert "exists and is not empty; use another name or delete it" in refused(*arguments)
        assert [entry.name for entry in out.iterdir()] == ["notes.txt"]
        assert "is a file" in refused(*arguments[:-1], out / "notes.txt")

    def test_refused_before_the_corpus_is_read(self, out, refused):
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
        assert "is not empty" in refused("tokenizer", "train", "--corpus_path", "/nowhere", "--out", out)

    def test_a_failed_write_leaves_nothing(self, corpus, out, refused, monkeypatch):
        def save_half(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_half)
        message = refused("tokenizer", "train", "--corpus_path", corpus, "--out", out)
        assert f"{out}: cannot be written: No space left on device" in message
        assert list(out.parent.iterdir()) == []

    def test_bad_input(self, corpus, out, refused, tmp_path):
        common = ("tokenizer", "train", "--out", out, "--corpus_path")
        assert "nowhere" in refused(*common, tmp_path / "nowhere")
        assert "vocab_size 3" in refused(*common, corpus, "--vocab_size", "3")
        assert "vocab_size 6: too small for a single character" in refused(*common, corpus, "--vocab_size", "6")
        assert "min_frequency 0" in refused(*common, corpus, "--min_frequency", "0")
        assert "--max_length 2" in refused(*common, corpus, "--max_length", "2")
        assert not out.exists()


class TestFromVocab:
    def test_folder_loads(self, out, tmp_path, capsys):
        vocab = tmp_path / "vocab.txt"
        vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "나", "##는"]), encoding="utf-8")
        main(["tokenizer", "from-vocab", str(vocab), "--out", str(out)])
        assert AutoTokenizer.from_pretrained(out)("나는")["input_ids"] == [2, 5, 6, 3]
        assert capsys.readouterr().out.startswith(f"7 tokens saved in {out}\n")

    def test_bad_file(self, out, tmp_path, refused):
        vocab = tmp_path / "vocab.txt"
        vocab.write_text("[PAD]\n[PAD]\n")
        message = refused("tokenizer", "from-vocab", vocab, "--out", out)
        assert f"{vocab}, line 2: '[PAD]' is already on line 1" in message
        assert not out.parent.exists()


class TestReport:
    @pytest.fixture
    def squad(self, tmp_path) -> str:
        answers = [{"answer_start": 3, "text": "학교에"}, {"answer_start": 4, "text": "교"}]
        paragraph = {"context": "나는 학교에 간다.", "qas": [{"id": "q", "question": "?", "answers": answers}]}
        file = tmp_path / "dev.json"
        file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
        return str(file)

    def test_table(self, corpus, squad, out, capsys):
        train(corpus, out)
        capsys.readouterr()
        main(["tokenizer", "report", "--tokenizer", str(out), "--corpus_path", corpus, "--squad_file", squad])
        lines = capsys.readouterr().out.splitlines()
        size = len(AutoTokenizer.from_pretrained(out))
        assert lines[0] == f"{out}: WordPiece, {size} tokens"
        cells = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith("  ")]
        values = {name: value for name, value, *_ in cells}
        assert values["sentences"] == "9"
        assert values["eojeols"] == str(3 * (3 + 3 + 5))
        assert values["characters"] == str(3 * (8 + 9 + 20))
        assert values["unknown rate"] == "0.0000%"
        assert values["answers"] == "2"
        assert values["EM ceiling"] == "50.00%"

    def test_only_what_was_asked_for(self, corpus, squad, out, capsys):
        train(corpus, out)
        capsys.readouterr()
        main(["tokenizer", "report", "--tokenizer", str(out), "--corpus_path", corpus])
        assert "EM ceiling" not in capsys.readouterr().out
        main(["tokenizer", "report", "--tokenizer", str(out), "--squad_file", squad, squad])
        printed = capsys.readouterr().out
        assert "eojeols" not in printed and "EM ceiling" in printed

    def test_refused(self, out, refused):
        assert "nothing to measure" in refused("tokenizer", "report", "--tokenizer", out)
        assert "no such folder" in refused("tokenizer", "report", "--tokenizer", out, "--squad_file", "x.json")


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["tokenizer", "train", "--corpus_pth", "x"], "unknown option --corpus_pth, did you mean --corpus_path?"),
            (["tokenizer", "train", "--corpus-path=x"], "unknown option --corpus-path, did you mean --corpus_path?"),
            (["tokenizer", "train", "--zzz"], "unknown option --zzz; see mixlm tokenizer train --help"),
            (["--hlp"], "unknown option --hlp, did you mean --help?"),
            (["tokenizer", "--hlp", "train"], "unknown option --hlp, did you mean --help?"),
            (["tokenizer", "train"], "required: --corpus_path, --out; see mixlm tokenizer train --help"),
            (["tokenizer", "train", "--vocab_size", "many"], "invalid int value: 'many'"),
            (["tokenizer", "trian"], "invalid choice: 'trian'"),
            (["tokenizr"], "invalid choice: 'tokenizr'"),
            (["tokenizer", "from-vocab", "a", "b", "--out", "c"], "unrecognized arguments: b"),
            ([], "see mixlm --help"),
        ],
    )
    def test_one_line_and_a_hint(self, refused, arguments, message):
        assert message in refused(*arguments)

    @pytest.mark.parametrize("verb", [[], ["tokenizer"], ["tokenizer", "train"], ["tokenizer", "report"]])
    def test_help(self, verb, capsys):
        with pytest.raises(SystemExit) as exit_:
            main([*verb, "--help"])
        assert exit_.value.code == 0
        assert " ".join(["usage: mixlm", *verb]) in capsys.readouterr().out

    def test_help_waits_for_nothing(self):
        # The package is put in place by hand, so that only what the cli itself imports is looked at.
        code = (
            "import sys, types\n"
            "package = types.ModuleType('mixlm'); package.__path__ = [sys.argv[1]]; sys.modules['mixlm'] = package\n"
            "from mixlm.cli import main\n"
            "try: main(['tokenizer', 'train', '--help'])\n"
            "finally: print('heavy:', sorted({'numpy', 'torch', 'tokenizers', 'transformers'} & set(sys.modules)))\n"
        )
        process = subprocess.run(
            [sys.executable, "-c", code, str(REPOSITORY / "mixlm")], capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.endswith("heavy: []\n")
