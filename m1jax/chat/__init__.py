"""MiniMax-M1's tokens, prompt format, thoughts and tool calls. Imports the project's exception, and no other part."""

from m1jax.chat.template import render, template_source
from m1jax.chat.tokenizer import TextStream, Tokenizer, encode_chat, encode_prompt

__all__ = ["TextStream", "Tokenizer", "encode_chat", "encode_prompt", "render", "template_source"]
