"""T5 and its tokenizer, which make text embeddings of prompts, from a diffusers directory or the published configuration.

Legend: B batch, L text tokens, D text width.
"""

import gc
import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory.offload import offload_blocks, place
from trainer.backbones import published
from trainer.backbones.location import fingerprint, read_config, reading
from trainer.backbones.weights import allocate, assign
from trainer.errors import CheckpointError

logger = logging.getLogger(__name__)
PROMPT_BATCH = 16  # prompts a pass


class TextEncoder:
    """A frozen T5 encoder and its tokenizer. Weights are loaded by the methods."""

    def __init__(self, directory: Path | None, length: int, width: int):
        """`directory`: the pipeline's. Without one it is T5-XXL, which has no words: its embeddings are random. `length`, `width`: L and D."""
        self.directory, self.length, self.width = directory, length, width

    def tokenizer(self) -> Any:
        """The tokenizer, or None for random weights."""
        from transformers import T5TokenizerFast

        if self.directory is None:
            return None
        folder = self.directory / "tokenizer"
        if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):  # transformers would make one without words
            raise CheckpointError(f"{folder} has neither tokenizer.json nor spiece.model; copy the model again")
        with reading(folder):
            return T5TokenizerFast.from_pretrained(folder)

    def token_ids(self, tokenizer: Any, prompts: list[str]) -> Tensor:
        """Padded token ids (B, L), as CogVideoXPipeline makes them."""
        return tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt").input_ids

    def encode(self, prompts: list[str], *, dtype: torch.dtype, device: torch.device | str = "cpu", batch_size: int = PROMPT_BATCH,
               stream: bool | None = None, out: Tensor | None = None) -> Tensor:
        """Text embeddings (B, L, D) on the host, in `out` if that is given; the model is loaded for this call and gone after it.

        `stream`: its blocks pass through two buffers on the device instead of living there, so that T5-XXL needs no room for its
        8.9 GiB (10.7 in float16); None: on every device but the CPU."""
        out = torch.empty(len(prompts), self.length, self.width, dtype=dtype) if out is None else out
        if self.directory is None:
            for row, prompt in zip(out, prompts):
                row.copy_(_random_text(prompt, self.length, self.width, dtype))
            return out
        device = torch.device(device)
        stream = device.type != "cpu" if stream is None else stream
        self._encode(prompts, out, device, batch_size, stream)
        if stream:
            gc.collect()  # blocks and what streams them refer to each other: gigabytes that nothing else would free
        torch.cuda.empty_cache()  # what stays on the card comes next, and would lie in the gaps: steps would reserve more
        return out

    def _encode(self, prompts: list[str], out: Tensor, device: torch.device, batch_size: int, stream: bool) -> None:
        tokenizer = self.tokenizer()
        if longer := [p for p, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids) if len(ids) > self.length]:
            logger.warning("%d of %d prompts are longer than what the model reads, %d tokens, and end there, as %r", len(longer),
                           len(prompts), self.length, longer[0][:60])
        model = self.load(dtype=out.dtype)
        streamed = []
        if stream:
            offload_blocks(model.encoder.block, device=device, gathered=False)  # the file stays mapped: gigabytes that need not be pinned
            streamed = list(model.encoder.block.parameters())
        place(model, device, skip=streamed)
        with torch.no_grad():
            for start in range(0, len(prompts), batch_size):
                ids = self.token_ids(tokenizer, prompts[start:start + batch_size])
                out[start:start + batch_size] = model(ids.to(device))[0]  # (B, L, D)

    def fingerprint(self) -> str | None:
        """Identifies the stored model and tokenizer by content, as a key for cached embeddings; None for random weights: do not cache."""
        if self.directory is None:
            return None
        return fingerprint(f for part in ("text_encoder", "tokenizer") for f in sorted((self.directory / part).iterdir()) if f.is_file())

    def load(self, *, dtype: torch.dtype) -> nn.Module:
        """The stored model, frozen, on the host."""
        return assign(self._build(), self.directory / "text_encoder", dtype=dtype)

    def fake(self, *, dtype: torch.dtype, num_blocks: int | None = None) -> nn.Module:
        """The model without data, for use under FakeTensorMode; `num_blocks`: a shorter one."""
        return allocate(self._build(num_blocks), dtype=dtype)

    @property
    def num_blocks(self) -> int:
        return self.config().num_layers

    def config(self) -> Any:
        """A transformers T5Config."""
        from transformers import T5Config

        if self.directory is None:
            return T5Config(**published.T5_XXL)
        with reading(self.directory / "text_encoder"):
            return T5Config.from_dict(read_config(self.directory, "text_encoder"))

    def _build(self, num_blocks: int | None = None) -> nn.Module:
        from transformers import T5EncoderModel

        config = self.config()
        config.num_layers = num_blocks or config.num_layers
        with torch.device("meta"), reading(Path(self.directory or "") / "text_encoder"):
            model = T5EncoderModel(config)
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.register_forward_hook(_rows_together)
        return model


def _rows_together(module: nn.Module, args: tuple[Tensor], bias: Tensor) -> Tensor:
    """T5's bias (L, L, heads), so laid out that the attention, which takes it as (heads, L, L), finds its rows contiguous.

    Of others torch's fused kernels on a card take none: it would make two attention matrices in float32.
    """
    return bias.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _random_text(prompt: str, length: int, width: int, dtype: torch.dtype) -> Tensor:
    """A stand-in embedding that depends on the prompt alone."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
