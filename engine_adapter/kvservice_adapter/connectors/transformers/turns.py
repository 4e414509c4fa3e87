"""Which blocks of a cache to store at the end of a turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvservice_adapter.connectors.transformers.cache import StoredCache
from kvservice_adapter.connectors.transformers.forward_saver import ForwardSaver
from kvservice_adapter.connectors.transformers.history import Tensors
from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel, dynamic_layers
from kvservice_adapter.connectors.transformers.rows import Sequences, common_tokens
from kvservice_adapter.connectors.transformers.unrotated import UnrotatedLayer
from kvservice_adapter.device.base import Pages
from kvservice_adapter.engine.turn_saver import Turn
from kvservice_adapter.session import Conversation, Keys
from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import Layout


class Turns:
    """The turns of one model's caches. For the engine's thread; waits only for a cache's own history."""

    def __init__(self, model: PreTrainedModel, layout: Layout, tokens_max: int | None) -> None:
        """Sequences of more than `tokens_max` tokens are not stored."""
        self._model = model
        self._layout = layout
        self._tokens_max = tokens_max

    def of(
        self,
        given: Sequences,
        cache: Cache,
        keys: Keys,
        session_ids: Sequence[str],
        conversation: Conversation | None,
    ) -> list[Turn]:
        """The blocks of each row that are to be stored.

        Raises InvalidRequest if the tokens are not those of the cache, and UnsupportedModel if its layers are
        not what the layout describes.
        """
        states = self._states(cache, len(given.pads))
        saver = forward_saver_of(cache)
        if saver is None and conversation is not None and conversation.cuts:
            raise InvalidRequest(
                "a conversation that was cut is saved with the cache that restore returned: no other cache has the cut"
            )
        columns = cache.get_seq_length()
        longest = columns - min(given.pads)
        turns = []
        for row, pad in enumerate(given.pads):
            row_end = saver.end_of_row(row) if saver is not None else None
            tokens = given.tokens(row, columns if row_end is None else row_end)
            if saver is not None and not saver.stopped:
                known = saver.token_ids(row)
                common = common_tokens(tokens, known)
                if common < min(len(tokens), len(known)):
                    raise InvalidRequest(f"token {common} is not the one that the cache was computed with")
            if self._tokens_max is not None and longest > self._tokens_max:
                tokens = tokens[:0]  # The last ones are rotated in another way, since an unknown token.
            if conversation is None:
                name, column = session_ids[row], pad
                hidden = saver.hidden_tokens(row) if saver is not None else None
                chain = keys.chain(tokens, with_partial=True, hidden=hidden)
                turn = Turn(chain, _pages(states, row, column), name)
            else:
                _continue(conversation, tokens)
                column = pad + conversation.kept_tokens
                chain = keys.chain(conversation.tokens_since_cut, conversation.parent(keys), with_partial=True)
                cuts, kept_tokens = len(conversation.cuts), conversation.kept_tokens
                turn = Turn(chain, _pages(states, row, column), conversation.session_id, cuts, kept_tokens)
            if saver is not None and not saver.continues(row, column, chain.parent):
                raise InvalidRequest("the cache's history was cut: save it with its conversation, as it was then")
            turns.append(turn)
        return turns

    def _states(self, cache: Cache, rows: int) -> list[Tensors]:
        """Keys and values of each layer. Raises UnsupportedModel if they are not what the layout describes."""
        layout, dtype = self._layout, self._model.dtype
        columns = cache.get_seq_length()
        found = []
        for index, layer in enumerate(dynamic_layers(cache, layout.layers)):
            keys, values = layer.keys, layer.values
            if keys is not None and not layout.rotated:
                keys = layer.raw_keys if isinstance(layer, UnrotatedLayer) else None
                if keys is None:
                    raise UnsupportedModel(f"the keys of layer {index} were not seen before they were rotated")
            if keys is None or values is None:
                raise UnsupportedModel(f"layer {index} of the cache is empty")
            group = layout.group_of(index)
            for states, dim in ((keys, group.k_head_dim), (values, group.v_head_dim)):
                expected = (rows, group.kv_heads, columns, dim)
                if tuple(states.shape) != expected or states.dtype != dtype:
                    would = "one sequence of this model" if rows == 1 else f"{rows} sequences of this model"
                    raise UnsupportedModel(
                        f"layer {index} of the cache is {tuple(states.shape)} of {states.dtype}; "
                        f"{would} would be {expected} of {dtype}"
                    )
            found.append((keys, values))
        return found


def forward_saver_of(cache: Cache) -> ForwardSaver | None:
    """The saver of a cache that this connector made; None for one of the library's own."""
    return cache.saver if isinstance(cache, StoredCache) else None


def _pages(states: Sequence[Tensors], row: int, column: int) -> Callable[[int, int], Pages]:
    """Where each layer has a row's tokens from a column on, and from the n-th of them."""
    return lambda layer, token: Pages(*states[layer], [row], column + token)


def _continue(conversation: Conversation, tokens: NDArray[Any]) -> None:
    """Extend the conversation to these tokens."""
    if not conversation.is_prefix_of(tokens):
        if conversation.cuts:
            raise InvalidRequest("the tokens do not begin with those that are left of the conversation")
        conversation.reset()  # It was edited.
    conversation.extend(tokens[conversation.token_count :])
