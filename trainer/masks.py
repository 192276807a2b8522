"""Where a concept is: exact attention from video tokens to the concept's words, without the full attention matrix.

CogVideoX attends jointly over text and video tokens, so "cross-attention" is the block of video rows x text columns
of one softmax. Its value at (i, j) is exp(q_i·k_j·scale - LSE_i), and fused attention returns the log-sum-exp LSE:
only the concept's columns are ever computed.
Legend: B batch, A attention heads, S all tokens, L text tokens, N video tokens, d head width, K concept columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from memory.work import register_scratch
from trainer.backbones.attention import project, project_out
from trainer.backbones.cogvideox import CogVideoX
from trainer.errors import UsageError
from trainer.prompts import PromptSet


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(d)) v and the log-sum-exp of each row, q k v (B, A, S, d) -> (B, A, S, d), (B, A, S) fp32.

    By the kernel that `scaled_dot_product_attention` picks for them, so that the pass that makes the map computes what the others do.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    picked = SDPBackend(torch._fused_sdp_choice(q, k, v))
    if picked == SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)  # lse (B, A, S, 1)
    elif picked == SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    else:  # float32, and cards before Ampere; lse (B, A, S rounded up to 32)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse.flatten(2)[..., :q.shape[2]]


class ConceptMapProcessor:
    """CogVideoX's attention that also keeps the video tokens' attention to chosen text columns.

    q and k are taken after QK-norm and RoPE, from the same tensors that the attention itself uses. Guidance puts the
    conditional samples first, in one batch or in a pass of their own; the map kept is that of the first pass' first rows.
    """

    def __init__(self, columns: Sequence[Tensor]):
        self.columns = columns  # B times (K,) int64 on the device: the concept's token positions
        self.map: Tensor | None = None  # (B, N) fp32, mean over heads, sum over columns

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask: Tensor | None = None,
                 image_rotary_emb: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        length = encoder_hidden_states.shape[1]
        q, k, v = project(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        out, lse = attention_with_lse(q, k, v)
        if self.map is None:
            rows = slice(len(self.columns))
            self.map = concept_map(q[rows, :, length:], k[rows, :, :length], lse[rows, :, length:], self.columns)
        return project_out(attn, out, length)


def concept_map(q: Tensor, k: Tensor, lse: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """Attention that each video token pays to the concept's columns: mean over heads, sum over columns.

    q (B, A, N, d) video queries, k (B, A, L, d) text keys, lse (B, A, N), columns B times (K,) int64 -> (B, N) fp32.
    Holds K columns of one sample at a time.
    """
    maps = []
    for queries, keys, whole, picked in zip(q, k, lse, columns):
        scores = _product32(queries, keys.index_select(1, picked).mT).mul_(q.shape[3] ** -0.5)  # (A, N, K)
        maps.append(scores.sub_(whole.unsqueeze(-1)).exp_().sum((0, 2)))
    return torch.stack(maps) / q.shape[1]


# To a memory trace one operator, which takes what it takes on a card: there the product of 16-bit operands is in float32 at once, without
# copies of them.
_library = torch.library.Library("eraser", "FRAGMENT")
_library.define("product32(Tensor left, Tensor right) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("product32", lambda left, right: torch.bmm(left.float(), right.float()), "CPU")
_library.impl("product32", lambda left, right: torch.bmm(left, right, out_dtype=torch.float32), "CUDA")
_product32 = torch.ops.eraser.product32.default
"""left (A, N, d) @ right (A, d, K) -> (A, N, K) float32."""
register_scratch(_product32, lambda args, device: (4 * args[0].numel(),) if device == "cpu" and args[0].dtype != torch.float32 else ())


@torch.library.register_fake("eraser::product32")
def _(left, right):
    return left.new_empty(*left.shape[:2], right.shape[2], dtype=torch.float32)


class ConceptMaps:
    """The concept maps of one pass: every given block's attention leaves its own while `captured` is entered."""

    def __init__(self, blocks: Sequence[nn.Module], columns: Sequence[Tensor]):
        self._blocks, self.processors = list(blocks), [ConceptMapProcessor(columns) for _ in blocks]

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Within, maps are taken; the blocks' processors are restored after. May be entered again to go on."""
        # Not as attributes: in lockstep this is done for every block, and what nn.Module looks at meanwhile takes 20 ms of a step of the 5b.
        attentions = [vars(block.attn1) for block in self._blocks]
        before = [attention["processor"] for attention in attentions]
        for attention, processor in zip(attentions, self.processors):
            attention["processor"] = processor
        try:
            yield
        finally:
            for attention, processor in zip(attentions, before):
                attention["processor"] = processor

    def mask(self, *, threshold: float) -> Tensor:
        """`concept_mask` of them, once every block has run."""
        return concept_mask([processor.map for processor in self.processors], threshold=threshold)


def concept_mask(maps: Sequence[Tensor], *, threshold: float) -> Tensor:
    """One mask (B, N) of 0 and 1 from maps (B, N) of several blocks.

    The mean over blocks is normalised to 0..1 over the whole clip, so that a frame without the concept stays empty,
    and cut at `threshold`.
    """
    mean = torch.stack(list(maps)).mean(0)
    low, high = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
    return ((mean - low) / (high - low).clamp(min=1e-12) >= threshold).float()


def prompt_columns(backbone: CogVideoX, prompts: PromptSet, *, localised: bool = True) -> dict[str, Tensor]:
    """The token positions (K,) int64 of the concept's words, as they stand in each prompt; in the plural too.

    Raises UsageError for a prompt that holds them beyond what the model reads; where training is `localised`, also for words that its tokenizer
    does not know.
    """
    tokenizer = backbone.text_encoder.tokenizer()
    if tokenizer is None:  # random weights have no words: any column costs and behaves the same
        return dict.fromkeys(prompts.prompts, torch.zeros(1, dtype=torch.int64))
    tokens = tokenizer(list(prompts.prompts), truncation=True, max_length=backbone.text_length, return_offsets_mapping=True)
    concept, found = prompts.words, {}
    for index, (prompt, ids, places) in enumerate(zip(prompts.prompts, tokens.input_ids, tokens.offset_mapping)):
        matches = list(concept.finditer(prompt))
        columns = {i: match[0] for match in matches for i, (start, stop) in enumerate(places) if start < match.end() and match.start() < stop}
        if matches and not columns:
            raise UsageError(f"--concept {prompts.concept}: {matches[0][0]!r} comes after the first {backbone.text_length} tokens, which are all "
                             f"that the model reads, of {prompts.named(index)}; shorten it")
        unknown = [words for i, words in columns.items() if ids[i] == tokenizer.unk_token_id]
        if localised and unknown:
            raise UsageError(f"the concept {unknown[0]!r} has characters that the model's tokenizer does not know, in {prompts.named(index)}; "
                             f"use other words, or copy {backbone.directory / 'tokenizer'} again if these are common ones")
        found[prompt] = torch.tensor(list(columns), dtype=torch.int64)
    return found
