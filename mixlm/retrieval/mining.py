"""Hard negatives: passages that a search finds for a question, and that do not answer it."""

from collections.abc import Iterable, Iterator, Sequence

from ..data.passages import Passage
from ..data.squad import ReadingExample
from ..evaluation.retrieval import folded
from .hits import Found
from .passages import StoredPassages


def hard_negatives(
    examples: Sequence[ReadingExample], found: Iterable[Found], passages: StoredPassages, per_question: int
) -> Iterator[tuple[ReadingExample, list[Passage]]]:
    """The best passages for each question that are no answer to it.

    A passage that has an answer in its title or text, in upper or lower case, is left out, whichever passage the
    question is about: it may well be right (Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question
    Answering", 2020, section 4.2). So is the question's own text, and all but the first of equal texts. Of a question
    without answers, which of the others might be right is not known.

    Args:
        examples: the questions.
        found: what a search found for each.
        passages: that were searched.
        per_question: most negatives of a question, the best hits first.
    """
    for example, of_question in zip(examples, found, strict=True):
        answers = [folded(text).casefold() for text in example.answer_texts]
        seen, chosen = {folded(example.context)}, []
        for hit in of_question.hits:
            passage = passages[hit.row]
            text = folded(passage.text)
            parts = (folded(passage.title).casefold(), text.casefold())
            if text not in seen and not any(answer in part for part in parts for answer in answers):
                chosen.append(passage)
            seen.add(text)
            if len(chosen) == per_question:
                break
        yield example, chosen
