"""Training sets in the schemas that users have: Math-Shepherd, stepwise, pointwise, pairs, prefixes with rates."""

from prmfast.prm.data.conversation import EncodedConversation, encode_conversation, prompt_id
from prmfast.prm.data.read import SCHEMAS, RowError, parse_row, read_examples, read_rows, schema_of
from prmfast.prm.data.schemas import Example, OutcomeExample, PairExample, PrefixExample, StepExample

__all__ = [
    "SCHEMAS",
    "EncodedConversation",
    "Example",
    "OutcomeExample",
    "PairExample",
    "PrefixExample",
    "RowError",
    "StepExample",
    "encode_conversation",
    "parse_row",
    "prompt_id",
    "read_examples",
    "read_rows",
    "schema_of",
]
