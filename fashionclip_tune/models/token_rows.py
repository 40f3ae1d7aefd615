"""A token table of which only the rows that occur in training are trained; the others stay on the host, as they are.

SigLIP2's table has 256,000 rows, half of its parameters; a set of captions uses a few thousand. Gradients, Adam's moments and
the average of the weights are of these rows only, and so are checkpoints: with the numbers of the rows and a hash of the whole
table as it was, from which ``whole`` makes the one that OpenCLIP knows.

Shape legend: V rows of the table, U of them trained, D width, B captions of L tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError

FIRST_EDITION = 2
"""Of ``training.edition``: before it the whole table is trained, and weight decay moves rows that never occur."""
USUAL_ROWS = 10_000
"""Where no captions are known; 12,000 products' titles and descriptions of up to 60 words have 8,100 of CLIP's."""
_TRAINED, _FACTS, _TABLE = "trained_UD", "_extra_state", "weight"
_HASH_SIZE = 4
_Shape = tuple[int, ...]


class TokenRows(nn.Module):
    """In the place of a tower's ``token_embedding``: the same vectors to the bit, of which some are parameters.

    In training the other rows are not to be had, so that nothing waits for the device: a token of theirs is an error there. In
    evaluation they are fetched from the host, for each call or, within ``rows_at_hand``, once.
    """

    place_of_V: Tensor

    def __init__(self, table_VD: Tensor, rows_U: Tensor) -> None:
        super().__init__()
        device, num_rows = table_VD.device, len(rows_U)
        # No buffers: they stay where they are when the network goes to a GPU.
        self.table_VD = table_VD.detach()
        self._is_trained_V = torch.zeros(len(table_VD), dtype=torch.bool, device=device)
        self._is_trained_V[rows_U.to(device)] = True
        self.trained_UD = nn.Parameter(self.table_VD[rows_U.to(device)])
        self._facts = torch.cat([_hash(self.table_VD), rows_U.to(torch.int32)])
        place_of_V = torch.full((len(table_VD),), num_rows, dtype=torch.int32, device=device)  # behind the last one: none
        place_of_V[rows_U.to(device)] = torch.arange(num_rows, dtype=torch.int32, device=device)
        self.register_buffer("place_of_V", place_of_V, persistent=False)
        self._at_hand: tuple[Tensor, Tensor] | None = None

    def get_extra_state(self) -> Tensor:
        """[4 + U] int32: a hash of the table, and its trained rows. A state dict has it by torch's name for such."""
        return self._facts

    def set_extra_state(self, state: Tensor) -> None:
        """Raises UserError for rows of another table, or others of it."""
        if not torch.equal(state.cpu(), self._facts):
            raise UserError(
                "the weights have other rows of the token table than this run would train: its captions, its tokenizer or its "
                "first weights have changed since"
            )

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """[B, L, D]"""
        if self.training:
            return F.embedding(self.place_of_V[tokens_BL], self.trained_UD)
        if self._at_hand is None:
            with self.rows_at_hand(tokens_BL):
                return self.forward(tokens_BL)
        place_of_V, others_ND = self._at_hand
        return F.embedding(place_of_V[tokens_BL], torch.cat([self.trained_UD, others_ND.to(self.trained_UD)]))

    @contextmanager
    def rows_at_hand(self, tokens: Tensor) -> Iterator[None]:
        """Within the block the rows of all these tokens are on the device, and no call of ``forward`` waits for them."""
        num_rows, device, tokens_N = len(self.trained_UD), self.trained_UD.device, tokens.unique().to(self.table_VD.device)
        others_N = tokens_N[~self._is_trained_V[tokens_N]]
        # Of a token that is not at hand the place is behind the last one here, too.
        place_of_V = torch.where(self.place_of_V < num_rows, self.place_of_V, num_rows + len(others_N))
        place_of_V[others_N.to(device)] = num_rows + torch.arange(len(others_N), dtype=torch.int32, device=device)
        self._at_hand = place_of_V, self.table_VD[others_N].to(device)
        try:
            yield
        finally:
            self._at_hand = None


@contextmanager
def rows_at_hand(network: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Within the block a network in evaluation mode has the rows of all these tokens on its device, and waits for none."""
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, TokenRows):
                stack.enter_context(module.rows_at_hand(tokens))
        yield


def use_token_rows(network: Any, config: ProjectConfig, rows: int | Callable[[], Tensor]) -> None:
    """Has a run of this configuration train those rows of its table only, if its edition does.

    Text towers that are not OpenCLIP's own have no ``token_embedding``, and train what they have.

    Args:
        rows: the numbers [U] in rising order, asked for if they matter; or how many, whichever they are, to measure with.
    """
    for tower in (network, getattr(network, "text", network)):
        table = getattr(tower, "token_embedding", None)
        if config.training.edition >= FIRST_EDITION and isinstance(table, nn.Embedding):
            rows_U = torch.arange(min(rows, len(table.weight))) if isinstance(rows, int) else rows()
            tower.token_embedding = TokenRows(table.weight, rows_U)


def untrained_tables(network: nn.Module) -> dict[str, Tensor]:
    """The whole tables as they were before training, by their names in OpenCLIP: what a state dict with rows is without."""
    rows = ((name, module) for name, module in network.named_modules() if isinstance(module, TokenRows))
    return {f"{name}.{_TABLE}": module.table_VD for name, module in rows}


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of OpenCLIP's own network."""
    return whole(network.state_dict(), untrained_tables(network))


def whole(weights: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with OpenCLIP's whole table in the place of trained rows, where they have such.

    Args:
        tables: with the table from which the run started, by its name.

    Raises:
        UserError: it is another table, or there is none.
    """
    found = dict(weights)
    for prefix in tables_in_rows(weights):
        trained_UD, facts = (found.pop(prefix + name).detach().cpu() for name in (_TRAINED, _FACTS))
        table_VD = tables.get(prefix + _TABLE)
        if table_VD is None or not torch.equal(_hash(table_VD), facts[:_HASH_SIZE]):
            state = "is not here" if table_VD is None else "is another one now"
            raise UserError(f"only {len(trained_UD):,} rows of {prefix}{_TABLE} were trained, and their table {state}")
        found[prefix + _TABLE] = table_VD.detach().cpu().clone()
        found[prefix + _TABLE][facts[_HASH_SIZE:].long()] = trained_UD.to(table_VD.dtype)
    return found


def split_tables(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of a checkpoint, and the tables that they are of: of a base's weights with a checkpoint's in their place."""
    names = [prefix + _TABLE for prefix in tables_in_rows(weights)]
    return {k: v for k, v in weights.items() if k not in names}, {name: weights[name] for name in names if name in weights}


def tables_in_rows(weights: Mapping[str, Any]) -> list[str]:
    """What the names of tables begin with of which these weights have rows only."""
    return [name.removesuffix(_TRAINED) for name in weights if name.endswith(f"token_embedding.{_TRAINED}")]


def whole_shapes(shapes: Mapping[str, _Shape], of_network: Mapping[str, _Shape]) -> dict[str, _Shape]:
    """The shapes that ``whole`` makes of weights with these, in a network of OpenCLIP's with those."""
    found = dict(shapes)
    for prefix in tables_in_rows(shapes):
        _, trained = found.pop(prefix + _FACTS, None), found.pop(prefix + _TRAINED)
        found[prefix + _TABLE] = (*of_network.get(prefix + _TABLE, ())[:1], *trained[1:])
    return found


def _hash(table_VD: Tensor) -> Tensor:
    """[4] int32: against mistakes, not against forgers."""
    if table_VD.is_meta:
        return torch.zeros(_HASH_SIZE, dtype=torch.int32)
    content = table_VD.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return torch.frombuffer(bytearray(xxhash.xxh3_128(content).digest()), dtype=torch.int32)
