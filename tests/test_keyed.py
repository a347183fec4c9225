import subprocess
import sys

import torch

from sdlab.keyed import Draws, key, keyed, permutation


def test_a_key_is_the_same_in_every_process_and_frozen():
    code = "from sdlab.keyed import key; print(key(42, 'noise', 7, 'a/b.png'))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert runs == {str(key(42, "noise", 7, "a/b.png"))} == {"5881613568774184166"}


def test_parts_of_a_key_do_not_run_together():
    assert key("ab", "c") != key("a", "bc")
    assert key(1, 23) != key(12, 3)


def test_a_samples_draw_does_not_depend_on_its_neighbours():
    draws = Draws(seed=1, step=5)
    alone = draws.normal("noise", ["b"], (4, 2, 2))
    together = draws.normal("noise", ["a", "b", "c"], (4, 2, 2))
    assert torch.equal(alone[0], together[1])
    assert torch.equal(draws.uniform("t", ["b"])[0], draws.uniform("t", ["a", "b"])[1])
    assert torch.equal(draws.integers("t", ["b"], 0, 1000)[0], draws.integers("t", ["a", "b"], 0, 1000)[1])


def test_draws_differ_by_seed_step_purpose_and_sample():
    base = Draws(1, 1).normal("noise", ["a"], (8,))
    others = [
        Draws(2, 1).normal("noise", ["a"], (8,)),
        Draws(1, 2).normal("noise", ["a"], (8,)),
        Draws(1, 1).normal("offset", ["a"], (8,)),
        Draws(1, 1).normal("noise", ["b"], (8,)),
    ]
    assert not any(torch.equal(base, other) for other in others)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    keyed("x")
    permutation(10, "y")
    Draws(0, 0).normal("z", ["a"], (3,))
    assert torch.equal(before, torch.get_rng_state())


def test_a_permutation_holds_every_number_once():
    assert sorted(permutation(1000, 3, "order", 0)) == list(range(1000))
    assert permutation(1000, 3, "order", 0) != permutation(1000, 3, "order", 1)
