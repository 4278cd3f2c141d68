"""Synthetic tasks: examples from a seed, of a known difficulty, without an end.

Training sees the difficulties of the recipe, evaluation also harder ones.
"""

from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.base import Count, Spec

Letters = Annotated[int, Field(ge=3, le=26)]
Group = Literal["Z2", "S3", "A4", "S4", "A5", "S5"]


class FunctionChainSpec(Spec):
    """`x f1 ... fk =`, answer fk(...f1(x)): fixed random bijections of the symbols; the difficulty is k."""

    kind: Literal["function_chain"] = "function_chain"
    n_symbols: Letters = 8
    n_functions: Letters = 8
    max_depth: Count = 4
    """Training draws k from 1 to this."""

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return self.max_depth + 2


class PHopSpec(Spec):
    """p-hop induction (arXiv:2402.09268): hop p times to the token after the latest equal one.

    The difficulty is the length. Neighbours are never equal. Every position whose hops are defined is a target.
    """

    kind: Literal["p_hop"] = "p_hop"
    n_symbols: Letters = 4
    n_hops: Count = 4
    length: Annotated[int, Field(ge=4)] = 48

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return self.length


class WordProblemSpec(Spec):
    """The product of all elements so far (arXiv:2404.08819), at every token; the difficulty is the length."""

    kind: Literal["word_problem"] = "word_problem"
    group: Group = "S3"
    """Z2 is parity; A5 is the smallest group without a shortcut of fixed depth."""
    length: Count = 16

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return self.length


SyntheticTaskSpec = Annotated[FunctionChainSpec | PHopSpec | WordProblemSpec, Field(discriminator="kind")]
