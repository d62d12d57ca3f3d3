"""The demo model's training text: documents of token ids and labels, and rows packed from them.

A short document is one plain problem (`<|bos|>`, prompt, answer, `<|eos|>`) or one chat. A long one strings
many together, so that the model learns to answer the last line whatever stands above it; after a plain
answer inside it a line break follows, though the label there is still `<|eos|>`. Only answers and their end
tokens have labels. Runs in: driver (only while training; standard library and tokenizers).
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache

from tokenizers import Tokenizer

from zmqexec.demo import tasks
from zmqexec.demo.tasks import Problem
from zmqexec.demo.tokenizer import ASSISTANT, BOS, END, EOS, SYSTEM, USER, special_ids

NO_LABEL = -1

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are zmqexec's demo model.",
    "Answer briefly.",
    "Be exact.",
    "You are a calculator.",
    "Please help the user.",
)

WORDS = """
    the of and to in is you that it he was for on are as with his they at be this have from or one had by word but
    not what all were we when your can said there use an each which she do how their if will up other about out many
    then them these so some her would make like him into time has look two more write go see number no way could
    people my than first water been call who oil its now find long down day did get come made may part hello world
    please tell me a story why sky blue capital France once upon once again thanks good morning test prompt stream
    def return import print class model token request server worker driver process shared memory ring queue error
""".split()  # noqa: SIM905


@dataclass(slots=True)
class Document:
    """Token ids, and for each the token that must follow it, or NO_LABEL."""

    token_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)

    def add(self, token_ids: list[int]) -> None:
        """Append text that the model is given."""
        self.token_ids += token_ids
        self.labels += [NO_LABEL] * len(token_ids)

    def add_answer(self, token_ids: list[int], end_id: int) -> None:
        """Append text that the model must produce; `end_id` must follow it, but is not appended."""
        self.labels[-1:] = token_ids[:1]
        self.token_ids += token_ids
        self.labels += [*token_ids[1:], end_id]


class Corpus:
    """An endless, seeded stream of documents."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        self.special = special_ids(tokenizer)

        @lru_cache(maxsize=1 << 16)
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

        self._encode = encode

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added."""
        return list(self._encode(text))

    def problem_document(self, problem: Problem) -> Document:
        """One plain problem, as a completions request poses it."""
        document = Document()
        document.add([self.special[BOS]])
        self._add_problem(document, problem)
        return document

    def chat_document(self, problem: Problem) -> Document:
        """One problem as the only user message of a chat."""
        document = Document()
        document.add([self.special[BOS]])
        self._add_turn(document, problem)
        return document

    def short(self) -> Document:
        """One training problem, most often an addition, posed plainly or in a chat."""
        draw = self.rng.random()
        if draw < 0.62:
            problem = tasks.training_addition(self.rng)
        elif draw < 0.85:
            problem = tasks.training_sort(self.rng)
        elif draw < 0.93:
            problem = tasks.training_count(self.rng)
        elif draw < 0.97:
            return self._chat(self._question())
        elif draw < 0.985:
            return self._chat(self._nonsense())
        else:
            return self.problem_document(self._nonsense())
        return self._chat(problem) if self.rng.random() < 0.15 else self.problem_document(problem)

    def long(self, max_tokens: int) -> Document:
        """Many training problems in one document of at most `max_tokens`, as lines or as turns of one chat."""
        document = Document()
        document.add([self.special[BOS]])
        chat = self.rng.random() < 0.5
        if chat and self.rng.random() < 0.5:
            self._add_system(document)
        while True:
            length = len(document)
            problem = self._any_problem(chat)
            if chat:
                self._add_turn(document, problem)
                document.add([self.special[END]])
            elif self.rng.random() < 0.1:
                document.add(self.encode(self._babble() + "\n"))
            else:
                self._add_problem(document, problem)
                document.add(self.encode("\n"))
            if len(document) > max_tokens:
                del document.token_ids[length:], document.labels[length:]
                return document

    def _any_problem(self, chat: bool) -> Problem:
        draw = self.rng.random()
        if draw < 0.5:
            return tasks.training_addition(self.rng)
        if draw < 0.7:
            return tasks.training_sort(self.rng)
        if draw < 0.85 or not chat:
            return tasks.training_count(self.rng)
        return self._question() if draw < 0.95 else self._nonsense()

    def _question(self) -> Problem:
        """One of QUESTIONS, one time in two as written, otherwise worded a little differently."""
        question, answer = self.rng.choice(tasks.QUESTIONS)
        if self.rng.random() < 0.5:
            if self.rng.random() < 0.5:
                question = question.lower()
            if self.rng.random() < 0.5:
                question = question.rstrip("?")
            if self.rng.random() < 0.2:
                question = self.rng.choice(("Hello! ", "Please tell me: ", "hi, ")) + question
            if self.rng.random() < 0.1:
                question += self.rng.choice((" ", "\n", "!", " Thanks."))
        return Problem(question, answer)

    def _nonsense(self) -> Problem:
        return Problem(self._babble(), tasks.FALLBACK)

    def _babble(self) -> str:
        """Text that is no task: words, letters or signs at random."""
        num_words = self.rng.randint(1, 12)
        if self.rng.random() < 0.2:
            return "".join(chr(self.rng.randint(33, 126)) for _ in range(num_words)) + "?"
        text = " ".join(self.rng.choices(WORDS, k=num_words))
        if self.rng.random() < 0.5:
            text = text.capitalize()
        return text + self.rng.choice(("", "", ".", "?", "!"))

    def _chat(self, problem: Problem) -> Document:
        document = Document()
        document.add([self.special[BOS]])
        if self.rng.random() < 0.25:
            self._add_system(document)
        self._add_turn(document, problem)
        return document

    def _add_system(self, document: Document) -> None:
        text = self.rng.choice(SYSTEM_MESSAGES) if self.rng.random() < 0.5 else self._babble()
        document.add([self.special[SYSTEM], *self.encode(text), self.special[END]])

    def _add_problem(self, document: Document, problem: Problem) -> None:
        document.add(self.encode(problem.prompt))
        document.add_answer(self.encode(problem.answer), self.special[EOS])

    def _add_turn(self, document: Document, problem: Problem) -> None:
        document.add(
            [self.special[USER], *self.encode(problem.prompt), self.special[END], self.special[ASSISTANT]],
        )
        # In a chat an answer is a message: it starts without the blank that continues a prompt.
        document.add_answer(self.encode(problem.answer.lstrip()), self.special[END])


@dataclass(slots=True)
class Rows:
    """Documents side by side: equally long rows of token ids, labels and document numbers (from 1; 0 is padding)."""

    length: int
    token_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    document_ids: list[list[int]] = field(default_factory=list)
    num_documents: int = 0

    def add(self, document: Document) -> None:
        """Put `document` behind the last one, on a new row if it does not fit there."""
        if len(document) > self.length:
            raise ValueError(f"a document of {len(document)} tokens does not fit into rows of {self.length}")
        if not self.token_ids or len(self.token_ids[-1]) + len(document) > self.length:
            self.pad()
            for rows in (self.token_ids, self.labels, self.document_ids):
                rows.append([])
        self.num_documents += 1
        self.token_ids[-1] += document.token_ids
        self.labels[-1] += document.labels
        self.document_ids[-1] += [self.num_documents] * len(document)

    def pad(self) -> None:
        """Fill the last row."""
        for rows, filler in ((self.token_ids, 0), (self.labels, NO_LABEL), (self.document_ids, 0)):
            if rows:
                rows[-1] += [filler] * (self.length - len(rows[-1]))
