"""MiniMax-M1's tokens and prompt format. Imports nothing else of this project but its exception."""

from m1jax.chat.template import render, template_source
from m1jax.chat.tokenizer import Tokenizer, encode_chat

__all__ = ["Tokenizer", "encode_chat", "render", "template_source"]
