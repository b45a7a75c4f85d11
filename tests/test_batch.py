"""Batches on their way to a device."""

import torch

from unifork.batch import together


def test_tensors_travel_as_one_of_each_number_type_and_keep_their_shapes():
    tensors = {
        "ids": torch.arange(6).reshape(2, 3),
        "none": torch.zeros(0, 4, dtype=torch.int64),
        "kinds": torch.arange(4, dtype=torch.int32).reshape(4, 1),
        "codes": torch.arange(24).reshape(2, 3, 4).transpose(0, 1),
    }
    travelled = []

    def move(flat):
        travelled.append((flat.dtype, flat.shape))
        return flat.clone()

    moved = together(tensors, move)
    assert sorted(travelled, key=str) == [(torch.int32, (4,)), (torch.int64, (30,))]
    assert list(moved) == list(tensors)
    for name, value in tensors.items():
        assert torch.equal(moved[name], value), name
        assert moved[name].dtype == value.dtype
