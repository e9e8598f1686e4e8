"""Logits, losses and greedy decoding for evaluation, on a decoder that is sharded or whole.

All methods are collective: a sharded model gathers its weights in each forward pass. Every rank has sequences
of its own, those of a pipeline too: its stages take each other's in turn.

Shapes: B sequences, S tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.model.decoder import Decoder
from train.model.kv_cache import CachedDecoder, flush_right
from train.model.pipeline import FORWARD, Pipeline
from train.recipe.schema import Precision
from train.recipe.topology import Topology


class Scorer:
    """A decoder for evaluation.

    Args:
        decoder: on its device, whole or sharded.
        precision: precision of matrix products.
        topology: this rank.
        limit: maximum sequence length in tokens.
    """

    def __init__(self, decoder: Decoder, precision: Precision, topology: Topology, limit: int) -> None:
        self.decoder, self.topology, self.limit = decoder, topology, limit
        self.device = next(decoder.parameters()).device
        self._is_bf16 = precision is Precision.bf16
        self._dtype = torch.bfloat16 if self._is_bf16 else torch.float32

    def _cast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_bf16)

    @torch.no_grad()
    def logits(self, ids_BS: Tensor) -> Tensor:
        """Returns logits [B, S, V] in fp32; those of a token do not depend on later tokens."""
        with self._cast():
            if self.decoder.pipeline is not None:
                return self._through_stages(self.decoder.pipeline, ids_BS.to(self.device)).float()
            logits_BSV = self.decoder(ids_BS.to(self.device)).logits_BSV
        assert logits_BSV is not None
        return logits_BSV.float()

    def _through_stages(self, pipeline: Pipeline, ids_BS: Tensor) -> Tensor:
        """Takes the sequences of each of the pipeline's ranks through all stages, for this one's logits."""
        like, model = torch.empty(0, dtype=self._dtype, device=self.device), self.decoder.cfg
        own_BSV: Tensor | None = None
        for owner, theirs_BS in enumerate(pipeline.share(ids_BS)):
            logits_BSV: Tensor | None = None
            for chunk, part in enumerate(self.decoder.parts):
                arrived_BSD = None
                if not part.is_first:
                    shape = (*theirs_BS.shape, model.d_model)
                    arrived_BSD = pipeline.receive(shape, like, FORWARD).wait()
                outputs = self.decoder(theirs_BS, chunk=chunk, arrived_BSD=arrived_BSD)
                if part.is_last:
                    logits_BSV = outputs.logits_BSV
                else:
                    pipeline.send(outputs.hidden_BSD, FORWARD)
            pipeline.finish()
            shape = (*theirs_BS.shape, model.vocab_size)
            back_BSV = pipeline.bring_back(logits_BSV, owner, shape, like)
            own_BSV = back_BSV if owner == pipeline.stage else own_BSV
        assert own_BSV is not None
        return own_BSV

    @torch.no_grad()
    def loss(self, ids_BS: Tensor, documents_BS: Tensor | None, targets_BS: Tensor) -> tuple[float, int]:
        """Returns the sum of the cross entropy over all targets, in nats, and their number."""
        documents_BS = None if documents_BS is None else documents_BS.to(self.device)
        with self._cast():
            outputs = self.decoder(ids_BS.to(self.device), documents_BS, targets_BS.to(self.device))
        return float(outputs.loss_sum.double()), int(outputs.target_tokens)

    @torch.no_grad()
    def continue_greedily(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, is_done: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Continues prompts by greedy decoding until all answers of all ranks are done.

        Args:
            prompts: token ids, none of them empty.
            max_tokens: maximum tokens per answer.
            is_done: returns True if an answer needs no more tokens.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        cached = CachedDecoder(self.decoder) if self.topology.world_size == 1 else None
        new_BS = flush_right(prompts, self.device)
        for _ in range(max_tokens):
            if cached is not None:
                with self._cast():
                    next_B = cached.feed(new_BS).argmax(dim=-1)
                new_BS = next_B[:, None]
            else:
                next_B = self._next([[*prompt, *a] for prompt, a in zip(prompts, answers, strict=True)])
            for answer, token in zip(answers, next_B.tolist(), strict=True):
                if not is_done(answer):
                    answer.append(token)
            if self._all_done(all(is_done(answer) for answer in answers)):
                break
        return answers

    def _next(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Returns the most likely token after each row, without a key-value cache: the model is sharded."""
        lengths = [len(row) for row in rows]
        ids_BS = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids_BS[number, : len(row)] = torch.tensor(row)
        last = torch.tensor(lengths, device=self.device) - 1
        return self.logits(ids_BS)[torch.arange(len(rows), device=self.device), last].argmax(dim=-1)

    def _all_done(self, is_done: bool) -> bool:
        if self.topology.world_size == 1:
            return is_done
        done = torch.tensor(int(is_done), device=self.device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())
