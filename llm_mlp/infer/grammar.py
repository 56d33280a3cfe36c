"""A grammar's way through llguidance, and its trial: run as a program, this file compiles one and says whether it can.

The library's limits do not cover everything: a large ``multipleOf`` keeps it busy for many seconds, and a chain of a
few hundred references fills its stack, which ends the process. So a grammar is tried in one of its own first. Imports
neither torch nor the rest of llm_mlp, so that this starts at once.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A tenth to a quarter of the library's own: by those an expression of 60 kB took 15 s and 2 GB before it was refused,
# by these 0.1 s and 20 MB. A step of the engine waits for each constrained request's mask, 0.08 s at the worst seen.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
STACK = 1 << 20  # of the trial; threads that use the grammar later have more
MEMORY = 2 << 30  # address space of the trial


class _Vocabulary:
    """In the form that the library asks for."""

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], eos: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens, self.special_token_ids, self._encode = tokens, special, encode
        self.eos_token_id, self.bos_token_id = eos, None

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def table(tokens: Sequence[bytes], special: Sequence[int], eos: int, encode: Callable[[str], list[int]]) -> LLTokenizer:
    """The library's table of a vocabulary: the bytes of each id."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokens, special, eos, encode)), n_vocab=len(tokens))


def compiled(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the grammar's begin.

    Raises:
        ValueError: why there is none.
    """
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=LLParserLimits(**LIMITS))
    # The first step builds what the constructor left for later, and finds grammars that no text satisfies.
    possible = not matcher.is_error() and any(matcher.compute_logit_bias())
    if matcher.is_error() and not matcher.get_error().startswith("NoExtension"):
        raise ValueError(matcher.get_error())
    if not possible or matcher.is_error():
        raise ValueError("no text satisfies it")
    return matcher


def main() -> None:
    """Reads a grammar, writes why it cannot be compiled (JSON; empty: it can)."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not on this system; the time limit holds all the same
    grammar = sys.stdin.buffer.read().decode("utf8")
    said: list[str] = []

    def attempt() -> None:
        try:
            # Bytes as a vocabulary: the work is in the grammar, not in the model's tokens.
            vocabulary = [*(bytes([i]) for i in range(256)), b"<eos>"]
            compiled(table(vocabulary, [256], 256, lambda text: list(text.encode())), grammar)
            said.append("")
        except ValueError as error:
            said.append(str(error) or "it is refused")

    threading.stack_size(STACK)
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if said:
        sys.stdout.write(json.dumps(said[0]))


if __name__ == "__main__":
    main()
