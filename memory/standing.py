"""What stays on a card through all steps, allocated before the first of them."""

import torch

from memory.optimizers import create_state


def allocate_standing(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    """Make the optimizer's state and, on a card, the workspaces of matrix products now, and not in the middle of the first step.

    There they would lie between what passes through, and split the room that the caching allocator has reserved: a later step finds
    no place for its largest tensors, and reserves more. Made before, all steps reserve what the first did. Call it when all else that
    stays is in place.
    """
    create_state(optimizer)
    if torch.device(device).type == "cuda":
        x = torch.ones(64, 64, device=device, requires_grad=True)
        (x @ x).sum().backward()  # autograd's thread has a workspace of its own
