"""The special tokens of M1's prompt format, and the tags that the model writes."""

BEGIN_OF_DOCUMENT = "<begin_of_document>"
BOS = "<beginning_of_sentence>"
EOS = "<end_of_sentence>"
THINK = "<think>"
END_THINK = "</think>"
TOOL_CALLS = "<tool_calls>"
END_TOOL_CALLS = "</tool_calls>"

TAGS = (THINK, END_THINK, TOOL_CALLS, END_TOOL_CALLS)
"""What the assistant writes as part of the format; everything else of the format is written around its turns."""
SPECIAL_TOKENS = (BEGIN_OF_DOCUMENT, BOS, EOS, *TAGS)
"""Ids 256, 257, ... of the built-in tokenizer, in this order."""
