"""Real gloo processes, started once for each number of ranks; each test compares one thing they computed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ptxdist.train import distributed
from ptxdist.train.batchnorm import GlobalBatchNorm2d, convert

# Cases of each rank in one global batch.
SHARES = {2: [(2, 2), (3, 1), (4, 0)], 3: [(2, 1, 3), (2, 0, 3), (0, 0, 4)]}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CHANNELS = 5
STEPS = 3
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def layer(momentum: float | None = 0.1, kind: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    norm = kind(CHANNELS, momentum=momentum)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


def data(total: int, step: int, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = 3 + step + 2 * torch.randn(total, CHANNELS, 6, 7, generator=generator)
    return x.to(memory_format=memory_format), torch.randn(x.shape, generator=generator)


def run_layer(norm: nn.BatchNorm2d, total: int, own: slice, memory_format: torch.memory_format) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, gradient = (tensor[own] for tensor in data(total, step, memory_format))
        x = x.detach().requires_grad_()
        y = norm(x)
        y.backward(gradient)
        assert x.grad is not None
        result |= {f"output {step}": y.detach(), f"gradient {step}": x.grad}
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return result | {"weight": norm.weight.grad, "bias": norm.bias.grad} | dict(norm.named_buffers())


def small_network() -> nn.Module:
    """In float64, where rounding does not decide which side of 0 an activation is on."""
    torch.manual_seed(3)

    def stage(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]

    middle = [nn.MaxPool2d(2), *stage(8), *stage(8), nn.Upsample(scale_factor=2)]
    return nn.Sequential(*stage(1), *middle, *stage(8), nn.Conv2d(8, 1, 3, padding=1)).double()


def network_step(model: nn.Module, own: slice, total: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(5)
    image, target = (torch.rand((total, 1, 16, 16), generator=generator, dtype=torch.float64)[own] for _ in range(2))
    per_image = (model(image) - target).square().mean((1, 2, 3))
    (per_image.sum() * ranks / total).backward()


def slices(share: tuple[int, ...]) -> list[slice]:
    return [slice(sum(share[:rank]), sum(share[: rank + 1])) for rank in range(len(share))]


def on_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    results: dict[Any, Any] = {"rank": (distributed.rank(), distributed.world_size())}
    tensor = torch.tensor([rank + 1, 10])
    results["sum is in place"] = distributed.sum_over_ranks(tensor) is tensor
    results["sum"] = tensor.tolist()
    distributed.barrier()
    for share in SHARES[ranks]:
        own = slices(share)[rank]
        for name, memory_format in FORMATS.items():
            results[share, name] = run_layer(convert(layer()), sum(share), own, memory_format)
        results[share, "timm"] = run_layer(convert(layer(kind=BatchNormAct2d)), sum(share), own, torch.channels_last)
        results[share, "cumulative"] = run_layer(convert(layer(None)), sum(share), own, torch.channels_last)
    norm = convert(layer())
    results["offset"] = norm(1e4 + data(4 * ranks, 0, torch.channels_last)[0][4 * rank : 4 * rank + 4]).detach()
    plain = convert(nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False))
    x, gradient = (tensor[2 * rank : 2 * rank + 2] for tensor in data(2 * ranks, 0, torch.contiguous_format))
    x = x.detach().requires_grad_()
    plain(x).backward(gradient)
    results["without weights and statistics"] = x.grad
    results["one value per rank"] = norm(torch.full((1, CHANNELS, 1, 1), float(rank))).detach()
    try:
        norm(torch.zeros(1 if rank == 0 else 0, CHANNELS, 1, 1))
        results["one value"] = None
    except ValueError as error:
        results["one value"] = str(error)
    before = [buffer.clone() for buffer in norm.eval().buffers()]
    results["eval"] = norm(data(3, 1, torch.channels_last)[0]).equal(
        nn.functional.batch_norm(
            data(3, 1, torch.channels_last)[0], norm.running_mean, norm.running_var, norm.weight, norm.bias
        )
    ) and all(a.equal(b) for a, b in zip(before, norm.buffers(), strict=True))
    only_one = SHARES[ranks][-1]  # in which one rank has all the cases
    model = DistributedDataParallel(convert(small_network()))
    network_step(model, slices(only_one)[rank], sum(only_one), ranks)
    results["network"] = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    results["network"] |= dict(model.module.named_buffers())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SHARES), ids=lambda ranks: f"{ranks} ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    torch.multiprocessing.start_processes(on_rank, (ranks, folder), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def test_the_helpers_know_the_ranks_and_sum_over_them(results: list[dict]) -> None:
    ranks = len(results)
    assert [result["rank"] for result in results] == [(rank, ranks) for rank in range(ranks)]
    assert all(result["sum"] == [ranks * (ranks + 1) // 2, 10 * ranks] for result in results)
    assert all(result["sum is in place"] for result in results)


@pytest.mark.parametrize("kind", [*FORMATS, "cumulative", "timm"])
def test_ranks_together_equal_one_process_with_the_whole_batch(results: list[dict], kind: str) -> None:
    for share in SHARES[len(results)]:
        parts = [result[share, kind] for result in results]
        norm = layer(None if kind == "cumulative" else 0.1, BatchNormAct2d if kind == "timm" else nn.BatchNorm2d)
        whole = run_layer(norm, sum(share), slice(None), FORMATS.get(kind, torch.channels_last))
        for name, expected in whole.items():
            values = [part[name] for part in parts]
            if name.startswith(("output", "gradient")):
                torch.testing.assert_close(torch.cat(values), expected, **CLOSE)
            elif name in ("weight", "bias"):  # each rank's own part of the sum
                torch.testing.assert_close(torch.stack(values).sum(0), expected, rtol=1e-5, atol=1e-4)
            else:
                torch.testing.assert_close(values[0], expected, **CLOSE)
                assert all(value.equal(values[0]) for value in values), f"{name} differs between ranks"


def test_the_memory_format_of_the_input_is_kept(results: list[dict]) -> None:
    for share in SHARES[len(results)]:
        for part in (result[share, "channels_last"] for result in results):
            for name in ("output 0", "gradient 0"):
                assert part[name].is_contiguous(memory_format=torch.channels_last)


def test_a_layer_without_weights_and_statistics_is_global_too(results: list[dict]) -> None:
    x, gradient = data(2 * len(results), 0, torch.contiguous_format)
    x.requires_grad_()
    nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False)(x).backward(gradient)
    torch.testing.assert_close(torch.cat([r["without weights and statistics"] for r in results]), x.grad, **CLOSE)


def test_a_large_offset_does_not_spoil_the_variance(results: list[dict]) -> None:
    x = 1e4 + data(4 * len(results), 0, torch.channels_last)[0].double()
    norm = layer().double()
    output = torch.cat([result["offset"] for result in results]).double()
    torch.testing.assert_close(output, norm(x).detach(), rtol=0, atol=5e-3)  # float32 holds 1e4 to 5e-4


def test_one_value_per_rank_is_enough_but_one_over_all_ranks_is_not(results: list[dict]) -> None:
    x = torch.arange(len(results), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, CHANNELS, 1, 1)
    torch.testing.assert_close(torch.cat([r["one value per rank"] for r in results]), layer()(x).detach(), **CLOSE)
    assert all("more than 1 value per channel" in result["one value"] for result in results)


def test_eval_mode_uses_the_running_statistics_and_leaves_them(results: list[dict]) -> None:
    assert all(result["eval"] for result in results)


def test_a_parallel_network_with_idle_ranks_has_the_gradients_of_one_process(results: list[dict]) -> None:
    model = small_network()
    network_step(model, slice(None), 4, 1)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())
    for name, value in expected.items():
        values = [result["network"][name] for result in results]
        assert all(other.equal(values[0]) for other in values), f"{name} differs between ranks"
        torch.testing.assert_close(values[0], value, rtol=1e-6, atol=1e-9)


def test_undistributed_it_is_the_ordinary_layer_to_the_last_bit() -> None:
    own, ordinary = convert(layer()), layer()
    assert type(own) is GlobalBatchNorm2d
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    result = run_layer(own, 4, slice(None), torch.channels_last)
    expected = run_layer(ordinary, 4, slice(None), torch.channels_last)
    assert all(result[name].equal(value) for name, value in expected.items())


def test_undistributed_a_sum_over_ranks_is_the_tensor_itself() -> None:
    tensor = torch.tensor([1, 2])
    assert distributed.sum_over_ranks(tensor) is tensor
    assert tensor.tolist() == [1, 2]
    distributed.barrier()


def test_converting_keeps_state_parameters_and_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4), nn.BatchNorm1d(4))
    before = model.state_dict(keep_vars=True)
    assert convert(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [type(module) for module in model.modules()].count(GlobalBatchNorm2d) == 2
    assert type(model[3]) is nn.BatchNorm1d
