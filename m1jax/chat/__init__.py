"""MiniMax-M1's tokens, prompt format, thoughts and tool calls. Imports the project's exception, and no other part."""

from m1jax.chat.parser import CallError, Content, Event, Message, Reasoning, StreamParser, ToolCall, parse_message
from m1jax.chat.template import render, template_source
from m1jax.chat.tokenizer import TextStream, Tokenizer, encode_chat, encode_prompt, partings
from m1jax.chat.tools import Tool, as_tools

__all__ = [
    "CallError",
    "Content",
    "Event",
    "Message",
    "Reasoning",
    "StreamParser",
    "TextStream",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "as_tools",
    "encode_chat",
    "encode_prompt",
    "parse_message",
    "partings",
    "render",
    "template_source",
]
