"""The optimizers against torch's and transformers', against themselves, and on problems small enough to see through."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers.optimization import Adafactor as ReferenceAdafactor

from sdlab.errors import SdlabError
from sdlab.training import rules
from sdlab.training.muon import is_block_matrix, muon_step, orthogonalised, rows_of
from sdlab.training.optim import AfterBackward, Ema, FusedBackward, WholeAdamW, make_optimizer
from sdlab.training.rules import Change, Code, rounded_bf16, rule_of, state_bytes

CPU = torch.device("cpu")
KINDS = ["adamw", "adamw8bit", "adafactor"]


class Net(nn.Module):
    """Two layers of 5120 and 5040 weights, a convolution, biases; inputs of width 64."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(64, 80)
        self.second = nn.Linear(80, 63)
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.to(dtype)

    def forward(self, x_B64):
        hidden_B63 = self.second(self.first(x_B64).tanh())
        return self.conv(hidden_B63[:, None]).mean(1)


def problem(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_B64 = torch.randn(128, 64, generator=generator)
    mixing = torch.randn(64, 63, generator=generator) / 8
    return x_B64, (x_B64 @ mixing).sin()


def updater(net: nn.Module, kind: str, **changes):
    settings = {"lr": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 3, "fused_backward": False}
    return make_optimizer(dict(net.named_parameters()), kind=kind, **{**settings, **changes})


def train(net: nn.Module, kind: str, *, steps: int = 60, lr: float = 1e-3, **changes) -> list[float]:
    x_B64, target = problem()
    change, losses = updater(net, kind, **changes), []
    for step in range(steps):
        change.begin(step, lr)
        out = net(x_B64.to(next(net.parameters()).dtype)).float()
        loss = (out - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        change.end(losses[-1])
    return losses


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in net.parameters()])


def test_adamw_on_float32_has_the_bits_of_torchs_fused_kernel():
    ours, theirs = Net(), Net()
    train(ours, "adamw", steps=10, lr=2e-3)
    reference = torch.optim.AdamW(theirs.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    x_B64, target = problem()
    for _ in range(10):
        (theirs(x_B64) - target).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    assert torch.equal(flat(ours), flat(theirs))
    assert isinstance(updater(ours, "adamw"), WholeAdamW)


@pytest.mark.parametrize("chunk", [rules.CHUNK, 512])
def test_our_own_float32_adamw_is_torchs_to_the_last_digits(monkeypatch, chunk):
    monkeypatch.setattr(rules, "CHUNK", chunk)
    ours, theirs = Net(), Net()
    train(ours, "adamw", steps=20, max_grad_norm=0.0, fused_backward=True)
    train(theirs, "adamw", steps=20, max_grad_norm=0.0)
    assert (flat(ours) - flat(theirs)).abs().max() < 2e-6
    assert (flat(ours) - flat(Net())).abs().max() > 5e-3


@pytest.mark.parametrize("fused", [False, True])
def test_8_bit_adamw_learns_like_adamw(fused):
    eight, full, start = Net(), Net(), Net()
    losses8 = train(eight, "adamw8bit", steps=120, fused_backward=fused, max_grad_norm=0.0)
    losses = train(full, "adamw", steps=120, max_grad_norm=0.0)
    assert losses[-1] < 0.5 * losses[0]
    assert losses8[-1] == pytest.approx(losses[-1], rel=0.1)
    way, other = flat(full) - flat(start), flat(eight) - flat(start)
    assert nn.functional.cosine_similarity(way, other, dim=0) > 0.96
    assert other.norm() == pytest.approx(float(way.norm()), rel=0.1)
    assert not torch.equal(way, other)


def test_small_tensors_keep_float32_moments_and_large_ones_two_bytes_a_weight():
    rule = rule_of("adamw8bit", CPU)
    assert {t.dtype for t in rule.fresh(torch.zeros(4095)).values()} == {torch.float32}
    state = rule.fresh(torch.zeros(100, 100))
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["exp_avg_scales"].shape == (40,)
    assert state_bytes("adamw8bit", torch.zeros(100, 100)) == 2 * 10000 + 2 * 40 * 4
    assert state_bytes("adamw", torch.zeros(100, 100)) == 8 * 10000
    assert state_bytes("adafactor", torch.zeros(100, 4, 25)) == 4 * 200
    assert state_bytes("adafactor", torch.zeros(100)) == 4 * 100


@pytest.mark.parametrize("signed", [True, False])
def test_the_8_bit_code_is_the_dynamic_tree(signed):
    code = Code.of(signed, CPU)
    values = code.values_256
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert {0.0, 1.0} <= set(values.tolist())
    assert values[0] == pytest.approx(-0.99296875 if signed else 0.0)
    for decade in range(7):
        inside = (values > 10.0 ** (decade - 7)) & (values < 10.0 ** (decade - 6)) & (values != 1)
        assert inside.sum() == 2 ** (decade if signed else decade + 1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_8_bit_rounding_is_to_the_nearest_code_in_each_block(signed, count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator) * torch.logspace(-3, 2, count)
    values = values if signed else values.abs()
    code = Code.of(signed, CPU)
    codes, scales = code.encode(values)
    assert codes.shape == (count,)
    assert scales.shape == (-(-count // 256),)
    ratio = values / scales.repeat_interleave(256)[:count]
    nearest = code.values_256[(ratio[:, None] - code.values_256).abs().argmin(1)]
    decoded = code.decode(codes, scales)
    expected = nearest * scales.repeat_interleave(256)[:count]
    if not signed:
        assert (decoded[values > 0] > 0).all()  # never rounded to nothing
        expected = torch.where(expected == 0, decoded, expected)
    assert torch.allclose(decoded, expected)
    if not signed:  # -1 has no code, so a block whose largest is negative shrinks by 0.7 % each time
        assert torch.equal(code.decode(*code.encode(decoded)), decoded)


def test_a_block_of_zeros_stays_zero():
    for signed in (True, False):
        code = Code.of(signed, CPU)
        assert code.decode(*code.encode(torch.zeros(300))).abs().max() == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunk", [rules.CHUNK, 512])
def test_adafactor_is_transformers_where_the_settings_coincide(monkeypatch, fused, chunk):
    monkeypatch.setattr(rules, "CHUNK", chunk)

    def matrices() -> nn.Module:  # no convolution: factored otherwise, see the next test
        net = Net()
        return nn.Sequential(net.first, nn.Tanh(), net.second)

    ours, theirs, start = matrices(), matrices(), matrices()
    x_B64, target = problem()
    reference = ReferenceAdafactor(
        theirs.parameters(), lr=3e-3, weight_decay=0.01, scale_parameter=False, relative_step=False
    )
    change = updater(ours, "adafactor", max_grad_norm=0.0, fused_backward=fused)
    for step in range(20):
        change.begin(step, 3e-3)
        loss = (ours(x_B64) - target).square().mean()
        loss.backward()
        change.end(loss.item())
        reference.zero_grad()
        (theirs(x_B64) - target).square().mean().backward()
        reference.step()
    assert (flat(ours) - flat(theirs)).abs().max() < 2e-6
    assert (flat(ours) - flat(start)).abs().max() > 1e-2


def test_adafactor_takes_a_convolution_as_a_matrix():
    rule = rule_of("adafactor", CPU)
    generator = torch.Generator().manual_seed(0)
    flat_weight, grad = torch.randn(8, 36, generator=generator), torch.randn(8, 36, generator=generator)
    change = Change(1e-2, 0.1, torch.tensor(1.0), None, None)
    shaped = flat_weight.clone().view(8, 4, 3, 3)
    rule.apply(shaped, grad.view(8, 4, 3, 3), rule.fresh(shaped), change)
    rule.apply(flat_weight, grad, rule.fresh(flat_weight), change)
    assert torch.equal(shaped.view(8, 36), flat_weight)


def test_adafactor_updates_are_clipped_to_a_root_mean_square_of_the_lr():
    rule = rule_of("adafactor", CPU)
    weight = torch.zeros(50, 40)
    state = rule.fresh(weight)
    change = Change(1e-2, 0.0, torch.tensor(1.0), None, None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        rule.apply(weight, torch.randn(50, 40, generator=generator), state, change)
    before = weight.clone()
    rule.apply(weight, 100 * torch.randn(50, 40, generator=generator), state, change)
    assert (weight - before).square().mean().sqrt() == pytest.approx(1e-2, rel=1e-4)


def test_stochastic_rounding_keeps_the_mean():
    values = torch.tensor([1.0 + 1 / 512, -3.14159265, 1e-30, 65535.9, 0.7, -1e-3])
    many = values.repeat(200_000, 1)
    rounded = rounded_bf16(many.flatten(), torch.Generator().manual_seed(0)).view(many.shape).double()
    step = 2.0 ** (values.abs().double().log2().floor() - 7)
    error = (rounded.mean(0) - values.double()).abs() / step
    assert (error < 4 * 0.5 / 200_000**0.5).all()  # four standard errors of the coarsest case
    nearest = values.bfloat16().double()
    assert ((nearest - values.double()).abs() / step).max() > 0.2  # what rounding to nearest is off by
    assert ((rounded - values.double()).abs() < step).all()  # to a neighbour, never further


def test_stochastic_rounding_leaves_bf16_values_and_what_is_not_finite():
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rounded_bf16(exact.float(), torch.Generator().manual_seed(1)), exact)
    assert rounded_bf16(torch.zeros(9), torch.Generator().manual_seed(1)).abs().max() == 0
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(
        torch.float32
    )  # a card's NaN first
    assert rounded_bf16(odd, torch.Generator().manual_seed(1)).isnan().all()
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(rounded_bf16(infinite, torch.Generator().manual_seed(1)).float(), infinite)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_move_at_an_lr_of_1e_5(kind, monkeypatch):
    start = Net(torch.bfloat16)
    rounded, nearest, full = Net(torch.bfloat16), Net(torch.bfloat16), Net(torch.bfloat16).float()
    settings = {"steps": 60, "lr": 1e-5, "weight_decay": 0.0, "max_grad_norm": 0.0}
    train(full, kind, **settings)
    train(rounded, kind, **settings)
    monkeypatch.setattr(rules, "rounded_bf16", lambda value, generator: value.bfloat16())
    train(nearest, kind, **settings)
    wanted = flat(full) - flat(start)

    def share(net: Net) -> float:
        return float((flat(net) - flat(start)) @ wanted / (wanted @ wanted))

    assert share(rounded) == pytest.approx(1.0, abs=0.25)
    assert share(nearest) < 0.2


def test_random_bits_are_named_by_seed_step_and_parameter():
    def bits(seed: int, step: int, name: str) -> torch.Tensor:
        net = Net(torch.bfloat16)
        change = updater(net, "adafactor", seed=seed)
        change.begin(step, 1e-3)
        generator = change.ruled._rounding(name, net.first.weight)
        return torch.randint(0, 1 << 16, (100,), generator=generator)

    one = bits(1, 2, "a")
    assert torch.equal(one, bits(1, 2, "a"))
    for other in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b")):
        assert not torch.equal(one, bits(*other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_does_not_depend_on_the_other_parameters(kind, dtype):
    x_B64, target = problem()
    results = []
    for trained in (("first.weight", "second.weight"), ("second.weight",)):
        net = Net(dtype)
        named = {name: p for name, p in net.named_parameters() if name in trained}
        change = make_optimizer(
            named, kind=kind, lr=1e-3, weight_decay=0.0, max_grad_norm=0.0, seed=1, fused_backward=True
        )
        change.begin(0, 1e-3)
        (net(x_B64.to(dtype)).float() - target).square().mean().backward()
        change.end(0.0)
        results.append(net.second.weight.detach())
    assert torch.equal(*results)


def test_a_fused_backward_frees_each_gradient_and_reports_the_global_norm():
    net, plain = Net(), Net()
    change = updater(net, "adafactor", fused_backward=True)
    alive = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: alive.append(sum(q.grad is not None for q in net.parameters()))
        )
    x_B64, target = problem()
    change.begin(0, 1e-3)
    (net(x_B64) - target).square().mean().backward()
    norm, finite = change.end(1.0)
    (plain(x_B64) - target).square().mean().backward()
    assert norm == pytest.approx(
        float(nn.utils.get_total_norm([p.grad for p in plain.parameters()])), rel=1e-6
    )
    assert finite
    assert alive == [0] * 6
    assert all(p.grad is None for p in net.parameters())


def test_a_fused_backward_clips_each_tensor_and_the_other_one_the_whole():
    x_B64, target = problem()
    seen: dict[bool, dict[str, float]] = {}
    for fused in (True, False):
        net = Net()
        change = updater(net, "adamw8bit", fused_backward=fused, max_grad_norm=1e-3)
        change.begin(0, 1e-3)
        (net(x_B64) - target).square().mean().backward()
        change.end(1.0)
        # after one step exp_avg is a tenth of the clipped gradient
        moments = {
            n: change.ruled.rules[n]._read(s, "exp_avg", slice(0, 10**6))
            for n, s in change.ruled.state.items()
        }
        seen[fused] = {name: 10 * float(moment.norm()) for name, moment in moments.items()}
    assert seen[True]["first.weight"] == pytest.approx(1e-3, rel=0.02)
    assert seen[True]["second.weight"] == pytest.approx(1e-3, rel=0.02)
    assert sum(norm**2 for norm in seen[False].values()) ** 0.5 == pytest.approx(1e-3, rel=0.02)


def test_a_fused_backward_works_with_recomputed_blocks_and_shared_weights():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inside, self.outside = nn.Linear(64, 64), nn.Linear(64, 63)

        def forward(self, x):
            for _ in range(3):
                x = recompute(lambda x: self.inside(x).tanh(), x, use_reentrant=False)
            return self.outside(x)

    results = []
    for fused in (True, False):
        net = Shared()
        train(net, "adafactor", steps=5, fused_backward=fused, max_grad_norm=0.0)
        results.append(flat(net))
    assert torch.equal(*results)
    assert not torch.equal(results[0], flat(Shared()))


def test_the_state_of_a_fused_backward_goes_when_its_updater_goes():
    net = Net()
    change = updater(net, "adamw8bit", fused_backward=True)
    state = weakref.ref(change.ruled.state["first.weight"]["exp_avg_codes"])
    gc.disable()
    try:
        del change
        assert state() is None
    finally:
        gc.enable()
    net(problem()[0]).sum().backward()  # an ordinary backward again
    assert net.first.weight.grad is not None


class Blocks(nn.Module):
    """An embedding, two blocks of a wide and a tall matrix, and a last layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(64, 48)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48)) for _ in range(2)
        )
        self.out = nn.Linear(48, 63)
        self.to(dtype)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def test_muons_step_has_all_directions_in_one_size():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((40, 90), (90, 40), (64, 64)):
        matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        made = orthogonalised(matrix.float()).double()
        inside = (left.T @ made @ right.T).diagonal()
        assert (
            made - left @ inside.diag() @ right
        ).abs().max() < 0.02  # its singular vectors are the matrix's
        large = values > 0.02 * values.norm()
        assert 0.6 < inside[large].min() and inside.max() < 1.25
        step = muon_step(matrix.float(), (rows,))
        assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)  # as AdamW's
    assert orthogonalised(torch.zeros(3, 5)).abs().max() == 0


def test_muon_is_torchs_own_for_matrices_in_blocks_and_adamw_for_all_else():
    ours, theirs, start = Blocks(), Blocks(), Blocks()
    train(ours, "muon", steps=15, lr=2e-3, weight_decay=0.1)
    inside = {n: p for n, p in theirs.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert len(inside) == 4
    others = [p for n, p in theirs.named_parameters() if n not in inside]
    reference = [
        torch.optim.Muon(inside.values(), lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, weight_decay=0.1),
    ]
    x_B64, target = problem()
    for _ in range(15):
        (theirs(x_B64) - target).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for optimizer in reference:
            optimizer.step()
        theirs.zero_grad()
    assert (flat(ours) - flat(theirs)).abs().max() < 0.02 * (flat(theirs) - flat(start)).abs().max()  # bf16


def test_queries_keys_and_values_that_one_weight_stacks_are_each_made_orthogonal():
    weight = torch.randn(3 * 24 + 40, 24, generator=torch.Generator().manual_seed(0))
    name = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    assert rows_of(name, weight) == (24, 24, 24, 40) and rows_of("blocks.0.ff.weight", weight) == (112,)
    step = muon_step(weight, rows_of(name, weight))
    for part in ((0, 24), (24, 48), (48, 72), (72, 112)):
        alone = muon_step(weight[slice(*part)], (part[1] - part[0],))
        assert torch.equal(step[slice(*part)], alone)
    assert not torch.allclose(step, muon_step(weight, (112,)), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("transformer_blocks.0.attn.to_q.weight", (8, 8), True),
        ("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight", (8, 8), True),
        ("mid_block.resnets.0.time_emb_proj.weight", (8, 8), True),
        ("text_decoder.bert.encoder.layer.0.attention.self.query.weight", (8, 8), True),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", (8, 8, 3, 3), False),
        ("transformer_blocks.0.norm.weight", (8,), False),
        ("x_embedder.weight", (8, 8), False),
        ("time_guidance_embed.timestep_embedder.linear_1.weight", (8, 8), False),
        ("proj_out.weight", (8, 8), False),
    ],
)
def test_muon_takes_the_matrices_inside_blocks(name, shape, wanted):
    assert is_block_matrix(name, torch.empty(shape, device="meta")) is wanted


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_learns_and_goes_on_from_its_state_bit_for_bit(dtype, fused):
    x_B64, target = problem()
    losses: list[float] = []

    def steps(net, change, ema, numbers):
        for step in numbers:
            change.begin(step, 3e-3)
            loss = (net(x_B64.to(dtype)).float() - target).square().mean()
            loss.backward()
            losses.append(loss.item())
            assert change.end(loss.item())[1]
            ema.update(step + 1)

    one = Blocks(dtype)
    change, ema = updater(one, "muon", fused_backward=fused), Ema(dict(one.named_parameters()))
    steps(one, change, ema, range(10))
    state = {name: t.clone() for name, t in change.tensors().items()}
    assert "blocks.0.0.weight.momentum" in state and "embed.weight.exp_avg" in state
    two = Blocks(dtype)
    two.load_state_dict(one.state_dict())
    other, average = updater(two, "muon", fused_backward=fused), Ema(dict(two.named_parameters()))
    other.load(state)
    average.shadow = {name: t.clone() for name, t in ema.shadow.items()}
    steps(one, change, ema, range(10, 16))
    steps(two, other, average, range(10, 16))
    assert torch.equal(flat(one), flat(two))
    assert all(torch.equal(ema.shadow[n], average.shadow[n]) for n in ema.shadow)
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(SdlabError, match="another optimizer"):
        updater(Blocks(dtype), "adamw", fused_backward=fused).load(state)


def test_a_gradient_that_is_not_finite_leaves_muons_matrices_as_they_are():
    net, start = Blocks(), Blocks()
    change = updater(net, "muon", fused_backward=True)
    change.begin(0, 1e-3)
    (net(problem()[0]).sum() * torch.inf).backward()
    assert not change.end(1.0)[1]
    assert torch.equal(flat(net), flat(start))
    assert change.ruled.state["blocks.0.0.weight"]["momentum"].abs().max() == 0


def test_muon_keeps_one_number_a_weight_of_a_matrix():
    matrix = torch.zeros(100, 100)
    assert state_bytes("muon", matrix, "blocks.0.weight") == 4 * 10000
    assert state_bytes("muon", matrix, "embed.weight") == 8 * 10000


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_another_optimizers_state_is_refused(kind, dtype, fused):
    net = Net(dtype)
    change = updater(net, kind, fused_backward=fused)
    other = updater(Net(dtype), "adafactor" if kind != "adafactor" else "adamw8bit", fused_backward=fused)
    with pytest.raises(SdlabError, match="another optimizer"):
        change.load(other.tensors())


def test_the_three_ways_are_chosen_by_type_kind_and_fusing():
    assert isinstance(updater(Net(), "adamw"), WholeAdamW)
    assert isinstance(updater(Net(torch.bfloat16), "adamw"), AfterBackward)
    assert isinstance(updater(Net(), "adafactor"), AfterBackward)
    assert isinstance(updater(Net(), "adamw", fused_backward=True), FusedBackward)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_after_backward(kind, bad):
    net = Net(torch.bfloat16)
    change = updater(net, kind)
    before = {name: t.clone() for name, t in change.tensors().items()}
    change.begin(0, 1e-3)
    net(problem()[0].bfloat16()).float().sum().backward()
    net.conv.bias.grad[0] = bad
    _, finite = change.end(1.0)
    assert not finite
    assert torch.equal(flat(net), flat(Net(torch.bfloat16)))
    assert all(torch.equal(before[name], t) for name, t in change.tensors().items())


def test_the_average_of_bf16_weights_is_kept_in_float32_and_shown_in_bf16():
    net = Net(torch.bfloat16)
    named = dict(net.named_parameters())
    ema = Ema(named)
    start = net.first.weight.detach().float().clone()
    with torch.no_grad():
        net.first.weight.mul_(1.01)
    raw = net.first.weight.detach().clone()
    for step in range(1_000_000, 1_000_010):
        ema.update(step)
    moved = ema.shadow["first.weight"] - start
    assert moved.abs().max() > 0
    assert torch.allclose(moved, 1e-3 * (raw.float() - start), rtol=0.2, atol=2e-8)
    with ema.applied():
        assert torch.equal(net.first.weight, ema.shadow["first.weight"].bfloat16())
    assert torch.equal(net.first.weight, raw)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_updates_without_waiting_and_repeats_its_bits(kind):
    results = []
    for _ in range(2):
        net = Net(torch.bfloat16).cuda()
        change = updater(net, kind, fused_backward=True)
        x_B64, target = (t.cuda() for t in problem())
        for step in range(3):
            change.begin(step, 1e-3)
            loss = (net(x_B64.bfloat16()).float() - target).square().mean()
            torch.cuda.set_sync_debug_mode("error")
            loss.backward()
            torch.cuda.set_sync_debug_mode("default")
            change.end(float(loss))
        results.append(flat(net))
    assert torch.equal(*results)
    assert not torch.equal(results[0].cpu(), flat(Net(torch.bfloat16)))
