"""The estimate against what is known of it, on networks without storage; there is no GPU to measure on."""

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.losses import fitted_logit_bias, info_nce, sigmoid_bce
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.profiling.memory import MemoryEstimate, estimate_memory
from fashionclip_tune.profiling.probe import probe


def estimate(network: Any, micro_batch_size: int = 8, **options: Any) -> MemoryEstimate:
    settings = {"batch_size": 8, "micro_batch_size": micro_batch_size, "autocast_dtype": None, **options}
    return estimate_memory(network, **settings)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_static_bytes_follow_from_the_weights_and_what_is_frozen(tiny_config: ProjectConfig, name: str) -> None:
    network = load_model(tiny_config.with_overrides({"clip_model": name})).network
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    whole = estimate(network)
    assert whole.gradients_bytes == size
    assert whole.optimizer_bytes == 2 * size
    assert size <= whole.weights_bytes < 1.1 * size  # the mask of causal attention is a buffer
    assert whole.average_bytes == 0
    assert estimate(network, averages_weights=True).average_bytes == size
    assert whole.total_bytes == sum(vars(whole).values())
    vision = 4 * sum(parameter.numel() for parameter in network.visual.parameters())
    for parameter in network.visual.parameters():
        parameter.requires_grad_(False)
    frozen = estimate(network)
    assert frozen.gradients_bytes == size - vision
    assert estimate(network, averages_weights=True).average_bytes == size - vision
    assert frozen.activations_bytes < 0.8 * whole.activations_bytes


def test_activations_grow_with_the_micro_batch_and_shrink_with_fp16_and_checkpointing(tiny_config: ProjectConfig) -> None:
    network = load_model(tiny_config).network
    before = copy.deepcopy(network.state_dict())
    eight, sixteen = estimate(network).activations_bytes, estimate(network, 16, batch_size=16).activations_bytes
    assert sixteen == pytest.approx(2 * eight, rel=0.02)
    assert estimate(network, autocast_dtype=torch.float16).activations_bytes < 0.95 * eight
    assert estimate(network, gradient_checkpointing=True).activations_bytes < 0.6 * eight
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert not torch.is_autocast_enabled("cuda")


def test_activations_are_what_a_pass_on_the_cpu_keeps(tiny_config: ProjectConfig) -> None:
    """Counted on true tensors of the CPU, whose attention kernel keeps the same."""
    network: Any = load_model(tiny_config).network.train()
    known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = network(torch.rand(8, 3, 32, 32), torch.randint(1, 100, (8, 32)))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert estimate(network).activations_bytes == pytest.approx(total, rel=0.05)


def test_without_a_gpu_probe_estimates_and_says_so(
    tiny_config: ProjectConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = probe(tiny_config.with_overrides({"training.batch_size": 10, "training.budget_examples": 160} | NO_STAGES))
    assert [each.micro_batch_size for each in report.probes] == [10, 5, 3, 2, 1]
    assert (report.card, report.best) == (None, None)
    activations = [each.estimate.activations_bytes for each in report.probes]
    assert activations == sorted(activations, reverse=True)
    main(["probe", "--set", "clip_model=tiny-clip", "--set", "model.pretrained=none", "--set", "training.batch_size=4"])
    lines = capsys.readouterr().out.splitlines()
    assert "nothing was measured" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["4", "2", "1"]


def test_probe_estimates_what_is_configured(tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option moves the part of the estimate that it concerns, and no other static one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def of(**settings: Any) -> MemoryEstimate:
        options = {path.replace("__", "."): value for path, value in settings.items()}
        return probe(tiny_config.with_overrides(options)).probes[0].estimate

    plain = of()
    vision = 4 * sum(parameter.numel() for parameter in load_model(tiny_config).network.visual.parameters())
    frozen = of(freeze__image_tower=True)
    assert frozen.gradients_bytes == plain.gradients_bytes - vision
    assert frozen.optimizer_bytes == 2 * frozen.gradients_bytes
    assert frozen.activations_bytes < 0.8 * plain.activations_bytes
    averaged = of(freeze__image_tower=True, optimizer__ema_decay=0.9)
    assert (plain.average_bytes, averaged.average_bytes) == (0, frozen.gradients_bytes)
    assert of(hardware__gradient_checkpointing=True).activations_bytes < 0.6 * plain.activations_bytes
    # Half of the image tower's 16 patches and its class token: 9 tokens for 17.
    dropped = of(model__patch_dropout=0.5)
    assert dropped.gradients_bytes == plain.gradients_bytes
    assert dropped.activations_bytes < 0.9 * plain.activations_bytes
    with pytest.raises(UserError, match=r"freeze.image_blocks = 99"):
        of(freeze__image_blocks=99)


NO_STAGES = {"training.stage_examples": None, "training.budget_examples": None}


@pytest.mark.parametrize("positives", [None, "all", "mask"])
@pytest.mark.parametrize("loss", ["contrastive", "sigmoid", "first bias"])
def test_a_loss_holds_no_more_matrices_than_are_counted(loss: str, positives: Any, tiny_config: ProjectConfig) -> None:
    size = 512
    image_BD, text_BD = (F.normalize(torch.randn(size, 16), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(50.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    pairs_BB = None if positives is None else torch.eye(size, dtype=torch.bool)
    treatment = positives or "all"
    with _LiveStorages() as live:
        if loss == "contrastive":
            info_nce(image_BD, text_BD, scale, pairs_BB, treatment).backward()
        elif loss == "sigmoid":
            sigmoid_bce(image_BD, text_BD, scale, bias, pairs_BB, treatment).backward()
        else:
            fitted_logit_bias(image_BD, text_BD, scale, pairs_BB, treatment)
    network = load_model(tiny_config).network
    found = estimate(network, batch_size=size, micro_batch_size=size)
    matrices_bytes = found.loss_bytes - 2 * 4 * 4 * size * network.visual.output_dim
    assert 0.4 * matrices_bytes < live.peak_bytes <= matrices_bytes


def test_embeddings_of_the_whole_batch_stay_where_it_is_cut_and_matrices_take_the_activations_room(
    tiny_config: ProjectConfig,
) -> None:
    network = load_model(tiny_config).network
    whole, cut = (estimate(network, micro, batch_size=256) for micro in (256, 8))
    matrices_bytes = 9 * 256 * 256 * 4
    embeddings_bytes = whole.loss_bytes - matrices_bytes
    assert embeddings_bytes == 2 * 4 * 4 * 256 * network.visual.output_dim
    assert cut.loss_bytes == embeddings_bytes + max(0, matrices_bytes - cut.activations_bytes)
    large = estimate(network, 8, batch_size=16_384)
    assert large.loss_bytes > 9 * 16_384**2 * 4 - large.activations_bytes


class _LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations make, as long as somebody holds them, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(torch.Tensor, self._note, func(*args, **(kwargs or {})))

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            weakref.finalize(storage, self._free, storage.nbytes())
        return tensor

    def _free(self, num_bytes: int) -> None:
        self._bytes -= num_bytes
