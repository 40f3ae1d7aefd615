"""Rows of a token table that are trained alone: the plain model's numbers to the bit, and nothing else moves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import planned_network
from fashionclip_tune.models.openclip import export_openclip, load_model, load_random_model
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.models.token_rows import TokenRows, plain_state, rows_at_hand, untrained_tables, use_token_rows, whole
from fashionclip_tune.models.towers import encoders, parameter_groups, parameter_places
from fashionclip_tune.models.weights import put_weights
from fashionclip_tune.training.trainer import Trainer
from tests.support.trainers import CPU, batches, steps

EDITION_1 = {"training.edition": 1}
THREE = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")


def config_of(name: str, **overrides: Any) -> ProjectConfig:
    settings = {"model.pretrained": None, "training.learning_rate": 1e-3, "training.batch_size": 6, "hardware.threads": 1}
    return ProjectConfig(clip_model=name, device="cpu").with_overrides({**settings, **overrides})


def rows_of(given: list[Any]) -> Tensor:
    return torch.cat([batch.tokens_BL for batch in given]).unique()


def table_of(network: Any) -> Any:
    return network.token_embedding if hasattr(network, "token_embedding") else network.text.token_embedding


def pair(name: str, rows: Any, **overrides: Any) -> tuple[Any, Any]:
    """The plain model, and the same with rows."""
    config = config_of(name, **overrides)
    plain = load_random_model(config).network
    other = copy.deepcopy(plain)
    use_token_rows(other, config, rows if isinstance(rows, int) else lambda: rows)
    assert isinstance(table_of(other), TokenRows)
    return plain, other


def texts(network: Any, low: int, high: int, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(low, high, (count, network.context_length), generator=generator)
    tokens_BL[:, -1] = 0
    return tokens_BL


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig", *(pytest.param(name, marks=pytest.mark.slow) for name in THREE)])
def test_embeddings_and_gradients_are_the_plain_models_bits(name: str) -> None:
    plain, other = pair(name, 3_000)
    with torch.no_grad():
        for among in ((0, 3_000), (2_000, 40_000), (40_000, 49_000)):  # rows only, some, none
            tokens_BL = texts(plain, *among)
            assert torch.equal(plain.eval().encode_text(tokens_BL), other.eval().encode_text(tokens_BL)), among
    tokens_BL = texts(plain, 0, 3_000)
    for network in (plain.train(), other.train()):
        network.encode_text(tokens_BL, normalize=True).square().flatten()[::7].sum().backward()
    full_VD, rows_UD = table_of(plain).weight.grad, table_of(other).trained_UD.grad
    assert torch.equal(full_VD[:3_000], rows_UD)
    assert not full_VD[3_000:].any()
    ours, theirs = dict(other.named_parameters()), dict(plain.named_parameters())
    same = [key for key in ours if "token_embedding" not in key and ours[key].grad is not None]
    assert len(same) > 10
    assert all(torch.equal(ours[key].grad, theirs[key].grad) for key in same)


def test_in_evaluation_gradients_are_right_where_some_rows_are_not_trained() -> None:
    plain, other = pair("tiny-sig", 3_000)
    tokens_BL = texts(plain, 2_000, 4_000)
    for network in (plain.eval(), other.eval()):
        network.encode_text(tokens_BL).sum().backward()
    assert torch.equal(table_of(plain).weight.grad[:3_000], table_of(other).trained_UD.grad)


def test_in_training_a_token_of_no_row_is_an_error_not_another_rows_vector() -> None:
    _, other = pair("tiny-clip", torch.tensor([0, 5, 7]))
    other.train().encode_text(torch.full((1, other.context_length), 7))
    with pytest.raises(IndexError):
        other.train().encode_text(torch.full((1, other.context_length), 6))


def test_rows_that_were_brought_at_once_are_those_that_are_brought_one_by_one() -> None:
    """And what was not brought is an error, not another row's vector."""
    plain, other = pair("tiny-clip", torch.tensor([0, 5, 7]))
    tokens_BL = texts(plain.eval(), 2, 40)
    with rows_at_hand(other.eval(), tokens_BL):
        for part_BL in tokens_BL.split(2):
            assert torch.equal(other.encode_text(part_BL), plain.encode_text(part_BL))
        with pytest.raises(IndexError):
            other.encode_text(torch.full_like(tokens_BL, 41))
    assert torch.equal(other.encode_text(torch.full_like(tokens_BL, 41)), plain.encode_text(torch.full_like(tokens_BL, 41)))
    with rows_at_hand(plain, tokens_BL):  # which has all of them
        assert torch.equal(plain.encode_text(tokens_BL), other.encode_text(tokens_BL))


@pytest.mark.parametrize(("name", "loss"), [("tiny-clip", "contrastive"), ("tiny-sig", "siglip")])
@pytest.mark.parametrize(
    "options",
    [{}, {"training.micro_batch_size": 4, "hardware.gradient_checkpointing": True, "optimizer.layer_decay": 0.8}],
    ids=["whole", "micro-batches, checkpointing, layer decay"],
)
def test_a_trained_model_differs_from_its_start_in_its_rows_only(name: str, loss: str, options: Any) -> None:
    given = batches(3)
    config = config_of(name, loss_function=loss, **options)
    loaded = load_random_model(config)
    before_VD = table_of(loaded.network).weight.detach().clone()
    rows_U = rows_of(given)
    use_token_rows(loaded.network, config, lambda: rows_U)
    trainer = Trainer(loaded, config, 8, CPU)
    steps(trainer, given)
    plain = load_random_model(config).network
    put_weights(plain, trainer.network.state_dict(), "the run")
    after_VD = table_of(plain).weight.detach()
    moved_V = (after_VD != before_VD).any(dim=1)
    assert moved_V.nonzero().flatten().tolist() == rows_U.tolist()
    tokens_BL = texts(plain, 0, 49_000)
    with torch.no_grad():
        assert torch.equal(plain.eval().encode_text(tokens_BL), trainer.network.eval().encode_text(tokens_BL))
    # The whole table, with weight decay, moves wherever it is; of its rows the training is the same but for rounding.
    first = config.with_overrides(EDITION_1)
    dense = load_random_model(first)
    use_token_rows(dense.network, first, lambda: pytest.fail("rows are not asked for"))
    trainer = Trainer(dense, first, 8, CPU)
    steps(trainer, given)
    dense_VD = table_of(dense.network).weight.detach()
    assert (dense_VD != before_VD).any(dim=1).all()
    torch.testing.assert_close(dense_VD[rows_U], after_VD[rows_U], atol=2e-4, rtol=0)


def test_optimizer_and_average_hold_the_rows_alone() -> None:
    given = batches(2)
    config = config_of("tiny-clip", **{"optimizer.ema_decay": 0.5})
    loaded = load_random_model(config)
    use_token_rows(loaded.network, config, lambda: rows_of(given))
    trainer = Trainer(loaded, config, 8, CPU)
    steps(trainer, given)
    num_rows, (num_all, width) = len(rows_of(given)), untrained_tables(trainer.network)["token_embedding.weight"].shape
    held = [tensor for each in trainer.state_dict()["optimizer"]["state"].values() for tensor in each.values()]
    held += trainer.state_dict()["raw_weights"].values()
    assert sum(tuple(tensor.shape) == (num_rows, width) for tensor in held) == 3
    assert all(num_all not in tensor.shape for tensor in held)
    with trainer.averaged():
        averaged = plain_state(trainer.network)["token_embedding.weight"]
    assert not torch.equal(averaged, plain_state(trainer.network)["token_embedding.weight"])


def test_rows_have_the_place_and_the_rate_of_the_table() -> None:
    config = config_of("tiny-clip", **{"optimizer.layer_decay": 0.5, "optimizer.text_rate": 2.0})
    plain, other = pair("tiny-clip", 3_000)
    assert parameter_places(other)["token_embedding.trained_UD"] == parameter_places(plain)["token_embedding.weight"]

    def group(network: Any, parameter: Any) -> Any:
        groups = parameter_groups(network, config.training, config.optimizer)
        (found,) = [each for each in groups if any(parameter is other for other in each["params"])]
        return found["peak_rate"], found["weight_decay"], len(groups)

    assert group(other, table_of(other).trained_UD) == group(plain, table_of(plain).weight)


@pytest.mark.parametrize("frozen", ["token_embedding", "text_tower"])
def test_frozen_rows_stay(frozen: str) -> None:
    given = batches(2)
    config = config_of("tiny-clip", **{f"freeze.{frozen}": True})
    loaded = load_random_model(config)
    before = plain_state(loaded.network)["token_embedding.weight"].clone()
    use_token_rows(loaded.network, config, lambda: rows_of(given))
    trainer = Trainer(loaded, config, 8, CPU)
    steps(trainer, given)
    assert torch.equal(plain_state(trainer.network)["token_embedding.weight"], before)


def test_the_rest_stays_on_the_host_wherever_the_network_goes() -> None:
    _, other = pair("tiny-clip", 3_000)
    moved = copy.deepcopy(other).to("meta")
    assert all(tensor.is_meta for tensor in (*moved.parameters(), *moved.buffers()))
    assert {name: tensor.device.type for name, tensor in untrained_tables(moved).items()} == {"token_embedding.weight": "cpu"}
    num_all, width = untrained_tables(other)["token_embedding.weight"].shape
    assert all(tensor.shape != (num_all, width) for tensor in (*other.parameters(), *other.buffers()))


def test_compiled_encoders_know_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager", fullgraph=True))
    monkeypatch.setenv("CXX", "true")
    plain, other = pair("tiny-clip", 3_000)
    tokens_BL = texts(plain, 0, 3_000)
    _, encode_text = encoders(other.train(), torch.device("cpu"), compiled=True)
    assert torch.equal(encode_text(tokens_BL, normalize=True), plain.train().encode_text(tokens_BL, normalize=True))


def test_an_export_of_a_network_with_rows_has_the_whole_table(tmp_path: Path) -> None:
    config = config_of("tiny-clip")
    loaded = load_model(config)
    expected = copy.deepcopy(loaded.network.state_dict())
    use_token_rows(loaded.network, config, 100)
    with torch.no_grad():
        table_of(loaded.network).trained_UD.add_(1)
    export_openclip(loaded, tmp_path / "out")
    found = load_model(config.with_overrides({"clip_model": f"local-dir:{tmp_path / 'out'}", "model.pretrained": "default"}))
    state = found.network.state_dict()
    assert state.keys() == expected.keys()
    assert torch.equal(state["token_embedding.weight"][100:], expected["token_embedding.weight"][100:])
    assert torch.equal(state["token_embedding.weight"][:100], expected["token_embedding.weight"][:100] + 1)


def test_rows_are_put_into_their_own_table_only() -> None:
    config = config_of("tiny-clip")
    network = load_random_model(config).network
    use_token_rows(network, config, 100)
    state = network.state_dict()
    other = load_random_model(config.with_overrides({"training.seed": 5})).network
    with pytest.raises(UserError, match=r"^only 100 rows of token_embedding.weight were trained, and their table is another"):
        put_weights(other, state, "here")
    with pytest.raises(UserError, match="their table is not here"):
        whole(state, {})
    more = load_random_model(config).network
    use_token_rows(more, config, 101)
    with pytest.raises(
        UserError, match=r"^the weights have other rows of the token table than this run would train: its captions"
    ):
        put_weights(more, state, "here")


def test_text_towers_without_such_a_table_train_as_before() -> None:
    """And so does the first edition, whichever the tower."""
    network = torch.nn.Module()
    network.text = torch.nn.ModuleDict({"embeddings": torch.nn.Embedding(9, 2)})  # as those of transformers are built
    use_token_rows(network, ProjectConfig(), lambda: pytest.fail("rows are not asked for"))
    assert untrained_tables(network) == {}


@pytest.mark.parametrize("name", THREE)
def test_what_is_planned_is_what_is_trained(name: str) -> None:
    """By hand: 6,000 rows of CLIP's, twice as many of another tokenizer."""
    width, all_rows, rows = (768, 256_000, 12_000) if "SigLIP2" in name else (512, 49_408, 6_000)
    config = ProjectConfig(clip_model=name)
    first, second = planned_network(config.with_overrides(EDITION_1), 6_000), planned_network(config, 6_000)
    trained = [sum(p.numel() for p in network.parameters() if p.requires_grad) for network in (first, second)]
    assert trained[0] - trained[1] == (all_rows - rows) * width
    assert [table.shape for table in untrained_tables(second).values()] == [(all_rows, width)]
    few = planned_network(config, 10**6)  # never more than there are
    assert sum(p.numel() for p in few.parameters()) == trained[0]


def test_under_autocast_it_is_the_same() -> None:
    bf16 = PrecisionPlan(torch.device("cpu"), torch.bfloat16)
    plain, other = pair("tiny-clip", 3_000)
    tokens_BL = texts(plain, 2_000, 4_000)
    with torch.no_grad(), bf16.autocast():
        assert torch.equal(plain.eval().encode_text(tokens_BL), other.eval().encode_text(tokens_BL))
