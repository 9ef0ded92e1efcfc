"""A program that uses mixlm as its documentation says: not run, but read by mypy (`make lint`).

What a user gets is what is written here behind each call; where the package changed a signature, this would not pass.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np

import mixlm
from mixlm.configuration import read_config
from mixlm.data.corpus import Document, read_documents
from mixlm.data.passages import Passage, read_passages
from mixlm.data.squad import ReadingData, read_squad, select_articles
from mixlm.data.statistics import CorpusStatistics, KnownText, corpus_statistics
from mixlm.data.store import TokenizedCorpus, open_corpus
from mixlm.encoder import MixLMEncoder
from mixlm.errors import UserError
from mixlm.evaluation.retrieval import ranking_scores
from mixlm.evaluation.retrieval_files import read_qrels, read_queries, read_run, write_run
from mixlm.exporting.onnx_folders import export_onnx
from mixlm.exporting.sentences import export_sentence_transformers
from mixlm.hub import files_to_push
from mixlm.open_qa import Choice, OpenAnswer, OpenQA
from mixlm.reader import MixLMReader, ReadAnswer
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.hits import Found
from mixlm.retrieval.index import Index, build_index, open_index
from mixlm.retrieval.search import Search
from mixlm.retrieval.vectors import StoredVectors, encode_passages
from mixlm.tokenization import load_tokenizer, train_tokenizer, word_start_table
from mixlm.training.arguments import PretrainingArguments, parse_arguments
from mixlm.training.publishing import publish


def configure() -> None:
    assert_type(read_config("mixlm-base"), mixlm.MixLMConfig | mixlm.MixLMSwitchConfig)
    assert_type(mixlm.preset_names(), list[str])
    arguments = assert_type(parse_arguments(PretrainingArguments, ["a.json"]), PretrainingArguments)
    assert_type(arguments.learning_rate, float | None)
    assert_type(arguments.run_folder, Path)


def read_texts() -> None:
    assert_type(read_documents("corpus"), Iterator[Document])
    data = assert_type(read_squad("dev.json"), ReadingData)
    assert_type(select_articles(data.examples, "0:110")[0].question, str)
    tokenizer = train_tokenizer(["한글은 1443년에 만들어졌다."], 1000)
    assert_type(word_start_table(tokenizer), np.ndarray)
    load_tokenizer(Path("tokenizer"))


def know_a_corpus() -> None:
    found = assert_type(corpus_statistics(read_documents("corpus"), evaluation_files=["dev.json"]), CorpusStatistics)
    assert_type(found.overlaps[0].most_known, list[KnownText])
    corpus = open_corpus("corpus", load_tokenizer("tokenizer"), max_sentence_length=128)
    assert_type(corpus, TokenizedCorpus)


def give_away() -> None:
    assert_type(files_to_push(Path("reader")), list[str])
    assert_type(publish(Path("reader"), "me/reader", private=True), list[str])
    assert_type(export_sentence_transformers("retriever", Path("out")), MixLMEncoder)
    assert_type(export_onnx("reader", Path("onnx"), int8=True, squad_file="dev.json"), dict[str, Any])


def answer_from_a_text() -> str:
    try:
        reader = MixLMReader.from_pretrained(Path("reader"), device="cpu")
    except UserError as error:
        return str(error)
    assert_type(reader.answers(["언제?"], ["1443년이다."]), list[ReadAnswer])
    answer = assert_type(reader.answer("언제?", "1443년이다."), ReadAnswer)
    assert_type(answer.null_odds, float | None)
    return answer.text


def answer_from_a_collection() -> None:
    passages = assert_type(read_passages(["passages.jsonl"]), Iterator[Passage])
    assert_type(encode_passages(passages, "retriever", Path("vectors"), processes=2), int)
    vectors = StoredVectors(Path("vectors"))
    build_index(vectors.passages(), Path("index"), BigramAnalyser(), vectors, "hnsw")
    index = assert_type(open_index(Path("index")), Index)
    encoder = MixLMEncoder.from_pretrained("retriever")
    assert_type(encoder.encode_queries(["언제?"]), np.ndarray)
    search = Search(index, encoder)
    for found in assert_type(search.hybrid(["언제?"], 10), Iterator[Found]):
        passage = assert_type(index.passages[found.hits[0].row], Passage)
        assert_type(passage.title, str)
    answering = OpenQA(index, MixLMReader.from_pretrained("reader"), search, top_k=5, choice=Choice(weight=2.0))
    assert_type(answering.answer("언제?"), OpenAnswer)
    assert_type(answering.answers(["언제?"]), Iterator[OpenAnswer])
    assert_type(answering.unused, str | None)


def evaluate() -> None:
    hits = assert_type(read_run(Path("hits.trec")), dict[str, list[tuple[str, float]]])
    write_run(Path("again.trec"), hits)
    assert_type(read_queries(Path("queries.jsonl")), dict[str, str])
    assert_type(ranking_scores(hits, read_qrels(Path("qrels.tsv"))), dict[str, dict[str, float]])
