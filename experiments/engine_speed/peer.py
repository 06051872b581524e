"""Transformers' `generate` with its native `minimax`, on the same weights and the same requests."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m1jax import MiniMaxM1, save_pretrained
from m1jax.inference import Request


class Peer:
    """A PyTorch model that continues requests.

    Args:
        threads: PyTorch's.
    """

    def __init__(self, model: MiniMaxM1, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as directory:
            save_pretrained(model, Path(directory) / "hf", layout="transformers")
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                Path(directory) / "hf", dtype=torch.float32
            ).eval()

    def serve(self, requests: Sequence[Request], batch: int) -> None:
        """Serve all of them in batches of that size, those of similar lengths together.

        A batch is padded on the left and goes on until its longest request has all its tokens, as `generate` does.
        """
        import torch

        order = sorted(requests, key=lambda request: request.sampling.max_new_tokens)
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            width = max(len(request.tokens) for request in some)
            tokens, mask = np.zeros((2, len(some), width), np.int64)
            for row, request in enumerate(some):
                tokens[row, width - len(request.tokens) :] = request.tokens
                mask[row, width - len(request.tokens) :] = 1
            new = max(request.sampling.max_new_tokens for request in some)
            with torch.no_grad():
                self._model.generate(
                    torch.tensor(tokens),
                    attention_mask=torch.tensor(mask),
                    do_sample=True,
                    temperature=some[0].sampling.temperature,
                    top_p=some[0].sampling.top_p,
                    top_k=0,
                    min_new_tokens=new,
                    max_new_tokens=new,
                    pad_token_id=0,
                )
