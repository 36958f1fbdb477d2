"""What the processes of a run agree on: the mean of gradients and statistics, the sum of counts."""

import torch
from torch import nn

from advmoe.training.processes import average_buffers, average_gradients, total


class Beside:
    """Fabric as one of two processes sees it; the other one holds the numbers `theirs`, of all tensors in turn."""

    world_size = 2

    def __init__(self, *theirs):
        self.theirs = torch.tensor(theirs)

    def all_reduce(self, tensor, reduce_op):
        tensor += self.theirs  # in place, as a process group does it
        return tensor if reduce_op == "sum" else tensor / 2


class Alone:
    world_size = 1


def test_gradients_become_their_mean_and_a_missing_one_counts_as_zero():
    used, unused, fixed = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    used.grad, fixed.requires_grad = torch.tensor([1.0, 2.0]), False
    average_gradients(Beside(3.0, 4.0, 5.0, 6.0), [used, unused, fixed])
    assert used.grad.tolist() == [2.0, 3.0] and unused.grad.tolist() == [2.5, 3.0] and fixed.grad is None


def test_statistics_become_their_mean_and_counts_stay():
    mean, batches = torch.tensor([[1.0, 3.0]]), torch.tensor(7)
    average_buffers(Beside(3.0, 3.0), [mean, batches])
    assert mean.tolist() == [[2.0, 3.0]] and batches.item() == 7
    average_buffers(Beside(), [])  # of a network that has none


def test_a_sum_leaves_what_each_one_has():
    mine = torch.tensor([1.0, 2.0])
    assert total(Beside(1.0, 2.0), mine).tolist() == [2.0, 4.0] and mine.tolist() == [1.0, 2.0]


def test_one_process_has_nothing_to_agree_on():
    parameter, buffer = nn.Parameter(torch.zeros(1)), torch.ones(1)
    average_gradients(Alone(), [parameter])
    average_buffers(Alone(), [buffer])
    assert parameter.grad is None and buffer.item() == 1 and total(Alone(), buffer) is buffer


def test_sums_over_processes_leave_what_each_one_has():
    class Two:
        world_size = 2

        def all_reduce(self, tensor, reduce_op):
            return tensor.mul_(2)  # in place, as a process group does it

    mine = torch.tensor([1.0, 2.0])
    assert total(Two(), mine).tolist() == [2.0, 4.0] and mine.tolist() == [1.0, 2.0]
    average_buffers(Two(), [])  # of a network that has none
